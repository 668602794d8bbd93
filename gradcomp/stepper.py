"""The steps of an exchange: buckets leave as their gradients become ready, and are put in place when all are back."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradcomp.bucket import Bucket
from gradcomp.driver import Driver
from gradcomp.errors import GradientError
from gradcomp.gradients import Gradients
from gradcomp.interfaces import Exchange, Transport
from gradcomp.lanes import Lane
from gradcomp.plan import Plan
from gradcomp.states import StateStore
from gradcomp.telemetry import StepRecord, Totals
from gradcomp.work import BucketWork, check_gradient

__all__ = ["Stepper"]


class Stepper:
    """Runs one step after the other. Its methods are called by the thread that trains, or runs backward.

    Args:
        scale: what sums over ranks are multiplied by.
        loss_scale: asked once a step, on the exchange's lane, what gradients are multiples of.

    Attributes:
        plan, store, tensors, gradients: what is exchanged; see :meth:`use`.
        step: number of steps that are finished; part of a checkpoint.
        totals: what was sent.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        tensors: Sequence[Tensor],
        gradients: Gradients,
        transport: Transport,
        exchange: Exchange,
        scale: float,
        loss_scale: Callable[[], float],
    ) -> None:
        self.step = 0
        self.totals = Totals()
        self._transport = transport
        self._exchange = exchange
        self._scale = scale
        self._ask_loss_scale = loss_scale
        self._turn = 0
        self._device = tensors[0].device
        self._lane = Lane(self._device)
        self._driver: Driver | None = None
        self._waiting: list[set[int]] | None = None  # the parameters each bucket still waits for, once that is known
        self._lock = threading.Lock()
        self.use(plan, StateStore(transport.rank), tensors, gradients)

    def use(self, plan: Plan, store: StateStore, tensors: Sequence[Tensor], gradients: Gradients) -> None:
        """From the next step on; not while one is under way."""
        self.plan, self.store, self.tensors, self.gradients = plan, store, tensors, gradients
        self._start_step()

    def start(self) -> None:
        """Begin to exchange: the transport is connected."""
        self._driver = Driver(self._transport, self._lane)

    def stop(self) -> None:
        """What is under way is dropped; a later step raises TransportError."""
        if self._driver is not None:
            self._driver.stop()

    @property
    def under_way(self) -> bool:
        """Whether a bucket of the next step has left already."""
        return bool(self._works)

    def next_turn(self) -> int:
        """A number for messages; unlike the step it never goes back, not even when a state is loaded."""
        self._turn += 1
        return self._turn

    def ready(self, positions: Sequence[int]) -> None:
        """These parameters have their gradients: buckets that are complete leave.

        Raises:
            GradientError: for the second time in a step, or a gradient that cannot be exchanged.
            GradcompError: what an earlier bucket failed with.
        """
        with self._lock:
            if self._waiting is None:
                # Frozen parameters will get none; whether they are frozen may change between steps.
                self._waiting = [{p for p in b.parameters if self.tensors[p].requires_grad} for b in self.plan.buckets]
            for position in positions:
                waiting = self._waiting[self.plan.bucket_of[position].index]
                if position not in waiting:
                    raise GradientError(
                        f"parameter {self.plan.table[position].name!r} got a second gradient before the first was "
                        "exchanged; was a backward pass interrupted, or is it used in two reentrant checkpoints? "
                        "(checkpoint(..., use_reentrant=False) may be)"
                    )
                waiting.discard(position)
            # Every rank submits every bucket in the same order, ready ones waiting for those before them.
            while len(self._works) < len(self.plan.buckets) and not self._waiting[len(self._works)]:
                self._submit(self.plan.buckets[len(self._works)])

    def finish(self) -> None:
        """Exchange what has not left yet, wait for all of it, commit residuals and put the sums in place.

        Raises:
            GradcompError: what a bucket failed with.
        """
        for bucket in self.plan.buckets[len(self._works) :]:
            self._submit(bucket)
        with self._record.timed("wait_s"):
            self._running().drain()
        nonfinite = any(work.nonfinite for work in self._works)
        with torch.no_grad():
            for work in self._works:
                work.finish(commit=not nonfinite)
        self.step += 1
        self.next_turn()
        self.gradients.end_step()
        self.totals.add(self._record, gradient_bytes=self.plan.gradient_bytes, nonfinite=nonfinite)
        self._start_step()

    def _start_step(self) -> None:
        self._waiting = None
        self._works: list[BucketWork] = []
        self._record = StepRecord()
        # Asked there, for GradScaler waits for the CUDA stream that computes it: backward must not.
        self._loss_scale = functools.cache(self._ask_loss_scale)

    def _submit(self, bucket: Bucket) -> None:
        for position in bucket.parameters:
            check_gradient(self.plan.table[position].name, self.gradients.get(position))
        work = BucketWork(
            bucket=bucket,
            pieces=self.plan.pieces[bucket.index],
            table=self.plan.table,
            gradients=self.gradients,
            device=self._device,
            store=self.store,
            transport=self._transport,
            record=self._record,
            step=self._turn,
            scale=self._scale,
            loss_scale=self._loss_scale,
            watch_dense=self.plan.has_state or self.store.holds_waiting,
        )
        self._works.append(work)
        self._running().submit(self._exchange.run(work), self._record)

    def _running(self) -> Driver:
        if self._driver is None:
            raise RuntimeError("the exchange has not been started")
        return self._driver
