"""What the torch kernels share: tensors taken a chunk at a time, and what was not finite in them.

``acc = float32(grad) + residual`` is what is compressed. It is formed a chunk at a time: one that stays in the cache
costs a fraction of a pass over memory, and nothing of the gradient's size is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["accumulate", "chunks", "new_buffer", "nonfinite_value"]

_CPU_CHUNK = 1 << 18  # of 2**15..2**19 the fastest: the loop's overhead is hidden and two buffers stay in the cache
_DEVICE_CHUNK = 1 << 24


def chunks(numel: int, device: torch.device, multiple_of: int = 1) -> Iterator[slice]:
    """Ranges that cover 0..numel-1, each beginning at a multiple of ``multiple_of``."""
    size = _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK
    size = max(size // multiple_of, 1) * multiple_of
    for start in range(0, numel, size):
        yield slice(start, min(start + size, numel))


def accumulate(grad: Tensor, residual: Tensor | None, part: slice, buffer: Tensor | None) -> Tensor:
    """The part of acc: in ``buffer`` if it has to be computed and a buffer is given."""
    if residual is None:
        return grad[part].to(torch.float32)
    if buffer is None:
        return residual[part] + grad[part]
    return torch.add(residual[part], grad[part], out=buffer[: part.stop - part.start])


def new_buffer(grad: Tensor) -> Tensor:
    """Room for the acc of one chunk."""
    chunk = next(chunks(grad.numel(), grad.device), slice(0, 0))
    return torch.empty(chunk.stop, dtype=torch.float32, device=grad.device)


def nonfinite_value(values: Tensor) -> float:
    """NaN or an infinity if ``values`` holds one, else 0."""
    bad = values[~values.isfinite()]
    return float(bad.sum()) if len(bad) else 0.0
