"""Memory for what is long and made anew in every step: kept for the next one.

Fresh memory comes from the kernel page by page, with a fault and a clearing for each; for a message or a vector of
megabytes that costs more than filling it.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Memory", "empty_floats"]

_ROUND_BYTES = 1 << 20  # so that lengths that differ a little can share
_MOST_KEPT_BYTES = 64 << 20


class Memory:
    """Keeps what nobody refers to any more for the next one that is about as long.

    For all threads, and without a lock: what is let go of may come back in the midst of anything, on any of them.
    """

    def __init__(self) -> None:
        self._free: deque[npt.NDArray[np.uint8]] = deque()

    def take(self, nbytes: int) -> memoryview:
        """So many bytes of no particular values; they are taken back once this and all views of it are gone."""
        base = self._find(-(-nbytes // _ROUND_BYTES) * _ROUND_BYTES)
        handed_out = base[:nbytes]  # an object of its own, which every view keeps alive
        weakref.finalize(handed_out, self._take_back, base).atexit = False
        return handed_out.data

    def _find(self, capacity: int) -> npt.NDArray[np.uint8]:
        with suppress(IndexError):  # another thread emptied it
            for _ in range(len(self._free)):
                base = self._free.popleft()
                if base.nbytes == capacity:
                    return base
                self._free.append(base)
        return np.empty(capacity, np.uint8)

    def _take_back(self, base: npt.NDArray[np.uint8]) -> None:
        self._free.append(base)
        with suppress(IndexError):
            while sum(kept.nbytes for kept in tuple(self._free)) > _MOST_KEPT_BYTES:
                self._free.popleft()


_FLOATS = Memory()


def empty_floats(numel: int, device: torch.device) -> Tensor:
    """As ``torch.empty(numel)``, float32; on the CPU, where long, of memory that is used again once it is let go of."""
    if device.type != "cpu" or 4 * numel < _ROUND_BYTES:
        return torch.empty(numel, dtype=torch.float32, device=device)
    return torch.frombuffer(_FLOATS.take(4 * numel), dtype=torch.float32)
