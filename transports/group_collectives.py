"""Collective operations of a process group as an exchange wants them: begun at once, waited for among other things."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradcomp.errors import PeerLost, TransportError, TransportTimeout
from gradcomp.interfaces import Incoming, Slot
from gradcomp.transports.group_courier import Courier
from gradcomp.transports.mailbox import Mailbox

__all__ = ["PendingSum", "swap_by_pairs", "swap_on_stream"]

_SWAP_TAG = 3
_MORE_PATIENCE_S = 5.0
_LOSS_S = 1.0


class PendingSum:
    """An all-reduce that the backend's own threads run.

    Args:
        total: this rank's part, and the sum once it is done.
    """

    def __init__(self, group: Any, total: Tensor, mailbox: Mailbox, courier: Courier) -> None:
        self.rank = mailbox.rank
        self.timeout_s = mailbox.timeout_s
        self.arrival = mailbox.arrival
        self._outcome = _Outcome(mailbox.arrival)
        self._mailbox = mailbox
        self._links = courier.links
        self._number = courier.finished
        options = dist.AllreduceOptions()
        # Who waits for it gives up first, and can say what for.
        options.timeout = timedelta(seconds=self.timeout_s + _MORE_PATIENCE_S)
        self._work = group.allreduce([total], options)
        self._work.get_future().add_done_callback(self._outcome.settle)

    @property
    def finished(self) -> bool:
        """Whether it is over, one way or the other."""
        return self._outcome.finished

    @property
    def failed(self) -> bool:
        """Whether the backend gave up."""
        return self.finished and bool(self._outcome.reason)

    def parts(self, slot: Slot) -> list[Incoming]:
        """What to wait for: the part of each other rank."""
        return [_Part(self, peer, slot) for peer in self._links]

    def lost(self, peer: int) -> TransportError | None:
        """Why ``peer`` takes no part in it; None if it does, or did before it left."""
        error = self._mailbox.lost(peer)
        left_after = self._links[peer].finished
        if isinstance(error, PeerLost) and left_after is not None and left_after > self._number:
            return None
        return error

    def error(self) -> TransportError:
        """Why there will be no sum. Most likely a peer is gone; it may be a moment before the messages show that, too.

        Who was killed is the cause, and who left because of that is not.
        """
        with self.arrival:
            self.arrival.wait_for(lambda: any(self._was_killed(peer) for peer in self._links), _LOSS_S)
        peers = sorted(self._links, key=self._was_killed, reverse=True)
        lost = next(filter(None, map(self.lost, peers)), None)
        return lost or TransportError(f"rank {self.rank}: the all-reduce failed: {self._outcome.reason}")

    def _was_killed(self, peer: int) -> bool:
        return self._mailbox.lost(peer) is not None and self._links[peer].finished is None


class _Outcome:
    """How an all-reduce ended: what the backend's own thread calls, and lets go of afterwards.

    It must not hold the group, nor anything that does: if that were the last reference, the group would end on its own
    thread, wait for it, and take the process down.
    """

    def __init__(self, arrival: threading.Condition) -> None:
        self.finished = False
        self.reason = ""
        self._arrival = arrival

    def settle(self, future: torch.futures.Future[Any]) -> None:
        try:
            future.value()
        except Exception as error:
            self.reason = _reason(error)
        with self._arrival:
            self.finished = True
            self._arrival.notify_all()


class _Part(Incoming):
    """What one peer adds to a sum."""

    def __init__(self, pending: PendingSum, peer: int, slot: Slot) -> None:
        self.peer = peer
        self.slot = slot
        self._pending = pending

    @property
    def done(self) -> bool:
        return self._pending.finished or self.failed

    @property
    def failed(self) -> bool:
        return self._pending.failed or (not self._pending.finished and self._pending.lost(self.peer) is not None)

    def result(self) -> memoryview:
        pending = self._pending
        with pending.arrival:
            if not pending.arrival.wait_for(lambda: self.done, pending.timeout_s):
                raise TransportTimeout(
                    f"rank {pending.rank}: no all-reduce with rank {self.peer} for step {self.slot.step}, "
                    f"bucket {self.slot.bucket} within {pending.timeout_s:g} s"
                )
        if self.failed:
            raise pending.error().with_traceback(None)
        return memoryview(b"")


def swap_on_stream(group: Any, size: int, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
    """Send and receive one tensor a peer, all as one operation of the backend, on the current stream.

    NCCL would deadlock if one rank's send waited behind its receive and the other's likewise. An all-to-all of tensors
    of any sizes, empty ones included, is all of them in one group.
    """
    example = next(iter({**outgoing, **incoming}.values()))
    nothing = example.new_empty(0)
    group.alltoall(
        [incoming.get(peer, nothing) for peer in range(size)], [outgoing.get(peer, nothing) for peer in range(size)]
    ).wait()


def swap_by_pairs(
    group: Any,
    outgoing: Mapping[int, Tensor],
    incoming: Mapping[int, Tensor],
    mailbox: Mailbox,
) -> None:
    """Send and receive one tensor a peer by transfers of their own, and wait for them.

    Raises:
        PeerLost, TransportTimeout: a peer is gone, or did not come.
    """
    deadline = time.monotonic() + mailbox.timeout_s
    begin = [(peer, group.recv, tensor) for peer, tensor in incoming.items() if tensor.numel()]
    begin += [(peer, group.send, tensor) for peer, tensor in outgoing.items() if tensor.numel()]
    works = []
    peer = mailbox.rank
    try:
        for peer, transfer, tensor in begin:
            works.append((peer, transfer([tensor], peer, _SWAP_TAG)))
        for peer, work in works:  # noqa: B007 - the one that failed is named below
            work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
    except RuntimeError as error:
        raise _swap_error(error, peer, mailbox) from None


def _swap_error(error: Exception, peer: int, mailbox: Mailbox) -> TransportError:
    rank = mailbox.rank
    if "timed out" in str(error).lower():
        return TransportTimeout(f"rank {rank}: no transfer from or to rank {peer} within {mailbox.timeout_s:g} s")
    with mailbox.arrival:
        mailbox.arrival.wait_for(lambda: mailbox.lost(peer) is not None, _LOSS_S)
    lost = mailbox.lost(peer)
    return lost or TransportError(f"rank {rank}: the transfer from or to rank {peer} failed: {_reason(error)}")


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
