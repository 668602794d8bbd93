"""Everything that is checked about a peer's frames before it is believed, and messages put together again."""

from __future__ import annotations

from dataclasses import dataclass

from gradcomp.errors import PacketError
from gradcomp.handshake import MAX_HELLO_BYTES
from gradcomp.interfaces import Slot
from gradcomp.transports.frames import DATA, HELLO, Header, unpack_header, verify
from gradcomp.transports.mailbox import Mailbox

__all__ = ["Inbound", "Session"]


@dataclass(frozen=True, kw_only=True)
class Session:
    """What every frame of one connection of one run has in common.

    Attributes:
        run: 64-bit digest of the run's name.
        epoch: how many connections of this run came before.
        max_message_bytes: no message is longer.
    """

    run: int
    epoch: int
    max_message_bytes: int


class Inbound:
    """The frames of one peer, in order: :meth:`header`, then :meth:`payload`, for each."""

    def __init__(self, peer: int, incarnation: int, session: Session, mailbox: Mailbox) -> None:
        self._peer = peer
        self._incarnation = incarnation
        self._session = session
        self._mailbox = mailbox
        self._sequence = 0
        self._greeted = False
        self._raw = b""
        self._header: Header | None = None
        # The message being put together; chunks of a peer's messages never interleave.
        self._slot: Slot | None = None
        self._total = 0
        self._got = 0
        self._chunk = 0
        self._whole: memoryview | None = None

    def header(self, raw: bytes) -> memoryview | None:
        """Check a frame's header, before anything is allocated for it.

        Returns:
            Where its payload belongs, exactly as long as it must be; None to take the payload as it comes.

        Raises:
            PacketError: anything this peer would not have sent.
        """
        header = unpack_header(raw)
        session = self._session
        if (header.run, header.epoch, header.incarnation) != (session.run, session.epoch, self._incarnation):
            raise PacketError("frame of another run, epoch or incarnation")
        if header.sequence != self._sequence:
            raise PacketError(f"frame {header.sequence} where {self._sequence} is due")
        if self._greeted == (header.kind == HELLO):
            raise PacketError("a second hello" if self._greeted else f"frame of kind {header.kind} before the hello")
        if header.kind == DATA:
            self._data(header)
        elif self._slot is not None:
            raise PacketError(f"frame of kind {header.kind} inside a message")
        elif header.total > MAX_HELLO_BYTES:
            raise PacketError(f"hello of {header.total} bytes is over {MAX_HELLO_BYTES}")
        self._raw, self._header = raw, header
        if header.kind == DATA and self._whole is not None:
            return self._whole[self._got : self._got + header.length]
        return None

    def _data(self, header: Header) -> None:
        slot = Slot(header.step, header.bucket, header.stage)
        if self._slot is None:
            if header.chunk:
                raise PacketError(f"chunk {header.chunk} of a message that has not begun")
            if header.total > self._session.max_message_bytes:
                raise PacketError(f"message of {header.total} bytes is over {self._session.max_message_bytes}")
            self._mailbox.expect(self._peer, slot, header.total)
            self._slot, self._total, self._got, self._chunk = slot, header.total, 0, 0
            self._whole = self._mailbox.memory.take(header.total) if header.length < header.total else None
            return
        if (slot, header.total, header.chunk) != (self._slot, self._total, self._chunk):
            raise PacketError(f"chunk {header.chunk} of {slot} where chunk {self._chunk} of {self._slot} is due")
        if self._got + header.length > self._total:
            raise PacketError(f"chunks of {self._got + header.length} bytes in a message of {self._total}")

    def payload(self, payload: memoryview) -> int:
        """Check the payload that follows the last header, and keep it if it is data.

        Args:
            payload: what :meth:`header` returned, filled; or the frame, if that was None.

        Returns:
            The kind of the frame.

        Raises:
            PacketError: another length than announced, or changed on the way.
        """
        header = self._header
        if header is None:
            raise PacketError("payload without a header")
        if len(payload) != header.length:
            raise PacketError(f"payload of {len(payload)} bytes; its header says {header.length}")
        verify(self._raw, payload)
        self._header = None
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self._greeted = True
        if header.kind == DATA:
            self._got += header.length
            self._chunk += 1
            if self._got == self._total and self._slot is not None:
                self._mailbox.deliver(self._peer, self._slot, payload if self._whole is None else self._whole)
                self._slot = self._whole = None
        return header.kind
