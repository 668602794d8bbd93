"""Training with a parameter server is what it would be without one, and nothing is lost on the way."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any

import pytest
import torch
from ranks import attach as attach_ranks
from ranks import batch, parameters_of, run_ranks, small_net, train_step
from served import Hub, attach, connect, run_workers
from torch import Tensor, nn

import gradcomp

SGD = {"lr": 0.1, "momentum": 0.9}


def sgd(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), **(SGD | options))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    connect(monkeypatch, hub)
    return hub


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(3)
    connect(monkeypatch, hub)
    return hub


def close_to(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Linear(nn.Module):
    """Its loss has the gradients that :meth:`loss` is given, whatever the parameters are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(256, 96))
        self.bias = nn.Parameter(torch.zeros(5))

    def loss(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        terms = [(p * torch.randn(p.shape, generator=generator)).sum() for p in self.parameters()]
        return terms[0] + terms[1]

    def gradients(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(p.shape, generator=generator) for p in self.parameters()]


def held_back(sync: Any, name: str, numel: int) -> Tensor:
    """All that a worker has yet to push of a parameter."""
    total = torch.zeros(numel)
    for span, roles in sync.state_dict()["states"].get(name, {}).items():
        start, stop = map(int, span.split(":"))
        for state in roles.values():
            total[start:stop] += state["residual"]
    return total


@pytest.mark.parametrize("make", [sgd, lambda net: torch.optim.Adam(net.parameters(), lr=0.01)], ids=["sgd", "adam"])
def test_rounds_are_what_ranks_do_together(shards: Hub, make: Any) -> None:
    def as_rank(transport: Any) -> list[Tensor]:
        net = small_net()
        with attach_ranks(net, optimizer := make(net), transport, compressor="none", exchange="all_gather"):
            for step in range(8):
                train_step(net, optimizer, transport.rank, step)
        return parameters_of(net)

    def as_worker(number: int) -> list[Tensor]:
        net = small_net()
        with attach(shards, net, optimizer := make(net), number, 3, pull="none"):
            for step in range(8):
                train_step(net, optimizer, number, step)
        return parameters_of(net)

    expected = run_ranks(3, as_rank)[0]
    for found in run_workers(3, as_worker):
        close_to(found, expected)


def test_all_workers_have_the_servers_bits(shards: Hub) -> None:
    def worker(number: int) -> tuple[list[Tensor], dict[str, Any]]:
        net = small_net(seed=number)  # they begin as the first one
        options = {"compressor": "threshold:density=0.1", "pull": "threshold:density=0.05"}
        with attach(shards, net, optimizer := sgd(net), number, 3, **options) as sync:
            for step in range(10):
                train_step(net, optimizer, number, step)
            return parameters_of(net), sync.stats()

    (first, stats), *others = run_workers(3, worker)
    for found, _ in others:
        assert all(torch.equal(one, other) for one, other in zip(found, first, strict=True))
    assert stats["steps"] == 10
    assert stats["version"] == 10
    assert stats["ratio"] > 3
    assert stats["pull_ratio"] > 3
    assert stats["staleness"] == {0: 30}  # of three shards
    assert stats["bytes_sent"] > stats["packet_bytes"] > 0
    assert stats["bytes_received"] > stats["pulled_bytes"] > 0


@pytest.mark.parametrize("mode", ["sync:backup=1", "async", "ssp:staleness=1", "softsync:n=1"])
def test_no_gradient_is_lost_or_applied_twice(shards: Hub, mode: str) -> None:
    rounds, workers = 12, 3

    def worker(number: int) -> tuple[list[int], dict[str, Tensor], dict[str, Any]]:
        net, seeds = Linear(), []
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        options = {"mode": mode, "compressor": "threshold:tau=0.5", "reduction": "sum", "pull": "none"}
        with attach(shards, net, optimizer, number, workers, **options) as sync:
            while sync.version < rounds if mode.startswith("sync") else len(seeds) < rounds:
                seeds.append(100 * number + len(seeds))
                optimizer.zero_grad()
                net.loss(seeds[-1]).backward()
                time.sleep(0.02 * (number == 2))
                optimizer.step()
            left = {name: held_back(sync, name, p.numel()).view(p.shape) for name, p in net.named_parameters()}
            return seeds, left, sync.stats()

    found = run_workers(workers, worker)
    seeds = [seed for seeds, *_ in found for seed in seeds]
    parts = [Linear().gradients(seed) for seed in seeds]
    for i, (name, p) in enumerate(Linear().named_parameters()):
        applied = -shards.values(name, p.shape)
        left = torch.stack([left[name] for _, left, _ in found]).sum(0)
        torch.testing.assert_close(
            applied + left, torch.stack([part[i] for part in parts]).sum(0), rtol=1e-5, atol=1e-4
        )
    acked = sum(sum(stats["staleness"].values()) + stats["late"] for *_, stats in found)
    assert acked == 3 * len(seeds)
    assert bool(sum(stats["late"] for *_, stats in found)) == mode.startswith("sync")


@pytest.mark.parametrize(("n_push", "n_fetch"), [(1, 1), (3, 1), (1, 3), (2, 3), (4, 4)])
def test_downpours_pushes_and_fetches(hub: Hub, n_push: int, n_fetch: int) -> None:
    net = small_net()
    plain, server = copy.deepcopy(net), copy.deepcopy(net)
    own, theirs = sgd(plain), sgd(server, momentum=0.5)
    for group in theirs.param_groups:
        group["momentum"] = 0.9
    sums = [torch.zeros_like(p) for p in plain.parameters()]
    with attach(hub, net, optimizer := sgd(net), 0, 1, mode=f"async:n_push={n_push},n_fetch={n_fetch}", pull="none"):
        for step in range(1, 13):
            train_step(net, optimizer, 0, step)

            train_step_without_optimizer(plain, step)
            for total, p in zip(sums, plain.parameters(), strict=True):
                total += p.grad
            if step % n_push == 0:
                for total, p in zip(sums, server.parameters(), strict=True):
                    p.grad = total.clone()
                    total.zero_()
                theirs.step()
            if step % n_fetch == 0:
                with torch.no_grad():
                    for p, q in zip(plain.parameters(), server.parameters(), strict=True):
                        p.copy_(q)
            else:
                own.step()
            close_to(parameters_of(net), parameters_of(plain))


def train_step_without_optimizer(net: nn.Module, step: int) -> None:
    inputs, targets = batch(0, step)
    for p in net.parameters():
        p.grad = None
    nn.functional.cross_entropy(net(inputs), targets).backward()


def test_a_delayed_pull_is_one_step_staler(hub: Hub) -> None:
    net = small_net()
    plain, server = copy.deepcopy(net), copy.deepcopy(net)
    theirs = sgd(server)
    with attach(hub, net, optimizer := sgd(net), 0, 1, mode="async", pull="none", delay=1) as sync:
        for step in range(6):
            before = parameters_of(server)
            train_step(net, optimizer, 0, step)
            train_step_without_optimizer(plain, step)
            for p, q in zip(plain.parameters(), server.parameters(), strict=True):
                q.grad = p.grad
            theirs.step()
            with torch.no_grad():
                for p, value in zip(plain.parameters(), before, strict=True):
                    p.copy_(value)
            close_to(parameters_of(net), before)
        sync.pull()
        close_to(parameters_of(net), parameters_of(server))
        assert sync.stats()["staleness"] == {0: 1, 1: 5}


def test_schedules_and_groups_reach_the_server(shards: Hub) -> None:
    def groups(net: nn.Module) -> list[dict[str, Any]]:
        weights = [p for p in net.parameters() if p.dim() > 1]
        return [
            {"params": weights, "lr": 0.1, "weight_decay": 0.01},
            {"params": [p for p in net.parameters() if p.dim() == 1], "lr": 0.02, "nesterov": True},
        ]

    net = small_net()
    plain = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(groups(one), lr=1.0, momentum=0.9) for one in (net, plain)]
    schedules = [torch.optim.lr_scheduler.StepLR(optimizers[1], 2, gamma=0.5)]
    with attach(shards, net, optimizers[0], 0, 1, pull="none"):
        schedules.insert(0, torch.optim.lr_scheduler.StepLR(optimizers[0], 2, gamma=0.5))
        for step in range(7):
            for one, optimizer, schedule in zip((net, plain), optimizers, schedules, strict=True):
                train_step(one, optimizer, 0, step)
                schedule.step()
            close_to(parameters_of(net), parameters_of(plain))


def test_the_local_optimizer_does_nothing_and_gradients_stay(hub: Hub) -> None:
    net = small_net()
    with attach(hub, net, optimizer := sgd(net), 0, 1):
        train_step(net, optimizer, 0, 0)
        assert not optimizer.state
        assert all(p.grad is not None for p in net.parameters())
    before = parameters_of(net)
    train_step(net, optimizer, 0, 1)  # detached: it is local again
    assert optimizer.state
    assert not torch.equal(before[0], parameters_of(net)[0])


def test_a_server_that_is_started_again_is_not_noticed(shards: Hub) -> None:
    def train(hub: Hub, *, restarts: bool) -> list[Tensor]:
        net = small_net()
        options = {"compressor": "threshold:density=0.1", "pull": "threshold:density=0.1"}
        with attach(hub, net, optimizer := sgd(net), 0, 1, **options):
            for step in range(6):
                train_step(net, optimizer, 0, step)
                if restarts:
                    shards.restart(step % 3)
        return parameters_of(net)

    found = train(shards, restarts=True)
    for shard in range(3):
        shards.replace(shard)
    assert all(torch.equal(one, other) for one, other in zip(found, train(shards, restarts=False), strict=True))


def test_a_worker_that_was_forgotten_comes_back(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    net = Linear()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    with attach(hub, net, optimizer, 0, 1, mode="async", pull="none") as sync:
        for step in range(4):
            optimizer.zero_grad()
            net.loss(step).backward()
            if step == 2:
                hub.forget()
            optimizer.step()
        assert "had forgotten it" in caplog.text
        assert sync.version == 4
        hub.forget()
        assert float(sync.average(torch.tensor(3.0))) == 3.0
    expected = [sum(parts) for parts in zip(*(Linear().gradients(seed) for seed in range(4)), strict=True)]
    close_to([-p for p in parameters_of(net)], expected)


def test_a_server_without_its_state_is_an_error(hub: Hub) -> None:
    net = small_net()
    with attach(hub, net, optimizer := sgd(net), 0, 1):
        train_step(net, optimizer, 0, 0)
        hub.replace(0)
        with pytest.raises(gradcomp.TransportError):
            train_step(net, optimizer, 0, 1)


def test_a_worker_that_is_started_again_goes_on_from_its_clock(hub: Hub) -> None:
    other = small_net(seed=5)
    with attach(hub, net := small_net(), optimizer := sgd(net), 0, 1, mode="ssp:staleness=1", pull="none") as sync:
        for step in range(3):
            train_step(net, optimizer, 0, step)
        assert sync.step == 3
    with attach(hub, other, optimizer := sgd(other), 0, 1, mode="ssp:staleness=1", pull="none") as sync:
        assert sync.step == 3
        close_to(parameters_of(other), parameters_of(net))
        train_step(other, optimizer, 0, 3)
        assert sync.version == 4


def test_state_dicts(hub: Hub) -> None:
    options = {"mode": "async:n_push=2", "compressor": "threshold:density=0.1"}
    with attach(hub, net := small_net(), optimizer := sgd(net), 0, 1, **options) as sync:
        for step in range(3):
            train_step(net, optimizer, 0, step)
        saved = sync.state_dict()
    with attach(hub, net := small_net(), sgd(net), 0, 1, **options) as sync:
        sync.load_state_dict(saved)
        again = sync.state_dict()
        assert again["step"] == 3
        assert again["sums"].keys() == saved["sums"].keys() != set()
        assert torch.equal(
            held_back(sync, "4.weight", 512),
            torch.as_tensor(saved["states"]["4.weight"]["0:512"]["gradient"]["residual"]),
        )
        with pytest.raises(gradcomp.StateError, match="compressor"):
            sync.load_state_dict(saved | {"compressor": "{}"})
        with pytest.raises(gradcomp.StateError, match="sums"):
            sync.load_state_dict(saved | {"sums": {"nobody": torch.zeros(3)}})


@pytest.mark.parametrize("mode", ["sync", "async:n_push=2"])
def test_gradients_that_are_not_finite_are_not_applied(
    shards: Hub, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    net = Linear()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    with attach(shards, net, optimizer, 0, 1, mode=mode, pull="none", compressor="threshold:tau=0.5") as sync:
        for step in range(2):
            optimizer.zero_grad()
            net.loss(step).backward()
            optimizer.step()
        before, left = parameters_of(net), held_back(sync, "weight", 256 * 96)
        for step in range(2):
            net.loss(step).backward()
            net.bias.grad[2] = float("nan")
            optimizer.step()
        assert "NaN or Inf" in caplog.text
        assert all(torch.equal(one, other) for one, other in zip(parameters_of(net), before, strict=True))
        assert torch.equal(held_back(sync, "weight", 256 * 96), left)
        stats = sync.stats()
        assert stats["nonfinite_steps"] == (2 if mode == "sync" else 1)
        assert stats["nonfinite"] == 3 * stats["nonfinite_steps"]
        optimizer.zero_grad()
        net.loss(7).backward()
        optimizer.step()
        net.loss(8).backward()
        optimizer.step()
        assert not torch.equal(parameters_of(net)[0], before[0])


def test_a_scaler_changes_nothing(hub: Hub) -> None:
    def train(scaler: torch.amp.GradScaler | None) -> list[Tensor]:
        hub.replace(0)
        net = small_net()
        with attach(hub, net, optimizer := sgd(net), 0, 1, pull="none", scaler=scaler):
            for step in range(3):
                inputs, targets = (
                    torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(step)),
                    torch.arange(8),
                )
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(inputs), targets)
                if scaler is None:
                    loss.backward()
                    optimizer.step()
                else:
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
        return parameters_of(net)

    close_to(train(torch.amp.GradScaler("cpu")), train(None))


def test_parameters_of_other_types_and_layouts(shards: Hub) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), nn.Flatten(), nn.Linear(32, 7), nn.Linear(7, 6)
    )
    net[3].requires_grad_(False)
    net[2].to(torch.bfloat16)
    plain = copy.deepcopy(net)
    with attach(shards, net, optimizer := sgd(net), 0, 1, pull="none"):
        for step in range(3):
            for one, own in ((net, optimizer), (plain, None)):
                inputs = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(step))
                own = own or sgd(plain, momentum=0.0)
                own.zero_grad()
                one[2](one[1](one[0](inputs)).bfloat16()).float().square().mean().backward()
                if step == 0:
                    own.step()
            if step == 0:
                torch.testing.assert_close(net[0].weight, plain[0].weight)
                torch.testing.assert_close(net[2].weight, plain[2].weight, rtol=0.02, atol=0.01)
            else:
                optimizer.step()
        assert net[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_averages_are_over_those_that_are_there(hub: Hub) -> None:
    def worker(number: int) -> list[float]:
        net = small_net()
        with attach(hub, net, sgd(net), number, 2) as sync:
            barrier.wait()
            found = [float(sync.average(torch.tensor([number + 1.0])))]
            barrier.wait()
            if number == 1:
                return found
            time.sleep(0.1)
            return [*found, float(sync.average(torch.tensor([5.0])))]

    barrier = threading.Barrier(2, timeout=20)
    assert run_workers(2, worker) == [[1.5, 5.0], [1.5]]
