"""Rounds of all-reduces: generators that yield what this rank adds to a sum and are sent the sum over all ranks."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Rounds", "alone", "join"]

R = TypeVar("R")
Rounds = Generator[Tensor, Tensor, R]


def alone(rounds: Rounds[R]) -> R:
    """What ``rounds`` return where there is no other rank: every sum is what was added to it."""
    try:
        part = next(rounds)
        while True:
            part = rounds.send(part)
    except StopIteration as end:
        result: R = end.value
        return result


def join(members: Sequence[Rounds[Any]]) -> Rounds[list[Any]]:
    """Several as one: what they yield in the same round is one vector; some may have fewer rounds than others.

    Returns:
        What each of them returns, in their order.
    """
    results: list[Any] = [None] * len(members)
    sums: dict[int, Tensor | None] = dict.fromkeys(range(len(members)))
    while True:
        parts: dict[int, Tensor] = {}
        for i, total in sums.items():
            part = _step(members[i], total, results, i)
            if part is not None:
                parts[i] = part
        if not parts:
            return results
        joined = yield torch.cat(list(parts.values()))
        sums = dict(zip(parts, torch.split(joined, [part.numel() for part in parts.values()]), strict=True))


def _step(member: Rounds[Any], total: Tensor | None, results: list[Any], i: int) -> Tensor | None:
    """What it adds next; None if it is done, and ``results[i]`` is what it returned."""
    try:
        return next(member) if total is None else member.send(total)
    except StopIteration as end:
        results[i] = end.value
        return None
