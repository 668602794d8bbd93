"""A run's logs while they are being written: what is new of each rank, and what is known of the last steps."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

from gradcomp.integrations.run_log import LogReader, beside, same_run

__all__ = ["FollowedRank", "FollowedRun"]

_RECENT = 100  # steps that rates and means are over
_LOSSES = 5000


class FollowedRank:
    """One rank's log.

    Attributes:
        recent: its last steps.
        accuracy: the last one it told, in percent.
        layers: what it last told of its layers.
        nonfinite: steps with a gradient that was not finite.
    """

    def __init__(self, path: Path) -> None:
        self.reader = LogReader(path)
        self.recent: deque[dict[str, Any]] = deque(maxlen=_RECENT)
        self.losses: deque[float] = deque(maxlen=_LOSSES)
        self.accuracy: float | None = None
        self.layers: dict[str, dict[str, Any]] = {}

    def read(self) -> None:
        """Take in what is new.

        Raises:
            ConfigError: the file cannot be read, or is damaged.
        """
        for step in self.reader.read():
            if self.recent and step["step"] < self.recent[-1]["step"]:  # begun anew
                self.recent.clear()
                self.losses.clear()
            self.recent.append(step)
            if step.get("loss") is not None:
                self.losses.append(step["loss"])
            if step.get("accuracy") is not None:
                self.accuracy = step["accuracy"]
            self.layers = step.get("layers", self.layers)

    @property
    def last(self) -> dict[str, Any]:
        """Its last step; empty before the first."""
        return self.recent[-1] if self.recent else {}

    @property
    def silent_s(self) -> float:
        """For how long it has written nothing, in seconds; 0 once it has ended."""
        return 0.0 if self.reader.end is not None else max(0.0, time.time() - self.reader.path.stat().st_mtime)

    def rate(self, key: str) -> float:
        """How much ``key`` grows in a second of training."""
        if len(self.recent) < 2:
            return 0.0
        first, last = self.recent[0], self.recent[-1]
        took_s = last["time_s"] - first["time_s"]
        return 0.0 if took_s <= 0 else ((last.get(key) or 0) - (first.get(key) or 0)) / took_s


class FollowedRun:
    """All ranks' logs, as they appear.

    Args:
        path: rank 0's.
    """

    def __init__(self, path: Path) -> None:
        self._first = FollowedRank(path)
        self.ranks: dict[int, FollowedRank] = {}

    def read(self) -> None:
        """Take in what is new.

        Raises:
            ConfigError: rank 0's file is not there, or one is damaged.
        """
        self._first.read()
        header = self.header
        if not header:
            return
        self.ranks = {header["rank"]: self._first, **{r: rank for r, rank in self.ranks.items() if r != header["rank"]}}
        for number, path in beside(self._first.reader.path, header):
            if number not in self.ranks and path.exists():
                self.ranks[number] = FollowedRank(path)
            if number in self.ranks:
                self.ranks[number].read()
        # A file that is left of another run, or is about to be written over.
        others = {number: rank for number, rank in self.ranks.items() if rank is not self._first}
        for number, rank in others.items():
            if not same_run(header, rank.reader.header, number):
                del self.ranks[number]

    @property
    def first(self) -> FollowedRank:
        """The rank whose log was named."""
        return self._first

    @property
    def header(self) -> dict[str, Any]:
        return self._first.reader.header

    @property
    def end(self) -> dict[str, Any] | None:
        return self._first.reader.end
