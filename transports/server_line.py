"""One shard of a parameter server as a worker's I/O thread sees it: what was asked, when to ask again, the connection.

Frames are lost only with a connection; but a connection may be lost, and a server may be started anew. So a short
request is sent again when its answer is late. A long one is not, for its answer may be late because it is long: a
heartbeat goes after it, and if that is answered and the request is not, then it was lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from gradcomp.errors import PacketError
from gradcomp.server.links import Asked
from gradcomp.server.protocol import (
    Acked,
    Beat,
    Busy,
    Changed,
    Leave,
    Left,
    Pull,
    Push,
    Refused,
    Reply,
    Request,
    Wait,
    Welcome,
    pack,
    unpack,
)
from gradcomp.transports.chunks import Chunk, Outgoing
from gradcomp.transports.frames import ANSWER, ASK, HEADER_BYTES, other_version
from gradcomp.transports.server_frames import Inbox, Letter, Outbox, receive, server_socket

__all__ = ["Line"]

_FIRST_WAIT_S, _LEAST_WAIT_S, _MOST_WAIT_S = 0.25, 0.02, 2.0
_UNDERSTOOD_WAIT_S = 0.1  # the least, once the server said that it waits for others
_BEATS_PER_LEASE = 5
_SHORT_BYTES = 64 << 10
_MOST_PROBES = 64
_RECEIVE_BATCH = 16
_RECONNECT_MS, _MOST_RECONNECT_MS = 50, 200

_HANDSHAKE_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _HANDSHAKE_FAILED


@dataclass(eq=False)
class _Pending:
    """A request that is not answered.

    Attributes:
        send: what is to be sent: the request, or a Pull once a Push was acknowledged.
        letter: as it was sent last; None: to be sent.
        probed_s: when a heartbeat was sent after it.
        wait_s: seconds until it is sent again.
        changed: a Changed that came before the Acked, which was lost.
    """

    asked: Asked
    send: Request
    message: Outgoing
    letter: Letter | None = None
    tries: int = 0
    probed_s: float = 0.0
    wait_s: float = 0.0
    heard: bool = False
    changed: Changed | None = None


class Line:
    """Belongs to the I/O thread; what is listed here may be read elsewhere.

    Attributes:
        address: ``host:port``.
        connected: there is a connection.
        heard_s: when it last said something; None: never.
        stranger: what is wrong with who listens there.
        bytes_sent, bytes_received: frames with their headers.
        blocked: ZeroMQ takes nothing more for now.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        *,
        worker: str,
        incarnation: int,
        chunk_bytes: int,
        max_message_bytes: int,
        next_number: Callable[[], int],
    ) -> None:
        self.address = address
        self.connected = self.blocked = False
        self.heard_s: float | None = None
        self.stranger = ""
        self.bytes_sent = self.bytes_received = 0
        self._worker, self._incarnation = worker, incarnation
        self._chunk_bytes = chunk_bytes
        self._next_number = next_number
        self._pending: dict[int, _Pending] = {}
        self._probes: dict[int, tuple[float, _Pending | None]] = {}
        self._outbox = Outbox(ASK, incarnation)
        self._inbox = Inbox(ANSWER, max_message_bytes)
        self._mean_s: float | None = None
        self._spread_s = 0.0
        self._beat_every_s: float | None = None
        self._beat_due_s = 0.0

        self.dealer = server_socket(context, zmq.DEALER)
        self.dealer.immediate = 1  # nothing is queued for a connection that is not there
        self.dealer.reconnect_ivl = _RECONNECT_MS
        self.dealer.reconnect_ivl_max = _MOST_RECONNECT_MS
        self.dealer.ipv6 = address.startswith("[")
        self.monitor = self.dealer.get_monitor_socket(_EVENTS)
        self.dealer.connect(f"tcp://{address}")

    def ask(self, asked: Asked) -> None:
        """Begin to ask."""
        request = asked.request
        self._pending[request.number] = _Pending(asked, request, self._cut(request))

    def give_up(self, asked: Asked) -> None:
        """Ask no more."""
        pending = self._pending.pop(asked.request.number, None)
        if pending is not None and pending.letter is not None:
            self._outbox.drop(pending.letter)

    def close(self) -> None:
        """Close the sockets."""
        self.dealer.disable_monitor()
        self.monitor.close(0)
        self.dealer.close(0)

    def _cut(self, request: Request) -> Outgoing:
        return Outgoing(pack(request), self._chunk_bytes)

    # Time.

    def due(self, now: float) -> float:
        """Do what is due. Returns when to be called next."""
        if not self.connected:
            return now + _MOST_WAIT_S
        next_s = now + _MOST_WAIT_S
        for pending in self._pending.values():
            letter = pending.letter
            if letter is None:
                self._send(pending)
            elif letter.left_s is not None:
                since = max(letter.left_s, pending.probed_s)
                if self._inbox.under_way == pending.send.number:
                    since = max(since, self._inbox.heard_s)
                if now >= since + pending.wait_s:
                    self._ask_again(pending, now)
                else:
                    next_s = min(next_s, since + pending.wait_s)
        if self._beat_every_s is not None:
            if now >= self._beat_due_s:
                self._beat(now, None)
                self._beat_due_s = now + self._beat_every_s
            next_s = min(next_s, self._beat_due_s)
        return next_s

    def _send(self, pending: _Pending) -> None:
        pending.tries += 1
        pending.wait_s = max(pending.wait_s, self._wait_s())
        pending.letter = Letter(pending.send.number, pending.message)
        self._outbox.put(pending.letter)

    def _ask_again(self, pending: _Pending, now: float) -> None:
        pending.wait_s = min(2 * pending.wait_s, _MOST_WAIT_S)
        if pending.message.total <= _SHORT_BYTES:
            self._send(pending)
        else:
            self._beat(now, pending)
            pending.probed_s = now

    def _beat(self, now: float, after: _Pending | None) -> None:
        number = self._next_number()
        beat = Beat(number=number, worker=self._worker, incarnation=self._incarnation)
        self._probes[number] = (now, after)
        if len(self._probes) > _MOST_PROBES:
            self._probes.pop(next(iter(self._probes)))
        self._outbox.put(Letter(number, self._cut(beat)))

    def _wait_s(self) -> float:
        """How long an answer may take: as TCP reckons it."""
        if self._mean_s is None:
            return _FIRST_WAIT_S
        return min(max(self._mean_s + 4 * self._spread_s, _LEAST_WAIT_S), _MOST_WAIT_S)

    def _took(self, seconds: float) -> None:
        if self._mean_s is None:
            self._mean_s, self._spread_s = seconds, seconds / 2
        else:
            self._spread_s += (abs(seconds - self._mean_s) - self._spread_s) / 4
            self._mean_s += (seconds - self._mean_s) / 8

    # The connection.

    def check_connection(self) -> None:
        """Read the monitor. What was under way in a connection that is no more is sent again."""
        try:
            while True:
                event = recv_monitor_message(self.monitor, zmq.NOBLOCK)["event"]
                self.connected = bool(event & zmq.EVENT_HANDSHAKE_SUCCEEDED)
                if event & _HANDSHAKE_FAILED:
                    self.stranger = "what listens there does not speak ZeroMQ"
                self._outbox.clear()
                self._probes.clear()
                self._inbox.give_up()
                self.blocked = False
                self._beat_due_s = 0.0
                for pending in self._pending.values():
                    pending.letter = None
        except zmq.Again:
            return

    # Sending.

    @property
    def ready(self) -> bool:
        """Whether there is something that could be sent now."""
        return self.connected and not self.blocked and bool(self._outbox)

    def send_chunk(self, now: float) -> int:
        """Hand the next chunk to ZeroMQ. Returns its bytes; 0 if ZeroMQ takes nothing for now."""
        try:
            sent = self._outbox.send(self._hand_over, now)
        except zmq.Again:
            self.blocked = True
            return 0
        self.bytes_sent += sent
        return sent

    def _hand_over(self, header: bytes, chunk: Chunk) -> None:
        self.dealer.send(header, zmq.NOBLOCK | zmq.SNDMORE)
        self.dealer.send(chunk.frame, zmq.NOBLOCK, copy=False)

    # Receiving.

    def receive(self, now: float) -> list[Asked]:
        """Take some frames off the wire. Returns the requests that are answered now, or made some progress."""
        changed: list[Asked] = []
        for _ in range(_RECEIVE_BATCH):
            try:
                raw = self.dealer.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            before = self._inbox.held_bytes
            try:
                found = receive(self.dealer, self._inbox, raw, now)
                self.bytes_received += HEADER_BYTES + max(0, self._inbox.held_bytes - before)
                self.heard_s = now
                if found is not None:
                    header, message = found
                    self.bytes_received += header.length
                    changed += self._answered(unpack(message), now)
            except PacketError as error:
                version = other_version(raw)
                self.stranger = f"it speaks version {version} of the frames" if version is not None else str(error)
            while self.dealer.getsockopt(zmq.RCVMORE):
                self.dealer.recv(copy=False)
        return changed

    def _answered(self, reply: object, now: float) -> list[Asked]:
        if not isinstance(reply, Reply):
            raise PacketError(f"{type(reply).__name__} is no reply")
        if isinstance(reply, Welcome):
            self._beat_every_s = reply.lease_s / _BEATS_PER_LEASE
            self._beat_due_s = now + self._beat_every_s
        probe = self._probes.pop(reply.number, None)
        if probe is not None:
            self._probe_answered(*probe, now)
            return []
        pending = self._pending.get(reply.number)
        if pending is None:
            return []  # a double, or the request was given up
        if (
            pending.tries == 1
            and not pending.heard
            and pending.letter is not None
            and pending.letter.left_s is not None
        ):
            self._took(now - pending.letter.left_s)
        pending.heard = True
        self._take(pending, reply)
        if pending.asked.done:
            self.give_up(pending.asked)
            if isinstance(reply, Left) or (isinstance(reply, Refused) and isinstance(pending.asked.request, Leave)):
                self._beat_every_s = None
        return [pending.asked]

    def _probe_answered(self, sent_s: float, after: _Pending | None, now: float) -> None:
        self._took(now - sent_s)
        if after is None or after.heard or after.asked.request.number not in self._pending:
            return
        if after.letter is not None and after.letter.left_s is not None and after.letter.left_s <= sent_s:
            self._send(after)

    def _take(self, pending: _Pending, reply: Reply) -> None:
        """Note what came; ask for the rest where there is one."""
        asked, request = pending.asked, pending.asked.request
        if isinstance(reply, (Wait, Busy)):
            asked.waiting = reply.reason
            pending.wait_s = max(pending.wait_s, _UNDERSTOOD_WAIT_S)
            return
        if not (isinstance(request, Push) and request.pull and isinstance(reply, (Acked, Changed))):
            asked.replies.append(reply)
            asked.done = True
            return
        if isinstance(reply, Changed):
            pending.changed = reply
        elif not asked.replies:
            asked.replies.append(reply)
            pull = Pull(
                number=request.number,
                worker=request.worker,
                incarnation=request.incarnation,
                clock=request.clock,
                have=request.have,
            )
            pending.send, pending.message = pull, self._cut(pull)
        if asked.replies and pending.changed is not None:
            asked.replies.append(pending.changed)
            asked.done = True
