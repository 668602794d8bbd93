"""What linear compressors send is added up on its way, in as many all-reduces as they have rounds."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradcomp.bucket import Piece, Unit
from gradcomp.errors import ConfigError
from gradcomp.interfaces import Exchange, Incoming, Work
from gradcomp.options import check_integer

__all__ = ["AllReduce"]


@dataclass(frozen=True, kw_only=True)
class AllReduce(Exchange):
    """Each rank adds to a sum instead of sending packets: one decode, however many ranks. Linear compressors only.

    A round of V bytes takes one trip and (N - 1) V from each rank, or two trips and 2(N - 1)/N V, where that saves more
    than ``trip_bytes``. All tensors of a bucket share its rounds, and several buckets are under way at once.

    Attributes:
        trip_bytes: bytes the link carries in the time of one more trip; the default is 2 ms at 1 Gb/s.
    """

    id: ClassVar[str] = "all_reduce"
    trip_bytes: int = 262_144

    def __post_init__(self) -> None:
        check_integer(self.id, "trip_bytes", self.trip_bytes, at_least=0)

    def cut(self, units: Sequence[Unit], world_size: int) -> list[Piece]:
        """Whole units, owned by nobody.

        Raises:
            ConfigError: a compressor that is not linear.
        """
        for unit in units:
            if not unit.codec.linear:
                raise ConfigError(
                    f"exchange all_reduce adds up what is sent, and compressor {unit.codec.id!r} is not linear: "
                    "use all_gather, two_shot or auto"
                )
        return [Piece(i, 0, unit.numel, unit.shape, unit.codec) for i, unit in enumerate(units)]

    def run(self, work: Work) -> Generator[Sequence[Incoming], None, None]:
        """Round by round, until the compressors have no more to add up."""
        rounds = work.rounds(work.pieces)
        turn = 0
        mine: Tensor | None = next(rounds, None)
        while mine is not None:
            saved_bytes = (work.world_size - 1) * (1 - 2 / work.world_size) * 4 * mine.numel()
            total = yield from work.all_reduce(turn, mine, one_trip=saved_bytes <= self.trip_bytes)
            turn += 1
            try:
                mine = rounds.send(total)
            except StopIteration:
                mine = None
