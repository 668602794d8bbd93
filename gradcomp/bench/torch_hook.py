"""torch's own PowerSGD, as DistributedDataParallel runs it: its communication hook, on a rank that is alone.

There is no process group: an all-reduce of one rank's has nothing to do, and its way there and back is not to be timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["NAME", "can_run", "powersgd_hook", "sent_nbytes"]

NAME = "torch powerSGD_hook rank 2"
_RANK = 2


class _Alone:
    """A group of one rank."""

    def size(self) -> int:
        return 1


class _Done:
    """An all-reduce that is over."""

    def __init__(self, tensor: Tensor, group: object = None, *, async_op: bool = True) -> None:
        self._tensor = tensor

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        device = self._tensor.device
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future(
            devices=[device] if device.type == "cuda" else None
        )
        future.set_result([self._tensor])
        return future


class _Bucket:
    """What the hook asks of DDP's bucket."""

    def __init__(self, tensors: Sequence[Tensor], buffer: Tensor) -> None:
        self._tensors, self._buffer = tensors, buffer

    def buffer(self) -> Tensor:
        return self._buffer

    def gradients(self) -> Sequence[Tensor]:
        return self._tensors

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True


def can_run(device: torch.device) -> bool:
    """Whether the hook works on ``device``: where there is CUDA, it waits for the device and takes no other."""
    return dist.is_available() and device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def sent_nbytes(tensors: Sequence[Tensor]) -> int:
    """What the hook all-reduces: factors where they are less than half of the matrix, which is its default."""
    numel = 0
    for tensor in tensors:
        rows, columns = tensor.shape[0], tensor[0].numel()
        factors = min(_RANK, rows, columns) * (rows + columns)
        numel += factors if 2 * factors < tensor.numel() else tensor.numel()
    return 4 * numel


@contextmanager
def powersgd_hook(buffer: Tensor, tensors: Sequence[Tensor]) -> Iterator[Callable[[], object]]:
    """What encodes the gradients in ``buffer`` and writes what is decoded in their place. Done once already.

    Args:
        buffer: flat float32.
        tensors: views of it.
    """
    # Imported here: it is slow, and not there in a torch without torch.distributed.
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as hooks

    state = hooks.PowerSGDState(_Alone(), matrix_approximation_rank=_RANK, start_powerSGD_iter=2)
    bucket = _Bucket(tensors, buffer)

    def call() -> object:
        return hooks.powerSGD_hook(state, bucket).wait()

    with patch.object(dist, "all_reduce", _Done):
        for _ in range(3):  # the first two leave the gradients as they are
            call()
        yield call
