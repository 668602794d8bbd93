"""What a worker asks the shards of a parameter server through; transports bring it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from gradcomp.server.protocol import Reply, Request

__all__ = ["Asked", "Links"]


@dataclass(kw_only=True, eq=False)
class Asked:
    """A request under way.

    Attributes:
        replies: what came; for a Push with ``pull`` its Acked, then a Changed. Never Wait or Busy.
        done: all there is has come.
        waiting: why it takes so long, as the server says (Wait, Busy).
    """

    shard: int
    request: Request
    replies: list[Reply] = field(default_factory=list)
    done: bool = False
    waiting: str = ""


class Links(ABC):
    """One worker's links to all shards.

    Whatever is not answered is sent again, also to a server that was gone for a while. Once a Welcome came, the lease
    is renewed without anybody asking for it, until a Left.

    Attributes:
        runs: of each shard, the run its first Welcome named; set it to None to accept another one.
    """

    runs: list[int | None]

    @abstractmethod
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
        """Begin to connect.

        Args:
            addresses: ``host:port`` of each shard, in order.
            worker: its name.
            incarnation: drawn at random when it joins.
            timeout_s: how long :meth:`wait` waits, in seconds.
            max_message_bytes: no reply is longer.
            rate: pace everything this worker sends, as ``"100mbit"`` or bits per second; None: as fast as it goes.
        """

    @property
    @abstractmethod
    def bytes_sent(self) -> int:
        """Bytes sent so far, with all headers, and whatever had to be sent twice."""

    @property
    @abstractmethod
    def bytes_received(self) -> int:
        """Bytes received so far."""

    @abstractmethod
    def ask(self, shard: int, request: Request) -> Asked:
        """Send ``request``; returns at once. Its number is given here. Its body must not change until it is done."""

    @abstractmethod
    def wait(self, asked: Sequence[Asked], *, timeout_s: float | None = None) -> None:
        """Wait until all are done.

        Args:
            timeout_s: in seconds; None: the usual one.

        Raises:
            TransportTimeout: names the shards that did not answer, their addresses, and what is known of the reason.
                These requests are given up; the same may be asked again.
            HandshakeError: a request was refused (``field`` names what of it), the server speaks another version, or it
                lost its state (``run``).
            TransportError: the links are closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop. Says no goodbye: ask for Leave before. Calling it again does nothing."""
