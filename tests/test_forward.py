"""``overlap="forward"``: the same bits as the plain order, with the next forward pass begun before the last bucket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import attach, batch, parameters_of, run_ranks, small_net
from torch import nn

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


def both(world_size: int, make: Any, **options: Any) -> None:
    plain, forward = (
        run_ranks(world_size, lambda transport: loop(transport, make, overlap=overlap, **options))
        for overlap in ("backward", "forward")
    )
    same_bits(plain, forward)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "auto"])
@pytest.mark.parametrize(
    "compressor", ["none", "fp16", "threshold:tau=1e-3", "onebit", "topk:ratio=0.1", "powersgd:rank=2"]
)
def test_parameters_states_and_residuals_are_those_of_the_plain_order(compressor: str, exchange: str) -> None:
    both(3, sgd, compressor=compressor, exchange=exchange)
