"""What carries messages between ranks: Transport, and what it hands out; part of :mod:`gradcomp.interfaces`."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar, final

import torch
from torch import Tensor

from gradcomp.errors import ConfigError, TransportError, TransportTimeout
from gradcomp.options import Configured

__all__ = ["FIRST_RESERVED_BUCKET", "MY_TURN", "Buffer", "Incoming", "Levels", "Part", "Slot", "Transport"]

T = TypeVar("T", bound="Transport")

Buffer = bytes | bytearray | memoryview

# Bucket numbers from here on no bucket has: they are of messages that are not gradients (gradcomp.replicas).
FIRST_RESERVED_BUCKET: Final = 0xFFFF_FFF0


class Slot(NamedTuple):
    """Where a message belongs: every (sender, slot) is sent at most once in a run."""

    step: int
    bucket: int
    stage: int

    @property
    def urgency(self) -> tuple[int, int, int, int]:
        """What sorts messages, the most urgent first: a verdict or a digest, and then buckets of the earliest layers.

        Buckets are numbered from the last layers to the first (:mod:`gradcomp.bucket`), and forward begins with the
        first. What is left of an earlier step comes before all of a later one, and every bucket's first trip before
        any second one: nothing is known of the step as a whole before that (:mod:`gradcomp.verdict`).
        """
        if self.bucket >= FIRST_RESERVED_BUCKET:
            return 0, 0, 0, 0
        return 1, self.step, self.stage, -self.bucket


class Incoming(ABC):
    """A message on its way here."""

    peer: int
    slot: Slot

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether :meth:`result` would return or raise at once."""

    @property
    @abstractmethod
    def failed(self) -> bool:
        """Whether :meth:`result` would raise at once."""

    @abstractmethod
    def result(self) -> memoryview:
        """The whole message, contiguous.

        Raises:
            PeerLost: the sender is gone.
            TransportError: the sender broke the protocol, or this transport was closed.
        """


class _MyTurn(tuple[Incoming, ...]):
    """The type of MY_TURN: an empty tuple like no other."""


# Yielded before a collective operation, which all ranks must begin in the same order: the exchange goes on once every
# bucket submitted before its own is done.
MY_TURN: Final[Sequence[Incoming]] = _MyTurn()


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some ranks of a run that have a transport of their own: those of one host, or one of each host.

    Attributes:
        name: no other part of the run has it.
        rank, world_size: counted among them.
        run_rank: this process's rank in the whole run.
        one_host: all of them run on this host.
    """

    name: str
    rank: int
    world_size: int
    run_rank: int
    one_host: bool


@dataclass(frozen=True, kw_only=True)
class Levels:
    """The two levels of a hierarchy of ranks.

    Attributes:
        local: the ranks of this host; its rank 0 is the host's leader.
        between: the leaders, host by host; None on a rank that leads none.
        host: this one's number.
        hosts: how many there are.
        dtype: what gradients are sent as inside a host, on their way to its leader.
    """

    local: Transport
    between: Transport | None
    host: int
    hosts: int
    dtype: torch.dtype


class Transport(Configured, ABC):
    """Carries messages between ranks, whole and in order of nothing but their slots.

    A connection lasts from :meth:`connect` to :meth:`close`. Sending never blocks; receiving is asking for an
    :class:`Incoming` and waiting for it. ``gradcomp.testing.check_transport`` checks the whole contract.

    Attributes:
        rank: this process's rank, in 0..world_size-1.
        world_size: number of ranks.
        timeout_s: how long a blocking call may take, in seconds.
        arrival: notified whenever an Incoming becomes done; hold it to wait for several things at once.
        bytes_sent, bytes_received: everything put on and taken off the wire for data, headers included.
        adds_up: whether :meth:`all_reduce` is more than sends and receives, so that sums are best left to it.
        levels: where ranks are not all alike: the transports that they do talk to each other by.
        first_needed_first: set before :meth:`connect`: of a peer's messages that have not begun, those that
            :attr:`Slot.urgency` puts first go first. A transport that has no queue of its own need not care.
    """

    rank: int
    world_size: int
    timeout_s: float
    arrival: threading.Condition
    bytes_sent: int
    bytes_received: int
    adds_up: bool = False
    levels: Levels | None = None
    first_needed_first: bool = False

    @property
    def parties(self) -> int:
        """How many exchange packets: all ranks, or the leaders of hosts."""
        return self.world_size if self.levels is None else self.levels.hosts

    @property
    def party(self) -> int | None:
        """This rank's number among those, or None if it is not one of them."""
        if self.levels is None:
            return self.rank
        return None if self.levels.between is None else self.levels.between.rank

    @classmethod
    def for_part(cls: type[T], options: Mapping[str, object], part: Part) -> T:
        """A transport of the ranks of ``part`` only; ``options`` as for ``from_options``.

        Raises:
            ConfigError: this transport cannot be had for some ranks of a run.
        """
        raise ConfigError(f"{cls.id}: this transport is for all ranks of a run; it cannot be one level of a hierarchy")

    def check_device(self, device: torch.device) -> None:
        """Raise ConfigError if gradients on ``device`` cannot go this way; called before :meth:`connect`."""

    @abstractmethod
    def connect(
        self,
        hello: Mapping[str, str | int | bytes],
        *,
        max_message_bytes: int,
        max_unclaimed_bytes: int | None = None,
    ) -> None:
        """Meet the other ranks and make sure that all of them said the same ``hello``.

        Args:
            hello: what every rank must agree on, field by field (see :mod:`gradcomp.handshake`).
            max_message_bytes: no message is longer; a peer that sends a longer one is cut off.
            max_unclaimed_bytes: a peer that sends more than that before it is asked for is cut off. A peer may be about
                a step ahead, so this should be two steps' messages, at least. None: the transport's own default.

        Raises:
            HandshakeError: a rank said something else; names the first field that differs, on every rank.
            TransportTimeout: a rank did not come within ``timeout_s``; names the missing ranks.
        """

    @abstractmethod
    def send(self, peer: int, slot: Slot, parts: Sequence[Buffer]) -> None:
        """Send the concatenation of ``parts`` to ``peer``; returns at once.

        The parts must not change until :meth:`close`: they may be read without a copy.

        Raises:
            PeerLost: ``peer`` is gone.
            TransportError: not connected, or closed.
        """

    def send_to_all(self, peers: Iterable[int], slot: Slot, parts: Sequence[Buffer]) -> None:
        """:meth:`send` the same to several peers, in this order; a transport may have a cheaper way."""
        for peer in peers:
            self.send(peer, slot, parts)

    @abstractmethod
    def recv(self, peer: int, slot: Slot) -> Incoming:
        """Ask for the message ``peer`` sends to ``slot``; returns at once, whether it is here or not."""

    @abstractmethod
    def close(self) -> None:
        """Leave: tell the peers, let what was sent get out, free everything. Bounded; may be called twice."""

    def traffic(self) -> dict[str, int]:
        """Bytes so far, under the names they have in :meth:`gradcomp.GradientExchange.stats`."""
        return {"bytes_sent": self.bytes_sent, "bytes_received": self.bytes_received}

    def all_reduce(self, slot: Slot, mine: Tensor, *, one_trip: bool) -> Generator[Sequence[Incoming], None, Tensor]:
        """The sum of every rank's ``mine``, the same bits on all; yields what must be here before it goes on.

        A transport with an all-reduce of its own puts it here; this one sends and receives, at ``slot``'s stage and the
        next. ``mine`` is flat float32, must not change until :meth:`close`. ``one_trip``: rather more bytes than trips.
        """
        from gradcomp.sums import sum_over_ranks

        return (yield from sum_over_ranks(self, slot, mine, one_trip=one_trip))

    def carries(self, device: torch.device) -> bool:
        """Whether tensors of ``device`` travel from there to the peer's without passing through host memory."""
        return False

    def swap_tensors(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        """Send each peer a tensor and fill those that come in, where :meth:`carries` says so; by peer, all at once.

        A collective operation: all ranks begin it for the same bucket and stage in the same order (:data:`MY_TURN`),
        with the sizes their peers expect. Ordered after what is queued on the current stream and before what is queued
        next; on the CPU it blocks.

        Args:
            outgoing, incoming: flat uint8, on the device; ``outgoing`` must not change until :meth:`close`. A rank that
                only takes part sends itself an empty one.

        Raises:
            PeerLost, TransportTimeout: a peer is gone, or did not come to it.
        """
        raise TransportError(f"transport {self.id!r} carries host memory only")

    @final
    def wait(
        self, incoming: Sequence[Incoming], *, timeout_s: float | None = None, waited_s: float = 0.0
    ) -> list[memoryview]:
        """The messages of ``incoming``, when all are here.

        Args:
            timeout_s: how long to wait, in seconds; None for the transport's own ``timeout_s``.
            waited_s: how long somebody has waited for them already, for the message.

        Raises:
            TransportTimeout: not all were here in time; names the ranks that are missing.
            PeerLost: as :meth:`Incoming.result`.
        """
        patience = self.timeout_s if timeout_s is None else timeout_s
        with self.arrival:
            # A failure is reported at once: the others that are missing may be waiting for us in turn.
            self.arrival.wait_for(lambda: any(i.failed for i in incoming) or all(i.done for i in incoming), patience)
        for i in incoming:
            if i.failed:
                i.result()
        missing = [i for i in incoming if not i.done]
        if missing:
            slot, peers = missing[0].slot, ", ".join(str(i.peer) for i in missing)
            raise TransportTimeout(
                f"rank {self.rank}: nothing from rank {peers} for step {slot.step}, bucket {slot.bucket}, "
                f"stage {slot.stage} within {patience + waited_s:g} s"
            )
        return [i.result() for i in incoming]

    def all_gather(self, slot: Slot, payload: Buffer) -> list[memoryview]:
        """Every rank's ``payload`` for ``slot``, in rank order. Blocks; raises as :meth:`wait`."""
        peers = [peer for peer in range(self.world_size) if peer != self.rank]
        incoming = [self.recv(peer, slot) for peer in peers]
        self.send_to_all(peers, slot, [payload])
        found = dict(zip(peers, self.wait(incoming), strict=True))
        return [memoryview(payload) if peer == self.rank else found[peer] for peer in range(self.world_size)]
