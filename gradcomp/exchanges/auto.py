"""All-gather, two-shot or all-reduce, whichever is expected to be faster for a bucket."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from gradcomp.bucket import Piece, Unit
from gradcomp.exchanges.all_gather import AllGather
from gradcomp.exchanges.all_reduce import AllReduce
from gradcomp.exchanges.two_shot import TwoShot
from gradcomp.interfaces import Compressor, Exchange, Incoming, Transport, Work
from gradcomp.options import check_flag, check_integer

__all__ = ["Auto"]


@dataclass(frozen=True, kw_only=True)
class Auto(Exchange):
    """Chooses for each bucket from world size and the packet size its compressors expect.

    For N ranks and packets of P bytes, all-gather sends (N-1) P in one trip, two-shot 2 (N-1)/N P in two. The second
    trip costs as much time as ``trip_bytes`` on the link; two-shot is chosen where it saves more than that. With two
    ranks they send the same, and all-gather compresses once.

    Linear compressors that are more than a plain copy go by all-reduce from three ranks on. It never sends more than
    all-gather, does not compress twice as two-shot does, and decodes one packet instead of N: for PowerSGD 0.5 ms less
    a packet and million elements, so that on 3 ranks a bucket of 2 million pays for a second trip of 2 ms, on more
    ranks a smaller one. With two ranks both send P, and all-gather has it there in one trip.

    Attributes:
        trip_bytes: bytes the link carries in the time of one more trip; the default is 2 ms at 1 Gb/s.
        native_sums: whether the transport has an all-reduce of its own; None: ask it.
    """

    id: ClassVar[str] = "auto"
    foreseeable: ClassVar[bool] = True
    trip_bytes: int = 262_144
    native_sums: bool | None = None

    def __post_init__(self) -> None:
        check_integer(self.id, "trip_bytes", self.trip_bytes, at_least=0)
        if self.native_sums is not None:
            check_flag(self.id, "native_sums", self.native_sums)

    def on(self, transport: Transport) -> Exchange:
        """With ``native_sums`` decided, so that ranks whose transports differ in it are refused at the handshake."""
        return self if self.native_sums is not None else replace(self, native_sums=transport.adds_up)

    def cut(self, units: Sequence[Unit], world_size: int) -> list[Piece]:
        """As the exchange chosen cuts; the choice is the same on every rank, for it rests on the configs alone."""
        if self._adds_up([unit.codec for unit in units], world_size):
            return AllReduce(trip_bytes=self.trip_bytes).cut(units, world_size)
        saved = sum(_saved_bytes(unit, world_size) for unit in units)
        chosen: Exchange = TwoShot() if saved > self.trip_bytes else AllGather()
        return chosen.cut(units, world_size)

    def run(self, work: Work) -> Generator[Sequence[Incoming], None, None]:
        """As the exchange chosen runs: pieces with an owner were cut by two-shot."""
        if self._adds_up([piece.codec for piece in work.pieces], work.world_size):
            return AllReduce(trip_bytes=self.trip_bytes).run(work)
        owned = any(piece.owner is not None for piece in work.pieces)
        return (TwoShot() if owned else AllGather()).run(work)

    def _adds_up(self, codecs: Sequence[Compressor], world_size: int) -> bool:
        if not all(codec.linear for codec in codecs):
            return False
        return world_size > 1 if self.native_sums else world_size > 2 and not all(codec.stateless for codec in codecs)


def _saved_bytes(unit: Unit, world_size: int) -> float:
    """What two-shot sends less than all-gather. A sum of products is sent as it is."""
    packet = unit.codec.typical_nbytes(unit.numel)
    total = unit.codec.max_nbytes(unit.numel) if unit.codec.factored else packet
    return (world_size - 1) * (packet - (packet + total) / world_size)
