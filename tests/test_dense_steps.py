"""Steps that all ranks count alike: PowerSGD's dense warm-up, schedules of linear compressors, random-k's choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import attach, outcomes, parameters_of, run_ranks, small_net, there_and_back, train_step
from torch import Tensor, nn

import gradcomp
from gradcomp.bucket import Unit
from gradcomp.errors import PacketError, PeerLost
from gradcomp.packet import Kind

EXCHANGES = ["all_reduce", "all_gather", "two_shot", "tree"]
# Matrices large enough for factors and for shards, and what never has factors: a vector, tiny, empty, 0-dim tensors.
SHAPES = [(160, 64), (40, 30), (70,), (2, 2), (0, 5), (), (24, 3, 3, 3)]


def grads_of(rank: int, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def set_gradients(parameters: list[nn.Parameter], grads: list[Tensor | None]) -> None:
    """Gives parameters these gradients through backward, so that hooks run."""
    for parameter in parameters:
        parameter.grad = None
    terms = [(p * g).sum() for p, g in zip(parameters, grads, strict=True) if g is not None]
    torch.stack(terms).sum().backward()


def decoded_steps(transport: Any, spec: str, exchange: str, steps: int, **changes: str) -> list[list[Tensor]]:
    """The sums that every step put into the gradients. ``changes``: compressors to set before a step, as step3=..."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    options = {"exchange": exchange, "reduction": "sum", "bucket_bytes": 8192, "dense": lambda *_: False}
    found = []
    with attach(None, torch.optim.SGD(parameters, lr=0.1), transport, compressor=spec, **options) as sync:
        for step in range(steps):
            if f"step{step}" in changes:
                sync.set_compressor(changes[f"step{step}"])
            set_gradients(parameters, [*grads_of(transport.rank, step)])
            found.append([p.grad.clone() for p in parameters if p.grad is not None])
    return found


def states_of(sync: Any) -> dict[str, dict[str, dict[str, dict[str, Tensor]]]]:
    states: dict[str, dict[str, dict[str, dict[str, Tensor]]]] = sync.state_dict()["states"]
    return states


class TestPowerSGD:
    def test_first_steps_are_exact_and_leave_nothing(self) -> None:
        codec = gradcomp.compressor("powersgd:rank=2,dense_steps=2")
        grad = torch.randn(40, 30)
        state = codec.new_state(grad)
        state["residual"] += torch.randn(1200)
        kinds = []
        for step in range(4):
            whole = state["residual"] + grad.view(-1)
            packet = codec.compress(grad, state)
            kinds.append(packet.kind)
            if step < 2:
                assert torch.equal(codec.decompress(packet), whole)
                assert not state["residual"].any()
        assert kinds == [Kind.DENSE_F32] * 2 + [Kind.FACTORS] * 2
        assert state["random"][1] == 4

    def test_a_step_that_is_not_finite_is_none(self) -> None:
        codec = gradcomp.compressor("powersgd:dense_steps=1")
        state = codec.new_state(torch.zeros(40, 30))
        codec.compress(torch.full((40, 30), torch.nan), state)
        assert codec.compress(torch.ones(40, 30), state).kind == Kind.DENSE_F32
        assert codec.compress(torch.ones(40, 30), state).kind == Kind.FACTORS

    def test_packets_of_the_other_stage_are_refused(self) -> None:
        codec = gradcomp.compressor("powersgd:dense_steps=1")
        grad, out = torch.randn(40, 30), torch.zeros(1200)
        state = codec.new_state(grad)
        early = codec.at(state)
        dense = codec.compress(grad, state)
        late = codec.at(state)
        factors = codec.compress(grad, state)
        for decoder, packet in ((early, factors), (late, dense)):
            with pytest.raises(PacketError, match="expected"):
                decoder.decompress_add(packet, out)
        assert not out.any()
        assert torch.equal(early.decompress(dense), codec.decompress(dense))
        assert torch.equal(late.decompress(factors), codec.decompress(factors))
        vector = codec.new_state(torch.zeros(7))
        assert codec.at(vector).decompress(codec.encode(torch.ones(7), vector)).tolist() == [1.0] * 7

    @pytest.mark.parametrize("exchange", EXCHANGES)
    @pytest.mark.parametrize("rank", [1, 8])
    def test_dense_steps_are_those_of_none_bit_for_bit(self, exchange: str, rank: int) -> None:
        spec = f"powersgd:rank={rank},dense_steps=3"
        found = run_ranks(3, lambda t: decoded_steps(t, spec, exchange, 5))
        exact = run_ranks(3, lambda t: decoded_steps(t, "none", "all_gather", 5))
        for mine, theirs in zip(found, exact, strict=True):
            for step in range(3):
                assert all(torch.equal(a, b) for a, b in zip(mine[step], theirs[step], strict=True))
            assert not torch.equal(mine[4][0], theirs[4][0])

    @pytest.mark.parametrize("exchange", EXCHANGES)
    def test_a_sum_of_no_higher_rank_is_exact(self, exchange: str) -> None:

        def rank_main(transport: Any) -> list[Tensor]:
            weight = nn.Parameter(torch.zeros(400, 200))
            options = {"compressor": "powersgd:rank=8,dense_steps=1", "exchange": exchange, "reduction": "sum"}
            found = []
            with attach(None, torch.optim.SGD([weight], lr=0.1), transport, **options):
                for step in range(4):
                    set_gradients([weight], [of_rank_two(transport.rank, step)])
                    assert weight.grad is not None
                    found.append(weight.grad.clone())
            return found

        def of_rank_two(rank: int, step: int) -> Tensor:
            generator = torch.Generator().manual_seed(10 * step + rank)
            return torch.randn(400, 2, generator=generator) @ torch.randn(2, 200, generator=generator)

        for found in run_ranks(3, rank_main):
            for step, total in enumerate(found):
                expected = sum(of_rank_two(rank, step) for rank in range(3))
                torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("exchange", EXCHANGES)
    def test_a_checkpoint_in_the_midst_of_the_warm_up(self, exchange: str) -> None:
        def rank_main(transport: Any, resumed: bool) -> list[Tensor]:
            net = small_net()
            optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
            options = {"compressor": "powersgd:rank=1,dense_steps=3", "exchange": exchange, "digest_every": 1}
            with attach(net, optimizer, transport, **options) as sync:
                for step in range(2):
                    train_step(net, optimizer, sync.rank, step)
                if resumed:
                    there_and_back(net, optimizer, sync, range(90, 93))
                for step in range(2, 6):
                    train_step(net, optimizer, sync.rank, step)
            return parameters_of(net)

        straight = run_ranks(3, lambda t: rank_main(t, False))
        resumed = run_ranks(3, lambda t: rank_main(t, True))
        for other in (*straight[1:], *resumed):
            assert all(torch.equal(p, q) for p, q in zip(straight[0], other, strict=True))

    @pytest.mark.parametrize("exchange", EXCHANGES)
    def test_nonfinite_steps_are_not_counted_on_any_rank(self, exchange: str) -> None:
        def rank_main(transport: Any) -> None:
            weight = nn.Parameter(torch.zeros(160, 64))
            options = {"compressor": "powersgd:dense_steps=2", "exchange": exchange}
            with attach(None, torch.optim.SGD([weight], lr=0.1), transport, **options) as sync:
                for step in range(5):
                    grad = torch.randn(160, 64)
                    if step == 1 and transport.rank == 2:
                        grad[3, 3] = torch.nan
                    set_gradients([weight], [grad])
                    assert weight.grad is not None
                    assert bool(weight.grad.isfinite().all()) == (step != 1)
                    counted = {
                        int(state["random"][1])
                        for roles in states_of(sync).get("group0.0", {}).values()
                        for state in roles.values()
                    }
                    # Where a message of a rank is not finite an owner may never have been asked for its own state.
                    assert counted == {step + 1 if step < 1 else step}

        run_ranks(3, rank_main)

    @pytest.mark.parametrize("exchange", EXCHANGES)
    def test_set_compressor_begins_with_dense_steps_and_sends_what_was_held_back(self, exchange: str) -> None:
        spec = "powersgd:rank=1,dense_steps=1"
        found = run_ranks(2, lambda t: decoded_steps(t, "randomk:k=5", exchange, 5, step2=spec, step4="none"))
        for steps in found:
            for i in range(len(SHAPES)):
                given = sum(grads_of(rank, step)[i] for rank in range(2) for step in range(3))
                applied = sum(step[i] for step in steps[:3])
                torch.testing.assert_close(applied, given, rtol=1e-4, atol=1e-4)
                everything = sum(grads_of(rank, step)[i] for rank in range(2) for step in range(5))
                torch.testing.assert_close(sum(step[i] for step in steps), everything, rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("rank", [1, 2, 4, 8])
    def test_a_small_net_learns(self, rank: int) -> None:
        def rank_main(transport: Any) -> tuple[float, float]:
            centers = torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
            net = small_net()
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
            losses = []
            options = {"compressor": f"powersgd:rank={rank},dense_steps=5", "exchange": "all_reduce"}
            with attach(net, optimizer, transport, **options) as sync:
                generator = torch.Generator().manual_seed(transport.rank)
                for _ in range(60):
                    targets = torch.randint(0, 10, (32,), generator=generator)
                    inputs = centers[targets] + 0.3 * torch.randn(32, 1, 4, 4, generator=generator)
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(net(inputs), targets)
                    loss.backward()
                    optimizer.step()
                    losses.append(float(sync.average(loss)))
                sync.check_replicas()
            return losses[0], sum(losses[-5:]) / 5

        for first, last in run_ranks(2, rank_main):
            assert last < 0.5 < 2 < first


@pytest.mark.parametrize("exchange", [*EXCHANGES, "auto"])
@pytest.mark.parametrize(
    "spec",
    [
        "powersgd:rank=1,dense_steps=2",
        "randomk:k=40",
        'scheduled:stages=[[2,"none"],[3,"randomk:k=40"]],then="powersgd:rank=1"',
        'scheduled:stages=[[2,"fp16"]],then="topk:k=40"',
    ],
)
def test_ranks_without_a_gradient_do_not_fall_behind(spec: str, exchange: str) -> None:
    """All ranks and owners count the same steps, whoever had a gradient, and nothing is lost."""
    if exchange == "all_reduce" and not gradcomp.compressor(spec).linear:
        pytest.skip("not linear")

    def rank_main(transport: Any) -> tuple[Tensor, Tensor, Tensor, set[int]]:
        weight, other = nn.Parameter(torch.zeros(160, 64)), nn.Parameter(torch.zeros(6))
        optimizer = torch.optim.SGD([weight, other], lr=1.0)
        given = torch.zeros(160, 64)
        options = {"compressor": spec, "exchange": exchange, "reduction": "sum", "digest_every": 1}
        with attach(None, optimizer, transport, **options) as sync:
            for step in range(6):
                grad = None
                if step % 3 != transport.rank and not (step == 4 and transport.rank == 2):
                    grad = torch.randn(160, 64)
                    given += grad
                set_gradients([weight, other], [grad, torch.ones(6)])
                assert weight.grad is not None
                optimizer.step()
            held, counted = torch.zeros(160 * 64), set()
            for span, roles in states_of(sync)["group0.0"].items():
                start, stop = map(int, span.split(":"))
                for state in roles.values():
                    held[start:stop] += state["residual"]
                    counted.add(int(state["step"]) if "step" in state else int(state["random"][1]))
        return given, -weight.detach(), held.view(160, 64), counted

    results = run_ranks(3, rank_main)
    assert all(result[3] == {6} for result in results)
    given = sum(result[0] for result in results)
    torch.testing.assert_close(given, results[0][1] + sum(result[2] for result in results), rtol=0, atol=2e-3)


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
@pytest.mark.parametrize(
    "spec", ["powersgd:dense_steps=3", 'scheduled:stages=[[3,"none"]],then="powersgd"', 'scheduled:stages=[[3,"fp16"]]']
)
def test_a_rank_in_another_stage_is_refused(spec: str, exchange: str) -> None:
    def rank_main(transport: Any) -> None:
        weight = nn.Parameter(torch.zeros(160, 64))
        with attach(None, torch.optim.SGD([weight], lr=0.1), transport, compressor=spec, exchange=exchange) as sync:
            for _ in range(2):
                set_gradients([weight], [torch.randn(160, 64)])
            if transport.rank == 1:
                states = sync.state_dict()
                for roles in states["states"]["group0.0"].values():
                    for state in roles.values():
                        (state["step"] if "step" in state else state["random"][1:]).fill_(3)
                sync.load_state_dict(states)
            set_gradients([weight], [torch.randn(160, 64)])

    errors = outcomes(2, rank_main, timeout_s=5.0)
    assert all(isinstance(error, (PacketError, PeerLost)) for error in errors)
    assert any(isinstance(error, PacketError) for error in errors)


def test_randomk_goes_from_all_gather_to_all_reduce() -> None:
    """One rank once had no gradient; the checkpoint's counters are alike all the same, and choices with them."""

    def rank_main(transport: Any, exchange: str, states: Any) -> Any:
        weight, other = nn.Parameter(torch.zeros(40, 30)), nn.Parameter(torch.zeros(6))
        options = {"compressor": "randomk:k=100", "exchange": exchange, "reduction": "sum"}
        with attach(None, torch.optim.SGD([weight, other], lr=0.1), transport, **options) as sync:
            if states is not None:
                sync.load_state_dict(states[transport.rank])
                before = sum(saved["states"]["group0.0"]["0:1200"]["gradient"]["residual"] for saved in states)
                set_gradients([weight, other], [torch.zeros(40, 30), torch.zeros(6)])
                assert weight.grad is not None
                sent = weight.grad.view(-1) != 0
                assert 0 < int(sent.sum()) <= 100
                torch.testing.assert_close(weight.grad.view(-1)[sent], before[sent])
                return weight.grad.clone()
            for step in range(3):
                grad = None if step == 1 and transport.rank == 0 else torch.ones(40, 30) * (step + 1)
                set_gradients([weight, other], [grad, torch.ones(6)])
            return sync.state_dict()

    saved = run_ranks(2, lambda t: rank_main(t, "all_gather", None))
    first, second = run_ranks(2, lambda t: rank_main(t, "all_reduce", saved))
    assert torch.equal(first, second)


@pytest.mark.parametrize("spec", ["powersgd:dense_steps=2", 'scheduled:stages=[[2,"none"]],then="powersgd"'])
def test_owners_that_are_new_count_what_was_counted(spec: str) -> None:
    """A tensor that is not cut goes from all_gather, which has no owners, to two_shot in the second stage."""

    def rank_main(transport: Any, exchange: str, states: Any) -> Any:
        weight = nn.Parameter(torch.zeros(40, 30))
        with attach(None, torch.optim.SGD([weight], lr=0.1), transport, compressor=spec, exchange=exchange) as sync:
            if states is not None:
                sync.load_state_dict(states[transport.rank])
            for step in range(3):
                set_gradients([weight], [grads_of(transport.rank, step)[1]])
            sync.check_replicas()
            return sync.state_dict()

    saved = run_ranks(2, lambda t: rank_main(t, "all_gather", None))
    for states in run_ranks(2, lambda t: rank_main(t, "two_shot", saved)):
        for state in states["states"]["group0.0"]["0:1200"].values():
            assert int(state["step"] if "step" in state else state["random"][1]) == 6


class TestLinearSchedules:
    SPEC = 'scheduled:stages=[[1,"none"],[3,"randomk:ratio=0.1"]],then="powersgd:rank=1"'

    def test_a_schedule_is_linear_if_all_its_stages_are(self) -> None:
        assert gradcomp.compressor(self.SPEC).linear
        assert gradcomp.compressor('warmup:compressor="randomk:ratio=0.01"').linear
        assert not gradcomp.compressor("scheduled").linear
        assert not gradcomp.compressor("warmup").linear
        with pytest.raises(TypeError, match="'topk' is not linear"):
            gradcomp.compressor("topk").rounds(torch.zeros(3))
        auto = gradcomp.exchange("auto")
        units = [Unit((0,), (2048, 1024), gradcomp.compressor(self.SPEC))]
        assert {piece.owner for piece in auto.cut(units, 4)} == {None}

    def test_a_schedule_with_a_stage_that_is_not_is_refused(self) -> None:
        def rank_main(transport: Any) -> None:
            net = small_net()
            attach(
                net, torch.optim.SGD(net.parameters(), lr=0.1), transport, compressor="warmup", exchange="all_reduce"
            )

        (error,) = outcomes(1, rank_main)
        assert isinstance(error, gradcomp.ConfigError)
        assert "'warmup' is not linear" in str(error)

    @pytest.mark.parametrize("spec", [SPEC, 'warmup:compressor="randomk:ratio=0.05",steps=3'])
    def test_it_is_added_up_and_nothing_is_lost(self, spec: str) -> None:
        def rank_main(transport: Any) -> tuple[list[Tensor], Tensor]:
            weight = nn.Parameter(torch.zeros(40, 30))
            options = {"compressor": spec, "exchange": "all_reduce", "reduction": "sum"}
            found = []
            with attach(None, torch.optim.SGD([weight], lr=0.1), transport, **options) as sync:
                for step in range(6):
                    set_gradients([weight], [grads_of(transport.rank, step)[1]])
                    assert weight.grad is not None
                    found.append(weight.grad.clone())
                state = states_of(sync)["group0.0"]["0:1200"]["gradient"]
                assert int(state["step"]) == 6
                return found, state["residual"].view(40, 30)

        results = run_ranks(3, rank_main)
        given = sum(grads_of(rank, step)[1] for rank in range(3) for step in range(6))
        held = sum(residual for _, residual in results)
        torch.testing.assert_close(sum(results[0][0]) + held, given, rtol=1e-4, atol=1e-4)
        if spec == self.SPEC:
            # The same as powersgd's own dense steps, but for the residual that random-k leaves.
            first = (grads_of(0, 0)[1] + grads_of(1, 0)[1]) + grads_of(2, 0)[1]
            assert torch.equal(results[0][0][0], first)
        for found, _ in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found, results[0][0], strict=True))

    def test_values_that_are_not_finite_stay_out_of_the_residual(self) -> None:
        def rank_main(transport: Any) -> None:
            weight = nn.Parameter(torch.zeros(40, 30))
            options = {"compressor": 'scheduled:stages=[[9,"none"]],then="powersgd"', "exchange": "all_reduce"}
            with attach(None, torch.optim.SGD([weight], lr=0.1), transport, **options) as sync:
                grad = torch.randn(40, 30)
                set_gradients([weight], [torch.where(grad > 2, torch.inf, grad) if transport.rank else grad])
                assert weight.grad is not None
                assert not weight.grad.isfinite().all()
                state = states_of(sync)["group0.0"]["0:1200"]["gradient"]
                assert not state["residual"].any()
                assert int(state["step"]) == 0

        run_ranks(2, rank_main)
