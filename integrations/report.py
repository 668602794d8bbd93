"""What a run tells: progress on standard error, one JSON line a step, tables on standard output."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, TextIO

from gradcomp.errors import ConfigError

__all__ = ["Reporter", "Summary", "open_log", "size", "table"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A finished run, as one rank saw it.

    Attributes:
        rank: which one.
        accuracy: of the test data at the end, in percent.
        steps: optimizer steps, the same on every worker.
        train_s: seconds spent training; start-up and evaluation are not in it.
        bytes_sent, bytes_received: by this rank, everything on the wire.
        ratio: bytes of float32 gradients over bytes of packets.
        pull_ratio: with a server, the same for what came back; 0 without one.
        updates: that the server made.
        late: pushes that came too late for their round.
        staleness: number of this rank's pushes by their staleness.
    """

    rank: int
    task: str
    compressor: str
    transport: str
    exchange: str
    workers: int
    seed: int
    accuracy: float
    steps: int
    train_s: float
    bytes_sent: int
    bytes_received: int
    ratio: float
    pull_ratio: float = 0.0
    updates: int = 0
    late: int = 0
    staleness: Mapping[int, int] = field(default_factory=dict)

    def table(self) -> str:
        """The run on two lines."""
        row = {
            "compressor": self.compressor,
            "workers": str(self.workers),
            "accuracy": f"{self.accuracy:.2f} %",
            "steps": str(self.steps),
            "time": f"{self.train_s:.1f} s",
            "steps/s": f"{self.steps / self.train_s:.2f}" if self.train_s else "-",
            "sent/step": size(self.bytes_sent / max(1, self.steps)),
            "received/step": size(self.bytes_received / max(1, self.steps)),
            "ratio": f"{self.ratio:.1f}x",
        }
        if self.pull_ratio:
            pushes = sum(self.staleness.values())
            mean = sum(staleness * count for staleness, count in self.staleness.items()) / max(1, pushes)
            row |= {
                "pull ratio": f"{self.pull_ratio:.1f}x",
                "updates": str(self.updates),
                "staleness": f"{mean:.1f}, max {max(self.staleness, default=0)}",
            }
        return table([row])

    def json(self) -> str:
        """The run as one line of JSON."""
        return json.dumps(asdict(self))


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same keys as aligned columns, a heading and a rule; the first column to the left, numbers right.

    >>> print(table([{"name": "none", "time": "9.0 s"}, {"name": "threshold", "time": "10.5 s"}]))
    name         time
    ---------  ------
    none        9.0 s
    threshold  10.5 s
    """
    heads = list(rows[0])
    widths = [max(len(head), *(len(row[head]) for row in rows)) for head in heads]

    def line(cells: Sequence[str]) -> str:
        first, *others = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join([first, *others]).rstrip()

    rule = ["-" * width for width in widths]
    return "\n".join([line(heads), line(rule), *(line([row[head] for head in heads]) for row in rows)])


def size(count: float) -> str:
    """Bytes for people, in powers of 1000 as links are rated.

    >>> size(512), size(1_533_224), size(2.5e9)
    ('512 B', '1.53 MB', '2.50 GB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


def open_log(path: str) -> TextIO:
    """Open a log for writing.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--log {path}: {error.strerror or error}") from None


class Reporter:
    """Rank 0's voice: a progress bar on a terminal, a line an epoch elsewhere, and the log.

    Args:
        label: what the progress starts with.
        steps: how many steps the run will take.
        log: one JSON object a line is written here for each step.

    Attributes:
        logging: whether :meth:`step` wants a record.
    """

    def __init__(self, *, label: str, steps: int, quiet: bool, log: TextIO | None) -> None:
        self._label, self._quiet, self._log = label, quiet, log
        self._bar: Any = None
        self.logging = log is not None
        if quiet or not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            print("for a progress bar: pip install 'gradcomp[demo]'", file=sys.stderr)
            return
        self._bar = tqdm(total=steps, desc=label, unit="step", leave=True, dynamic_ncols=True, ascii=" #")

    def step(self, record: Mapping[str, object]) -> None:
        """Note a finished step; ``record`` becomes a line of the log."""
        if self._log is not None:
            self._log.write(json.dumps(record) + "\n")
            self._log.flush()
        if self._bar is not None:
            self._bar.update(1)

    def epoch(self, *, epoch: int, epochs: int, loss: float, accuracy: float, train_s: float) -> None:
        """Show how an epoch ended."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"epoch {epoch}/{epochs}, loss {loss:.3f}, accuracy {accuracy:.1f} %")
        elif not self._quiet:
            text = f"{self._label}: epoch {epoch}/{epochs}  loss {loss:.3f}  accuracy {accuracy:.1f} %  {train_s:.1f} s"
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.close()
