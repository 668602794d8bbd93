"""Messages between workers and a parameter server as frames: what is to be sent to one peer, what came from one.

Unlike ranks, which give a peer up after one wrong frame, both sides expect frames to be lost or doubled: whatever is
not answered is sent again, as a transmission with a number of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

import numpy as np
import zmq

from gradcomp.errors import PacketError
from gradcomp.transports.chunks import Chunk, Outgoing
from gradcomp.transports.frames import HEADER_BYTES, MAX_CHUNK_BYTES, Header, pack_header, unpack_header, verify
from gradcomp.transports.zmq_link import receive_payload

__all__ = ["CHUNK_BYTES", "Inbox", "Letter", "Outbox", "receive", "server_socket"]

# Short, so that a heartbeat that comes between two of them is not late.
CHUNK_BYTES = 256 << 10
# Chunks that wait inside ZeroMQ for one peer, either way.
_SEND_CHUNKS = 4
_RECEIVE_CHUNKS = 16
_HEARTBEAT_MS = 1000
_SILENCE_MS = 5000
_HANDSHAKE_MS = 3000


def server_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """A socket with everything bounded that ZeroMQ leaves unbounded, that notices a peer who is silently gone."""
    socket = context.socket(kind)
    socket.linger = 0
    socket.maxmsgsize = MAX_CHUNK_BYTES + 4096
    socket.handshake_ivl = _HANDSHAKE_MS
    socket.rcvhwm = _RECEIVE_CHUNKS
    socket.sndhwm = _SEND_CHUNKS
    socket.heartbeat_ivl = _HEARTBEAT_MS
    socket.heartbeat_timeout = _SILENCE_MS
    socket.heartbeat_ttl = 2 * _SILENCE_MS
    return socket


class Letter:
    """A message to one peer, and how far it is.

    Attributes:
        number: of the request it is, or answers.
        tag: letters to one peer with the same tag stand for each other.
        left_s: when its last chunk was handed to ZeroMQ; None: not yet.
    """

    __slots__ = ("chunk", "left_s", "message", "number", "sent_bytes", "tag", "transmission")

    def __init__(self, number: int, message: Outgoing, tag: Hashable = None) -> None:
        self.number, self.message, self.tag = number, message, tag
        self.transmission = self.chunk = self.sent_bytes = 0
        self.left_s: float | None = None

    @property
    def begun(self) -> bool:
        """Whether a part of it was sent."""
        return self.chunk > 0


class Outbox:
    """What waits to be sent to one peer, in order; but what fits into one chunk may come between two of a longer one.

    Args:
        kind: of the frames: ASK or ANSWER.
        incarnation: of the sender.
    """

    def __init__(self, kind: int, incarnation: int) -> None:
        self._kind, self._incarnation = kind, incarnation & 0xFFFFFFFF
        self._under_way: Letter | None = None
        self._waiting: deque[Letter] = deque()
        self._transmission = 0

    def __bool__(self) -> bool:
        return self._under_way is not None or bool(self._waiting)

    def __len__(self) -> int:
        return len(self._waiting) + (self._under_way is not None)

    @property
    def nbytes(self) -> int:
        """Of all messages in it."""
        under_way = 0 if self._under_way is None else self._under_way.message.total
        return under_way + sum(letter.message.total for letter in self._waiting)

    def put(self, letter: Letter) -> None:
        """Add a letter."""
        self._waiting.append(letter)

    def replace(self, letter: Letter) -> bool:
        """Put it in the place of one with its tag; nothing if that one has begun. Whether there was one."""
        if letter.tag is None:
            return False
        if self._under_way is not None and self._under_way.tag == letter.tag:
            return True
        for i, other in enumerate(self._waiting):
            if other.tag == letter.tag:
                self._waiting[i] = letter
                return True
        return False

    def drop(self, letter: Letter) -> None:
        """Take a letter out, unless it has begun or left."""
        if letter in self._waiting:
            self._waiting.remove(letter)

    def drop_oldest(self) -> None:
        """Take out the letter that waits longest to begin."""
        if self._waiting:
            self._waiting.popleft()

    def clear(self) -> None:
        """Forget everything; what has begun stays half sent."""
        self._under_way = None
        self._waiting.clear()

    def send(self, send: Callable[[bytes, Chunk], None], now: float) -> int:
        """Send the next chunk through ``send``. Returns its bytes with the header.

        Raises:
            zmq.ZMQError: what ``send`` raised; nothing has changed then.
        """
        letter = self._next()
        message = letter.message
        chunk = message.chunk(letter.chunk)
        if not letter.begun:
            self._transmission = (self._transmission + 1) & 0xFFFFFFFF
            letter.transmission = self._transmission
        header = Header(
            self._kind,
            run=0,
            epoch=0,
            incarnation=self._incarnation,
            step=letter.number,
            bucket=0,
            stage=0,
            chunk=letter.chunk,
            sequence=letter.transmission,
            length=chunk.length,
            total=message.total,
        )
        send(pack_header(header, chunk.digest), chunk)
        letter.chunk += 1
        letter.sent_bytes += chunk.length
        left = letter.sent_bytes == message.total
        if letter is not self._under_way:
            self._waiting.popleft()
            self._under_way = self._under_way if left else letter
        elif left:
            self._under_way = None
        if left:
            letter.left_s = now
        return HEADER_BYTES + chunk.length

    def _next(self) -> Letter:
        if self._under_way is None:
            return self._waiting[0]
        if self._waiting:
            first = self._waiting[0]
            if first.message.chunk(0).length == first.message.total:
                return first
        return self._under_way


class Inbox:
    """The messages of one peer, put together: :meth:`header`, then :meth:`payload`, for each frame.

    A message of several chunks is dropped when one of its chunks is missing, or when the next such message begins.

    Attributes:
        held_bytes: of the message that is not whole yet.
        heard_s: when a part of it came last.
    """

    def __init__(self, kind: int, max_message_bytes: int) -> None:
        self._kinds, self._max_message_bytes = (kind,), max_message_bytes
        self._raw = b""
        self._header: Header | None = None
        self._whole: memoryview | None = None
        self._first: Header | None = None  # of the message under way
        self._chunk = 0
        self._wanted = False
        self.held_bytes = 0
        self.heard_s = 0.0

    @property
    def under_way(self) -> int | None:
        """The number of the message that is not whole yet."""
        return None if self._first is None else self._first.step

    def header(self, raw: bytes) -> memoryview | None:
        """Check a frame's header, before anything is allocated for it.

        Returns:
            Where its payload belongs, exactly as long as it must be; None to take the payload as it comes.

        Raises:
            PacketError: nothing that a worker or a server would have sent.
        """
        self._header = None
        header = unpack_header(raw, self._kinds)
        if header.run or header.epoch or header.bucket or header.stage:
            raise PacketError("frame with a run, an epoch or a slot")
        if header.total > self._max_message_bytes:
            raise PacketError(f"message of {header.total} bytes is over {self._max_message_bytes}")
        if header.length == header.total and header.chunk:
            raise PacketError(f"chunk {header.chunk} is all of its message")
        self._raw, self._header = raw, header
        self._wanted = header.length == header.total or self._fits(header)
        if self._wanted and header.length < header.total and self._whole is not None:
            return self._whole[self.held_bytes : self.held_bytes + header.length]
        return None

    def _fits(self, header: Header) -> bool:
        """Whether a chunk is the next one of its message; begins with it, or gives the message up."""
        first = self._first
        under_way = first is not None and (first.sequence, first.step, first.total) == (
            header.sequence,
            header.step,
            header.total,
        )
        if not under_way and header.chunk == 0:
            self.give_up()
            # Memory is taken as it is filled: what a stranger claims costs nothing.
            self._first, self._whole = header, np.empty(header.total, np.uint8).data
            return True
        if not under_way or header.chunk < self._chunk:  # what is left of a message given up, or a double
            return False
        if header.chunk > self._chunk or self.held_bytes + header.length > header.total:
            self.give_up()
            return False
        return True

    def payload(self, payload: memoryview, now: float) -> tuple[Header, memoryview] | None:
        """Check the payload that follows the last header, and keep it.

        Args:
            payload: what :meth:`header` returned, filled; or the frame, if that was None.

        Returns:
            The message, if it is whole now, and the header of its last chunk.

        Raises:
            PacketError: another length than announced, or changed on the way.
        """
        header = self._header
        if header is None:
            raise PacketError("payload without a header")
        self._header = None
        if len(payload) != header.length:
            raise PacketError(f"payload of {len(payload)} bytes; its header says {header.length}")
        if not self._wanted:
            return None
        verify(self._raw, payload)
        if header.length == header.total:
            return header, payload
        self.heard_s = now
        self._chunk += 1
        self.held_bytes += header.length
        if self.held_bytes < header.total or self._whole is None:
            return None
        whole = self._whole
        self.give_up()
        return header, whole

    def give_up(self) -> None:
        """Drop the message that is not whole yet."""
        self._first = self._whole = None
        self._chunk = self.held_bytes = 0


def receive(socket: zmq.Socket[bytes], inbox: Inbox, raw: bytes, now: float) -> tuple[Header, memoryview] | None:
    """Read the payload of the frame whose header ``raw`` was just read from ``socket``.

    Returns:
        The message, if it is whole now, and the header of its last chunk.

    Raises:
        PacketError: as :class:`Inbox`; parts of the frame may be left to read.
    """
    return inbox.payload(receive_payload(socket, inbox.header(raw)), now)
