"""Ranks as threads, each with an in-process transport, under one deadline."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import gradcomp
from gradcomp import testing_transport
from gradcomp.transports.inproc import InprocTransport


def run_ranks(world_size: int, function: Callable[[Any], Any], *, timeout_s: float = 20.0) -> list[Any]:
    """``function(transport)`` on every rank at once; their results in rank order, or the error that came first."""
    transports = InprocTransport.world(world_size, timeout_s=timeout_s)
    return testing_transport.run_ranks(transports, function)


def outcomes(world_size: int, function: Callable[[Any], Any], *, timeout_s: float = 20.0) -> list[Any]:
    """As :func:`run_ranks`, with each rank's error in place of its result."""

    def caught(transport: Any) -> Any:
        try:
            return function(transport)
        except Exception as error:
            return error

    return run_ranks(world_size, caught, timeout_s=timeout_s)


def small_net(seed: int = 0) -> nn.Sequential:
    """A convolution, a BatchNorm and two dense layers: 1,000 parameters."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def batch(rank: int, step: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Another batch for every rank and step, the same in every run."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(size, 1, 4, 4, generator=generator), torch.randint(0, 10, (size,), generator=generator)


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    """What everybody's training loop does."""
    inputs, targets = batch(rank, step)
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(inputs), targets).backward()
    optimizer.step()


def parameters_of(net: nn.Module) -> list[torch.Tensor]:
    """A copy of the parameters."""
    return [parameter.detach().clone() for parameter in net.parameters()]


def attach(net: nn.Module | None, optimizer: torch.optim.Optimizer, transport: Any, **options: Any) -> Any:
    """:func:`gradcomp.attach` with options for small nets: no tensor is too small to compress, and several buckets."""
    options = {"model": net, "dense": gradcomp.DenseRule(min_numel=0, min_dim=2), "bucket_bytes": 1024} | options
    return gradcomp.attach(optimizer, transport=transport, **options)


def there_and_back(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any, detour: range) -> None:
    """Save net and exchange, train on, and load what was saved: the training in between leaves no trace."""
    torch.save([net.state_dict(), sync.state_dict()], file := io.BytesIO())
    for step in detour:
        train_step(net, optimizer, sync.rank, step)
    file.seek(0)
    model, states = torch.load(file, weights_only=True)
    net.load_state_dict(model)
    sync.load_state_dict(states)
