"""A rank that sends its packets to itself over ZeroMQ: all that exchange costs one machine, without another one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

from gradcomp.bucket import Piece, Unit
from gradcomp.exchanges.all_gather import AllGather
from gradcomp.interfaces import Buffer, Exchange, Incoming, Slot, Transport, Work
from gradcomp.transports.zmq import ZmqTransport

__all__ = ["ToItself", "ToItselfTransport"]


@dataclass(frozen=True, kw_only=True)
class ToItself(Exchange):
    """Packets are made, sent, received, checked, and applied as all that there are.

    Attributes:
        watch: a context for each part of the work, by its name.
    """

    id: ClassVar[str] = "to_itself"
    watch: Callable[[str], AbstractContextManager[object]] = field(default=lambda name: nullcontext(), repr=False)

    def config(self) -> dict[str, object]:
        return {"id": self.id}

    def cut(self, units: Sequence[Unit], world_size: int) -> list[Piece]:
        return AllGather().cut(units, world_size)

    def run(self, work: Work) -> Generator[Sequence[Incoming], None, None]:
        with self.watch("compress"):
            mine = work.encode(work.pieces)
        with self.watch("to the host, send"):
            incoming = work.recv(work.rank, 0)
            work.send(work.rank, 0, mine)
        yield [incoming]
        with self.watch("check, to the device"):
            message = work.parse(work.pieces, incoming)
        with self.watch("deliver"):
            work.deliver(work.pieces, [message])


@dataclass(kw_only=True, eq=False)
class ToItselfTransport(Transport):
    """A world of one rank, whose messages to itself pass a socket on loopback: from one of two transports to the other.

    Attributes:
        timeout_s: how long a blocking call may take, in seconds.
    """

    id: ClassVar[str] = "to_itself"
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            master = f"127.0.0.1:{free.getsockname()[1]}"
        self.rank, self.world_size = 0, 1
        self._sender, self._receiver = (
            ZmqTransport(rank=rank, world_size=2, master=master, timeout_s=self.timeout_s) for rank in range(2)
        )
        self.arrival = self._receiver.arrival

    @property
    def bytes_sent(self) -> int:  # type: ignore[override]
        return self._sender.bytes_sent

    @property
    def bytes_received(self) -> int:  # type: ignore[override]
        return self._receiver.bytes_received

    def connect(
        self,
        hello: Mapping[str, str | int | bytes],
        *,
        max_message_bytes: int,
        max_unclaimed_bytes: int | None = None,
    ) -> None:
        bounds = {"max_message_bytes": max_message_bytes, "max_unclaimed_bytes": max_unclaimed_bytes}
        failed: list[BaseException] = []

        def connect_sender() -> None:
            try:
                self._sender.connect(hello, **bounds)  # type: ignore[arg-type]
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=connect_sender, daemon=True)
        thread.start()
        self._receiver.connect(hello, **bounds)  # type: ignore[arg-type]
        thread.join(self.timeout_s)
        if failed:
            raise failed[0]

    def send(self, peer: int, slot: Slot, parts: Sequence[Buffer]) -> None:
        self._sender.send(1, slot, parts)

    def recv(self, peer: int, slot: Slot) -> Incoming:
        return self._receiver.recv(0, slot)

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()
