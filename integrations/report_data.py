"""What a report draws, computed from the logs: thinned out, so that a picture of a million steps stays one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcomp.integrations.run_log import Run, series

__all__ = ["STAGES", "LayerGrid", "RankTimes", "accuracies", "layer_grid", "per_bin", "rank_times", "stage_ms"]

Array = NDArray[np.float64]

# The stages of a step in the training thread, in their order.
STAGES = ("data", "forward", "backward", "waiting", "applying", "optimizer")


def per_bin(values: Sequence[float] | Array, bins: int) -> Array:
    """Means of equally many values each, at most so many means; NaN and infinities left out.

    >>> per_bin([1, 3, 5, float("nan"), 7], 3)
    array([2., 5., 7.])
    """
    array = np.asarray(values, dtype=np.float64)
    each = _per_bin(len(array), bins)
    if each == 1:
        return array
    grid = np.full((-(-len(array) // each), each), math.nan)
    grid.flat[: len(array)] = array
    there = np.isfinite(grid)
    counts = there.sum(axis=1)
    means: Array = np.where(there, grid, 0.0).sum(axis=1) / np.maximum(counts, 1)
    return np.where(counts > 0, means, math.nan)


def _per_bin(count: int, bins: int) -> int:
    return max(1, math.ceil(count / bins))


def accuracies(run: Run) -> list[dict[str, Any]]:
    """The steps with an accuracy."""
    return [step for step in run.first if step.get("accuracy") is not None]


def stage_ms(steps: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    """Milliseconds of each stage in each step; together they are the step.

    Without ``step_ms``, as where a loop of one's own is watched, there is only what the exchange took.
    """

    def ms(key: str) -> Array:
        return np.nan_to_num(np.array(series(steps, key), dtype=np.float64))

    exposed = ms("exposed_ms")
    found = {stage: ms(f"{stage}_ms") for stage in ("forward", "backward", "optimizer")}
    found["waiting"] = np.minimum(ms("wait_ms"), exposed)
    found["applying"] = exposed - found["waiting"]
    found["data"] = np.maximum(0.0, ms("step_ms") - sum(found.values()))
    return {stage: found[stage] for stage in STAGES}


@dataclass(frozen=True)
class RankTimes:
    """How one rank spent its time, as means over its steps in milliseconds.

    Attributes:
        stages: by stage, in the training thread.
        compress, decompress: in whichever thread.
        hidden: share of the exchange that was hidden.
        own: all stages but waiting.
        slowest: in which share of the steps its own work took longest of all ranks.
    """

    rank: int
    steps: int
    stages: dict[str, float]
    compress: float
    decompress: float
    hidden: float
    own: float
    slowest: float


def rank_times(run: Run) -> list[RankTimes]:
    """Of every rank."""
    stages = {rank: stage_ms(steps) for rank, steps in run.steps.items() if steps}
    own = {rank: sum(rows[stage] for stage in STAGES if stage != "waiting") for rank, rows in stages.items()}
    shared = min((len(values) for values in own.values()), default=0)  # type: ignore[arg-type]
    slowest = np.argmax([values[:shared] for values in own.values()], axis=0) if shared else np.empty(0)  # type: ignore[index]
    times = []
    for place, (rank, rows) in enumerate(stages.items()):
        steps = run.steps[rank]
        mean = {key: _mean(series(steps, key)) for key in ("compress_ms", "decompress_ms", "hidden_fraction")}
        times.append(
            RankTimes(
                rank=rank,
                steps=len(steps),
                stages={stage: float(values.mean()) for stage, values in rows.items()},
                compress=mean["compress_ms"],
                decompress=mean["decompress_ms"],
                hidden=mean["hidden_fraction"],
                own=float(np.mean(own[rank])),
                slowest=float((slowest == place).mean()) if shared else math.nan,
            )
        )
    return times


def _mean(values: Sequence[float]) -> float:
    array = np.asarray(values)
    array = array[np.isfinite(array)]
    return float(array.mean()) if len(array) else math.nan


@dataclass(frozen=True)
class LayerGrid:
    """One number of each layer over time.

    Attributes:
        layers: their names, in the model's order as far as it is known.
        times_s: the ends of the columns.
        values: (layers, columns); NaN where there is nothing.
    """

    layers: list[str]
    times_s: Array
    values: Array


def layer_grid(run: Run, key: str, *, columns: int = 200) -> LayerGrid | None:
    """A number of each layer over time, at most so many columns; None if no layer has it."""
    steps = [step for step in run.first if step.get("layers")]
    rows: dict[str, Array] = {}
    for place, step in enumerate(steps):
        for name, row in step["layers"].items():
            value = row.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rows.setdefault(name, np.full(len(steps), math.nan))[place] = value
    if not rows:
        return None
    # The log names parameters as they leave, the last layer first; `compressors` has the model's order.
    order = {name: place for step in run.first for place, name in enumerate(step.get("compressors", {}))}
    layers = sorted(rows, key=lambda name: order.get(name, len(order)))
    each, times = _per_bin(len(steps), columns), series(steps, "time_s")
    ends = [times[min(last, len(times) - 1)] for last in range(each - 1, len(times) + each - 1, each)]
    return LayerGrid(layers, np.array(ends), np.array([per_bin(rows[name], columns) for name in layers]))
