"""Every rank sends its packets to every other rank, and everyone adds up everything."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradcomp.bucket import Piece, Unit
from gradcomp.interfaces import Exchange, Incoming, Work

__all__ = ["AllGather"]


@dataclass(frozen=True, kw_only=True)
class AllGather(Exchange):
    """One hop: each rank sends ``world_size - 1`` copies of its packets and decodes ``world_size`` of them.

    Nothing is compressed twice, and latency is one trip. Best for few ranks or small packets; against a dense ring it
    pays only if the ratio is over world_size / 2.
    """

    id: ClassVar[str] = "all_gather"
    foreseeable: ClassVar[bool] = True

    def cut(self, units: Sequence[Unit], world_size: int) -> list[Piece]:
        """Whole units, owned by nobody."""
        return [Piece(i, 0, unit.numel, unit.shape, unit.codec) for i, unit in enumerate(units)]

    def run(self, work: Work) -> Generator[Sequence[Incoming], None, None]:
        """Send, wait for everyone's, add them up in rank order."""
        mine = work.encode(work.pieces)
        # Each rank starts with its neighbour, so that no receiver is everybody's first.
        others = [(work.rank + turn) % work.world_size for turn in range(1, work.world_size)]
        messages = yield from work.swap(0, [(peer, mine) for peer in others], dict.fromkeys(others, work.pieces))
        messages[work.rank] = mine
        work.deliver(work.pieces, [messages[rank] for rank in range(work.world_size)])
