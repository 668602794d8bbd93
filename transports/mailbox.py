"""Where messages that came in meet those who ask for them; shared by the transports."""

from __future__ import annotations

import threading

from gradcomp.errors import PacketError, TransportError, TransportTimeout
from gradcomp.interfaces import Incoming, Slot, Transport
from gradcomp.memory import Memory

__all__ = ["Mailbox", "Received", "check_address"]

# What a message that nobody asked for costs beside its bytes, so that empty ones are bounded, too.
_MESSAGE_COST_BYTES = 1024


class Received(Incoming):
    """A message asked for."""

    def __init__(self, mailbox: Mailbox, peer: int, slot: Slot) -> None:
        self.peer = peer
        self.slot = slot
        self._mailbox = mailbox
        self._data: memoryview | None = None
        self._error: TransportError | None = None

    @property
    def done(self) -> bool:
        return self._data is not None or self._error is not None

    @property
    def failed(self) -> bool:
        return self._error is not None

    def result(self) -> memoryview:
        if self._data is None and self._error is None:
            self._mailbox.wait_for(self)
        if self._data is not None:
            return self._data
        if self._error is None:
            raise TransportError(f"message from rank {self.peer} is neither here nor lost")
        raise self._error.with_traceback(None)

    def settle(self, data: memoryview | None, error: TransportError | None) -> None:
        """For the mailbox: it is here, or never will be."""
        self._data, self._error = data, error


class Mailbox:
    """Messages by (peer, slot), claimed before or after they come. Every method may be called from any thread.

    Attributes:
        rank, timeout_s: the transport's.
        arrival: notified whenever a claimed message is here or lost.
        max_unclaimed_bytes: most a peer may send before it is asked for; None: no limit.
        memory: for messages that come in parts.
    """

    def __init__(self, rank: int, timeout_s: float) -> None:
        self.arrival = threading.Condition()
        self.max_unclaimed_bytes: int | None = None
        self.memory = Memory()
        self.rank = rank
        self.timeout_s = timeout_s
        self._claimed: dict[tuple[int, Slot], Received] = {}
        self._unclaimed: dict[tuple[int, Slot], tuple[int, memoryview | None]] = {}  # size, and the data once complete
        self._unclaimed_bytes: dict[int, int] = {}
        self._lost: dict[int, TransportError] = {}
        self._failed: TransportError | None = None

    def claim(self, peer: int, slot: Slot) -> Received:
        """Ask for a message. Asking again while it is on its way gives the same Incoming."""
        key = (peer, slot)
        with self.arrival:
            claimed = self._claimed.get(key)
            if claimed is not None:
                return claimed
            received = Received(self, peer, slot)
            if key in self._unclaimed:
                total, data = self._unclaimed.pop(key)
                self._unclaimed_bytes[peer] -= total + _MESSAGE_COST_BYTES
                if data is not None:
                    received.settle(data, None)
                    return received
            error = self.lost(peer)
            if error is not None:
                received.settle(None, error)
            else:
                self._claimed[key] = received
        return received

    def expect(self, peer: int, slot: Slot, total: int) -> None:
        """A message of ``total`` bytes begins to come in.

        Raises:
            PacketError: it came before, or ``peer`` has sent too much that nobody asked for.
        """
        key = (peer, slot)
        with self.arrival:
            if key in self._claimed:
                return
            if key in self._unclaimed:
                raise PacketError(f"a second message for step {slot.step}, bucket {slot.bucket}, stage {slot.stage}")
            pending = self._unclaimed_bytes.get(peer, 0) + total + _MESSAGE_COST_BYTES
            if self.max_unclaimed_bytes is not None and pending > self.max_unclaimed_bytes:
                raise PacketError(f"more than {self.max_unclaimed_bytes} bytes that nobody asked for")
            self._unclaimed_bytes[peer] = pending
            self._unclaimed[key] = (total, None)

    def deliver(self, peer: int, slot: Slot, data: memoryview) -> None:
        """The message announced with :meth:`expect` is complete."""
        key = (peer, slot)
        with self.arrival:
            received = self._claimed.pop(key, None)
            if received is not None:
                received.settle(data, None)
                self.arrival.notify_all()
            elif key in self._unclaimed:
                self._unclaimed[key] = (len(data), data)

    def lose(self, peer: int, error: TransportError) -> None:
        """Nothing more will come from ``peer``; what is here already stays readable."""
        with self.arrival:
            self._lost.setdefault(peer, error)
            self._settle([key for key in self._claimed if key[0] == peer], self._lost[peer])

    def fail(self, error: TransportError) -> None:
        """Nothing more will come from anybody."""
        with self.arrival:
            if self._failed is None:
                self._failed = error
            self._settle(list(self._claimed), self._failed)

    def lost(self, peer: int) -> TransportError | None:
        """Why nothing more comes from ``peer``; None while it may."""
        return self._failed or self._lost.get(peer)

    def wait_for(self, received: Received) -> None:
        """Block until ``received`` is done.

        Raises:
            TransportTimeout: it was not within the timeout.
        """
        with self.arrival:
            if self.arrival.wait_for(lambda: received.done, self.timeout_s):
                return
        step, bucket, stage = received.slot
        raise TransportTimeout(
            f"rank {self.rank}: nothing from rank {received.peer} for step {step}, bucket {bucket}, "
            f"stage {stage} within {self.timeout_s:g} s"
        )

    def _settle(self, keys: list[tuple[int, Slot]], error: TransportError) -> None:
        for key in keys:
            self._claimed.pop(key).settle(None, error)
        self.arrival.notify_all()


def check_address(transport: Transport, peer: int, slot: Slot) -> None:
    """Raise ValueError unless ``peer`` is another rank and ``slot`` fits the wire."""
    if not 0 <= peer < transport.world_size or peer == transport.rank:
        raise ValueError(
            f"rank {transport.rank} cannot exchange messages with rank {peer}; there are {transport.world_size} ranks"
        )
    step, bucket, stage = slot
    if not (0 <= step < 1 << 64 and 0 <= bucket < 1 << 32 and 0 <= stage < 1 << 8):
        raise ValueError(f"{slot} is out of range: step below 2**64, bucket below 2**32, stage below 2**8")
