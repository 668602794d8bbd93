"""The pictures of a report. What names say is shown as it is: no mathematics, no markup."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradcomp.errors import ConfigError
from gradcomp.integrations.report_data import STAGES, accuracies, layer_grid, per_bin, rank_times, stage_ms
from gradcomp.integrations.run_log import Run, printable, series

__all__ = ["STAGE_COLORS", "Picture", "compare", "label", "look_at"]

BINS = 400
MOST_LABELS = 24
MOST_RANKS = 64
STAGE_COLORS = {
    "data": "#bab0ac",
    "forward": "#4e79a7",
    "backward": "#76b7b2",
    "waiting": "#e15759",
    "applying": "#f28e2b",
    "optimizer": "#edc948",
}
_RUN_COLORS = ("#4e79a7", "#e15759", "#59a14f", "#f28e2b", "#b07aa1", "#76b7b2", "#9c755f", "#ff9da7")


@dataclass(frozen=True)
class Picture:
    """A figure, and what to say about it.

    Attributes:
        name: of its file.
        figure: of matplotlib.
    """

    name: str
    title: str
    caption: str
    figure: Any


def label(text: object, most: int = 60) -> str:
    """A name as matplotlib shows it: on one line, not too long, dollars no mathematics."""
    shown = printable(text, most)
    # A leading underscore would leave it out of the legend.
    return ("\u200a" if shown.startswith("_") else "") + shown.replace("$", r"\$")


def name_of(run: Run) -> str:
    return label(run.header.get("label") or run.header.get("compressor") or run.path.stem)


def compare(runs: Sequence[Run]) -> list[Picture]:
    """What several runs share: how they learned, and what they sent."""
    return [picture for picture in (_learning(runs), _compression(runs)) if picture is not None]


def look_at(run: Run) -> list[Picture]:
    """What is one run's own: its layers, and where its time went."""
    return [picture for picture in (_layers(run), _milliseconds(run), _ranks(run)) if picture is not None]


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("matplotlib is not installed: pip install 'gradcomp[demo]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _colors(runs: Sequence[Run]) -> Any:
    return zip(runs, itertools.cycle(_RUN_COLORS), strict=False)


def _learning(runs: Sequence[Run]) -> Picture | None:
    """Loss and accuracy against time and against bytes."""
    if not any(run.first for run in runs):
        return None
    figure = _figure(10, 6.4)
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    for run, color in _colors(runs):
        marked = accuracies(run)
        for column, (key, unit) in enumerate((("time_s", 1.0), ("bytes_sent", 1e6))):
            x = per_bin(series(run.first, key), BINS) / unit
            # Thin: single steps; thick: the mean of a fiftieth of the run.
            loss = per_bin(series(run.first, "loss"), BINS)
            grid[0, column].plot(x, loss, color=color, linewidth=0.7, alpha=0.35)
            thick = per_bin(x, 50), per_bin(loss, 50)
            grid[0, column].plot(*thick, color=color, label=name_of(run))
            xs = np.array(series(marked, key)) / unit
            dot = "o" if len(marked) < 40 else ""
            grid[1, column].plot(xs, series(marked, "accuracy"), color=color, marker=dot, markersize=3.5)
    units = ("seconds of training", "megabytes sent by a worker")
    for row, name in enumerate(("loss", "test accuracy in percent")):
        for column, axis in enumerate(units):
            _tidy(grid[row, column], axis if row else "", "" if column else name)
    grid[0, 0].legend(frameon=False)
    return Picture(
        "learning",
        "Loss and accuracy",
        "Against time on the left, which leaves out start-up and evaluation; against what one worker sent on the "
        "right. Thin lines are single steps, or means of a few.",
        figure,
    )


def _compression(runs: Sequence[Run]) -> Picture | None:
    """Ratio, density, tau and residual norm over time."""
    if not any(run.first for run in runs):
        return None
    figure = _figure(10, 5.6)
    grid = figure.subplots(2, 2, sharex=True).flat
    panels = (
        ("ratio", "ratio so far"),
        ("density", "density"),
        ("tau", "mean tau"),
        ("residual_norm", "residual norm"),
    )
    for axes, (key, what) in zip(grid, panels, strict=True):
        for run, color in _colors(runs):
            x, y = (per_bin(series(run.first, name), BINS) for name in ("time_s", key))
            if key == "density":  # which jumps from step to step
                axes.plot(x, y, color=color, linewidth=0.7, alpha=0.35)
                x, y = per_bin(x, 50), per_bin(y, 50)
            axes.plot(x, y, color=color, linewidth=1.3, label=name_of(run))
        # Zero: a compressor that has none.
        lines = [line.get_ydata() for line in axes.lines]
        if key in ("density", "tau") and any((line > 0).any() for line in lines):
            axes.set_yscale("log", nonpositive="mask")
        _tidy(axes, "seconds of training" if key in ("tau", "residual_norm") else "", what)
    figure.axes[0].legend(frameon=False)
    return Picture(
        "compression",
        "What compression did",
        "Ratio: bytes of float32 gradients over bytes of packets. Density: share of the compressed elements that a "
        "step sent; tau: their threshold. Residual norm: of what waits to be sent.",
        figure,
    )


def _layers(run: Run) -> Picture | None:
    """Density, tau and residual norm, layer by layer over time."""
    wanted = (("density", "density"), ("tau", "tau"), ("residual_norm", "residual norm"))
    grids = [(what, grid) for key, what in wanted if (grid := layer_grid(run, key)) is not None]
    if not grids:
        return None
    from matplotlib.colors import LogNorm

    rows = max(len(grid.layers) for _, grid in grids)
    each = min(4.8, max(1.5, 0.9 + 0.17 * rows))
    figure = _figure(10, each * len(grids))
    for axes, (what, grid) in zip(np.atleast_1d(figure.subplots(len(grids), 1)), grids, strict=True):
        positive = grid.values[np.isfinite(grid.values) & (grid.values > 0)]
        norm = LogNorm(positive.min(), max(positive.max(), 1.01 * positive.min())) if len(positive) else None
        edges = np.concatenate([[0.0], grid.times_s])
        shown = np.where(grid.values > 0, grid.values, math.nan)
        mesh = axes.pcolormesh(
            edges, np.arange(len(grid.layers) + 1), shown, norm=norm, cmap="viridis", rasterized=True
        )
        axes.set_facecolor("#eeeeee")
        every = math.ceil(len(grid.layers) / MOST_LABELS)
        places = range(0, len(grid.layers), every)
        axes.set_yticks([place + 0.5 for place in places], [label(grid.layers[place], 40) for place in places])
        axes.tick_params(axis="y", length=0, labelsize=7.5 if len(places) > 12 else 9)
        axes.invert_yaxis()
        axes.set_title(what, loc="left", fontsize=10)
        figure.colorbar(mesh, ax=axes, pad=0.01, aspect=max(6, 3 * each))
    axes.set_xlabel("seconds of training")
    more = "" if rows <= MOST_LABELS else f" Of {rows} layers not all are named."
    return Picture(
        "layers",
        "Layer by layer",
        f"Rank {run.rank}'s, the first layer at the top; grey where nothing was sent.{more}",
        figure,
    )


def _milliseconds(run: Run) -> Picture | None:
    """The stages of a step over time, on the rank that is looked at first."""
    steps = run.first
    if not steps:
        return None
    bins = min(BINS // 2, max(1, len(steps) // 4))
    x = per_bin(series(steps, "time_s"), bins)
    stages = {stage: per_bin(values, bins) for stage, values in stage_ms(steps).items()}
    stages = {stage: values for stage, values in stages.items() if values.any()}
    if not stages:
        return None
    figure = _figure(10, 6.2)
    hidden = per_bin(series(steps, "hidden_fraction"), bins)
    known = bool(np.isfinite(hidden).any())
    upper, codec, *share = figure.subplots(2 + known, 1, sharex=True, height_ratios=(3, 1, 1)[: 2 + known])
    upper.stackplot(
        x, *stages.values(), labels=list(stages), colors=[STAGE_COLORS[stage] for stage in stages], linewidth=0
    )
    # The first steps warm up; they must not make the rest small.
    total = sum(stages.values())
    if len(x) > 1 and np.size(total):
        upper.set_ylim(0, 1.25 * float(np.percentile(total, 97)) or 1.0)
    for key, style in (("compress_ms", "-"), ("decompress_ms", "--")):
        name = key.removesuffix("_ms")
        codec.plot(x, per_bin(series(steps, key), bins), color="#555555", linestyle=style, linewidth=1.2, label=name)
    _tidy(upper, "", "ms a step")
    _tidy(codec, "" if known else "seconds of training", "ms a step")
    codec.set_ylim(bottom=0)
    for axes in share:
        axes.plot(x, 100 * hidden, color="#59a14f", linewidth=1.2)
        _tidy(axes, "seconds of training", "hidden, %")
        axes.set_ylim(0, 105)
    upper.legend(frameon=False, ncols=len(STAGES), loc="upper right")
    codec.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 0.93))
    return Picture(
        "milliseconds",
        "Where the milliseconds of a step went",
        f"Rank {run.rank}'s training thread. Waiting for the network and applying what came is what was not hidden of "
        "the exchange. Below: what compressing and decompressing took, most of it beside the training thread; "
        "which share of the exchange was hidden.",
        figure,
    )


def _ranks(run: Run) -> Picture | None:
    """The stages of a mean step, rank by rank."""
    times = [row for row in rank_times(run) if any(row.stages.values())]
    if not times:
        return None
    shown = times
    if len(times) > MOST_RANKS:  # those that held others up, and those that waited
        by_own = sorted(times, key=lambda row: row.own)
        shown = sorted([*by_own[: MOST_RANKS // 2], *by_own[-MOST_RANKS // 2 :]], key=lambda row: row.rank)
    figure = _figure(10, 1.3 + 0.3 * len(shown))
    axes = figure.subplots()
    left = np.zeros(len(shown))
    for stage in STAGES:
        widths = np.array([row.stages[stage] for row in shown])
        if widths.any():
            axes.barh(range(len(shown)), widths, left=left, height=0.72, color=STAGE_COLORS[stage], label=stage)
        left += widths
    axes.set_yticks(range(len(shown)), [f"rank {row.rank}" for row in shown])
    axes.invert_yaxis()
    _tidy(axes, "ms of a mean step", "")
    axes.grid(axis="y", visible=False)
    axes.legend(frameon=False, ncols=len(STAGES), loc="lower right", bbox_to_anchor=(1.0, 1.0))
    more = "" if len(shown) == len(times) else f" The slowest and the fastest {MOST_RANKS // 2} of {len(times)} ranks."
    return Picture(
        "ranks",
        "Rank by rank",
        "Who waits longest waits for those that wait least." + more,
        figure,
    )
