"""Gradients to measure compressors on: drawn, saved, or taken from a task while it trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradcomp.errors import ConfigError

__all__ = ["draw", "from_task", "load", "save", "stretch"]

STEPS = 4  # gradients of so many steps in a row, so that a residual meets what it would meet in training


def draw(numel: int) -> Tensor:
    """Float32 [STEPS, numel]: noise whose size varies between runs of 4096 elements, as it does between layers."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(-(-numel // 4096), generator=generator).exp_().mul_(1e-3)
    rows = torch.empty(STEPS, numel)
    for row in rows:
        torch.randn(numel, generator=generator, out=row)
        for part, size in zip(row.split(4096), sizes, strict=True):
            part.mul_(size)
    return rows


def from_task(name: str, settings: Sequence[str], *, warm_up: int = 20) -> Tensor:
    """Float32 [STEPS, numel]: all gradients of a task's network, after ``warm_up`` steps of training.

    Raises:
        ConfigError: there is no such task, or it refuses its settings.
    """
    from gradcomp.integrations.tasks import load as load_task
    from gradcomp.integrations.tasks import train_batches

    torch.manual_seed(0)
    task = load_task(name).build(settings)
    rows: deque[Tensor] = deque(maxlen=STEPS)
    task.model.train()
    steps, epoch = 0, 0
    while steps < warm_up + STEPS:
        for inputs, targets in train_batches(
            task.train_data, batch_size=task.batch_size, rank=0, world_size=1, seed=0, epoch=epoch
        ):
            task.optimizer.zero_grad()
            task.loss(task.model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            # What compressors are for: weights. Biases and scales are few, and go dense.
            rows.append(
                torch.cat([p.grad.view(-1) for p in task.model.parameters() if p.grad is not None and p.dim() > 1])
            )
            task.optimizer.step()
            steps += 1
            if steps == warm_up + STEPS:
                break
        epoch += 1
    return torch.stack(list(rows))


def save(path: str, rows: Tensor) -> None:
    """Write gradients for :func:`load`: a NumPy array, float32 [steps, numel]."""
    np.save(path, rows.numpy(), allow_pickle=False)


def load(path: str) -> Tensor:
    """Read what :func:`save` wrote.

    Raises:
        ConfigError: no such file, or not a float32 array of two dimensions.
    """
    if not Path(path).is_file():
        raise ConfigError(f"gradients: there is no file {path!r}; make one with --task TASK --save FILE")
    try:
        rows = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ConfigError(f"gradients: {path!r} is not a NumPy array: {error}") from error
    if rows.dtype != np.float32 or rows.ndim != 2 or not rows.size:
        raise ConfigError(f"gradients: {path!r} holds {rows.dtype} {rows.shape}; it must be float32 [steps, numel]")
    return torch.from_numpy(rows)


def stretch(rows: Tensor, numel: int) -> Tensor:
    """``numel`` elements of every row: its first ones, or repeated with changing signs if it is shorter."""
    have = rows.shape[1]
    if numel <= have:
        return rows[:, :numel].contiguous()
    turns = -(-numel // have)
    signs = torch.ones(turns).index_fill_(0, torch.arange(1, turns, 2), -1.0)
    return (rows.unsqueeze(1) * signs.view(1, -1, 1)).reshape(len(rows), -1)[:, :numel].contiguous()
