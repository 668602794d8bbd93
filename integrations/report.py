"""What a run comes to, and tables of it on standard output."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

__all__ = ["Summary", "size", "table"]


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
