"""Reading the logs of a run, whole or while they are being written. docs/WATCHING.md says what is in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradcomp.errors import ConfigError
from gradcomp.integrations.callbacks import rank_path
from gradcomp.integrations.recorder import LOG_FORMAT

__all__ = ["LogReader", "Run", "beside", "open_run", "printable", "same_run", "series"]

Line = dict[str, Any]

_NUMBERS = frozenset(
    (
        *("time_s", "epoch", "loss", "accuracy", "lr", "bytes_sent", "bytes_received", "ratio", "pull_ratio"),
        *("density", "tau", "residual_norm", "hidden_fraction", "compress_ms", "wait_ms", "decompress_ms"),
        *("exposed_ms", "step_ms", "forward_ms", "backward_ms", "optimizer_ms", "nonfinite_steps", "version"),
    )
)


class LogReader:
    """One rank's log. Each :meth:`read` goes on where the last one ended, which is before a line without its end.

    Attributes:
        header: ``run`` of the first line: what is run. Empty before it is there.
        end: ``end`` of the last line of a run that is over: what it came to.
        cut_off: whether the last line was without its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.header: Line = {}
        self.end: Line | None = None
        self.cut_off = False
        self._first = b""
        self._offset = self._lines = 0

    def read(self) -> list[Line]:
        """The steps that are new. A file that was begun anew is read anew.

        Raises:
            ConfigError: it cannot be read, or holds something that is no log; names file and line.
        """
        try:
            with self.path.open("rb") as file:
                if file.read(len(self._first)) != self._first:
                    self._forget()
                file.seek(self._offset)
                data = file.read()
        except OSError as error:
            raise ConfigError(f"{self.path}: {error.strerror or error}") from None
        whole, newline, rest = data.rpartition(b"\n")
        self.cut_off = bool(rest)
        self._offset += len(whole) + len(newline)
        if self._lines == 0 and newline:
            self._first = whole.partition(b"\n")[0] + newline
        return [] if not newline else [step for line in whole.split(b"\n") if (step := self._take(line)) is not None]

    def _take(self, text: bytes) -> Line | None:
        """A line, if it is a step."""
        self._lines += 1
        try:
            line = json.loads(text)
        except ValueError as error:
            raise self._damaged(f"it is not JSON ({error})") from None
        if not isinstance(line, dict):
            raise self._damaged("it is not a JSON object")
        if self._lines == 1:
            if not isinstance(line.get("run"), dict):
                raise self._damaged('it has no "run", as the first line of a log of gradcomp has')
            self.header = self._check_header(line["run"])
        if "end" in line:
            if not isinstance(line["end"], dict):
                raise self._damaged("end must be an object")
            self.end = line["end"]
            if "step" not in line:  # the run ended before there was one
                return None
        return self._check_step(line)

    def _check_header(self, line: Line) -> Line:
        if line.get("format") != LOG_FORMAT:
            raise self._damaged(f"it is of format {line.get('format')!r}; this version reads format {LOG_FORMAT}")
        rank, world_size = line.get("rank"), line.get("world_size")
        if not (_is_count(rank) and _is_count(world_size) and line["rank"] < line["world_size"]):
            raise self._damaged(f"rank is {rank!r} and world_size {world_size!r}; they must be integers, rank the less")
        return line

    def _check_step(self, line: Line) -> Line:
        if not _is_count(line.get("step")) or not _is_number(line.get("time_s")):
            raise self._damaged("a step must have an integer step >= 0 and a number time_s")
        for key in _NUMBERS & line.keys():
            if line[key] is not None and not _is_number(line[key]):
                raise self._damaged(f"{key} is {line[key]!r}; it must be a number or null")
        layers = line.get("layers", {})
        if not isinstance(layers, dict) or not all(isinstance(row, dict) for row in layers.values()):
            raise self._damaged("layers must be an object of objects")
        return line

    def _damaged(self, why: str) -> ConfigError:
        return ConfigError(f"{self.path}, line {self._lines} is damaged: {why}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class Run:
    """A run as its logs tell it.

    Attributes:
        path: rank 0's log.
        readers, steps: by rank; of the ranks whose logs were found.
        strange: logs beside it that are of another run.
    """

    path: Path
    readers: Mapping[int, LogReader]
    steps: Mapping[int, Sequence[Line]]
    strange: Sequence[Path] = ()

    @property
    def rank(self) -> int:
        """The first one found: it has the accuracy."""
        return min(self.readers)

    @property
    def header(self) -> Line:
        return self.readers[self.rank].header

    @property
    def first(self) -> Sequence[Line]:
        """That rank's steps."""
        return self.steps[self.rank]

    @property
    def end(self) -> Line | None:
        return self.readers[self.rank].end

    @property
    def missing(self) -> list[int]:
        """Ranks whose logs were not found."""
        return [rank for rank in range(self.header["world_size"]) if rank not in self.readers]


def beside(path: Path, header: Line) -> Iterator[tuple[int, Path]]:
    """Where the logs of the other ranks of a run would be."""
    if header["rank"] == 0:
        yield from ((rank, rank_path(path, rank)) for rank in range(1, header["world_size"]))


def same_run(one: Line, other: Line, rank: int) -> bool:
    """Whether another rank's header is of the same run, as far as one can tell."""
    keys = ("world_size", "task", "compressor", "exchange", "seed", "epochs")
    return other.get("rank") == rank and all(one.get(key) == other.get(key) for key in keys)


def open_run(path: str | Path) -> Run:
    """Read the logs of all ranks: the one named, and those beside it.

    Raises:
        ConfigError: the file is not there, is empty, or is damaged; names file and line.
    """
    path = Path(path)
    first = LogReader(path)
    steps = {0: first.read()}
    if not first.header:
        raise ConfigError(f"{path}: it is empty; a log of gradcomp begins with a line about the run")
    readers = {first.header["rank"]: first}
    steps = {first.header["rank"]: steps[0]}
    strange = []
    for rank, other in beside(path, first.header):
        if not other.exists():
            continue
        reader = LogReader(other)
        read = reader.read()
        if same_run(first.header, reader.header, rank):
            readers[rank], steps[rank] = reader, read
        else:
            strange.append(other)
    return Run(path, readers, steps, strange)


def series(steps: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """One number of each step; NaN where there is none."""
    values = (step.get(key) for step in steps)
    return [float("nan") if value is None else float(value) for value in values]


def printable(text: object, most: int = 60) -> str:
    """What a log calls something, for a terminal or a picture: on one line, not too long, no control characters.

    >>> printable("\\x1b[2Jfc1.weight")
    '[2Jfc1.weight'
    """
    shown = "".join(letter for letter in str(text) if letter.isprintable()).strip() or "-"
    return shown if len(shown) <= most else f"{shown[: most // 2 - 1]}…{shown[-(most // 2) :]}"
