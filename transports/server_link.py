"""A worker's links to the shards of a parameter server over ZeroMQ: what it asks, and the I/O thread that does it.

What travels is specified in docs/FORMAT.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import zmq

from gradcomp.errors import ConfigError, HandshakeError, TransportError, TransportTimeout
from gradcomp.options import check_integer, check_number, check_text
from gradcomp.server.links import Asked, Links
from gradcomp.server.protocol import Refused, Request, Unknown, Welcome
from gradcomp.transports.addresses import split_address
from gradcomp.transports.pacing import TokenBucket, paced_chunk_bytes, parse_rate
from gradcomp.transports.server_frames import CHUNK_BYTES
from gradcomp.transports.server_line import Line

__all__ = ["ServerLinks"]

_OWNER = "server"
_PATIENCE_S = 1.0


class ServerLinks(Links):
    """See :class:`gradcomp.server.links.Links`. Connecting goes on in the background, before and after the first time.

    Args:
        addresses: ``host:port`` of each shard, in order.
        worker: its name.
        incarnation: drawn at random when it joins.
        timeout_s: how long :meth:`wait` waits, in seconds.
        max_message_bytes: no reply is longer.
        rate: pace everything this worker sends, as ``"100mbit"`` or bits per second; None: as fast as it goes.

    Raises:
        ConfigError: no shard, or an option that is not allowed.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        worker: str,
        incarnation: int,
        timeout_s: float,
        max_message_bytes: int,
        rate: str | float | None = None,
    ) -> None:
        if not addresses:
            raise ConfigError("server: there must be at least one address")
        for address in addresses:
            split_address(_OWNER, address)
        check_text(_OWNER, "worker", worker)
        check_integer(_OWNER, "incarnation", incarnation, at_least=0, at_most=(1 << 63) - 1)
        check_number(_OWNER, "timeout_s", timeout_s, above=0)
        check_integer(_OWNER, "max_message_bytes", max_message_bytes, at_least=1)
        bits_per_s = parse_rate(_OWNER, rate)
        self.runs = [None] * len(addresses)
        self.timeout_s = timeout_s
        self._pid = os.getpid()
        self._numbers = itertools.count(1)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        lines = [
            Line(
                context,
                address,
                worker=worker,
                incarnation=incarnation,
                chunk_bytes=min(CHUNK_BYTES, paced_chunk_bytes(bits_per_s)),
                max_message_bytes=max_message_bytes,
                next_number=lambda: next(self._numbers),
            )
            for address in addresses
        ]
        self._courier = _Courier(context, lines, bits_per_s)
        self._finalizer = weakref.finalize(self, self._courier.close)

    @property
    def bytes_sent(self) -> int:
        return sum(line.bytes_sent for line in self._courier.lines)

    @property
    def bytes_received(self) -> int:
        return sum(line.bytes_received for line in self._courier.lines)

    def ask(self, shard: int, request: Request) -> Asked:
        self._check_open()
        asked = Asked(shard=shard, request=dataclasses.replace(request, number=next(self._numbers)))
        self._courier.post(partial(self._courier.lines[shard].ask, asked))
        return asked

    def wait(self, asked: Sequence[Asked], *, timeout_s: float | None = None) -> None:
        self._check_open()
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        with self._courier.progress:
            while True:
                for one in asked:
                    self._check(one)
                if all(one.done for one in asked):
                    return
                if self._courier.error is not None:
                    raise self._courier.error
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    break
                self._courier.progress.wait(left_s)
        late = [one for one in asked if not one.done]
        for one in late:
            self._courier.post(partial(self._courier.lines[one.shard].give_up, one))
        raise TransportTimeout("; ".join(self._explain(one, timeout_s) for one in late))

    def _check(self, asked: Asked) -> None:
        where = self._where(asked.shard)
        for reply in asked.replies:
            if isinstance(reply, Refused):
                raise HandshakeError(f"{where} refuses: {reply.reason}", field=reply.field, peer=asked.shard)
            if isinstance(reply, (Welcome, Unknown)):
                known = self.runs[asked.shard]
                if known is None and isinstance(reply, Welcome):
                    self.runs[asked.shard] = reply.run
                elif known is not None and reply.run != known:
                    raise HandshakeError(
                        f"{where} lost its state: it was run {known:#x}, and now is {reply.run:#x}; start it with "
                        "the --state it had, or start all workers anew",
                        field="run",
                        peer=asked.shard,
                    )

    def _explain(self, asked: Asked, timeout_s: float) -> str:
        line = self._courier.lines[asked.shard]
        what = f"{self._where(asked.shard)} did not answer {type(asked.request).__name__} within {timeout_s:g} s"
        if line.stranger:
            return f"{what}: {line.stranger}"
        if line.heard_s is None:
            return f"{what}: " + (
                "it accepts connections but says nothing" if line.connected else "nobody listens there"
            )
        silent_s = time.monotonic() - line.heard_s
        if not line.connected:
            return f"{what}: its connection broke {silent_s:.1f} s ago or later, and nobody listens there now"
        return f"{what}: {asked.waiting or f'it was last heard of {silent_s:.1f} s ago'}"

    def _where(self, shard: int) -> str:
        return f"server: shard {shard} at {self._courier.lines[shard].address}"

    def close(self) -> None:
        if os.getpid() == self._pid:
            self._finalizer()

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise TransportError("server: links do not survive fork; make others in the child")
        if not self._finalizer.alive:
            raise TransportError("server: the links are closed")


class _Courier:
    """The I/O thread: it alone touches the lines, everybody else posts what it is to do.

    Attributes:
        progress: notified when a request is answered, and when the thread died of ``error``.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], lines: Sequence[Line], bits_per_s: float | None
    ) -> None:
        self.lines = lines
        self.progress = threading.Condition()
        self.error: TransportError | None = None
        self._context = context
        self._pid = os.getpid()
        self._pace = None if bits_per_s is None else TokenBucket(bits_per_s, time.monotonic())
        self._turn = 0
        self._lock = threading.Lock()
        self._posted: list[Callable[[], None]] = []
        self._woken = self._stop = self._ended = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._poller = zmq.Poller()
        self._poller.register(self._wake_read, zmq.POLLIN)
        for line in lines:
            self._poller.register(line.monitor, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="gradcomp-server-links", daemon=True)
        self._thread.start()

    # Called by other threads.

    def post(self, what: Callable[[], None]) -> None:
        """Have it done by the thread; returns at once."""
        with self._lock:
            self._posted.append(what)
            self._wake()

    def close(self) -> None:
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._stop = True
            self._wake()
        self._thread.join(_PATIENCE_S)

    def _wake(self) -> None:
        if not self._woken and not self._ended:
            self._woken = True
            os.write(self._wake_write, b"\0")

    # The thread.

    def _run(self) -> None:
        try:
            while not self._stop:
                self._one_turn()
        except BaseException as cause:
            error = TransportError(f"server: the I/O thread died: {type(cause).__name__}: {cause}")
            error.__cause__ = cause
            with self.progress:
                self.error = error
                self.progress.notify_all()
        finally:
            with self._lock:
                self._ended = True
                os.close(self._wake_read)
                os.close(self._wake_write)
            for line in self.lines:
                line.close()
            self._context.destroy(0)

    def _one_turn(self) -> None:
        now = time.monotonic()
        until = min(line.due(now) for line in self.lines)
        if any(line.ready for line in self.lines):
            until = now if self._pace is None else now + self._pace.wait_s(now)
        for line in self.lines:
            # While ZeroMQ takes nothing, wait until it does; else its being ready would wake us all the time.
            self._poller.register(line.dealer, zmq.POLLIN | (zmq.POLLOUT if line.blocked else 0))
        ready = dict(self._poller.poll(max(0, math.ceil((until - now) * 1000))))
        if self._wake_read in ready:
            self._take_posted()
        answered = []
        for line in self.lines:
            if line.monitor in ready:
                line.check_connection()
            events = ready.get(line.dealer, 0)
            if events & zmq.POLLOUT:
                line.blocked = False
            if events & zmq.POLLIN:
                answered += line.receive(time.monotonic())
        if answered:
            with self.progress:
                self.progress.notify_all()
        self._send_round()

    def _take_posted(self) -> None:
        os.read(self._wake_read, 16)
        with self._lock:
            posted, self._posted = self._posted, []
            self._woken = False
        for what in posted:
            what()

    def _send_round(self) -> None:
        """At most one chunk to each shard, so that all of them progress."""
        for _ in self.lines:
            now = time.monotonic()
            if self._pace is not None and self._pace.wait_s(now) > 0:
                return
            line = self.lines[self._turn]
            self._turn = (self._turn + 1) % len(self.lines)
            if line.ready:
                sent = line.send_chunk(now)
                if sent and self._pace is not None:
                    self._pace.take(sent, now)
