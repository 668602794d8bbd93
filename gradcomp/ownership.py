"""Which gradients lie in memory that is nobody else's, so that it may be used up and exchanged for other memory.

A residual that is written where the gradient was, and a gradient that is then built where the residual was, save a pass
over both. But the memory must not be looked at from elsewhere: as part of a larger buffer, by another process, or by
somebody who keeps it from step to step: gradients (``zero_grad(set_to_none=False)``), or memory that a backward pass
writes its gradients to every time, such as that of ``torch.cuda.make_graphed_callables``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Ownership"]


class Ownership:
    """Follows the gradients of some tensors from step to step.

    Args:
        tensors: those whose ``grad`` is meant.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        # Of each one's last gradient; it keeps no memory, but no other storage is taken for it.
        self._last: list[StorageWeakRef | None] = [None] * len(tensors)
        self.end_step()

    def end_step(self) -> None:
        """Remember the gradients' memory: what is there again in the next step is kept by somebody."""
        for i, tensor in enumerate(self._tensors):
            if type(tensor.grad) is Tensor and tensor.grad.layout == torch.strided:
                self._last[i] = StorageWeakRef(tensor.grad.untyped_storage())  # type: ignore[no-untyped-call]

    def may_use_up(self, position: int) -> bool:
        """Whether backward made this gradient anew, in memory of its own, as contiguous float32.

        Never the first one, of which nobody can tell whether the next will lie there again.

        On CUDA its memory then changes between the streams of training and exchange; see :class:`gradcomp.lanes.Lane`.
        """
        grad = self._tensors[position].grad
        if grad is None or grad.dtype != torch.float32 or not grad.is_contiguous():
            return False
        if grad.device.type not in ("cpu", "cuda"):
            return False
        if grad.device.type == "cpu" and grad.is_shared():  # type: ignore[no-untyped-call]
            return False  # CUDA's memory always says that it is
        last = self._last[position]
        if last is None or type(grad) is not Tensor:
            return False
        storage = grad.untyped_storage()
        return storage._cdata != last.cdata and storage.nbytes() == 4 * grad.numel()
