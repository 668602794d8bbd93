"""What was sent, and how long each stage took."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from gradcomp.marks import Mark

__all__ = ["StepRecord", "Totals"]


@dataclass
class StepRecord:
    """One step's measurements, in seconds and bytes; written by the exchange thread and the training thread.

    Attributes:
        device: where the gradients lie: :meth:`held_up` measures on its clock.
        under_way: when each bucket left, and when it was through.
        parameters: what compressors say of what they sent, and ``numel``, by parameter.
        sent, elements: of all elements that were compressed, how many were sent.
    """

    device: torch.device | None = None
    compress_s: float = 0.0
    decompress_s: float = 0.0
    wait_s: float = 0.0
    packet_bytes: int = 0
    under_way: list[tuple[float, float]] = field(default_factory=list)
    parameters: dict[str, dict[str, float]] = field(default_factory=dict)
    sent: int = 0
    elements: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _held_up: list[tuple[Mark, Mark]] = field(default_factory=list, repr=False, compare=False)

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

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """Add the time this block takes to :attr:`exposed_s`: training stands still for it."""
        start = Mark(self.device)
        try:
            yield
        finally:
            self._held_up.append((start, Mark(self.device)))

    def note(self, name: str, numel: int, row: Mapping[str, float]) -> None:
        """What a compressor says of a parameter, or of the next piece of one: then it is the mean over elements."""
        self.elements += numel
        self.sent += round(row.get("density", 1.0) * numel)
        before = self.parameters.get(name)
        if before is None:
            self.parameters[name] = {**row, "numel": numel}
            return
        so_far = before["numel"]
        for key, value in row.items():
            before[key] = (before.get(key, value) * so_far + value * numel) / (so_far + numel)
        before["numel"] = so_far + numel

    @property
    def hidden_fraction(self) -> float:
        """Share of the time in which buckets were under way that the training thread did not wait for them."""
        busy, end = 0.0, -1.0
        for start, stop in sorted(self.under_way):
            busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return 0.0 if busy == 0.0 else min(1.0, max(0.0, 1.0 - self.wait_s / busy))

    @property
    def exposed_s(self) -> float:
        """How long training stood still: waiting, and putting sums in place."""
        return sum(start.until(stop) for start, stop in self._held_up)


@dataclass
class Totals:
    """Counts over all steps.

    Attributes:
        residual_norms: gives what is held back now, by parameter.
    """

    residual_norms: Callable[[], Mapping[str, float]] = dict
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
        """Totals, the last step's times in milliseconds, and what is held back: one pass over all residuals."""
        last, norms = self.last, self.residual_norms()
        taus = [row["tau"] for row in last.parameters.values() if "tau" in row]
        parameters = {
            name: row | ({"residual_norm": norms[name]} if name in norms else {})
            for name, row in last.parameters.items()
        }
        return {
            "steps": self.steps,
            "nonfinite_steps": self.nonfinite_steps,
            "packet_bytes": self.packet_bytes,
            "gradient_bytes": self.gradient_bytes,
            "ratio": self.gradient_bytes / self.packet_bytes if self.packet_bytes else 0.0,
            "density": last.sent / last.elements if last.elements else 0.0,
            "tau": sum(taus) / len(taus) if taus else 0.0,
            "residual_norm": math.hypot(*norms.values()),
            "compress_ms": last.compress_s * 1e3,
            "wait_ms": last.wait_s * 1e3,
            "decompress_ms": last.decompress_s * 1e3,
            "exposed_ms": last.exposed_s * 1e3,
            "hidden_fraction": last.hidden_fraction,
            "parameters": parameters,
        }
