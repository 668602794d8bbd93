"""Which of several choices makes a step shortest, found by trying: pure logic, no clock and no network.

These are coroutines. Each yields the label of the choice that the next step is to go with, and is sent what that step
took, the same numbers on every rank: so all ranks decide alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

__all__ = ["IN_TIME", "Row", "Sample", "Trials", "median", "race", "watch"]

IN_TIME = "it is time again"

T = TypeVar("T")

_LEAST_ROUNDS, _MOST_ROUNDS = 2, 4
# Not even tried, or given up after two such steps in a row: what takes so many times the best.
_HOPELESS, _MOST_LATE = 2.0, 2
# What takes so many times the best is given up at once, even though the first step after a change pays for the change.
_HOPELESS_AT_ONCE = 8.0
# After one turn only what is slower by that is out: a few steps may mislead.
_CLEARLY = 0.4
_CHANGED = 1.25
# How often ranks compare steps: each second, by what a step took, but each 25 steps at least: they may be long by now.
_CHECK_S, _LEAST_CHECK, _MOST_CHECK, _MOST_CHECKS = 1.0, 4, 25, 8


@dataclass(frozen=True)
class Sample:
    """What a step took, in seconds.

    Attributes:
        step_s: from the end of one exchange to the end of the next.
        wait_s: of it, what the training thread waited for the exchange: on the rank that waited least, so that it is
            the network that was waited for, and no rank that was late.
        compress_s, decompress_s: on the exchange's own thread.
    """

    step_s: float
    wait_s: float
    compress_s: float = 0.0
    decompress_s: float = 0.0


Trials = Generator[str, Sample, T]


@dataclass
class Row:
    """What is known of one choice.

    Attributes:
        samples: of the steps that count.
        out: why it is no longer tried; empty while it is.
    """

    samples: list[Sample] = field(default_factory=list)
    out: str = ""

    @property
    def step_s(self) -> float:
        """Median step; infinite if there was none."""
        return statistics.median(s.step_s for s in self.samples) if self.samples else math.inf

    @property
    def median(self) -> Sample:
        """Of each number by itself; not if there was no step."""
        return median(self.samples)

    def as_dict(self) -> dict[str, object]:
        """For stats; JSON-able."""
        took_ms = self.step_s * 1e3 if self.samples else None
        return {"step_ms": took_ms, "steps": len(self.samples), "out": self.out}

    def __str__(self) -> str:
        took = f"{self.step_s * 1e3:.1f} ms in {len(self.samples)} steps" if self.samples else ""
        return ", ".join(filter(None, (took, self.out)))

    @property
    def doubt_s(self) -> float:
        """About how far that is from the truth: the median's standard error, from the median deviation."""
        middle = self.step_s
        deviation = statistics.median(abs(s.step_s - middle) for s in self.samples)
        return 1.86 * deviation / math.sqrt(len(self.samples))


def median(samples: Sequence[Sample]) -> Sample:
    """Of each number by itself."""
    columns = zip(*((s.step_s, s.wait_s, s.compress_s, s.decompress_s) for s in samples), strict=True)
    return Sample(*map(statistics.median, columns))


def race(
    rows: Mapping[str, Row],
    *,
    now: str | None,
    running: str,
    trial: int,
    margin: float,
    least_s: Mapping[str, float],
) -> Trials[str]:
    """Try each in turn, in rounds, until one is fastest beyond doubt; those that are not in the race any more sit out.

    Args:
        rows: by label, the preferred ones first; filled in.
        now: the choice to keep if no other is faster by ``margin``; None: there is none.
        running: what the last step went with.
        trial: steps of the first turn of each.
        least_s: a step's least time with a choice, as far as that is known without trying.

    Returns:
        The fastest; of those within ``margin`` of it ``now``, or else the first.
    """
    order = sorted(rows, key=lambda label: (label != now, least_s.get(label, 0.0)))
    for number in range(_MOST_ROUNDS):
        left = [label for label in order if not rows[label].out]
        if number >= _LEAST_ROUNDS and (len(left) < 2 or _are_equal([rows[label] for label in left], margin)):
            break
        for label in left if number % 2 == 0 else reversed(left):
            # Longer and longer: those that are left are nearly as fast, and a change costs more than such a step.
            running = yield from _turn(label, rows, running, (number + 1) * trial, least_s.get(label, 0.0))
        _drop_the_slower(rows, _CLEARLY if number == 0 else margin)
    # Others were slower than these in the same minute; later ones were perhaps slower for all.
    left = [label for label, row in rows.items() if not row.out]
    best = min(rows[label].step_s for label in left)
    equal = [label for label in left if rows[label].step_s <= best * (1.0 + margin)]
    return now if now is not None and now in equal else equal[0]


def _turn(label: str, rows: Mapping[str, Row], running: str, trial: int, least_s: float) -> Trials[str]:
    """Some steps with one choice, fewer if it turns out to be hopeless; returns what the last step went with."""
    row = rows[label]
    # Of those still in the race: so the last one can never be given up.
    best = min((other.step_s for name, other in rows.items() if name != label and not other.out), default=math.inf)
    if least_s > _HOPELESS * best:
        row.out = f"not tried: at least {least_s * 1e3:.0f} ms on this link"
        return running
    if running != label:
        first = yield label
        if first.wait_s > _HOPELESS_AT_ONCE * best:
            row.samples.append(first)
            row.out = "given up at once"
            return label
    late = 0
    for _ in range(trial):
        sample = yield label
        row.samples.append(sample)
        late = late + 1 if sample.wait_s > _HOPELESS * best else 0  # a single one may be an accident
        if late == _MOST_LATE or (late and sample.wait_s > _HOPELESS_AT_ONCE * best):
            row.out = f"given up after {len(row.samples)} steps"
            break
    return label


def _drop_the_slower(rows: Mapping[str, Row], margin: float) -> None:
    left = [row for row in rows.values() if not row.out]
    fastest = min(left, key=lambda row: row.step_s)
    for row in left:
        # Beyond the margin by more than chance explains.
        if row.step_s > fastest.step_s * (1.0 + margin) + 2.0 * (row.doubt_s + fastest.doubt_s):
            row.out = "slower"


def _are_equal(rows: Sequence[Row], margin: float) -> bool:
    """Whether no chance could have any of them outside the margin."""
    fastest = min(rows, key=lambda row: row.step_s)
    return all(row.step_s + 2.0 * (row.doubt_s + fastest.doubt_s) <= (1.0 + margin) * fastest.step_s for row in rows)


def watch(
    label: str,
    known: Sample,
    *,
    steps: int,
    patience: int,
    agree: Callable[[Sample], Sample],
    step_over: Callable[[], None],
) -> Trials[str]:
    """Stay with a choice until something changes, or for so many steps; returns why no longer.

    Only here steps are sent as this rank saw them: :func:`median` of several is what ``agree`` makes the same on all.

    Args:
        known: what a step took when it was chosen.
        patience: so many times in a row must a change be seen.
        step_over: called after each step.
    """
    usual = max(_LEAST_CHECK, min(math.ceil(_CHECK_S / max(known.step_s, 1e-9)), steps // _MOST_CHECKS, _MOST_CHECK))
    check = usual
    seen: list[Sample] = []
    changes = 0
    for _ in range(steps):
        seen.append((yield label))
        step_over()
        if len(seen) == check:
            found = agree(median(seen))
            seen.clear()
            changes = changes + 1 if _differs(known, found) else 0
            check = _LEAST_CHECK if changes else usual  # whether it lasts is known soon
            if changes >= patience:
                return (
                    f"a step took {known.step_s * 1e3:.1f} ms, {known.wait_s * 1e3:.1f} of them waiting, and takes "
                    f"{found.step_s * 1e3:.1f}, {found.wait_s * 1e3:.1f} of them waiting"
                )
    return IN_TIME


def _differs(known: Sample, found: Sample) -> bool:
    ratio = found.step_s / max(known.step_s, 1e-9)
    waits = abs(found.wait_s - known.wait_s) > (_CHANGED - 1.0) * known.step_s
    return not 1.0 / _CHANGED <= ratio <= _CHANGED or waits
