"""Which gradients lie in memory that is nobody else's, so that it may be used up and exchanged for other memory.

A residual that is written where the gradient was, and a gradient that is then built where the residual was, save a pass
over both. But the memory must not be looked at from elsewhere: as part of a larger buffer, by another process, or by
somebody who keeps gradients from step to step (``zero_grad(set_to_none=False)``).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Ownership"]


class Ownership:
    """Follows the gradients of some tensors from step to step.

    Args:
        tensors: those whose ``grad`` is meant.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._kept: list[weakref.ref[Tensor] | None] = [None] * len(tensors)
        self.end_step()

    def end_step(self) -> None:
        """Remember the gradients there are: one that is still the same object in the next step is kept by somebody."""
        for i, tensor in enumerate(self._tensors):
            self._kept[i] = None if tensor.grad is None else weakref.ref(tensor.grad)

    def may_use_up(self, position: int) -> bool:
        """Whether backward made this gradient anew, in memory of its own, as contiguous float32.

        On CUDA its memory then changes between the streams of training and exchange; see :class:`gradcomp.lanes.Lane`.
        """
        grad = self._tensors[position].grad
        if grad is None or grad.dtype != torch.float32 or not grad.is_contiguous():
            return False
        if grad.device.type not in ("cpu", "cuda"):
            return False
        if grad.device.type == "cpu" and grad.is_shared():  # type: ignore[no-untyped-call]
            return False  # CUDA's memory always says that it is
        kept = self._kept[position]
        if kept is not None and kept() is grad:
            return False
        return type(grad) is Tensor and grad.untyped_storage().nbytes() == 4 * grad.numel()
