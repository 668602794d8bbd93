"""``overlap="forward"``: the same bits as the plain order, with the next forward pass begun before the last bucket."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import attach, batch, parameters_of, run_ranks, small_net, train_step
from test_optimizers import CASES, build
from torch import Tensor, nn
from training import Branches, Tied, filled, noise, zmq_world

import gradcomp
from gradcomp.interfaces import Slot
from gradcomp.replicas import VERDICT_BUCKET
from gradcomp.testing_transport import run_ranks as run_on
from gradcomp.transports.inproc import InprocTransport
from gradcomp.transports.torch_distributed import GlooTransport

STEPS = 5


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    return [torch.as_tensor(value) for state in states for _, value in sorted(state.items()) if value is not None]


def loop(
    transport: Any,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    steps: int = STEPS,
    **options: Any,
) -> dict[str, Any]:
    """Train; what is left on this rank."""
    net = small_net()
    optimizer = make(net)
    with attach(net, optimizer, transport, digest_every=2, **options) as sync:
        schedule = scheduler(optimizer) if scheduler is not None else None
        for step in range(steps):
            inputs, targets = batch(transport.rank, step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), targets).backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
        states = sync.state_dict()["states"]
    return {"parameters": parameters_of(net), "optimizer": optimizer_state(optimizer), "states": states}


def flat(found: Any) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    values = [found[key] for key in sorted(found)] if isinstance(found, dict) else found
    return [tensor for value in values for tensor in flat(value)]


def same_bits(one: Any, other: Any) -> None:
    first, second = flat(one), flat(other)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))


Scenario = Callable[[Any, str], Any]


def both(world_size: int, scenario: Scenario) -> list[Any]:
    """What every rank returns in the plain order, after checking that it is the same the other way."""
    plain = run_ranks(world_size, lambda transport: scenario(transport, "backward"))
    same_bits(plain, run_ranks(world_size, lambda transport: scenario(transport, "forward")))
    return plain


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


COMPRESSORS = ["none", "fp16", "threshold:tau=1e-3", "onebit", "topk:ratio=0.1", "powersgd:rank=2", "factors"]


# Of the exchanges auto chooses all_gather and, for powersgd, all_reduce.
@pytest.mark.parametrize("exchange", ["auto", "two_shot"])
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_parameters_states_and_residuals_are_those_of_the_plain_order(compressor: str, exchange: str) -> None:
    both(3, lambda transport, overlap: loop(transport, sgd, overlap=overlap, compressor=compressor, exchange=exchange))


@pytest.mark.parametrize(("name", "how"), CASES)
def test_any_optimizer(name: str, how: str) -> None:
    def scenario(transport: Any, overlap: str) -> Any:
        return loop(transport, lambda net: build(name, how, net), overlap=overlap, compressor="onebit", steps=3)

    both(2, scenario)


def cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)  # momentum, too


def halve(optimizer: torch.optim.Optimizer) -> Any:
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])  # changed in place
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


@pytest.mark.parametrize("scheduler", [cycle, halve])
def test_schedulers_change_the_options_of_later_steps_only(scheduler: Any) -> None:
    def adamw(net: nn.Module) -> torch.optim.Optimizer:
        layers = list(net.children())
        groups = [
            {"params": layers[0].parameters(), "weight_decay": 0.1},
            {"params": nn.Sequential(*layers[1:]).parameters()},
        ]
        return torch.optim.AdamW(groups, lr=1e-3)

    both(2, lambda transport, overlap: loop(transport, adamw, scheduler=scheduler, overlap=overlap))


# Other loops.


def trained(
    transport: Any, overlap: str, body: Callable[..., Any], net: nn.Module | None = None, **options: Any
) -> Any:
    """``body(net, optimizer, sync)``, and what is left; its own result, if it has one, too."""
    net = small_net() if net is None else net
    optimizer = sgd(net)
    with attach(net, optimizer, transport, **({"digest_every": 1, "overlap": overlap} | options)) as sync:
        found = body(net, optimizer, sync)
        states = sync.state_dict()["states"]
    return [parameters_of(net), optimizer_state(optimizer), states, [] if found is None else found]


def one_step(net: nn.Module, optimizer: Any, rank: int, step: int, factor: float = 1.0) -> None:
    inputs, targets = batch(rank, step)
    optimizer.zero_grad()
    (factor * nn.functional.cross_entropy(net(inputs), targets)).backward()
    optimizer.step()


def test_layers_that_some_ranks_or_none_use() -> None:
    def body(net: Any, optimizer: Any, sync: Any) -> None:
        net.stem.bias.requires_grad_(False)
        for step in range(STEPS):
            optimizer.zero_grad()
            net(noise(sync.rank, step, 6, 12), (sync.rank + step) % 2).square().mean().backward()
            optimizer.step()
            net.stem.bias.requires_grad_(step % 2 == 0)

    both(3, lambda transport, overlap: trained(transport, overlap, body, filled(Branches())))


def test_modules_whose_parameters_are_used_without_calling_them() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.tied = Tied()

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.as_tensor(self.tied.decoder(self.block(inputs)))

    def body(net: Any, optimizer: Any, sync: Any) -> Any:
        losses = []
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = net(noise(sync.rank, step, 2, 3, 8)).square().mean()
            loss.backward()
            optimizer.step()
            net.eval()
            with torch.no_grad():  # a path of its own that calls nothing inside
                losses += [loss.detach(), net(noise(9, step, 2, 3, 8))]
            net.train()
        return losses

    both(2, lambda transport, overlap: trained(transport, overlap, body, filled(Attention())))


def test_gradients_that_are_accumulated_without_an_exchange() -> None:
    def body(net: Any, optimizer: Any, sync: Any) -> None:
        for step in range(STEPS):
            optimizer.zero_grad()
            with sync.no_sync():
                nn.functional.cross_entropy(net(batch(sync.rank, step)[0]), batch(sync.rank, step)[1]).backward()
            nn.functional.cross_entropy(net(batch(sync.rank, 50 + step)[0]), batch(sync.rank, step)[1]).backward()
            optimizer.step()

    both(2, lambda transport, overlap: trained(transport, overlap, body))


def test_two_passes_for_one_step() -> None:
    def body(net: Any, optimizer: Any, sync: Any) -> None:
        for step in range(STEPS):
            optimizer.zero_grad()
            for turn in range(2):
                nn.functional.cross_entropy(net(batch(sync.rank, turn)[0]), batch(sync.rank, step)[1]).backward()
            optimizer.step()

    both(2, lambda transport, overlap: trained(transport, overlap, body))


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot"])
@pytest.mark.parametrize("factor", [float("nan"), 3e37])
def test_a_step_that_is_not_finite_leaves_residuals_alone(factor: float, exchange: str) -> None:
    def body(net: Any, optimizer: Any, sync: Any) -> Any:
        for step in range(3):
            one_step(net, optimizer, sync.rank, step)
        # Of one rank; or finite on each, and only their sum is not.
        one_step(net, optimizer, sync.rank, 3, factor if sync.rank or factor == factor else 1.0)
        sync.wait()
        return [torch.tensor(sync.stats()["nonfinite_steps"])]

    options = {"exchange": exchange, "reduction": "sum", "digest_every": 0}
    found = both(4, lambda transport, overlap: trained(transport, overlap, body, **options))
    if factor != factor:
        assert all(rank[-1][0] == 1 for rank in found)


class Steep(nn.Module):
    """A matrix that is compressed, and a vector that is not, whose gradient is ``slope``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5))

    def forward(self, inputs: Tensor, slope: float) -> Tensor:
        return (self.weight @ inputs).square().sum() + self.weight.sum() + slope * self.bias.sum()


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot"])
@pytest.mark.parametrize(("slope", "finite"), [(1.0, True), (1e38, True), (2e38, False)])
def test_values_that_only_their_sum_takes_to_infinity(slope: float, finite: bool, exchange: str) -> None:
    def body(net: Any, optimizer: Any, sync: Any) -> Any:
        for step in range(3):
            optimizer.zero_grad()
            net(noise(sync.rank, step, 3), slope if step == 1 else 0.0).backward()
            optimizer.step()
        sync.wait()
        assert sync.stats()["nonfinite_steps"] == (not finite)

    options = {"exchange": exchange, "reduction": "sum", "digest_every": 0, "bucket_bytes": 32}
    both(2, lambda transport, overlap: trained(transport, overlap, body, Steep(), **options))


def test_gradients_that_are_not_changed_may_be_dropped_or_used_twice() -> None:
    def body(net: Any, optimizer: Any, sync: Any) -> None:
        for step in range(STEPS):
            inputs, targets = batch(sync.rank, step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), targets).backward()
            if step % 2:
                optimizer.zero_grad()  # this step is not taken
            else:
                optimizer.step()

    both(2, lambda transport, overlap: trained(transport, overlap, body))


def test_waiting_before_the_step_gives_the_exchanged_gradients() -> None:
    def body(net: Any, optimizer: Any, sync: Any) -> Any:
        norms = []
        for step in range(STEPS):
            inputs, targets = batch(sync.rank, step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), targets).backward()
            if step % 2:
                sync.wait()
                norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.5))
            optimizer.step()
        return norms

    both(2, lambda transport, overlap: trained(transport, overlap, body))


def test_what_is_saved_loaded_or_changed_in_between_is_finished() -> None:
    def body(net: Any, optimizer: Any, sync: Any) -> Any:
        found: list[Any] = []
        for step in range(8):
            one_step(net, optimizer, sync.rank, step)
            if step == 0:
                found.append(copy.deepcopy(net[4].state_dict()))
            elif step == 1:
                state = copy.deepcopy(optimizer.state_dict())
                found.append([row["momentum_buffer"] for row in state["state"].values()])
            elif step == 2:
                found.append(sync.state_dict()["states"])
            elif step == 3:
                sync.set_compressor("onebit")
            elif step == 4:
                optimizer.load_state_dict(state)
            elif step == 5:
                net.load_state_dict({key: value + 0.01 for key, value in small_net().state_dict().items()})
            elif step == 6:
                found.append(sync.average(net[4].weight))
                sync.check_replicas()
            else:
                with torch.inference_mode():
                    found.append(net(batch(0, 0)[0]).clone())
        return found

    both(2, lambda transport, overlap: trained(transport, overlap, body))


def test_the_first_state_may_be_made_in_inference_mode_and_under_autocast() -> None:
    def body(net: Any, optimizer: Any, sync: Any) -> None:
        for step in range(STEPS):
            inputs, targets = batch(sync.rank, step)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(net(inputs), targets)
            loss.backward()
            optimizer.step()
            with torch.inference_mode():
                net(inputs)

    both(
        2,
        lambda transport, overlap: trained(transport, overlap, body, compressor="powersgd:rank=1", buffers="broadcast"),
    )


def test_parameters_that_come_later() -> None:
    def scenario(transport: Any, overlap: str) -> Any:
        net = small_net()
        optimizer = torch.optim.SGD([*net[0].parameters(), *net[4].parameters()], lr=0.1, momentum=0.9)
        with attach(net, optimizer, transport, overlap=overlap, digest_every=1) as sync:
            for step in range(4):
                one_step(net, optimizer, sync.rank, step)
                if step == 1:
                    optimizer.add_param_group({"params": list(net[6].parameters()), "lr": 0.05})
        return parameters_of(net)

    both(2, scenario)


def test_after_detaching_training_goes_on_from_finished_parameters() -> None:
    def scenario(transport: Any, overlap: str) -> Any:
        net = small_net()
        optimizer = sgd(net)
        sync = attach(net, optimizer, transport, overlap=overlap)
        one_step(net, optimizer, transport.rank, 0)
        sync.detach()
        one_step(net, optimizer, transport.rank, 1)
        return parameters_of(net)

    both(2, scenario)


# What is refused.


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": None}, "without model="),
        ({"when": "step"}, "when='step'"),
        ({"scaler": torch.amp.GradScaler("cpu")}, "with a scaler"),
        ({"transport": None, "exchange": "hierarchical:local=inproc,ranks_per_host=1"}, "hosts as levels"),
        ({"overlap": "sideways"}, "overlap='sideways'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(change: dict[str, Any], match: str) -> None:
    net = small_net()
    options = {"model": net, "overlap": "forward", "transport": "inproc"} | change
    with pytest.raises(gradcomp.ConfigError, match=match):
        gradcomp.attach(sgd(net), **options)


def test_optimizers_that_couple_parameters_are_refused() -> None:
    class Mine(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None: ...

    net = small_net()
    for optimizer in (torch.optim.LBFGS(net.parameters()), Mine(net.parameters(), {})):
        with pytest.raises(gradcomp.ConfigError, match=f"with {type(optimizer).__name__}"):
            gradcomp.attach(optimizer, model=net, overlap="forward", transport="inproc")


@pytest.mark.parametrize("wrong", ["clip", "closure", "again"])
def test_a_loop_that_would_go_wrong_is_stopped(wrong: str) -> None:
    def body(transport: Any) -> None:
        net = small_net()
        optimizer = sgd(net)
        attach(net, optimizer, transport, overlap="forward")
        inputs, targets = batch(transport.rank, 0)
        losses = [nn.functional.cross_entropy(net(inputs), targets) for _ in range(2)]
        losses[0].backward()
        if wrong == "again":
            with pytest.raises(gradcomp.errors.GradientError, match=r"before optimizer\.step"):
                losses[1].backward()
        elif wrong == "clip":
            nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
            with pytest.raises(gradcomp.errors.GradientError, match="was changed between"):
                optimizer.step()
        else:
            with pytest.raises(gradcomp.ConfigError, match="takes no closure"):
                optimizer.step(lambda: 0.0)

    run_ranks(1, body)


def test_a_parameter_that_was_used_too_early_is_noticed() -> None:
    class Sly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 4)

        def forward(self, inputs: Tensor, *, call: bool) -> Tensor:
            hidden = self.first(inputs)
            return torch.as_tensor(
                self.second(hidden) if call else nn.functional.linear(hidden, self.second.weight, self.second.bias)
            )

    def body(transport: Any) -> None:
        net = filled(Sly())
        optimizer = sgd(net)
        attach(net, optimizer, transport, overlap="forward", bucket_bytes=400)
        for call in (True, True, False):
            optimizer.zero_grad()
            loss = net(noise(0, 0, 6, 12), call=call).square().mean()
            if call:
                loss.backward()
                optimizer.step()
        with pytest.raises(gradcomp.errors.GradientError, match=r"'second.* was used before it was stepped"):
            loss.backward()

    run_ranks(1, body)


def test_all_ranks_must_overlap_alike() -> None:
    def body(transport: Any) -> None:
        net = small_net()
        with pytest.raises(gradcomp.HandshakeError, match="differ in overlap"):
            attach(net, sgd(net), transport, overlap=["forward", "backward"][transport.rank])

    run_ranks(2, body)


# Overlap, and its end.


class Withholding(InprocTransport):
    """Keeps messages of some buckets back until it is told to send them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.keeps: Callable[[Slot], bool] = lambda slot: False
        self._kept: list[tuple[int, Slot, bytes]] = []

    def send(self, peer: int, slot: Slot, parts: Any) -> None:
        if self.keeps(slot):
            self._kept.append((peer, slot, b"".join(parts)))
        else:
            super().send(peer, slot, parts)

    def release(self) -> None:
        kept, self._kept = self._kept, []
        for peer, slot, data in kept:
            super().send(peer, slot, [data])


@pytest.mark.parametrize("compressor", ["none", "threshold"])
def test_forward_begins_before_the_last_bucket_is_here(compressor: str) -> None:
    def body(transport: Any) -> list[Tensor]:
        net = small_net()
        optimizer = sgd(net)
        with attach(net, optimizer, transport, overlap="forward", compressor=compressor) as sync:
            transport.keeps = lambda slot: slot.bucket == 0
            # The last layer's gradients are sent only once the first layer of the next pass was computed.
            net[0].register_forward_hook(lambda *_: transport.release())
            for step in range(3):
                train_step(net, optimizer, transport.rank, step)
            transport.keeps = lambda slot: False
            transport.release()
            sync.wait()
            assert 0 <= sync.stats()["hidden_fraction"] <= 1
        return parameters_of(net)

    found = run_on(Withholding.world(2, timeout_s=10.0), body)
    same_bits(found[0], found[1])


def test_a_peer_that_is_lost_is_reported_by_the_next_forward_pass() -> None:
    stepped = threading.Event()

    def body(transport: Any) -> None:
        net = small_net()
        optimizer = sgd(net)
        sync = attach(net, optimizer, transport, overlap="forward")
        if transport.rank == 0:
            transport.keeps = lambda slot: slot.bucket == 1
        train_step(net, optimizer, transport.rank, 0)
        if transport.rank == 0:
            assert stepped.wait(10.0)
            transport.close()
            return
        stepped.set()
        with pytest.raises(gradcomp.PeerLost, match="rank 0 left"):
            net(batch(0, 0)[0])
        with pytest.raises(gradcomp.TransportError, match="some parameters have not been stepped"):
            net.state_dict()
        sync.detach()
        net.state_dict()

    run_on(Withholding.world(2, timeout_s=10.0), body)


def test_a_bucket_that_never_comes_is_a_timeout() -> None:
    def body(transport: Any) -> None:
        net = small_net()
        optimizer = sgd(net)
        attach(net, optimizer, transport, overlap="forward")
        transport.keeps = lambda slot: slot.bucket == 1
        train_step(net, optimizer, transport.rank, 0)
        with pytest.raises(gradcomp.TransportError, match=r"within 1 s|left the run"):
            net(batch(0, 0)[0])

    run_on(Withholding.world(2, timeout_s=1.0), body)


# On the wire.


@pytest.mark.parametrize("first_needed_first", [False, True])
def test_earlier_layers_overtake_on_a_slow_link(first_needed_first: bool) -> None:
    order: list[Slot] = []

    def body(transport: Any) -> None:
        transport.first_needed_first = first_needed_first
        transport.connect({"model": "m"}, max_message_bytes=1 << 20)
        slots = [Slot(1, bucket, 0) for bucket in range(6)] + [Slot(1, 0, 1), Slot(2, 9, 0), Slot(1, VERDICT_BUCKET, 0)]
        if transport.rank == 0:
            for slot in slots:
                transport.send(1, slot, [bytes(100_000)])
            transport.wait([transport.recv(1, Slot(0, 0, 0))])
        else:
            deliver = transport._mailbox.deliver
            transport._mailbox.deliver = lambda peer, slot, data: (order.append(slot), deliver(peer, slot, data))
            transport.wait([transport.recv(0, slot) for slot in slots])
            transport.send(0, Slot(0, 0, 0), [b"thanks"])
        transport.close()

    run_on(zmq_world(rate="10mbit"), body)
    if first_needed_first:
        # What was on its way when the others came was not stopped: the first, or the first few.
        begun = [slot for slot in order[:2] if slot.bucket < 2]
        assert order[len(begun) :] == sorted(order[len(begun) :], key=lambda slot: slot.urgency)
        assert order.index(Slot(1, 5, 0)) < order.index(Slot(1, 3, 0)) < order.index(Slot(1, 0, 1))
    else:
        assert [slot.bucket for slot in order] == [0, 1, 2, 3, 4, 5, 0, 9, VERDICT_BUCKET]


@pytest.mark.parametrize(
    "make_world", [lambda: zmq_world(rate="20mbit"), lambda: list(GlooTransport.world(2, timeout_s=30.0))]
)
@pytest.mark.parametrize("compressor", ["none", "threshold"])
def test_other_transports_come_to_the_same(make_world: Any, compressor: str) -> None:
    found = run_on(make_world(), lambda transport: loop(transport, sgd, overlap="forward", compressor=compressor))
    expected = run_ranks(2, lambda transport: loop(transport, sgd, compressor=compressor))
    same_bits([rank["parameters"] for rank in found], [rank["parameters"] for rank in expected])


@pytest.mark.gpu
@pytest.mark.parametrize("compressor", ["none", "threshold", "powersgd:rank=2"])
def test_on_cuda_too(compressor: str) -> None:
    def body(net: Any, optimizer: Any, sync: Any) -> None:
        for step in range(STEPS):
            inputs, targets = (tensor.cuda() for tensor in batch(sync.rank, step))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), targets).backward()
            optimizer.step()

    both(2, lambda transport, overlap: trained(transport, overlap, body, small_net().cuda(), compressor=compressor))
