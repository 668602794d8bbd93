"""Whether a step is finite on every rank, known before its sums are here.

Residuals are committed only if it is (gradcomp.work), and the first bucket is to be used before the last has come. But
what is not finite begins somewhere: in what a rank compresses itself. So each rank says, once it has compressed its
part of the whole step, whether it is *sure* that nothing of it can come out as NaN or Inf, in one byte that goes ahead
of all data. If all are sure, the step is finite. If one is not, all ranks wait for all sums and look at them, as they
do otherwise: a gradient that is only large costs the overlap of one step and changes no result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gradcomp.bucket import Piece
from gradcomp.errors import PacketError
from gradcomp.interfaces import Slot, Transport
from gradcomp.packet import Packet
from gradcomp.replicas import VERDICT_BUCKET

__all__ = ["Outlook", "Verdict"]

_LARGEST = torch.finfo(torch.float32).max


class Outlook:
    """One bucket on one rank: how sure it is of the packets that it has made.

    Args:
        foreseeable: :attr:`gradcomp.interfaces.Exchange.foreseeable`; if not, nothing is said before :meth:`over`.
        tell: called once, with whether this rank is sure.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        *,
        rank: int,
        world_size: int,
        foreseeable: bool,
        tell: Callable[[bool], None],
    ) -> None:
        self._left = len(pieces) + sum(piece.owner == rank for piece in pieces)
        self._most = _LARGEST / (2 * world_size)  # so many of these add up to something finite
        self._foreseeable = foreseeable
        self._tell: Callable[[bool], None] | None = tell
        self._sure = True

    def add(self, pieces: Sequence[Piece], packets: Sequence[Packet | None]) -> None:
        """This rank has encoded or reduced these."""
        if not self._foreseeable:
            return
        self._left -= len(pieces)
        for piece, packet in zip(pieces, packets, strict=True):
            self._sure = self._sure and (packet is None or self._is_sure(piece, packet))
        if self._left == 0:
            self._say(sure=self._sure)

    def over(self, *, nonfinite: bool) -> None:
        """The bucket's exchange is over, and this is known of its sums."""
        self._say(sure=not nonfinite)

    def _say(self, *, sure: bool) -> None:
        tell, self._tell = self._tell, None
        if tell is not None:
            tell(sure)

    def _is_sure(self, piece: Piece, packet: Packet) -> bool:
        if packet.is_nonfinite:
            return False
        if not piece.codec.stateless or not packet.numel:
            return True
        # These carry any value, and it is their sums that are looked at in the end.
        low, high = torch.stack(torch.aminmax(piece.codec.decompress(packet))).tolist()
        return bool(-self._most <= low and high <= self._most)


class Verdict:
    """One step on all ranks.

    Args:
        turn: the step's messages' number.
        buckets: how many it has.
    """

    def __init__(self, transport: Transport, turn: int, buckets: int) -> None:
        self._transport = transport
        self._slot = Slot(turn, VERDICT_BUCKET, 0)
        self._peers = [peer for peer in range(transport.world_size) if peer != transport.rank]
        self._incoming = [transport.recv(peer, self._slot) for peer in self._peers]
        self._untold = buckets
        self._sure = True

    def tell(self, sure: bool) -> None:
        """One more bucket of this rank is through, or not; the last one tells the others. Never blocks."""
        self._untold -= 1
        self._sure = self._sure and sure
        if self._untold == 0:
            for peer in self._peers:
                self._transport.send(peer, self._slot, [bytes([self._sure])])

    @property
    def told(self) -> bool:
        """Whether this rank has said its own, or need not."""
        return self._untold == 0 or any(i.failed for i in self._incoming)

    @property
    def known(self) -> bool:
        """Whether all ranks have, or one is lost."""
        return self.told and (any(i.failed for i in self._incoming) or all(i.done for i in self._incoming))

    def sure(self) -> bool:
        """Whether all ranks are sure; asked once it is known, or a whole timeout after it was told.

        Raises:
            PeerLost, TransportTimeout: a rank did not say.
            PacketError: a rank said something else.
        """
        said = self._transport.wait(self._incoming, timeout_s=0.0, waited_s=self._transport.timeout_s)
        for peer, word in zip(self._peers, said, strict=True):
            if bytes(word) not in (b"\0", b"\1"):
                raise PacketError(f"rank {peer} said {bytes(word[:8])!r} about a step; it is one byte, 0 or 1")
        return self._sure and all(bytes(word) == b"\1" for word in said)
