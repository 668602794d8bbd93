"""Training loops as people write them, each to be run with gradcomp.attach on threads and with DDP in processes.

As a script it is one of the processes: ``python training_loops.py RANK WORLD_SIZE FOLDER`` runs every loop with
DistributedDataParallel over Gloo and leaves what came out in the folder.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks
from torch import Tensor, nn
from training import (
    Branches,
    Checkpointed,
    Ddp,
    Mixed,
    Ours,
    Result,
    Side,
    Tied,
    filled,
    noise,
    perceptron,
    result,
    sgd,
)
from zygote import Popen

WORLD_SIZE = 2
DEADLINE_S = 240  # quiet, it takes 7
LOOPS: dict[str, Callable[[Side], Result]] = {}


def loop(function: Callable[[Side], Result]) -> Callable[[Side], Result]:
    """Add it to those that are compared."""
    LOOPS[function.__name__] = function
    return function


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
        processes = [Popen([*command, str(rank), str(WORLD_SIZE), folder], env=env) for rank in range(WORLD_SIZE)]
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
