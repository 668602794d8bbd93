"""A parameter server's socket: what comes in is put together and handed on, what is answered sent to whom it is for.

One slow, silent or hostile peer costs the others nothing but its share of the time: nothing here waits for anybody, and
what is held for each, and for all together, is bounded. What travels is specified in docs/FORMAT.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import zmq

from gradcomp.errors import GradcompError, PacketError, TransportError
from gradcomp.options import check_integer
from gradcomp.server.protocol import Refused, Reply, Request, pack, unpack
from gradcomp.transports.addresses import check_exposure, join_address, split_address
from gradcomp.transports.chunks import Chunk, Outgoing
from gradcomp.transports.frames import ANSWER, ASK, HEADER_BYTES, other_version
from gradcomp.transports.pacing import TokenBucket, paced_chunk_bytes, parse_rate
from gradcomp.transports.server_frames import CHUNK_BYTES, Inbox, Letter, Outbox, receive, server_socket

__all__ = ["Handler", "ServerLoop"]

_OWNER = "server"
_BACKLOG = 256
_RECEIVE_BATCH = 64
_TICK_S = 0.2
_AGAIN_S = 0.003  # until a peer for whom ZeroMQ took nothing is tried again
_MOST_HALF_MESSAGES = 256
_MOST_LETTERS = 8  # to one peer
_PATIENCE_S = 30.0  # with a peer that reads nothing
_LEAST_HELD_BYTES = 1 << 30


class Handler(Protocol):
    """What a loop is built around: :class:`gradcomp.server.service.Service`."""

    def handle(self, request: Request, sender: bytes, now: float) -> list[tuple[bytes, Reply]]:
        """Do what is asked. Returns replies, and whom they are for."""

    def tick(self, now: float) -> list[tuple[bytes, Reply]]:
        """Do what time brings."""


class _Peer:
    """What waits to be sent to a peer."""

    def __init__(self, now: float) -> None:
        self.outbox = Outbox(ANSWER, 0)
        self.again_s = 0.0
        self.read_s = now


class ServerLoop:
    """Receives, has handled and answers; call :meth:`turn` again and again, from the thread that made it.

    Args:
        handler: what does what is asked.
        bind: ``IP:PORT`` to listen on; port 0: any that is free.
        insecure: allow another address than loopback although nothing is encrypted and nobody proves who they are.
        max_message_bytes: no request is longer.
        rate: pace everything this server sends, as ``"100mbit"`` or bits per second; None: as fast as it goes.
        before_replies: called after requests were handled and before anybody hears of it.

    Attributes:
        address: ``IP:PORT`` it listens on.
        bytes_sent, bytes_received: frames with their headers.
        junk_frames: frames that no worker would have sent; dropped.

    Raises:
        ConfigError: an address that is not loopback without ``insecure``, or none at all.
        TransportError: cannot listen there.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        bind: str = "127.0.0.1:0",
        insecure: bool = False,
        max_message_bytes: int,
        rate: str | float | None = None,
        before_replies: Callable[[], None] | None = None,
    ) -> None:
        check_integer(_OWNER, "max_message_bytes", max_message_bytes, at_least=1)
        host, port = split_address(_OWNER, bind)
        check_exposure(_OWNER, host, insecure=insecure)
        bits_per_s = parse_rate(_OWNER, rate)
        self.bytes_sent = self.bytes_received = self.junk_frames = 0
        self._handler = handler
        self._max_message_bytes = max_message_bytes
        self._max_held_bytes = max(_LEAST_HELD_BYTES, 2 * max_message_bytes)
        self._chunk_bytes = min(CHUNK_BYTES, paced_chunk_bytes(bits_per_s))
        self._pace = None if bits_per_s is None else TokenBucket(bits_per_s, time.monotonic())
        self._before_replies = before_replies
        self._inboxes: dict[bytes, Inbox] = {}  # only of those in the middle of a message, the last heard of last
        self._peers: dict[bytes, _Peer] = {}  # only those for whom something waits
        self._ticked_s = 0.0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = server_socket(self._context, zmq.ROUTER)
        self._router.router_mandatory = 1
        self._router.backlog = _BACKLOG
        self._router.ipv6 = ":" in host
        try:
            self._router.bind(f"tcp://{join_address(host, port)}")
        except zmq.ZMQError as error:
            self._context.destroy(0)
            raise TransportError(f"server: cannot listen on {bind}: {error}") from None
        endpoint = self._router.getsockopt(zmq.LAST_ENDPOINT)
        self.address = endpoint.rstrip(b"\0").decode().removeprefix("tcp://") if isinstance(endpoint, bytes) else bind

    def turn(self, timeout_s: float) -> None:
        """Wait for requests, at most so long; handle some, and send what is to be sent."""
        now = time.monotonic()
        if self._router.poll(max(0, round(self._sleep_s(now, timeout_s) * 1000))):
            self._receive()
        now = time.monotonic()
        if now >= self._ticked_s + _TICK_S:
            self._ticked_s = now
            self._post(self._handler.tick(now), now)
            self._forget_silent(now)
        if self._before_replies is not None:
            self._before_replies()
        self._send()

    def close(self) -> None:
        """Stop listening. What is not sent is dropped: whoever waits for it asks again, and finds nobody."""
        self._context.destroy(0)

    def _sleep_s(self, now: float, timeout_s: float) -> float:
        until = min(now + timeout_s, self._ticked_s + _TICK_S)
        for peer in self._peers.values():
            until = min(until, peer.again_s)
        pause_s = 0.0 if self._pace is None or not self._peers else self._pace.wait_s(now)
        return max(until - now, pause_s, 0.0)

    # Receiving.

    def _receive(self) -> None:
        router = self._router
        for _ in range(_RECEIVE_BATCH):
            try:
                sender = router.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            now = time.monotonic()
            raw = b""
            try:
                if not router.getsockopt(zmq.RCVMORE):
                    raise PacketError("frame without a header")
                raw = router.recv()
                self._receive_frame(sender, raw, now)
            except PacketError:
                self.junk_frames += 1
                version = other_version(raw)
                if version is not None:
                    reason = f"frames of version {version}; this server speaks version {raw[4]}"
                    self._post([(sender, Refused(number=0, field="frames", reason=reason))], now)
            while router.getsockopt(zmq.RCVMORE):  # of junk, or of a frame refused half way
                router.recv(copy=False)

    def _receive_frame(self, sender: bytes, raw: bytes, now: float) -> None:
        inbox = self._inboxes.pop(sender, None) or Inbox(ASK, self._max_message_bytes)
        before = inbox.held_bytes
        try:
            found = receive(self._router, inbox, raw, now)
        finally:
            if inbox.under_way is not None:
                self._inboxes[sender] = inbox
                self._bound_inboxes()
        self.bytes_received += HEADER_BYTES + max(0, inbox.held_bytes - before)
        if found is None:
            return
        header, message = found
        self.bytes_received += header.length
        try:
            request = unpack(message)
            if not isinstance(request, Request):
                raise PacketError(f"{type(request).__name__} is no request")
            replies = self._handler.handle(request, sender, now)
        except GradcompError as error:
            self.junk_frames += 1
            replies = [(sender, Refused(number=header.step & (1 << 63) - 1, field="request", reason=str(error)))]
        self._post(replies, now)

    def _bound_inboxes(self) -> None:
        """Those who did not send anything for longest lose what they have sent: they will send it again."""
        while len(self._inboxes) > _MOST_HALF_MESSAGES or (
            len(self._inboxes) > 1 and sum(i.held_bytes for i in self._inboxes.values()) > self._max_held_bytes
        ):
            del self._inboxes[next(iter(self._inboxes))]

    # Sending.

    def _post(self, replies: list[tuple[bytes, Reply]], now: float) -> None:
        for receiver, reply in replies:
            letter = Letter(reply.number, Outgoing(pack(reply), self._chunk_bytes), (type(reply), reply.number))
            peer = self._peers.setdefault(receiver, _Peer(now))
            if not peer.outbox.replace(letter):
                peer.outbox.put(letter)
                if len(peer.outbox) > _MOST_LETTERS:
                    peer.outbox.drop_oldest()

    def _send(self) -> None:
        """A chunk to each peer in turn, until there is nothing more to send or nobody takes any more."""
        progress = True
        rounds = 0
        while progress and rounds < _RECEIVE_BATCH:
            progress = False
            rounds += 1
            for receiver, peer in list(self._peers.items()):
                now = time.monotonic()
                if self._pace is not None and self._pace.wait_s(now) > 0:
                    return
                if now >= peer.again_s:
                    progress = self._send_chunk(receiver, peer, now) or progress

    def _send_chunk(self, receiver: bytes, peer: _Peer, now: float) -> bool:
        def hand_over(header: bytes, chunk: Chunk) -> None:
            self._router.send(receiver, zmq.NOBLOCK | zmq.SNDMORE)
            self._router.send(header, zmq.NOBLOCK | zmq.SNDMORE)
            self._router.send(chunk.frame, zmq.NOBLOCK, copy=False)

        try:
            sent = peer.outbox.send(hand_over, now)
        except zmq.Again:
            peer.again_s = now + _AGAIN_S
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            del self._peers[receiver]  # its connection broke; over the next one it will ask again
            return False
        self.bytes_sent += sent
        if self._pace is not None:
            self._pace.take(sent, now)
        peer.read_s, peer.again_s = now, 0.0
        if not peer.outbox:
            del self._peers[receiver]
        return True

    def _forget_silent(self, now: float) -> None:
        for receiver, peer in list(self._peers.items()):
            if now > peer.read_s + _PATIENCE_S:
                del self._peers[receiver]
        by_patience = sorted(self._peers, key=lambda receiver: self._peers[receiver].read_s)
        waiting_bytes = sum(peer.outbox.nbytes for peer in self._peers.values())
        for receiver in by_patience:
            if waiting_bytes <= self._max_held_bytes or len(self._peers) == 1:
                break
            waiting_bytes -= self._peers.pop(receiver).outbox.nbytes
