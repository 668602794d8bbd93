"""The I/O thread of a ZeroMQ transport: it alone touches the sockets, everybody else leaves letters with it."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import zmq

from gradcomp.errors import PacketError, PeerLost, TransportError
from gradcomp.transports.chunks import Outgoing
from gradcomp.transports.frames import BYE, BYE_SEEN, HEADER_BYTES, HELLO, MAX_CHUNK_BYTES
from gradcomp.transports.mailbox import Mailbox
from gradcomp.transports.pacing import TokenBucket
from gradcomp.transports.zmq_link import NO_SLOT, Letter, Link, receive_payload

__all__ = ["Courier"]

# Frames taken off the wire before it is some peer's turn to be sent to again.
_RECEIVE_BATCH = 16


class Courier:
    """Sends and receives until :meth:`close`; owns the context, its sockets and the thread.

    Attributes:
        bytes_sent, bytes_received: chunks and their headers.
        junk_frames: frames of unknown senders, and of peers that were cut off: dropped.
    """

    def __init__(
        self,
        rank: int,
        context: zmq.Context[zmq.Socket[bytes]],
        router: zmq.Socket[bytes],
        links: Sequence[Link],
        mailbox: Mailbox,
        bits_per_s: float | None,
    ) -> None:
        self.bytes_sent = self.bytes_received = self.junk_frames = 0
        self.links = {link.peer: link for link in links}
        self._rank = rank
        self._pid = os.getpid()
        self._context = context
        self._router = router
        self._mailbox = mailbox
        self._pace = None if bits_per_s is None else TokenBucket(bits_per_s, time.monotonic())
        # Each rank begins with the next one, so that not all of them send to rank 0 first.
        self._turns = deque(sorted(links, key=lambda link: (link.peer < rank, link.peer)))
        self._by_identity = {link.identity: link for link in links}

        self._lock = threading.Lock()
        self._posted: list[tuple[int, Letter]] = []
        self._woken = self._closing = self._said_bye = self._stop = self._ended = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)

        self._poller = zmq.Poller()
        self._handlers: dict[object, Callable[[], object]] = {}
        self._watch(self._wake_read, zmq.POLLIN, self._take_posted)
        self._watch(router, zmq.POLLIN, self._receive)
        for link in links:
            self._watch(link.monitor, zmq.POLLIN, partial(self._check_connection, link))
        self._thread = threading.Thread(target=self._run, name=f"gradcomp-zmq-{rank}", daemon=True)
        self._thread.start()

    # Called by other threads.

    def post(self, peers: Iterable[int], letter: Letter) -> None:
        """Leave a letter for each of ``peers``; returns at once."""
        with self._lock:
            self._posted += [(peer, letter) for peer in peers]
            self._wake()

    def close(self, patience_s: float) -> None:
        """Send what is posted, say goodbye, and end the thread; at most ``patience_s`` without any progress."""
        if os.getpid() != self._pid:
            return  # a forked child has neither the thread nor a right to the sockets
        with self._lock:
            self._closing = True
            self._wake()
        while self._thread.is_alive():
            before = self.bytes_sent
            self._thread.join(patience_s)
            if self.bytes_sent == before:
                break
        with self._lock:
            self._stop = True
            self._wake()
        self._thread.join(1.0)

    def _wake(self) -> None:
        if not self._woken and not self._ended:
            self._woken = True
            os.write(self._wake_write, b"\0")

    # The thread.

    def _run(self) -> None:
        try:
            while not self._finished():
                self._turn()
        except BaseException as cause:
            error = TransportError(f"rank {self._rank}: the I/O thread died: {type(cause).__name__}: {cause}")
            error.__cause__ = cause
            self._mailbox.fail(error)
        finally:
            self._end()

    def _finished(self) -> bool:
        if self._stop:
            return True
        return self._closing and not self._posted and all(self._settled(link) for link in self.links.values())

    @staticmethod
    def _settled(link: Link) -> bool:
        """Whether nothing is left to do for this peer once this rank is leaving."""
        return link.gone or link.farewell_seen or ((link.left or link.cut_off) and not link.outbox)

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            os.close(self._wake_read)
            os.close(self._wake_write)
        for link in self.links.values():
            link.close()
        self._router.close(0)
        self._context.destroy(0)
        self._mailbox.fail(TransportError(f"rank {self._rank}: the transport is closed"))

    def _watch(self, socket: zmq.Socket[bytes] | int, events: int, handler: Callable[[], object]) -> None:
        self._poller.register(socket, events)
        self._handlers[socket] = handler

    def _unwatch(self, socket: zmq.Socket[bytes]) -> None:
        if self._handlers.pop(socket, None) is not None:
            self._poller.unregister(socket)

    def _turn(self) -> None:
        for socket, _ in self._poller.poll(self._sleep_ms()):
            handler = self._handlers.get(socket)
            if handler is not None:
                handler()
        self._send_round()

    def _sleep_ms(self) -> int | None:
        if not any(link.outbox and not link.blocked for link in self._turns):
            return None
        return 0 if self._pace is None else math.ceil(self._pace.wait_s(time.monotonic()) * 1000)

    def _take_posted(self) -> None:
        os.read(self._wake_read, 16)
        with self._lock:
            posted, self._posted = self._posted, []
            self._woken = False
            say_bye = self._closing and not self._said_bye
        for peer, letter in posted:
            link = self.links[peer]
            if not (link.gone or link.left or link.cut_off):
                link.post(letter)
        if say_bye:
            self._said_bye = True
            for link in self.links.values():
                if not (link.gone or link.left or link.cut_off):
                    self._control(link, BYE)

    @staticmethod
    def _control(link: Link, kind: int) -> None:
        link.outbox.append(Letter(kind, NO_SLOT, Outgoing([], MAX_CHUNK_BYTES)))

    # Sending.

    def _send_round(self) -> None:
        """At most one chunk to each peer, so that all of them progress."""
        for _ in range(len(self._turns)):
            if self._pace is not None and self._pace.wait_s(time.monotonic()) > 0:
                return
            link = self._turns[0]
            self._turns.rotate(-1)
            if link.blocked or not link.outbox:
                continue
            sent = link.send_chunk()
            if sent:
                self.bytes_sent += sent
                if self._pace is not None:
                    self._pace.take(sent, time.monotonic())
            else:
                self._watch(link.dealer, zmq.POLLOUT, partial(self._unblock, link))

    def _unblock(self, link: Link) -> None:
        link.blocked = False
        self._unwatch(link.dealer)

    # Receiving.

    def _receive(self) -> bool:
        """Take some frames off the wire; returns whether there may be more."""
        router = self._router
        for _ in range(_RECEIVE_BATCH):
            try:
                identity = router.recv(zmq.NOBLOCK)
            except zmq.Again:
                return False
            link = self._by_identity.get(identity)
            if link is None or link.cut_off:
                self.junk_frames += 1
            else:
                try:
                    self._receive_frame(link)
                except PacketError as error:
                    self._cut_off(link, error)
            while router.getsockopt(zmq.RCVMORE):  # of junk, or of a frame refused half way
                router.recv(copy=False)
        return True

    def _receive_frame(self, link: Link) -> None:
        router, inbound = self._router, link.inbound
        if not router.getsockopt(zmq.RCVMORE):
            raise PacketError("frame without a header")
        raw = router.recv()
        payload = receive_payload(router, inbound.header(raw))
        kind = inbound.payload(payload)
        self.bytes_received += HEADER_BYTES + len(payload)
        if kind == HELLO:
            link.hello = bytes(payload)
            with self._mailbox.arrival:
                self._mailbox.arrival.notify_all()
        elif kind == BYE:
            link.left = True
            self._lose(link, "left the run")
            link.forget_outbox()
            self._control(link, BYE_SEEN)
        elif kind == BYE_SEEN:
            if not self._said_bye:
                raise PacketError("answer to a farewell that nobody said")
            link.farewell_seen = True

    def _cut_off(self, link: Link, error: PacketError) -> None:
        link.cut_off = True
        self._lose(link, f"broke the protocol and was cut off: {error}")
        link.forget_outbox()
        self._control(link, BYE)

    # Losing.

    def _check_connection(self, link: Link) -> None:
        if not link.lost_connection():
            return
        # What it sent before, its farewell perhaps, comes over the other connection: read that first.
        while self._receive():
            pass
        self._lose(link, f"is gone: no connection to {link.endpoint} any more")
        self._unwatch(link.dealer)
        self._unwatch(link.monitor)
        link.close()

    def _lose(self, link: Link, what: str) -> None:
        self._mailbox.lose(link.peer, PeerLost(f"rank {self._rank}: rank {link.peer} {what}", peer=link.peer))
