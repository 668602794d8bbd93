"""Threads of one process: for tests and notebooks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakValueDictionary

from gradcomp.errors import PacketError, PeerLost, TransportError, TransportTimeout
from gradcomp.handshake import compare, pack, unpack
from gradcomp.interfaces import Buffer, Incoming, Part, Slot, Transport
from gradcomp.options import check_integer, check_number, check_text
from gradcomp.transports.mailbox import Mailbox, check_address

__all__ = ["InprocTransport"]


class _Hub:
    """Where the ranks of one world meet; lives as long as one of them does."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.members: dict[int, InprocTransport] = {}
        self.hellos: dict[int, bytes] = {}


_hubs: WeakValueDictionary[tuple[int, str], _Hub] = WeakValueDictionary()
_hubs_lock = threading.Lock()


@dataclass(kw_only=True, eq=False)
class InprocTransport(Transport):
    """Ranks are threads of one process; bytes are copied once, so that sender and receiver share no memory.

    Attributes:
        rank, world_size: one transport for each rank; :meth:`world` makes them all.
        hub: ranks of the same hub meet.
        timeout_s: how long a blocking call may take, in seconds.
    """

    id: ClassVar[str] = "inproc"

    rank: int = 0
    world_size: int = 1
    hub: str = "default"
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        check_integer(self.id, "world_size", self.world_size, at_least=1)
        check_integer(self.id, "rank", self.rank, at_least=0, at_most=self.world_size - 1)
        check_text(self.id, "hub", self.hub)
        check_number(self.id, "timeout_s", self.timeout_s, above=0)
        self.bytes_sent = self.bytes_received = 0
        self._mailbox = Mailbox(self.rank, self.timeout_s)
        self.arrival = self._mailbox.arrival
        self._meeting: _Hub | None = None
        self._closed = False
        self._max_message_bytes = 0
        self._counting = threading.Lock()

    @classmethod
    def world(cls, world_size: int, *, timeout_s: float = 60.0) -> list[InprocTransport]:
        """Transports for all ranks of a new world."""
        hub = os.urandom(8).hex()
        return [cls(rank=rank, world_size=world_size, hub=hub, timeout_s=timeout_s) for rank in range(world_size)]

    @classmethod
    def for_part(cls, options: Mapping[str, object], part: Part) -> InprocTransport:
        """A hub of its own for each part."""
        hub = f"{options.get('hub', cls.hub)}/{part.name}"
        return cls.from_options({**options, "hub": hub, "rank": part.rank, "world_size": part.world_size})

    def connect(
        self,
        hello: Mapping[str, str | int | bytes],
        *,
        max_message_bytes: int,
        max_unclaimed_bytes: int | None = None,
    ) -> None:
        if self._meeting is not None or self._closed:
            raise TransportError(f"rank {self.rank}: a transport connects once; make another one")
        self._max_message_bytes = max_message_bytes
        self._mailbox.max_unclaimed_bytes = max_unclaimed_bytes
        key = (os.getpid(), self.hub)
        with _hubs_lock:
            hub = _hubs.get(key)
            if hub is None or self.rank in hub.members:  # a world that met before: this is the next one
                hub = _hubs[key] = _Hub()
        self._meeting = hub
        said = {"world_size": self.world_size, **hello, "max_message_bytes": max_message_bytes}
        try:
            self._meet(hub, said)
        except BaseException:
            self.close()
            raise

    def _meet(self, hub: _Hub, hello: Mapping[str, str | int | bytes]) -> None:
        deadline = time.monotonic() + self.timeout_s
        waiting = set(range(self.world_size))
        with hub.changed:
            hub.members[self.rank] = self
            hub.hellos[self.rank] = pack(hello)
            hub.changed.notify_all()
            while waiting:
                # Compared as they come: a rank that counts another world size waits for ranks that never will.
                for peer in sorted(waiting & set(hub.hellos)):
                    compare(hello, unpack(hub.hellos[peer]), rank=self.rank, peer=peer)
                    waiting.discard(peer)
                if waiting and not hub.changed.wait(max(deadline - time.monotonic(), 0.0)):
                    break
        missing = [str(rank) for rank in sorted(waiting)]
        if missing:
            raise TransportTimeout(
                f"rank {self.rank}: rank {', '.join(missing)} did not come to {self.hub!r} within {self.timeout_s:g} s"
            )

    def send(self, peer: int, slot: Slot, parts: Sequence[Buffer]) -> None:
        hub = self._check_open(peer, slot)
        lost = self._mailbox.lost(peer)
        if lost is not None:
            raise lost.with_traceback(None)
        data = b"".join(parts)
        if len(data) > self._max_message_bytes:
            raise ValueError(f"message of {len(data)} bytes; {self._max_message_bytes} were agreed on")
        with self._counting:
            self.bytes_sent += len(data)
        hub.members[peer]._deliver(self.rank, slot, data)

    def _deliver(self, peer: int, slot: Slot, data: bytes) -> None:
        try:
            self._mailbox.expect(peer, slot, len(data))
        except PacketError as error:
            what = f"rank {self.rank}: rank {peer} broke the protocol and was cut off: {error}"
            self._mailbox.lose(peer, PeerLost(what, peer=peer))
            return
        with self._counting:
            self.bytes_received += len(data)
        self._mailbox.deliver(peer, slot, memoryview(data))

    def recv(self, peer: int, slot: Slot) -> Incoming:
        self._check_open(peer, slot)
        return self._mailbox.claim(peer, slot)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._mailbox.fail(TransportError(f"rank {self.rank}: the transport is closed"))
        if self._meeting is None:
            return
        with self._meeting.changed:
            peers = [member for rank, member in self._meeting.members.items() if rank != self.rank]
        for member in peers:
            member._mailbox.lose(
                self.rank, PeerLost(f"rank {member.rank}: rank {self.rank} left the run", peer=self.rank)
            )

    def _check_open(self, peer: int, slot: Slot) -> _Hub:
        if self._closed:
            raise TransportError(f"rank {self.rank}: the transport is closed")
        if self._meeting is None:
            raise TransportError(f"rank {self.rank}: the transport is not connected")
        check_address(self, peer, slot)
        return self._meeting
