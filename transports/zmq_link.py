"""One peer as the I/O thread sees it: a DEALER that sends there, its monitor, and the checks on what comes back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from gradcomp.errors import PacketError
from gradcomp.interfaces import Slot
from gradcomp.transports.chunks import Outgoing
from gradcomp.transports.frames import DATA, HEADER_BYTES, MAX_CHUNK_BYTES, Header, pack_header
from gradcomp.transports.inbound import Inbound, Session
from gradcomp.transports.mailbox import Mailbox
from gradcomp.transports.rendezvous import Record

__all__ = ["NO_SLOT", "Letter", "Link", "receive_payload", "secure_socket"]

NO_SLOT = Slot(0, 0, 0)

# Chunks that wait inside ZeroMQ for one peer. Enough to keep the link busy while this process does something else.
_SEND_CHUNKS = 16
_RECEIVE_CHUNKS = 64
# What waits there can be overtaken no more.
_SEND_CHUNKS_IF_OVERTAKEN = 2
_HEARTBEAT_MS = 1000
_HANDSHAKE_MS = 3000

_GONE = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def secure_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """A socket with everything bounded that ZeroMQ leaves unbounded."""
    socket = context.socket(kind)
    socket.linger = 0
    socket.maxmsgsize = MAX_CHUNK_BYTES + 4096
    socket.handshake_ivl = _HANDSHAKE_MS
    socket.rcvhwm = _RECEIVE_CHUNKS
    socket.sndhwm = _SEND_CHUNKS
    return socket


def receive_payload(socket: zmq.Socket[bytes], place: memoryview | None) -> memoryview:
    """Read what follows a frame's header, the last part of a message, from ``socket``.

    Args:
        place: where it belongs, as long as the header says; None to take it as it comes.

    Raises:
        PacketError: there is none, it is longer or shorter, or not the last; parts may be left to read.
    """
    if not socket.getsockopt(zmq.RCVMORE):
        raise PacketError("frame without a payload")
    if place is None:
        payload = socket.recv(copy=False).buffer
    else:
        received = socket.recv_into(place)
        if received != len(place):  # a longer one was cut to fit
            raise PacketError(f"payload of {received} bytes; its header says {len(place)}")
        payload = place
    if socket.getsockopt(zmq.RCVMORE):
        raise PacketError("frame of more than header and payload")
    return payload


@dataclass(frozen=True)
class Letter:
    """A message to one peer."""

    kind: int
    slot: Slot
    message: Outgoing


class Link:
    """What goes to one peer and what is known of it. Belongs to the I/O thread; flags may be read elsewhere.

    Attributes:
        outbox: what waits to be sent, in order.
        blocked: ZeroMQ takes nothing more for now.
        hello: what the peer said, once it did.
        left: the peer said that it leaves.
        cut_off: nothing that comes from it is read any more.
        farewell_seen: the peer has read everything up to this rank's own farewell.
        gone: there is no connection any more.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        mine: Record,
        theirs: Record,
        session: Session,
        mailbox: Mailbox,
        *,
        silence_s: float,
        buffer_bytes: int,
        first_needed_first: bool = False,
    ) -> None:
        self.peer = theirs.rank
        self.identity = theirs.identity
        self.endpoint = theirs.endpoint
        self.inbound = Inbound(theirs.rank, theirs.incarnation, session, mailbox)
        self.outbox: deque[Letter] = deque()
        self.blocked = False
        self.hello: bytes | None = None
        self.left = self.cut_off = self.farewell_seen = self.gone = False
        self._first_needed_first = first_needed_first
        self._session = session
        self._incarnation = mine.incarnation
        self._sequence = 0
        self._chunk = 0
        self._sent_bytes = 0

        self.dealer = secure_socket(context, zmq.DEALER)
        self.dealer.routing_id = mine.identity
        self.dealer.immediate = 1  # nothing is queued for a connection that is not there
        self.dealer.reconnect_ivl = -1  # a connection lost is a peer lost: what was in it is lost, too
        self.dealer.heartbeat_ivl = _HEARTBEAT_MS
        self.dealer.heartbeat_timeout = int(silence_s * 1000)
        self.dealer.heartbeat_ttl = int(silence_s * 2000)
        if first_needed_first:
            self.dealer.sndhwm = _SEND_CHUNKS_IF_OVERTAKEN
        if buffer_bytes:
            self.dealer.sndbuf = buffer_bytes
        self.dealer.ipv6 = "[" in theirs.endpoint
        self.monitor = self.dealer.get_monitor_socket(_GONE)
        self.dealer.connect(theirs.endpoint)

    def post(self, letter: Letter) -> None:
        """Queue a letter; with ``first_needed_first`` before those that are less urgent and have not begun."""
        at = len(self.outbox)
        if self._first_needed_first and letter.kind == DATA:
            begun = 1 if self._chunk else 0  # chunks of two messages must not interleave
            while at > begun and _overtakes(letter, self.outbox[at - 1]):
                at -= 1
        self.outbox.insert(at, letter)

    def send_chunk(self) -> int:
        """Hand the next chunk to ZeroMQ. Returns its bytes with the header; 0 if ZeroMQ takes nothing for now."""
        letter = self.outbox[0]
        message, slot = letter.message, letter.slot
        chunk = message.chunk(self._chunk)
        header = Header(
            letter.kind,
            self._session.run,
            self._session.epoch,
            self._incarnation,
            slot.step,
            slot.bucket,
            slot.stage,
            self._chunk,
            self._sequence,
            chunk.length,
            message.total,
        )
        try:
            self.dealer.send(pack_header(header, chunk.digest), zmq.NOBLOCK | zmq.SNDMORE)
        except zmq.Again:
            self.blocked = True
            return 0
        self.dealer.send(chunk.frame, zmq.NOBLOCK, copy=False)
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self._chunk += 1
        self._sent_bytes += chunk.length
        if self._sent_bytes == message.total:
            self.outbox.popleft()
            self._chunk = self._sent_bytes = 0
        return HEADER_BYTES + chunk.length

    def forget_outbox(self) -> None:
        """Drop what was not sent; a message half sent stays half sent."""
        self.outbox.clear()
        self._chunk = self._sent_bytes = 0

    def lost_connection(self) -> bool:
        """Read the monitor: whether the connection broke, or never came about."""
        try:
            while True:
                if recv_monitor_message(self.monitor, zmq.NOBLOCK)["event"] & _GONE:
                    return True
        except zmq.Again:
            return False

    def close(self) -> None:
        """Close the sockets."""
        if not self.gone:
            self.gone = True
            self.outbox.clear()
            self.dealer.disable_monitor()
            self.monitor.close(0)
            self.dealer.close(0)


def _overtakes(letter: Letter, other: Letter) -> bool:
    """Nothing overtakes a hello or a goodbye."""
    return other.kind == DATA and letter.slot.urgency < other.slot.urgency
