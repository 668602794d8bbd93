"""What training loops are tested with: models, inputs, and the two sides that are compared."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import Any

import torch
from ports import free_port
from ranks import attach
from torch import Tensor, nn

from gradcomp.transports.zmq import ZmqTransport

Result = dict[str, Tensor]


class Side(ABC):
    """What a loop is run with: one of the two that are compared."""

    rank: int

    @abstractmethod
    def wrap(
        self, net: nn.Module, optimizer: torch.optim.Optimizer, *, scaler: Any = None, unused: bool = False
    ) -> nn.Module:
        """The module to call."""

    @abstractmethod
    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """In here gradients stay local."""


class Ours(Side):
    def __init__(self, transport: Any, **options: Any) -> None:
        self.rank, self._transport = transport.rank, transport
        self._options = {"digest_every": 1, "buffers": "broadcast"} | options
        self.sync: Any = None

    def wrap(
        self, net: nn.Module, optimizer: torch.optim.Optimizer, *, scaler: Any = None, unused: bool = False
    ) -> nn.Module:
        self.sync = attach(net, optimizer, self._transport, scaler=scaler, **self._options)
        return net

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        found: contextlib.AbstractContextManager[None] = self.sync.no_sync()
        return found


class Ddp(Side):
    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._module: Any = None

    def wrap(
        self, net: nn.Module, optimizer: torch.optim.Optimizer, *, scaler: Any = None, unused: bool = False
    ) -> nn.Module:
        self._module = nn.parallel.DistributedDataParallel(net, find_unused_parameters=unused)
        return self._module

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        found: contextlib.AbstractContextManager[None] = self._module.no_sync()
        return found


def filled(net: nn.Module, seed: int = 0) -> nn.Module:
    """``net`` with parameters that depend on nothing but the seed: threads share torch's own generator."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def noise(rank: int, step: int, *shape: int) -> Tensor:
    """Another input for every rank and step."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * step + rank))


def result(net: nn.Module, **more: Tensor) -> Result:
    """Parameters, buffers, gradients, and what else was given. A parameter without gradient has no ``grad.`` entry."""
    found = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    found |= {f"grad.{name}": p.grad.detach().clone() for name, p in net.named_parameters() if p.grad is not None}
    return found | more


def perceptron() -> nn.Module:
    """Two layers, filled."""
    return filled(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4)))


def zmq_world(**options: Any) -> list[ZmqTransport]:
    """Transports of two ranks that meet on loopback."""
    master = f"127.0.0.1:{free_port()}"
    return [ZmqTransport(rank=rank, world_size=2, master=master, timeout_s=30.0, **options) for rank in range(2)]


def sgd(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), **({"lr": 0.1, "momentum": 0.9} | options))


class Mixed(nn.Module):
    """Layers of three types."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.middle = nn.Linear(20, 20, dtype=torch.bfloat16)
        self.short = nn.Linear(20, 20, dtype=torch.float16)
        self.last = nn.Linear(20, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs)).bfloat16()
        hidden = torch.tanh(self.short(torch.tanh(self.middle(hidden)).half()))
        return torch.as_tensor(self.last(hidden.float()))


class Tied(nn.Module):
    """An embedding whose weight is the decoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.decoder = nn.Linear(8, 11)
        self.decoder.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return torch.as_tensor(self.decoder(torch.tanh(self.hidden(self.embedding(words)))))


class Branches(nn.Module):
    """Ranks use different layers, and one is used by none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 8)
        self.branches = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))

    def forward(self, inputs: Tensor, branch: int) -> Tensor:
        return torch.as_tensor(self.branches[branch](torch.tanh(self.stem(inputs))))


class Checkpointed(nn.Module):
    """Blocks whose activations are computed again in backward, by a backward pass inside of backward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(3))
        self.last = nn.Linear(12, 4)

    def forward(self, inputs: Tensor, *, reentrant: bool = True) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        for block in self.blocks:
            inputs = checkpoint(block, inputs, use_reentrant=reentrant)
        return torch.as_tensor(self.last(inputs))
