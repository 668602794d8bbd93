"""The exchange's own CUDA stream beside the training's, and page-locked host memory, which its bytes pass through.

Page-locked memory comes from torch's own allocator, which keeps what was freed for the next time: no more is ever
locked than was in use at once, rounded up. A block is free once nobody holds it, a transport that sends from it
included, and the copies to or from it that were queued are over. Where a system lets no more memory be locked, which
the log then says once, memory as it is takes its place: copies are slower, and the host waits for them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

__all__ = ["Lane", "joins", "on", "page_locked", "short_tensor", "to_device", "to_host", "uses"]


class Lane:
    """Where the exchange's work is queued: on CUDA a stream of its own, so that backward goes on; else nowhere.

    Everything queued here begins by waiting for a :meth:`mark` of the training's stream, and that waits for all of it
    (:meth:`join`) before it uses the results. So memory that either of them frees is never written while the other
    still reads it, although the allocator knows nothing of it; nor memory that changes sides, as a gradient's that
    becomes a residual. Memory of one side's that the other lets go of between a mark and the next join is not covered
    by that: :func:`uses` is for it. A mark covers the stream that is current when a bucket is complete: gradients that
    one backward pass makes on several streams must be exchanged with ``when="step"``.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def mark(self) -> torch.cuda.Event | None:
        """What the current stream has been given to do so far."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def after(self, mark: torch.cuda.Event | None) -> Iterator[None]:
        """What is queued in here runs on this lane, and not before ``mark``."""
        if self._stream is None:
            yield
            return
        if mark is not None:
            self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            yield

    def follow(self) -> None:
        """What is queued here from now on runs after all that the current stream was given. The host does not wait."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def join(self) -> None:
        """What the current stream is given from now on runs after all that was queued here. The host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels launched in here run on ``device``: Triton's run on the current one, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def uses(*tensors: Tensor) -> None:
    """What the current stream was given reads ``tensors``, which another one may have allocated and nobody may keep.

    On CUDA their memory is then not used again before it has done so.
    """
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def joins(device: torch.device) -> bool:
    """Whether what moves between ``device`` and the host is best moved as one."""
    return device.type == "cuda"


def page_locked(data: memoryview) -> Tensor:
    """A copy of ``data``, uint8, in host memory that CUDA copies from while the host goes on."""
    host = _host_memory(torch.Size([len(data)]), torch.uint8)
    host.numpy().data[:] = data
    return host


def to_host(tensor: Tensor) -> Tensor:
    """``tensor`` on the CPU; from CUDA through page-locked memory, which is copied to at the full rate of the bus.

    Waits for the copy, asleep, and for what the current stream was given before: bytes must be there to be sent.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = _host_memory(tensor.shape, tensor.dtype)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(tensor.device))
    copied.synchronize()
    return host


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor`` on ``device``; to CUDA through page-locked memory, without waiting for the copy."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    if not tensor.is_pinned():
        tensor = _host_memory(tensor.shape, tensor.dtype).copy_(tensor)
    return tensor.to(device, non_blocking=True)


def short_tensor(values: Sequence[float], device: torch.device | str, dtype: torch.dtype = torch.int64) -> Tensor:
    """A few numbers on ``device``; unlike ``torch.tensor(values, device=device)`` it does not wait for the stream."""
    return to_device(torch.tensor(values, dtype=dtype), device)


def _host_memory(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Page-locked, where there is CUDA and the system lets it be."""
    if torch.cuda.is_available():
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            _say_not_locked(str(error).partition("\n")[0])
    return torch.empty(shape, dtype=dtype)


@cache
def _say_not_locked(reason: str) -> None:
    logging.getLogger("gradcomp").warning(
        "no host memory can be page-locked: copies from and to the GPU are slower (%s)", reason
    )
