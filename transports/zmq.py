"""Peer to peer over ZeroMQ: TCP, or unix-domain sockets on one host.

Every rank binds one ROUTER, on which it only receives, and connects one DEALER to every other rank, on which it only
sends. What travels is specified in docs/FORMAT.md.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import struct
import tempfile
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import xxhash
import zmq

from gradcomp.errors import TransportError
from gradcomp.handshake import pack
from gradcomp.interfaces import Buffer, Incoming, Part, Slot, Transport
from gradcomp.options import check_flag, check_integer, check_number, check_text
from gradcomp.transports import environment
from gradcomp.transports.addresses import check_reachable, endpoint, listening_address, parse_ip
from gradcomp.transports.chunks import Outgoing
from gradcomp.transports.frames import DATA, HELLO, MAX_CHUNK_BYTES
from gradcomp.transports.frames import VERSION as FRAME_VERSION
from gradcomp.transports.greeting import greet
from gradcomp.transports.inbound import Session
from gradcomp.transports.mailbox import Mailbox, check_address
from gradcomp.transports.pacing import paced_chunk_bytes, parse_rate
from gradcomp.transports.rendezvous import Meeting, Record, run_name
from gradcomp.transports.zmq_courier import Courier
from gradcomp.transports.zmq_link import NO_SLOT, Letter, Link, secure_socket

__all__ = ["ZmqTransport"]

_PATIENCE_S = 10.0  # for peers that are there but do not read
_REFUSED_PATIENCE_S = 1.0
_UNCLAIMED_BYTES = 1 << 30


@dataclass(kw_only=True, eq=False)
class ZmqTransport(Transport):
    """Ranks talk to each other directly over TCP (``zmq``) or unix-domain sockets (``zmq:ipc=true``).

    They meet in torch's TCPStore at MASTER_ADDR:MASTER_PORT, as torchrun sets them.

    Attributes:
        rank, world_size: from RANK and WORLD_SIZE unless given.
        rate: pace everything this rank sends, as ``"100mbit"`` or bits per second; None: as fast as it goes.
        insecure: allow another address than loopback although nothing is encrypted and nobody proves who they are:
            whoever reaches the port may read gradients, and send some.
        ipc: unix-domain sockets in a private folder instead of TCP; all ranks must run on one host.
        timeout_s: how long a blocking call may take, in seconds.
        silence_s: a peer that does not answer for so long is lost, in seconds. More for links below some 20 Mb/s.
        buffer_bytes: how much a connection may have under way. Small, so that connections that share a link share it
            evenly and an all-gather has no straggler; a connection over a long round trip gets no more than
            ``buffer_bytes`` per round trip. 0: the kernel decides.
        address: IP address to receive on; None: the one that routes to the master, or loopback if torchrun says that
            all ranks run on this host.
        master: ``host:port`` instead of MASTER_ADDR and MASTER_PORT.
        run: name of the run, to keep several apart that share a master; None: torchrun's run id.
    """

    id: ClassVar[str] = "zmq"

    rank: int = field(default_factory=environment.rank)
    world_size: int = field(default_factory=environment.world_size)
    rate: str | float | None = None
    insecure: bool = False
    ipc: bool = False
    timeout_s: float = 300.0
    silence_s: float = 3.0
    buffer_bytes: int = 64 << 10
    address: str | None = None
    master: str | None = None
    run: str | None = None

    def __post_init__(self) -> None:
        check_integer(self.id, "world_size", self.world_size, at_least=1)
        check_integer(self.id, "rank", self.rank, at_least=0, at_most=self.world_size - 1)
        check_flag(self.id, "insecure", self.insecure)
        check_flag(self.id, "ipc", self.ipc)
        check_number(self.id, "timeout_s", self.timeout_s, above=0)
        check_number(self.id, "silence_s", self.silence_s, at_least=0.1, at_most=3600)
        check_integer(self.id, "buffer_bytes", self.buffer_bytes, at_least=0, at_most=1 << 30)
        for name in ("address", "master", "run"):
            if getattr(self, name) is not None:
                check_text(self.id, name, getattr(self, name))
        if self.address is not None:
            parse_ip(self.address)
        self._master = environment.master(self.master)
        self._bits_per_s = parse_rate(self.id, self.rate)
        self._chunk_bytes = paced_chunk_bytes(self._bits_per_s)
        self._pid = os.getpid()
        self._mailbox = Mailbox(self.rank, self.timeout_s)
        self.arrival = self._mailbox.arrival
        self._courier: Courier | None = None
        self._connected = self._closed = False
        self._max_message_bytes = 0
        self._last: Outgoing | None = None
        self._hosting: bool | None = None
        self._part = ""

    @classmethod
    def for_part(cls, options: Mapping[str, object], part: Part) -> ZmqTransport:
        """All parts meet at the run's one master, under names of their own; on one host they stay on loopback."""
        more: dict[str, object] = {"rank": part.rank, "world_size": part.world_size}
        if part.one_host and not options.get("ipc"):
            more["address"] = options.get("address") or "127.0.0.1"
        found = cls.from_options({**options, **more})
        found._hosting, found._part = part.run_rank == 0, f"/{part.name}"
        return found

    @property
    def bytes_sent(self) -> int:  # type: ignore[override]
        return 0 if self._courier is None else self._courier.bytes_sent

    @property
    def bytes_received(self) -> int:  # type: ignore[override]
        return 0 if self._courier is None else self._courier.bytes_received

    def connect(
        self,
        hello: Mapping[str, str | int | bytes],
        *,
        max_message_bytes: int,
        max_unclaimed_bytes: int | None = None,
    ) -> None:
        if self._connected or self._closed:
            raise TransportError(f"rank {self.rank}: a transport connects once; make another one")
        self._check_process()
        self._connected = True
        self._max_message_bytes = max_message_bytes
        self._mailbox.max_unclaimed_bytes = max_unclaimed_bytes or max(_UNCLAIMED_BYTES, 4 * max_message_bytes)
        if self.world_size == 1:
            return
        deadline = time.monotonic() + self.timeout_s
        try:
            full_hello = self._open(hello, deadline)
            assert self._courier is not None
            links = self._courier.links
            names = {peer: f"{peer} at {link.endpoint}" for peer, link in links.items()}
            greet(full_hello, links, names, self._mailbox, deadline)
        except BaseException:
            self._close(_REFUSED_PATIENCE_S)
            raise

    def _open(self, hello: Mapping[str, str | int | bytes], deadline: float) -> dict[str, str | int | bytes]:
        """Bind, meet the others, and start the thread that greets them."""
        run = run_name(self.run) + self._part
        full_hello = dict(hello) | {
            "frames": FRAME_VERSION,
            "run": run,
            "max_message_bytes": self._max_message_bytes,
        }
        packed = pack(full_hello)
        host = None if self.ipc else listening_address(self.address, self._master, insecure=self.insecure)
        folder = tempfile.mkdtemp(prefix="gradcomp-") if self.ipc else None
        if folder is not None:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            router = secure_socket(context, zmq.ROUTER)
            router.backlog = self.world_size + 64
            router.router_handover = 0
            router.ipv6 = host is not None and ":" in host
            router.bind(endpoint(host, folder))
            mine = Record(
                rank=self.rank,
                world_size=self.world_size,
                endpoint=_last_endpoint(router),
                # A routing id may not begin with a zero byte; who does not know it cannot speak for this rank.
                identity=struct.pack("<4sI", b"rank", self.rank) + secrets.token_bytes(8),
                incarnation=secrets.randbits(32),
                host=socket.gethostname(),
            )
            meeting = Meeting(self._master, run, self.rank, self.world_size, deadline, hosting=self._hosting)
            others = meeting.exchange(mine)
            for theirs in others.values():
                check_reachable(mine, theirs)
            session = Session(
                run=xxhash.xxh3_64_intdigest(run.encode()),
                epoch=meeting.epoch,
                max_message_bytes=self._max_message_bytes,
            )
            links = [
                Link(
                    context,
                    mine,
                    theirs,
                    session,
                    self._mailbox,
                    silence_s=self.silence_s,
                    buffer_bytes=self.buffer_bytes,
                    first_needed_first=self.first_needed_first,
                )
                for theirs in others.values()
            ]
        except BaseException:
            context.destroy(0)
            raise
        self._courier = Courier(self.rank, context, router, links, self._mailbox, self._bits_per_s)
        # Also at exit: the peers learn that this rank leaves, and what it sent gets out.
        self._finalizer = weakref.finalize(self, self._courier.close, _PATIENCE_S)
        self._courier.post([link.peer for link in links], Letter(HELLO, NO_SLOT, Outgoing([packed], MAX_CHUNK_BYTES)))
        return full_hello

    def send(self, peer: int, slot: Slot, parts: Sequence[Buffer]) -> None:
        self.send_to_all([peer], slot, parts)

    def send_to_all(self, peers: Iterable[int], slot: Slot, parts: Sequence[Buffer]) -> None:
        """All at once: the thread that sends is woken once."""
        peers = list(peers)
        for peer in peers:
            self._check_open(peer, slot)
            lost = self._mailbox.lost(peer)
            if lost is not None:
                raise lost.with_traceback(None)
        if not peers:
            return
        message = self._last
        if message is None or not message.same_as(parts):
            message = Outgoing(parts, self._chunk_bytes)
            if message.total > self._max_message_bytes:
                raise ValueError(f"message of {message.total} bytes; {self._max_message_bytes} were agreed on")
            self._last = message  # an all-gather sends the same parts to everybody
        assert self._courier is not None
        self._courier.post(peers, Letter(DATA, slot, message))

    def recv(self, peer: int, slot: Slot) -> Incoming:
        self._check_open(peer, slot)
        return self._mailbox.claim(peer, slot)

    def close(self) -> None:
        self._close(_PATIENCE_S)

    def _close(self, patience_s: float) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._last = None
        self._mailbox.fail(TransportError(f"rank {self.rank}: the transport is closed"))
        if self._courier is not None:
            self._courier.close(patience_s)
            self._finalizer.detach()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise TransportError(f"rank {self.rank}: a transport does not survive fork; make one in the child")

    def _check_open(self, peer: int, slot: Slot) -> None:
        self._check_process()
        if self._closed:
            raise TransportError(f"rank {self.rank}: the transport is closed")
        if not self._connected:
            raise TransportError(f"rank {self.rank}: the transport is not connected")
        check_address(self, peer, slot)


def _last_endpoint(bound: zmq.Socket[bytes]) -> str:
    found = bound.getsockopt(zmq.LAST_ENDPOINT)
    return found.rstrip(b"\0").decode() if isinstance(found, bytes) else str(found)
