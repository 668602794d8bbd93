"""Finished runs of ``gradcomp bench train``: the file that keeps them, and what several seeds of a method come to."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gradcomp.errors import ConfigError
from gradcomp.integrations.report import size

__all__ = ["Point", "Results", "Row", "Run", "Spread", "seconds_to", "spread", "summarize"]


class Point(NamedTuple):
    """A model after an epoch: seconds of training and bytes a rank sent until then (None: nobody counted)."""

    epoch: int
    seconds: float
    bytes_sent: float | None
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run.

    Attributes:
        points: after each epoch, the last one being the result.
        steps: of rank 0.
        bytes_sent, bytes_received: mean of all ranks, as the kernel counts them; on loopback, rank 0's as gradcomp
            counts them; None where nobody counts.
        ratio: bytes of float32 gradients over bytes of packets.
    """

    points: tuple[Point, ...]
    steps: int
    bytes_sent: float | None
    bytes_received: float | None
    ratio: float

    @property
    def accuracy(self) -> float:
        """At the end, in percent."""
        return self.points[-1].accuracy

    @property
    def train_s(self) -> float:
        """Seconds of training in all."""
        return self.points[-1].seconds


class Results:
    """Runs by what they were runs of, and why the others failed.

    Args:
        path: one JSON object a line, read now and appended to with each run; None: kept in memory only.

    Raises:
        ConfigError: the file cannot be read or written, or is something else.
    """

    def __init__(self, path: str | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._runs: dict[str, Run] = {}
        self._errors: dict[str, str] = {}
        if self._path is None:
            return
        try:
            text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--results {path}: {error}") from None
        whole = text[: text.rfind("\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            self._read(line, f"--results {path}: line {number}")
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.truncate(len(whole.encode()))  # whoever wrote it may have been ended in the middle of a line
        except OSError as error:
            raise ConfigError(f"--results {path}: {error.strerror or error}") from None

    def _read(self, line: str, where: str) -> None:
        try:
            self._take(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{where} is no run of this benchmark: {error!r}") from None

    def _take(self, record: dict[str, Any]) -> None:
        name = _name(record["of"])
        if "error" in record:
            self._errors[name] = record["error"]
            return
        fields = dict(record["run"])
        points = tuple(Point(*point) for point in fields.pop("points"))
        if not points:
            raise ValueError("it has no points")
        self._runs[name] = Run(points=points, **fields)
        self._errors.pop(name, None)

    def run(self, of: dict[str, object]) -> Run | None:
        """The run of just this, if it is there."""
        return self._runs.get(_name(of))

    def error(self, of: dict[str, object]) -> str | None:
        """Why the run of just this failed the last time, if it did."""
        return None if _name(of) in self._runs else self._errors.get(_name(of))

    def add(self, of: dict[str, object], outcome: Run | str) -> None:
        """Keep a run, or why it failed."""
        record = {"of": of} | ({"run": asdict(outcome)} if isinstance(outcome, Run) else {"error": outcome})
        self._take(json.loads(json.dumps(record)))
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _name(of: dict[str, object]) -> str:
    return json.dumps(of, sort_keys=True)


class Spread(NamedTuple):
    """Mean and sample standard deviation (0 for one) of ``runs`` values."""

    mean: float
    deviation: float
    runs: int

    def text(self, form: str) -> str:
        """For a table, each number in the given form.

        >>> Spread(97.25, 0.5, 3).text(".2f"), Spread(97.25, 0.0, 1).text(".1f")
        ('97.25 +- 0.50', '97.2')
        """
        return f"{self.mean:{form}}" + (f" +- {self.deviation:{form}}" if self.runs > 1 else "")


def spread(values: Iterable[float]) -> Spread:
    """Of one value at least.

    >>> spread([1.0, 2.0, 3.0])
    Spread(mean=2.0, deviation=1.0, runs=3)
    """
    found = list(values)
    return Spread(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found))


def seconds_to(run: Run, target: float) -> float | None:
    """Seconds of training until the end of the first epoch with an accuracy of ``target`` percent; None: never."""
    return next((point.seconds for point in run.points if point.accuracy >= target), None)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the runs of one method come to. None: nobody knows.

    Attributes:
        runs, failed: how many there are, and how many there are not.
        against_dense: difference of the mean accuracies, in points.
        to_target: seconds, of those runs that reached the target.
        traffic: how many times fewer bytes a rank sends than the dense method's.
    """

    method: str
    runs: int
    failed: int
    accuracy: Spread | None = None
    against_dense: float | None = None
    to_target: Spread | None = None
    epoch_s: float | None = None
    bytes_sent: float | None = None
    traffic: float | None = None
    ratio: float | None = None

    def cells(self, target: float | None) -> dict[str, str]:
        """For a table."""
        missing = f", {self.failed} failed" if self.failed else ""
        row = {
            "method": self.method,
            "runs": f"{self.runs}{missing}",
            "accuracy %": "-" if self.accuracy is None else self.accuracy.text(".2f"),
            "against dense": _cell(self.against_dense, "{:+.2f}"),
        }
        if target is not None:
            row[f"s to {target:.1f} %"] = self._to_target()
        return row | {
            "s/epoch": _cell(self.epoch_s, "{:.2f}"),
            "sent/rank": "-" if self.bytes_sent is None else size(self.bytes_sent),
            "less traffic": _cell(self.traffic, "{:.1f}x"),
            "ratio": _cell(self.ratio, "{:.1f}x"),
        }

    def _to_target(self) -> str:
        if not self.runs:
            return "-"
        if self.to_target is None:
            return f"not reached, 0 of {self.runs}"
        missed = "" if self.to_target.runs == self.runs else f", {self.to_target.runs} of {self.runs}"
        return self.to_target.text(".1f") + missed


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def summarize(
    method: str, runs: Sequence[Run], failed: int, *, dense: Sequence[Run] = (), target: float | None = None
) -> Row:
    """A method's row, from its runs and those of the dense method."""
    if not runs:
        return Row(method=method, runs=0, failed=failed)
    accuracy = spread(run.accuracy for run in runs)
    reached = [] if target is None else [s for s in (seconds_to(run, target) for run in runs) if s is not None]
    sent, dense_sent = _mean_sent(runs), _mean_sent(dense)
    return Row(
        method=method,
        runs=len(runs),
        failed=failed,
        accuracy=accuracy,
        against_dense=accuracy.mean - spread(run.accuracy for run in dense).mean if dense else None,
        to_target=spread(reached) if reached else None,
        epoch_s=spread(run.train_s / len(run.points) for run in runs).mean,
        bytes_sent=sent,
        traffic=dense_sent / sent if sent and dense_sent else None,
        ratio=spread(run.ratio for run in runs).mean,
    )


def _mean_sent(runs: Sequence[Run]) -> float | None:
    counted = [run.bytes_sent for run in runs if run.bytes_sent is not None]
    return statistics.fmean(counted) if counted else None
