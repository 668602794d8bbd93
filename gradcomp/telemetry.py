"""What was sent, and how long each stage took."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["StepRecord", "Totals"]


@dataclass
class StepRecord:
    """One step's measurements, in seconds and bytes; written by the exchange thread and the training thread."""

    compress_s: float = 0.0
    decompress_s: float = 0.0
    wait_s: float = 0.0
    packet_bytes: int = 0
    under_way: list[tuple[float, float]] = field(default_factory=list)
    parameters: dict[str, dict[str, float]] = field(default_factory=dict)
    sent: int = 0
    elements: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time this block takes to ``compress_s``, ``decompress_s`` or ``wait_s``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            with self.lock:
                setattr(self, stage, getattr(self, stage) + took)

    @property
    def hidden_fraction(self) -> float:
        """Share of the time in which buckets were under way that the training thread did not wait for them."""
        busy, end = 0.0, -1.0
        for start, stop in sorted(self.under_way):
            busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return 0.0 if busy == 0.0 else min(1.0, max(0.0, 1.0 - self.wait_s / busy))


@dataclass
class Totals:
    """Counts over all steps."""

    steps: int = 0
    nonfinite_steps: int = 0
    packet_bytes: int = 0
    gradient_bytes: int = 0
    last: StepRecord = field(default_factory=StepRecord)

    def add(self, step: StepRecord, *, gradient_bytes: int, nonfinite: bool) -> None:
        """Count a finished step."""
        self.steps += 1
        self.nonfinite_steps += nonfinite
        self.packet_bytes += step.packet_bytes
        self.gradient_bytes += gradient_bytes
        self.last = step

    def as_dict(self) -> dict[str, Any]:
        """Totals, and the last step's times in milliseconds."""
        last = self.last
        taus = [row["tau"] for row in last.parameters.values() if "tau" in row]
        return {
            "steps": self.steps,
            "nonfinite_steps": self.nonfinite_steps,
            "packet_bytes": self.packet_bytes,
            "gradient_bytes": self.gradient_bytes,
            "ratio": self.gradient_bytes / self.packet_bytes if self.packet_bytes else 0.0,
            "density": last.sent / last.elements if last.elements else 0.0,
            "tau": sum(taus) / len(taus) if taus else 0.0,
            "compress_ms": last.compress_s * 1e3,
            "wait_ms": last.wait_s * 1e3,
            "decompress_ms": last.decompress_s * 1e3,
            "hidden_fraction": last.hidden_fraction,
            "parameters": {name: dict(row) for name, row in last.parameters.items()},
        }
