"""Every optimizer of S. Ruder's overview (2016) that torch.optim has, in all its implementations; and schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import attach, batch, parameters_of, run_ranks, small_net, train_step
from torch import Tensor, nn, optim

STEPS = 4
OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.05}),
    "momentum": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}),
    "nesterov": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adagrad": (optim.Adagrad, {"lr": 0.01}),
    "adadelta": (optim.Adadelta, {"lr": 1.0}),
    "rmsprop": (optim.RMSprop, {"lr": 1e-3}),
    "adam": (optim.Adam, {"lr": 1e-3}),
    "amsgrad": (optim.Adam, {"lr": 1e-3, "amsgrad": True}),
    "adamw": (optim.AdamW, {"lr": 1e-3}),
    "adamax": (optim.Adamax, {"lr": 1e-3}),
    "nadam": (optim.NAdam, {"lr": 1e-3}),
    "radam": (optim.RAdam, {"lr": 1e-3}),
    "rprop": (optim.Rprop, {"lr": 1e-3}),
    "asgd": (optim.ASGD, {"lr": 0.05}),
}
FUSED_ON_CPU = (optim.SGD, optim.Adagrad, optim.Adam, optim.AdamW)
CASES = [
    (name, how)
    for name, (kind, _) in OPTIMIZERS.items()
    for how in ("plain", "foreach", "fused")
    if how != "fused" or kind in FUSED_ON_CPU
]


def build(name: str, how: str, net: nn.Module) -> optim.Optimizer:
    kind, options = OPTIMIZERS[name]
    chosen = {"foreach": False} if how == "plain" else {how: True}
    return kind(net.parameters(), **options, **chosen)  # type: ignore[arg-type]


def gradients(net: nn.Module, rank: int, step: int) -> list[Tensor]:
    inputs, targets = batch(rank, step)
    net.zero_grad()
    nn.functional.cross_entropy(net(inputs), targets).backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def alone(make: Callable[[nn.Module], optim.Optimizer], world_size: int) -> list[Tensor]:
    """One process that steps by the mean of all ranks' gradients, as DistributedDataParallel does."""
    net = small_net()
    optimizer = make(net)
    for step in range(STEPS):
        every = [gradients(net, rank, step) for rank in range(world_size)]
        for parameter, *grads in zip(net.parameters(), *every, strict=True):
            parameter.grad = torch.stack(grads).mean(0)
        optimizer.step()
    return parameters_of(net)


@pytest.mark.parametrize(("name", "how"), CASES)
def test_every_optimizer(name: str, how: str) -> None:
    def rank_main(transport: Any, spec: str) -> list[Tensor]:
        net = small_net()
        optimizer = build(name, how, net)
        with attach(net, optimizer, transport, compressor=spec, digest_every=1) as sync:
            for step in range(STEPS):
                train_step(net, optimizer, sync.rank, step)
        return parameters_of(net)

    expected = alone(lambda net: build(name, how, net), 2)
    for found in run_ranks(2, lambda t: rank_main(t, "none")):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    first, second = run_ranks(2, lambda t: rank_main(t, "threshold:density=0.05"))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, second, strict=True))


SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "step": lambda optimizer: optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5),
    "one_cycle": lambda optimizer: optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS + 1),
    # So large a threshold that nothing is good enough: the rate falls whenever the loss is not a tenth of the best.
    "plateau": lambda optimizer: optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    """Ranks keep one learning rate; ReduceLROnPlateau does so because it is fed the mean loss."""

    def rank_main(transport: Any) -> tuple[list[float], list[Tensor], list[float]]:
        net = small_net()
        optimizer = optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        rates, losses = [], []
        with attach(net, optimizer, transport, compressor="threshold:density=0.05", digest_every=1) as sync:
            for step in range(STEPS):
                train_step(net, optimizer, sync.rank, step)
                inputs, targets = batch(sync.rank, step)
                loss = nn.functional.cross_entropy(net(inputs), targets).detach()
                losses.append(float(loss))
                if name == "plateau":
                    scheduler.step(sync.average(loss))
                else:
                    scheduler.step()
                rates.append(optimizer.param_groups[0]["lr"])
        return rates, parameters_of(net), losses

    first, second = run_ranks(2, rank_main)
    assert first[2] != second[2]
    assert first[0] == second[0]
    assert len({*first[0]}) > 1
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_a_scheduler_gives_what_it_gives_one_process() -> None:
    def rank_main(transport: Any) -> list[Tensor]:
        net = small_net()
        optimizer = optim.Adam(net.parameters(), lr=1e-3)
        scheduler = SCHEDULERS["one_cycle"](optimizer)
        with attach(net, optimizer, transport, compressor="none") as sync:
            for step in range(STEPS):
                train_step(net, optimizer, sync.rank, step)
                scheduler.step()
        return parameters_of(net)

    def scheduled(net: nn.Module) -> optim.Optimizer:
        optimizer = optim.Adam(net.parameters(), lr=1e-3)
        scheduler = SCHEDULERS["one_cycle"](optimizer)
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    expected = alone(scheduled, 2)
    for found in run_ranks(2, rank_main):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
