"""Training loops as people write them, each to be run with gradcomp.attach on threads and with DDP in processes.

As a script it is one of the processes: ``python training.py RANK WORLD_SIZE FOLDER`` runs every loop with
DistributedDataParallel over Gloo and leaves what came out in the folder.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ranks import attach, run_ranks
from torch import Tensor, nn

from gradcomp.transports.zmq import ZmqTransport

WORLD_SIZE = 2
DEADLINE_S = 240  # quiet, it takes 7
Result = dict[str, Tensor]
LOOPS: dict[str, Callable[[Side], Result]] = {}


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


def loop(function: Callable[[Side], Result]) -> Callable[[Side], Result]:
    """Add it to those that are compared."""
    LOOPS[function.__name__] = function
    return function


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{free.getsockname()[1]}"
    return [ZmqTransport(rank=rank, world_size=2, master=master, timeout_s=30.0, **options) for rank in range(2)]


def sgd(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), **({"lr": 0.1, "momentum": 0.9} | options))


@loop
def accumulation(side: Side) -> Result:
    """Steps of 1, 3, 2 and 1 micro-steps, and a mean over them; in one step rank 1 takes one more."""
    net = perceptron()
    optimizer = sgd(net)
    module = side.wrap(net, optimizer)
    for step, micro_steps in enumerate([1, 3, 2 + side.rank, 1]):
        optimizer.zero_grad()
        for micro in range(micro_steps):
            with contextlib.nullcontext() if micro == micro_steps - 1 else side.no_sync():
                (module(noise(side.rank, 10 * step + micro, 6, 12)).square().mean() / micro_steps).backward()
        optimizer.step()
    return result(net)


@loop
def two_backward_passes_before_a_step(side: Side) -> Result:
    """Each is exchanged."""
    net = perceptron()
    optimizer = sgd(net)
    module = side.wrap(net, optimizer)
    for step in range(3):
        optimizer.zero_grad()
        for half in range(2):
            module(noise(side.rank, 2 * step + half, 6, 12)).square().mean().backward()
        optimizer.step()
    return result(net)


@loop
def clip_norm(side: Side) -> Result:
    """Global norms, as seen after backward."""
    net = perceptron()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    module = side.wrap(net, optimizer)
    norms = []
    for step in range(4):
        optimizer.zero_grad()
        module(noise(side.rank, step, 6, 12)).square().sum().backward()
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.5))
        optimizer.step()
    return result(net, norms=torch.stack(norms))


@loop
def clip_value(side: Side) -> Result:
    """Each element by itself; the gradients are kept from step to step."""
    net = perceptron()
    optimizer = sgd(net)
    module = side.wrap(net, optimizer)
    for step in range(4):
        optimizer.zero_grad(set_to_none=False)
        module(noise(side.rank, step, 6, 12)).square().mean().backward()
        nn.utils.clip_grad_value_(net.parameters(), 0.01)
        optimizer.step()
    return result(net)


@loop
def scaler(side: Side) -> Result:
    """Accumulation, unscale_ and clipping; Inf on rank 1 at a step that all skip; the scale grows and shrinks."""
    net = perceptron()
    optimizer = sgd(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    module = side.wrap(net, optimizer, scaler=scaler)
    scales = []
    for step in range(7):
        optimizer.zero_grad()
        for micro in range(2):
            inputs = noise(side.rank, 2 * step + micro, 6, 12)
            if side.rank == 1 and step == 3:
                inputs[0, 0] = float("inf")
            with contextlib.nullcontext() if micro else side.no_sync():
                scaler.scale(module(inputs).square().mean() / 2).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [1024.0, 2048.0, 2048.0, 1024.0, 1024.0, 2048.0, 2048.0]
    return result(net)


@loop
def autocast(side: Side) -> Result:
    """bfloat16 in the forward pass, float32 parameters, and a schedule."""
    net = perceptron()
    optimizer = sgd(net)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    module = side.wrap(net, optimizer)
    for step in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(noise(side.rank, step, 6, 12)).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    return result(net)


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


@loop
def mixed_types(side: Side) -> Result:
    """float32, bfloat16 and float16 parameters in one model."""
    net = filled(Mixed())
    optimizer = sgd(net, lr=0.02)
    module = side.wrap(net, optimizer)
    for step in range(3):
        optimizer.zero_grad()
        module(noise(side.rank, step, 6, 12)).square().mean().backward()
        optimizer.step()
    return result(net)


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


@loop
def tied(side: Side) -> Result:
    """One parameter in two places."""
    net = filled(Tied())
    optimizer = sgd(net)
    module = side.wrap(net, optimizer)
    for step in range(4):
        words = torch.arange(6) * (side.rank + 2 + step) % 11
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(words), (words + 1) % 11).backward()
        optimizer.step()
    return result(net)


@loop
def batch_norm(side: Side) -> Result:
    """Running statistics of rank 0, and channels_last convolutions."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 2), nn.Flatten())
    net = filled(net).to(memory_format=torch.channels_last)
    optimizer = sgd(net)
    module = side.wrap(net, optimizer)
    for step in range(4):
        optimizer.zero_grad()
        inputs = noise(side.rank, step, 5, 3, 6, 6).contiguous(memory_format=torch.channels_last)
        module(inputs).square().mean().backward()
        optimizer.step()
    if side.rank == 0:  # DDP hands them on before the next forward pass, we after backward
        return result(net)
    return {name: tensor for name, tensor in result(net).items() if "running" not in name}


class Branches(nn.Module):
    """Ranks use different layers, and one is used by none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 8)
        self.branches = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))

    def forward(self, inputs: Tensor, branch: int) -> Tensor:
        return torch.as_tensor(self.branches[branch](torch.tanh(self.stem(inputs))))


@loop
def unused(side: Side) -> Result:
    """Parameters that a rank does not use, another one in each step, and some that nobody uses."""
    net = filled(Branches())
    optimizer = sgd(net)
    module = side.wrap(net, optimizer, unused=True)
    for step in range(4):
        optimizer.zero_grad()
        module(noise(side.rank, step, 6, 12), (side.rank + step) % 2).square().mean().backward()
        optimizer.step()
    assert net.branches[2].weight.grad is None  # type: ignore[union-attr]
    return result(net)


@loop
def frozen(side: Side) -> Result:
    """The first layer is frozen for some steps and has no gradient then."""
    net = perceptron()
    optimizer = sgd(net)
    module = side.wrap(net, optimizer, unused=True)
    for step in range(6):
        optimizer.zero_grad()
        net[0].requires_grad_(not 2 <= step < 4)  # type: ignore[operator]
        module(noise(side.rank, step, 6, 12)).square().mean().backward()
        assert (net[0].weight.grad is None) == (2 <= step < 4)  # type: ignore[index]
        optimizer.step()
    return result(net)


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


@loop
def reentrant_checkpoints(side: Side) -> Result:
    """The inner backward passes end before the outer one does."""
    net = filled(Checkpointed())
    optimizer = sgd(net)
    module = side.wrap(net, optimizer)
    for step in range(3):
        optimizer.zero_grad()
        module(noise(side.rank, step, 6, 12).requires_grad_()).square().mean().backward()
        optimizer.step()
    return result(net)


@loop
def recurrent(side: Side) -> Result:
    """An LSTM, unrolled over time."""
    net = filled(nn.LSTM(6, 8, num_layers=2, batch_first=True))
    optimizer = sgd(net)
    module = side.wrap(net, optimizer)
    for step in range(3):
        optimizer.zero_grad()
        outputs, _ = module(noise(side.rank, step, 4, 5, 6))
        outputs.square().mean().backward()
        optimizer.step()
    return result(net)


@loop
def closure(side: Side) -> Result:
    """LBFGS calls backward as often as it wants, inside of step()."""
    net = perceptron()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
    module = side.wrap(net, optimizer)
    for step in range(2):

        def evaluate(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = module(noise(side.rank, step, 6, 12)).square().mean()
            loss.backward()
            return loss

        optimizer.step(evaluate)  # type: ignore[arg-type]
    return result(net)


def ours(name: str, **options: Any) -> list[Result]:
    """What a loop gives on each rank with gradcomp.attach."""

    def rank_main(transport: Any) -> Result:
        side = Ours(transport, **options)
        found = LOOPS[name](side)
        side.sync.check_replicas()
        side.sync.detach()
        return found

    return run_ranks(WORLD_SIZE, rank_main)


@functools.cache
def ddp() -> dict[str, list[Result]]:
    """What every loop gives on each rank with DistributedDataParallel: one launch of processes for all."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__]
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        processes = [
            subprocess.Popen([*command, str(rank), str(WORLD_SIZE), folder], env=env) for rank in range(WORLD_SIZE)
        ]
        try:
            assert [process.wait(DEADLINE_S) for process in processes] == [0] * WORLD_SIZE
        finally:
            for process in processes:
                process.kill()
                process.wait()
        found = [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(WORLD_SIZE)]
    return {name: [rank[name] for rank in found] for name in LOOPS}


def main(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save({name: function(Ddp(rank)) for name, function in LOOPS.items()}, Path(folder, f"{rank}.pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
