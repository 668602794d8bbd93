"""When what ran in one step: a picture with a row for each thread that was watched and each CUDA stream."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gradcomp.errors import ConfigError

__all__ = ["Span", "Timeline"]


@dataclass(frozen=True)
class Span:
    """Something that ran in ``row`` from ``start_ms`` to ``stop_ms``, counted from the step's beginning."""

    row: str
    name: str
    start_ms: float
    stop_ms: float


class Timeline:
    """Collects what ran between the beginning and the end of :meth:`recorded`; else it costs next to nothing.

    Args:
        device: if a CUDA device, its streams are recorded too, by torch.profiler.

    Attributes:
        spans: what was found.
    """

    def __init__(self, device: torch.device) -> None:
        self.spans: list[Span] = []
        self._device = device
        self._start_s: float | None = None

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """What the calling thread does in here, on the host."""
        start_s = time.perf_counter()
        yield
        if self._start_s is not None:
            thread = "training" if threading.current_thread() is threading.main_thread() else "exchange"
            self._add(f"{thread} thread", name, start_s - self._start_s, time.perf_counter() - self._start_s)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record what runs in here."""
        if self._device.type != "cuda":
            self._start_s = time.perf_counter()
            yield
            self._start_s = None
            return
        from torch.profiler import ProfilerActivity, profile, record_function

        torch.cuda.synchronize(self._device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            with record_function("gradcomp: begin"):  # where the profiler's clock is when ours is at 0
                self._start_s = time.perf_counter()
            yield
            torch.cuda.synchronize(self._device)
            self._start_s = None
        events = found.events()
        begin_us = next(event.time_range.start for event in events if event.name == "gradcomp: begin")
        for event in events:
            if event.device_type.name == "CUDA":
                row = f"CUDA stream {event.device_resource_id}"
                span = event.time_range
                self._add(row, event.name, (span.start - begin_us) / 1e6, (span.end - begin_us) / 1e6)

    def _add(self, row: str, name: str, start_s: float, stop_s: float) -> None:
        self.spans.append(Span(row, name, start_s * 1e3, stop_s * 1e3))

    def draw(self, path: str, title: str) -> None:
        """Draw what was recorded.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ConfigError("--profile needs matplotlib: pip install 'gradcomp[demo]'") from error
        rows = sorted({span.row for span in self.spans}, reverse=True)
        figure = Figure(figsize=(14, 1.5 + 0.8 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel="milliseconds since the step began", title=title)
        kinds = sorted({_kind(span) for span in self.spans})
        for number, kind in enumerate(kinds):
            for place, row in enumerate(rows):
                found = [span for span in self.spans if span.row == row and _kind(span) == kind]
                bars = [(span.start_ms, span.stop_ms - span.start_ms) for span in found]
                axes.broken_barh(bars, (place - 0.4, 0.8), facecolors=f"C{number % 10}", label=kind if bars else None)
        axes.set_yticks(range(len(rows)), rows)
        named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(named.values(), named.keys(), ncols=5, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        figure.savefig(path, dpi=120)


def _kind(span: Span) -> str:
    """What a span is drawn as: the name given on the host; on the device copies, kernels of Triton's, and others."""
    if not span.row.startswith("CUDA"):
        return span.name
    if "Memcpy" in span.name or "Memset" in span.name:
        return span.name.partition(" (")[0]
    return "our kernels" if span.name.startswith("_") and not span.name.startswith("_Z") else "torch's kernels"
