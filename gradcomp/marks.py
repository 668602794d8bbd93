"""Points in time as the training thread passes them: on the CPU's clock, or in the order of a CUDA stream's work."""

from __future__ import annotations

import time

import torch

__all__ = ["Mark"]


class Mark:
    """Now. On a CUDA device: when its current stream gets here, which is later than the thread that queues its work.

    Making one waits for nothing; asking what lies between two waits until the device has passed both.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._event: torch.cuda.Event | None = None
        if device is not None and device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))
        self._time_s = time.perf_counter()

    def until(self, later: Mark) -> float:
        """Seconds from this one to ``later``, which is of the same device."""
        if self._event is None or later._event is None:
            return later._time_s - self._time_s
        self._event.synchronize()
        later._event.synchronize()
        return float(self._event.elapsed_time(later._event)) / 1e3
