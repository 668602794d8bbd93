"""Sums over all workers, one after the other: counts of an evaluation, gradients of a whole data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradcomp.errors import StateError
from gradcomp.server.refusal import Refusal

__all__ = ["Totals"]


class Totals:
    """The last sum, and the terms of the one under way.

    Attributes:
        turn: of the last sum; 0: there was none.
        total: the last sum's float32 as bytes.
        terms: how many workers are in it.
    """

    def __init__(self, max_numel: int) -> None:
        self.turn = 0
        self.total = b""
        self.terms = 0
        self._max_numel = max_numel
        self._given: dict[str, Tensor] = {}

    def add(self, worker: str, turn: int, term: memoryview) -> None:
        """Take in a worker's term; one that it gave before is replaced.

        Raises:
            Refusal: another turn, or not as many float32 as the others gave.
        """
        if turn != self.turn + 1:
            raise Refusal("turn", f"sum {turn}; the one under way is {self.turn + 1}")
        if len(term) % 4 or len(term) > 4 * self._max_numel:
            raise Refusal("body", f"a term of {len(term)} bytes; it must be float32, at most {self._max_numel}")
        others = [values.numel() for name, values in self._given.items() if name != worker]
        if others and others[0] != len(term) // 4:
            raise Refusal("body", f"a term of {len(term) // 4} elements; others gave {others[0]}")
        self._given[worker] = floats(term)

    def complete(self, workers: Sequence[str]) -> bool:
        """Whether all of these have given their terms."""
        return bool(self._given) and all(name in self._given for name in workers)

    def sum(self) -> tuple[bytes, int]:
        """The sum of what was given, by name, and how many terms it has."""
        first, *others = sorted(self._given)
        total = self._given[first].clone()
        for name in others:
            total += self._given[name]
        return total.numpy().tobytes(), len(self._given)

    def close(self, turn: int, total: bytes, terms: int) -> None:
        """The sum is this."""
        self.turn, self.total, self.terms = turn, total, terms
        self._given.clear()

    def forget(self, worker: str) -> None:
        """A worker is gone; its term goes with it."""
        self._given.pop(worker, None)

    def state_dict(self) -> dict[str, Any]:
        """The last sum; terms are sent again."""
        return {"turn": self.turn, "terms": self.terms, "total": floats(memoryview(self.total))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        if not isinstance(state.get("total"), Tensor) or state["total"].dtype != torch.float32:
            raise StateError("state of sums: total is not a float32 tensor")
        self.close(int(state["turn"]), state["total"].numpy().tobytes(), int(state["terms"]))


def floats(data: memoryview) -> Tensor:
    """A copy of ``data`` as float32."""
    return torch.frombuffer(bytearray(data), dtype=torch.float32) if len(data) else torch.empty(0)
