"""All-reduce of linear compressors: rounds, sums in rank order, and what the engine makes of them."""

from __future__ import annotations

import io
import struct
from collections.abc import Generator
from typing import Any

import pytest
import torch
from ranks import attach, outcomes, parameters_of, run_ranks, small_net, there_and_back, train_step
from torch import Tensor, nn

import gradcomp
from gradcomp.errors import ConfigError, PacketError
from gradcomp.interfaces import Incoming, Slot
from gradcomp.rounds import Rounds, alone, join

LINEAR = ["none", "randomk:ratio=0.1", "randomk:ratio=0.1,unbiased=true", "powersgd", "powersgd:rank=1"]
WITH_RESIDUAL = ["randomk:ratio=0.1", "powersgd", "powersgd:rank=1"]


def finished(transport: Any, steps: Generator[Any, None, Tensor]) -> Tensor:
    """What a coroutine that waits for messages returns."""
    awaited: list[Incoming] = []
    while True:
        try:
            awaited = list(next(steps))
        except StopIteration as end:
            result: Tensor = end.value
            return result
        transport.wait(awaited)


def saved(sync: Any) -> bytes:
    torch.save(sync.state_dict()["states"], file := io.BytesIO())
    return file.getvalue()


def set_gradients(parameters: list[nn.Parameter], grads: list[Tensor]) -> None:
    """Gives parameters these gradients through backward, so that hooks run."""
    for parameter in parameters:
        parameter.grad = None
    sum((p * g).sum() for p, g in zip(parameters, grads, strict=True)).backward()  # type: ignore[union-attr]


class TestSums:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 4])
    @pytest.mark.parametrize("numel", [0, 1, 2, 3, 1000])
    def test_one_trip_and_two_give_the_same_bits_on_all_ranks(self, world_size: int, numel: int) -> None:
        def vector(rank: int) -> Tensor:
            return torch.randn(numel, generator=torch.Generator().manual_seed(rank)) * 10.0**rank

        def rank_main(transport: Any) -> list[Tensor]:
            transport.connect({}, max_message_bytes=4 * numel + 64)
            mine = vector(transport.rank)
            before = mine.clone()
            slots = Slot(0, 0, 0), Slot(0, 0, 2)
            found = [
                finished(transport, transport.all_reduce(slot, mine, one_trip=one_trip))
                for slot, one_trip in zip(slots, (True, False), strict=True)
            ]
            assert torch.equal(mine, before)
            # Nobody leaves while others still read.
            transport.all_gather(Slot(1, 0, 0), b"done")
            return found

        expected = vector(0)
        for rank in range(1, world_size):
            expected = expected + vector(rank)
        for found in run_ranks(world_size, rank_main):
            assert all(torch.equal(total, expected) for total in found)

    def test_bytes_sent(self) -> None:
        def rank_main(transport: Any) -> list[int]:
            transport.connect({}, max_message_bytes=5000)
            mine, sent = torch.ones(1200), []
            for stage, one_trip in ((0, True), (2, False)):
                before = transport.bytes_sent
                finished(transport, transport.all_reduce(Slot(0, 0, stage), mine, one_trip=one_trip))
                sent.append(transport.bytes_sent - before)
            transport.all_gather(Slot(1, 0, 0), b"done")
            return sent

        for sent in run_ranks(4, rank_main):
            assert sent == [3 * 4800, 2 * 3 * 1200]

    def test_a_part_of_another_length_is_refused(self) -> None:
        def rank_main(transport: Any) -> Any:
            transport.connect({}, max_message_bytes=100)
            mine = torch.ones(3 if transport.rank else 4)
            return finished(transport, transport.all_reduce(Slot(0, 0, 0), mine, one_trip=True))

        for error in outcomes(2, rank_main, timeout_s=5.0):
            assert isinstance(error, (PacketError, gradcomp.PeerLost))


class TestRounds:
    @staticmethod
    def echo(values: list[float], times: int) -> Rounds[float]:
        part = torch.tensor(values)
        for _ in range(times):
            part = yield part
        return float(part.sum())

    def test_what_is_in_the_same_round_is_one_vector(self) -> None:
        joined = join([self.echo([1.0], 2), self.echo([2.0, 3.0], 1), self.echo([], 0), self.echo([4.0], 3)])
        assert next(joined).tolist() == [1, 2, 3, 4]
        assert joined.send(torch.tensor([10.0, 20.0, 30.0, 40.0])).tolist() == [10, 40]
        assert joined.send(torch.tensor([100.0, 400.0])).tolist() == [400]
        with pytest.raises(StopIteration) as end:
            joined.send(torch.tensor([4000.0]))
        assert end.value.value == [100, 50, 0, 4000]

    def test_alone_every_sum_is_what_was_added(self) -> None:
        assert alone(self.echo([1.0, 2.0], 5)) == 3
        assert alone(join([])) == []


@pytest.mark.parametrize("spec", ["topk", "onebit", "fp16", "threshold", "dct"])
def test_what_is_not_linear_is_refused_by_name(spec: str) -> None:
    def rank_main(transport: Any) -> None:
        net = small_net()
        attach(net, torch.optim.SGD(net.parameters(), lr=0.1), transport, compressor=spec, exchange="all_reduce")

    (error,) = outcomes(1, rank_main)
    assert isinstance(error, ConfigError)
    for word in (spec, "not linear", "all_gather", "two_shot", "auto"):
        assert word in str(error)


@pytest.mark.parametrize(
    ("exchange", "world_size"),
    [
        *((exchange, ranks) for exchange in ("all_reduce", "all_reduce:trip_bytes=0") for ranks in (2, 3, 4)),
        *((exchange, 3) for exchange in ("all_gather", "two_shot", "tree", "auto")),
    ],
)
@pytest.mark.parametrize("spec", ["randomk:ratio=0.1", "randomk:ratio=0.1,unbiased=true", "powersgd"])
def test_replicas_stay_bit_identical(spec: str, exchange: str, world_size: int) -> None:
    def rank_main(transport: Any) -> list[Tensor]:
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 320), nn.ReLU(), nn.Linear(320, 10))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        with attach(net, optimizer, transport, compressor=spec, exchange=exchange, bucket_bytes=16384) as sync:
            for step in range(4):
                train_step(net, optimizer, sync.rank, step)
            sync.check_replicas()
        return parameters_of(net)

    first, *others = run_ranks(world_size, rank_main)
    assert all(p.isfinite().all() for p in first)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("exchange", ["all_reduce", "all_reduce:trip_bytes=0"])
def test_none_is_the_sum_in_rank_order(exchange: str) -> None:
    def grads(rank: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(rank)
        return [torch.randn(shape, generator=generator) for shape in ((33, 7), (5,), (4, 3, 2, 2))]

    def rank_main(transport: Any) -> list[Any]:
        parameters = [nn.Parameter(torch.zeros_like(grad)) for grad in grads(0)]
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        with attach(None, optimizer, transport, compressor="none", exchange=exchange, reduction="sum"):
            set_gradients(parameters, grads(transport.rank))
        return [p.grad for p in parameters]

    expected = [(a + b) + c for a, b, c in zip(grads(0), grads(1), grads(2), strict=True)]
    for found in run_ranks(3, rank_main):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("exchange", ["all_reduce", "all_gather", "two_shot", "tree", "auto"])
@pytest.mark.parametrize("spec", WITH_RESIDUAL)
def test_what_is_not_applied_is_held_back(spec: str, exchange: str) -> None:
    """Sum of all gradients == sum of all that was applied + all residuals."""

    def rank_main(transport: Any) -> tuple[Tensor, Tensor, Tensor]:
        weight = nn.Parameter(torch.zeros(160, 64))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        given = torch.zeros(160, 64)
        generator = torch.Generator().manual_seed(transport.rank)
        sync = attach(None, optimizer, transport, compressor=spec, exchange=exchange, reduction="sum")
        for _ in range(8):
            gradient = 0.01 * torch.randn(160, 64, generator=generator)
            given += gradient
            optimizer.zero_grad()
            (weight * gradient).sum().backward()
            optimizer.step()
        held = torch.zeros(160 * 64)
        for span, roles in sync.state_dict()["states"]["group0.0"].items():
            start, stop = map(int, span.split(":"))
            for state in roles.values():
                held[start:stop] += state["residual"]
        sync.close()
        return given, -weight.detach(), held.view(160, 64)

    results = run_ranks(3, rank_main)
    given = sum(result[0] for result in results)
    held = sum(result[2] for result in results)
    torch.testing.assert_close(given, results[0][1] + held, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", ["randomk:ratio=0.1", "randomk:ratio=0.1,unbiased=true", "powersgd"])
@pytest.mark.parametrize(("where", "what"), [("0.weight", "nan"), ("4.weight", "inf"), ("6.bias", "-inf")])
def test_nonfinite_on_one_rank(spec: str, where: str, what: str) -> None:
    """Every rank sees it, whatever is random or low-rank, dense or not, and no state moves anywhere."""
    value = float(what)

    def rank_main(transport: Any) -> None:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
        with attach(net, optimizer, transport, compressor=spec, exchange="all_reduce") as sync:
            for step in range(2):
                train_step(net, optimizer, sync.rank, step)
            before = saved(sync)
            spoiled = dict(net.named_parameters())[where]
            handle = spoiled.register_hook(lambda g: torch.where(torch.arange(g.numel()).view_as(g) == 3, value, g))
            if sync.rank != 1:
                handle.remove()
            optimizer.zero_grad()
            net(torch.ones(2, 1, 4, 4)).sum().backward()
            assert spoiled.grad is not None
            assert not spoiled.grad.isfinite().all()
            assert saved(sync) == before
            assert sync.stats()["nonfinite_steps"] == 1
            handle.remove()
            for step in range(3, 5):
                train_step(net, optimizer, sync.rank, step)
            assert all(p.isfinite().all() for p in net.parameters())
            sync.check_replicas()

    run_ranks(3, rank_main)


@pytest.mark.parametrize("spec", LINEAR)
def test_a_parameter_used_on_some_ranks_or_none(spec: str) -> None:
    """A rank without a gradient adds zeros and stays in step with the others; nobody has one, nobody gets one."""

    def rank_main(transport: Any) -> None:
        some, nobodys, bias = (nn.Parameter(torch.ones(shape)) for shape in ((40, 30), (40, 30), (6,)))
        optimizer = torch.optim.SGD([some, nobodys, bias], lr=0.1)
        with attach(None, optimizer, transport, compressor=spec, exchange="all_reduce", bucket_bytes=1 << 20) as sync:
            for step in range(4):
                optimizer.zero_grad()
                used = bias.sum() + some.sum() * (step + 1) if sync.rank != step % 3 else bias.sum()
                used.backward()
                assert nobodys.grad is None
                assert some.grad is not None
                assert torch.equal(bias.grad, torch.ones(6)) if bias.grad is not None else False
                optimizer.step()
            sync.check_replicas()
            states = sync.state_dict()["states"]
            assert set(states) <= {"group0.0", "group0.1"}
            if spec != "none" and "unbiased" not in spec:
                assert not states["group0.1"]["0:1200"]["gradient"]["residual"].any()
                assert states["group0.1"]["0:1200"]["gradient"]["random"][1] == 0
                assert states["group0.0"]["0:1200"]["gradient"]["random"][1] == 4

    run_ranks(3, rank_main)


@pytest.mark.parametrize("spec", ["randomk:ratio=0.1", "powersgd"])
def test_state_dict_restores_a_run_bit_for_bit(spec: str) -> None:
    def rank_main(transport: Any, resumed: bool) -> list[Tensor]:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
        with attach(net, optimizer, transport, compressor=spec, exchange="all_reduce") as sync:
            for step in range(3):
                train_step(net, optimizer, sync.rank, step)
            if resumed:
                there_and_back(net, optimizer, sync, range(9, 10))
            for step in range(3, 6):
                train_step(net, optimizer, sync.rank, step)
        return parameters_of(net)

    straight = run_ranks(3, lambda t: rank_main(t, False))
    resumed = run_ranks(3, lambda t: rank_main(t, True))
    for a, b in zip(straight, resumed, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("spec", "floats"),
    [("none", 1200 + 6), ("randomk:k=50", 50 + 6), ("powersgd:rank=3", 3 * 70 + 6), ("powersgd:rank=30", 1200 + 6)],
)
def test_bytes_on_the_wire(spec: str, floats: int) -> None:
    """What is sent: a float a value, and one a parameter for how many ranks have a gradient. No heads, no indices."""

    def rank_main(transport: Any, exchange: str) -> tuple[int, int]:
        weight, bias = nn.Parameter(torch.ones(40, 30)), nn.Parameter(torch.ones(6))
        optimizer = torch.optim.SGD([weight, bias], lr=0.1)
        options = {"compressor": spec, "exchange": exchange, "bucket_bytes": 1 << 20, "digest_every": 0}
        with attach(None, optimizer, transport, **options) as sync:
            before = transport.bytes_sent
            (weight * torch.randn(40, 30)).sum().backward(retain_graph=False)
            return transport.bytes_sent - before, sync.stats()["packet_bytes"]

    for sent, packet_bytes in run_ranks(4, lambda t: rank_main(t, "all_reduce")):
        assert packet_bytes == 4 * (floats + 2)
        assert sent == 3 * packet_bytes
    shares = run_ranks(4, lambda t: rank_main(t, "all_reduce:trip_bytes=0"))
    # Parts differ by one element at most, in each trip of each round.
    for sent, packet_bytes in shares:
        assert abs(sent - 2 * 3 * packet_bytes / 4) <= 2 * 2 * 3 * 4


def test_tensors_of_a_bucket_share_rounds_and_a_transport_may_add_up_by_itself() -> None:
    def rank_main(transport: Any) -> list[tuple[Slot, int]]:
        calls: list[tuple[Slot, int]] = []
        own = transport.all_reduce

        def watched(slot: Slot, mine: Tensor, *, one_trip: bool) -> Any:
            calls.append((slot, mine.numel()))
            return own(slot, mine, one_trip=one_trip)

        transport.all_reduce = watched
        parameters = [nn.Parameter(torch.ones(shape)) for shape in ((40, 30), (50, 20), (6,), (8, 9))]
        options = {"compressor": "powersgd:rank=1", "exchange": "all_reduce", "bucket_bytes": 1 << 20}
        with attach(None, torch.optim.SGD(parameters, lr=0.1), transport, **options):
            set_gradients(parameters, [torch.ones_like(p) for p in parameters])
        return calls

    for calls in run_ranks(3, rank_main):
        assert [numel for _, numel in calls] == [4 + 40 + 50 + 8 + 6, 30 + 20 + 9]
        assert [(slot.bucket, slot.stage) for slot, _ in calls] == [(0, 0), (0, 2)]


def test_auto_adds_up_from_three_ranks_on() -> None:
    from gradcomp.bucket import Unit

    auto = gradcomp.exchange("auto")

    def cut(specs: list[str], world_size: int) -> set[int | None]:
        units = [Unit((i,), (2048, 1024), gradcomp.compressor(spec)) for i, spec in enumerate(specs)]
        return {piece.owner for piece in auto.cut(units, world_size)}

    assert cut(["powersgd", "none"], 4) == {None}
    assert cut(["none"], 4) == {0, 1, 2, 3}
    assert cut(["fp16", "powersgd"], 4) == {0, 1, 2, 3}

    def rank_main(transport: Any) -> tuple[float, int]:
        weight = nn.Parameter(torch.ones(400, 300))
        with attach(None, torch.optim.SGD([weight], lr=0.1), transport, compressor="powersgd:rank=1") as sync:
            before = transport.bytes_sent
            weight.sum().backward()
            return sync.stats()["packet_bytes"], transport.bytes_sent - before

    # Sums carry no packet heads: 700 floats and a count. A packet has 48 bytes more, a message a head.
    assert {packet_bytes for packet_bytes, _ in run_ranks(3, rank_main)} == {4 * 701}
    assert {packet_bytes for packet_bytes, _ in run_ranks(2, rank_main)} == {4 * 700 + 48}


class TestRandomK:
    def test_all_ranks_choose_the_same_and_another_choice_every_step(self) -> None:
        codec = gradcomp.compressor("randomk:k=20")
        grads = [torch.randn(1000) for _ in range(2)]
        states = [codec.new_state(grad) for grad in grads]
        for rank, state in enumerate(states):
            codec.seed_state(state, parameter="w", rank=rank)
        seen = set()
        for _ in range(5):
            packets = [codec.compress(grad, state) for grad, state in zip(grads, states, strict=True)]
            sent = [codec.decompress(packet).nonzero().view(-1) for packet in packets]
            assert torch.equal(*sent)
            assert len(sent[0]) == 20
            seen.add(tuple(sent[0].tolist()))
        assert len(seen) == 5
        other = codec.new_state(grads[0])
        codec.seed_state(other, parameter="v", rank=0)
        assert tuple(codec.decompress(codec.compress(grads[0], other)).nonzero().view(-1).tolist()) not in seen

    @pytest.mark.parametrize(("numel", "k"), [(10, 3), (1000, 7), (64, 64), (5, 100), (1, 1)])
    def test_every_element_has_its_turn(self, numel: int, k: int) -> None:
        codec = gradcomp.compressor(f"randomk:k={k},unbiased=true")
        grad = torch.ones(numel)
        state = codec.new_state(grad)
        total = torch.zeros(numel)
        for _ in range(300):
            total += codec.decompress(codec.compress(grad, state))
        assert total.mean() / 300 == pytest.approx(1.0)
        assert (total / 300 - 1).abs().max() < 6 * (max(numel / k, 1) / 300) ** 0.5

    def test_sent_values_are_exact_and_leave_nothing(self) -> None:
        codec = gradcomp.compressor("randomk:k=10")
        grad = torch.randn(1000)
        state = codec.new_state(grad)
        packet = codec.compress(grad, state)
        decoded = codec.decompress(packet)
        sent = decoded != 0
        assert packet.nbytes == 32 + 16 + 40
        assert torch.equal(decoded[sent], grad[sent])
        assert torch.equal(state["residual"], torch.where(sent, 0.0, grad))

    def test_what_overflows_when_scaled_is_the_largest_there_is(self) -> None:
        codec = gradcomp.compressor("randomk:k=1,unbiased=true")
        assert codec.decompress(codec.encode(torch.full((1000,), -1e38))).min() == torch.finfo(torch.float32).min

    def test_a_packet_names_its_key_and_step(self) -> None:
        codec = gradcomp.compressor("randomk:k=10")
        state = codec.new_state(torch.zeros(100))
        state["random"].copy_(torch.tensor([-1, 3]))
        packet = codec.encode(torch.ones(100), state)
        assert struct.unpack_from("<QQ", packet.to_bytes(), 32) == (2**64 - 1, 3)
        assert torch.equal(gradcomp.compressor("randomk:seed=7").decompress(packet), codec.decompress(packet))


def test_half_precision_gradients() -> None:
    def rank_main(transport: Any) -> None:
        weight = nn.Parameter(torch.zeros(40, 30, dtype=torch.bfloat16))
        bias = nn.Parameter(torch.zeros(30, dtype=torch.float16))
        optimizer = torch.optim.SGD([weight, bias], lr=1.0)
        with attach(None, optimizer, transport, compressor="powersgd", exchange="all_reduce") as sync:
            (weight.sum() * (sync.rank + 1) + bias.sum()).backward()
            assert weight.grad is not None
            assert bias.grad is not None
            assert (weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float16)
            torch.testing.assert_close(weight.grad, torch.full_like(weight, 2))
            assert torch.equal(bias.grad, torch.ones_like(bias))

    run_ranks(3, rank_main)
