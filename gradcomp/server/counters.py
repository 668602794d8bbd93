"""What a server counts, in constant memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradcomp.errors import StateError

__all__ = ["Counters", "Histogram"]

_EXACT = 32


class Histogram:
    """Counts of whole numbers >= 0: each by itself below 32, then by powers of two."""

    def __init__(self) -> None:
        self._counts = [0] * (_EXACT + 64)
        self.number = 0
        self.sum = 0
        self.most = 0

    def add(self, value: int) -> None:
        """Count ``value`` once."""
        self._counts[value if value < _EXACT else _EXACT + value.bit_length() - _EXACT.bit_length()] += 1
        self.number += 1
        self.sum += value
        self.most = max(self.most, value)

    def summary(self) -> dict[str, Any]:
        """``counts`` by value or range (``"3"``, ``"32-63"``), without empty ones; ``mean``; ``most``.

        >>> histogram = Histogram()
        >>> for value in (0, 0, 3, 40):
        ...     histogram.add(value)
        >>> histogram.summary()
        {'counts': {'0': 2, '3': 1, '32-63': 1}, 'mean': 10.75, 'most': 40}
        """
        counts = {_label(place): count for place, count in enumerate(self._counts) if count}
        return {"counts": counts, "mean": self.sum / self.number if self.number else 0.0, "most": self.most}

    def state_dict(self) -> dict[str, Any]:
        """As plain numbers."""
        return {"counts": list(self._counts), "sum": self.sum, "most": self.most}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        counts = [int(count) for count in state["counts"]]
        if len(counts) != len(self._counts):
            raise StateError(f"state of a histogram has {len(counts)} counts; it must have {len(self._counts)}")
        self._counts, self.sum, self.most = counts, int(state["sum"]), int(state["most"])
        self.number = sum(counts)


def _label(place: int) -> str:
    if place < _EXACT:
        return str(place)
    first = _EXACT << (place - _EXACT)
    return f"{first}-{2 * first - 1}"


class Counters:
    """Pushes by what became of them, and what else there is to count.

    Attributes:
        applied, late, nonfinite: pushes; each is counted once.
        overflowed: gradients that were finite, but not their sum, or not the update: there was none.
        duplicates: pushes that came again.
        pushed_bytes, pulled_bytes: bodies of pushes that counted, and of changes that were sent.
        staleness: of gradients that were applied.
    """

    NAMES = ("applied", "late", "nonfinite", "overflowed", "duplicates", "pushed_bytes", "pulled_bytes")

    def __init__(self) -> None:
        self.applied = self.late = self.nonfinite = self.overflowed = 0
        self.duplicates = 0
        self.pushed_bytes = self.pulled_bytes = 0
        self.staleness = Histogram()

    def count(self, result: str, nbytes: int) -> None:
        """Count a push, by what its worker is told."""
        self.applied += result == "applied"
        self.late += result == "late"
        self.nonfinite += result == "nonfinite"
        self.pushed_bytes += nbytes

    def summary(self) -> dict[str, Any]:
        """For a status."""
        return {name: getattr(self, name) for name in self.NAMES} | {"staleness": self.staleness.summary()}

    def state_dict(self) -> dict[str, Any]:
        """As plain numbers."""
        return {name: getattr(self, name) for name in self.NAMES} | {"staleness": self.staleness.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        for name in self.NAMES:
            setattr(self, name, int(state[name]))
        self.staleness.load_state_dict(state["staleness"])
