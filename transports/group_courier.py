"""Messages by slot over a process group: for each peer one thread that sends and one that receives.

A process group's transfers are pairs of equal size, complete on both sides or on neither, and a wait that times out
breaks the whole group. So every receiver always has a transfer posted for the next frame and waits for it without a
limit; what may take how long is the business of those who wait at the mailbox.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradcomp.errors import PacketError, PeerLost, TransportError
from gradcomp.interfaces import Slot
from gradcomp.transports.group_frames import (
    BYE,
    CUT_OFF,
    DATA,
    FRAME_BYTES,
    HELLO,
    NO_SLOT,
    Frame,
    Outgoing,
)
from gradcomp.transports.group_making import break_off
from gradcomp.transports.mailbox import Mailbox

__all__ = ["Courier", "Letter"]

_FOREVER = timedelta(days=3650)
_FRAME_TAG, _REST_TAG = 1, 2
_NOTHING = Outgoing([])


class Letter(NamedTuple):
    """A message to one peer."""

    kind: int
    slot: Slot
    message: Outgoing

    @property
    def urgency(self) -> tuple[int, ...]:
        """What sorts letters where urgent ones go first: a hello before all data, a goodbye after it."""
        return self.slot.urgency if self.kind == DATA else (-1,) if self.kind == HELLO else (2,)


class Link:
    """One peer: its two threads and what is known of it.

    Attributes:
        hello: what the peer said, once it did.
        finished: how many collective operations the peer had finished when it left; None: it has not left.
        cut_off: one of the two reads nothing more of what the other sends.
    """

    def __init__(
        self,
        rank: int,
        peer: int,
        group: dist.ProcessGroup,
        mailbox: Mailbox,
        max_message_bytes: int,
        *,
        first_needed_first: bool,
    ) -> None:
        self.peer = peer
        self.hello: bytes | None = None
        self.finished: int | None = None
        self.cut_off = False
        self.bytes_sent = self.bytes_received = 0
        self._rank = rank
        self._group = group
        self._mailbox = mailbox
        self._max_message_bytes = max_message_bytes
        self._first_needed_first = first_needed_first
        self._posted = itertools.count()
        self._outbox: queue.PriorityQueue[tuple[tuple[int, ...], int, Letter]] = queue.PriorityQueue()
        name = f"gradcomp-group-{rank}-{peer}"
        self._sender = threading.Thread(target=self._send_all, name=f"{name}-send", daemon=True)
        self._receiver = threading.Thread(target=self._receive_all, name=f"{name}-receive", daemon=True)
        self._sender.start()
        self._receiver.start()

    @property
    def busy(self) -> bool:
        """Whether one of its threads still runs."""
        return self._sender.is_alive() or self._receiver.is_alive()

    def post(self, letter: Letter) -> None:
        """Leave a letter; returns at once."""
        self._outbox.put((letter.urgency if self._first_needed_first else (), next(self._posted), letter))

    def join(self, timeout_s: float) -> None:
        """Wait for both threads, each so long at most."""
        self._sender.join(timeout_s)
        self._receiver.join(timeout_s)

    def break_off(self) -> None:
        """End both threads whatever they wait for, and all else that goes over the group."""
        break_off(self._group, self.peer)

    # The sending thread.

    def _send_all(self) -> None:
        try:
            while self._send(self._outbox.get()[-1]):
                pass
        except Exception as error:
            self._lose(f"is gone: {_reason(error)}")

    def _send(self, letter: Letter) -> bool:
        """Send one letter; returns whether more may follow."""
        if letter.kind == DATA and (self.finished is not None or self.cut_off):
            return True  # it would not be read
        tags = (_FRAME_TAG, _REST_TAG)
        for tensor, tag in zip(letter.message.tensors(letter.kind, letter.slot), tags, strict=False):
            self._group.send([tensor], self.peer, tag).wait(_FOREVER)
            self.bytes_sent += tensor.numel()
        return letter.kind in (HELLO, DATA)

    # The receiving thread.

    def _receive_all(self) -> None:
        try:
            posted = self._post_receive(FRAME_BYTES, _FRAME_TAG)
            while True:
                data, work = posted
                work.wait(_FOREVER)
                self.bytes_received += FRAME_BYTES
                frame = Frame.unpack(data.numpy().data, self._max_message_bytes)
                if frame.kind in (BYE, CUT_OFF):
                    self._leave(frame)
                    return
                if (frame.kind == HELLO) != (self.hello is None):
                    raise PacketError("a second hello" if self.hello is not None else "a message before the hello")
                if frame.kind == DATA:
                    self._mailbox.expect(self.peer, frame.slot, frame.total)
                # The next frame may come while the rest of this message does.
                posted = self._post_receive(FRAME_BYTES, _FRAME_TAG)
                self._accept(frame, self._receive_rest(frame))
        except PacketError as error:
            self.cut_off = True
            self._lose(f"broke the protocol and was cut off: {error}", CUT_OFF)
        except Exception as error:
            self._lose(f"is gone: {_reason(error)}")

    def _post_receive(self, nbytes: int, tag: int) -> tuple[Tensor, dist.Work]:
        data = torch.empty(nbytes, dtype=torch.uint8)
        return data, self._group.recv([data], self.peer, tag)

    def _receive_rest(self, frame: Frame) -> memoryview:
        if len(frame.start) == frame.total:
            return memoryview(frame.start)
        whole = torch.empty(frame.total, dtype=torch.uint8)
        data: memoryview = whole.numpy().data
        data[: len(frame.start)] = frame.start
        self._group.recv([whole[len(frame.start) :]], self.peer, _REST_TAG).wait(_FOREVER)
        self.bytes_received += frame.total - len(frame.start)
        return data

    def _accept(self, frame: Frame, data: memoryview) -> None:
        if frame.kind == DATA:
            self._mailbox.deliver(self.peer, frame.slot, data)
            return
        with self._mailbox.arrival:
            self.hello = bytes(data)
            self._mailbox.arrival.notify_all()

    def _leave(self, frame: Frame) -> None:
        if frame.kind == CUT_OFF:
            self.cut_off = True
            self._lose("cut this rank off: it said more than was asked for, or something malformed")
        else:
            self.finished = frame.slot.step
            self._lose("left the run")

    def _lose(self, what: str, last_word: int = BYE) -> None:
        self._mailbox.lose(self.peer, PeerLost(f"rank {self._rank}: rank {self.peer} {what}", peer=self.peer))
        # Ends the sending thread, and answers a peer that waits to hear that its own goodbye was read.
        self.post(Letter(last_word, NO_SLOT, _NOTHING))


class Courier:
    """All peers of one rank.

    Args:
        group: carries CPU tensors; used for nothing else until :meth:`close`.

    Attributes:
        finished: collective operations this rank has finished. Who leaves tells its peers, for they need not give up an
            operation that it took part in.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        rank: int,
        size: int,
        mailbox: Mailbox,
        max_message_bytes: int,
        *,
        first_needed_first: bool = False,
    ) -> None:
        self._rank = rank
        self._pid = os.getpid()
        self._mailbox = mailbox
        self.finished = 0
        self.links = {
            peer: Link(rank, peer, group, mailbox, max_message_bytes, first_needed_first=first_needed_first)
            for peer in range(size)
            if peer != rank
        }

    @property
    def bytes_sent(self) -> int:
        """Frames and all."""
        return sum(link.bytes_sent for link in self.links.values())

    @property
    def bytes_received(self) -> int:
        """Frames and all."""
        return sum(link.bytes_received for link in self.links.values())

    def post(self, peers: Sequence[int], letter: Letter) -> None:
        """Leave a letter for ``peers``; returns at once."""
        for peer in peers:
            self.links[peer].post(letter)

    def close(self, patience_s: float) -> None:
        """Send what is posted, say goodbye and end the threads; at most ``patience_s`` without any progress."""
        if os.getpid() != self._pid:
            return  # a forked child has no such threads
        self._mailbox.fail(TransportError(f"rank {self._rank}: the transport is closed"))
        self.post(list(self.links), Letter(BYE, Slot(self.finished, 0, 0), _NOTHING))
        moved, deadline = -1, 0.0
        while any(link.busy and not link.cut_off for link in self.links.values()):
            if self.bytes_sent + self.bytes_received != moved:
                moved, deadline = self.bytes_sent + self.bytes_received, time.monotonic() + patience_s
            elif time.monotonic() > deadline:
                break
            for link in self.links.values():
                link.join(0.05)
        for link in self.links.values():
            if link.busy:
                link.break_off()
        for link in self.links.values():
            link.join(1.0)


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
