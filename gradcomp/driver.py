"""The one exchange thread: it moves all buckets under way while the training thread goes on with backward."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch

from gradcomp.errors import TransportError
from gradcomp.interfaces import MY_TURN, Incoming, Transport
from gradcomp.lanes import Lane
from gradcomp.telemetry import StepRecord

__all__ = ["Driver"]

Steps = Generator[Sequence[Incoming], None, None]


@dataclass
class _Bucket:
    steps: Steps
    record: StepRecord
    submitted: float
    mark: torch.cuda.Event | None
    awaited: Sequence[Incoming] = ()
    deadline: float = 0.0


class Driver:
    """Runs exchanges as coroutines: whichever has what it waits for goes on, a new bucket before all others.

    New buckets come first so that their packets are on the wire while earlier ones are still coming in.

    Args:
        lane: where their CUDA work is queued.
        last_first: of those that can go on, the one submitted last does.
    """

    def __init__(self, transport: Transport, lane: Lane, *, last_first: bool = False) -> None:
        self.lane = lane
        self._transport = transport
        self._last_first = last_first
        self._new: deque[_Bucket] = deque()
        self._active: list[_Bucket] = []
        self._unfinished = 0
        # For who waits for all of it: of what comes in meanwhile the training thread need not hear.
        self._idle = threading.Event()
        self._idle.set()
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="gradcomp-exchange", daemon=True)
        self._thread.start()

    def submit(self, steps: Steps, record: StepRecord) -> None:
        """Start an exchange of what the current CUDA stream, if there is one, has been given to compute.

        Raises:
            GradcompError: what an earlier exchange failed with.
        """
        with self._transport.arrival:
            self._check()
            self._unfinished += 1
            self._idle.clear()
            self._new.append(_Bucket(steps, record, time.perf_counter(), self.lane.mark()))
            self._transport.arrival.notify_all()

    def drain(self) -> None:
        """Wait until everything submitted is done. Bounded: each exchange has the transport's timeout for each step.

        Raises:
            GradcompError: what an exchange failed with.
        """
        try:
            while not self._idle.wait(1.0):
                with self._transport.arrival:
                    self._check_alive()
            with self._transport.arrival:
                self._check()
        finally:
            self.lane.join()  # after an error, too: gradients that are let go of then may still be read, or written to

    def wait_until(self, there: Callable[[], bool]) -> None:
        """Wait for something that an exchange under way, or a message that comes in, makes true.

        Raises:
            GradcompError: what an exchange failed with.
        """
        try:
            with self._transport.arrival:
                while not there() and self._error is None and not self._stopped:
                    self._check_alive()
                    self._transport.arrival.wait(1.0)
                self._check()
        finally:
            self.lane.join()

    def stop(self) -> None:
        """End the thread; what is under way is dropped."""
        with self._transport.arrival:
            self._stopped = True
            self._idle.set()
            self._transport.arrival.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def _check_alive(self) -> None:
        if not self._thread.is_alive():
            self._check()  # it says what it fails with before it ends
            raise TransportError("the exchange thread is gone")

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._stopped:
            raise TransportError("this exchange is closed")

    def _run(self) -> None:
        with torch.no_grad():
            try:
                while (bucket := self._next()) is not None:
                    self._advance(bucket)
            except BaseException as error:
                with self._transport.arrival:
                    self._error = error
                    self._idle.set()
                    self._transport.arrival.notify_all()

    def _next(self) -> _Bucket | None:
        """The next bucket that can go on; None when stopped."""
        with self._transport.arrival:
            while not self._stopped:
                if self._new:
                    bucket = self._new.popleft()
                    self._active.append(bucket)
                    return bucket
                for bucket in reversed(self._active) if self._last_first else self._active:
                    if self._can_go_on(bucket):
                        return bucket
                deadline = min((bucket.deadline for bucket in self._active), default=math.inf)
                left = None if deadline == math.inf else deadline - time.monotonic()
                if left is not None and left <= 0:
                    # wait() knows how to say what is missing.
                    return next(bucket for bucket in self._active if bucket.deadline == deadline)
                self._transport.arrival.wait(left)
            return None

    def _can_go_on(self, bucket: _Bucket) -> bool:
        if bucket.awaited is MY_TURN:
            return bucket is self._active[0]
        return any(i.failed for i in bucket.awaited) or all(i.done for i in bucket.awaited)

    def _advance(self, bucket: _Bucket) -> None:
        if bucket.awaited:
            self._transport.wait(bucket.awaited, timeout_s=0.0, waited_s=self._transport.timeout_s)
            bucket.awaited = ()  # the messages' memory is the exchange's to free
        try:
            with self.lane.after(bucket.mark):
                bucket.awaited = next(bucket.steps)
            bucket.mark = None
            # Who waits for its turn waits for a bucket that has a deadline.
            bucket.deadline = math.inf if bucket.awaited is MY_TURN else time.monotonic() + self._transport.timeout_s
        except StopIteration:
            with self._transport.arrival:
                bucket.record.under_way.append((bucket.submitted, time.perf_counter()))
                self._active.remove(bucket)
                self._unfinished -= 1
                if not self._unfinished:
                    self._idle.set()
                self._transport.arrival.notify_all()
