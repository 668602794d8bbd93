"""The steps of an exchange: buckets leave as their gradients become ready, and are put in place when all are back."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from gradcomp.bucket import Bucket
from gradcomp.driver import Driver
from gradcomp.errors import GradientError
from gradcomp.flight import Flight
from gradcomp.gradients import Gradients, HeldGradients, check_gradient
from gradcomp.hosts import Host, at_level
from gradcomp.interfaces import MY_TURN, Exchange, Incoming, Transport
from gradcomp.lanes import Lane, on
from gradcomp.plan import Plan
from gradcomp.states import StateStore
from gradcomp.telemetry import StepRecord, Totals
from gradcomp.verdict import Outlook, Verdict
from gradcomp.work import BucketWork

__all__ = ["Stepper"]


class Stepper:
    """Runs one step after the other. Its methods are called by the thread that trains, or runs backward.

    Where ranks are a hierarchy, gradients are first added up inside each host, by a thread of their own; what is said
    below of exchanging is then done by the leaders of hosts, and their members get the results at the end of the step.

    Args:
        scale: what sums over ranks are multiplied by.
        loss_scale: asked once a step, on the exchange's lane, what gradients are multiples of.
        ahead: steps end with :meth:`leave`, not :meth:`finish`; ``gradients`` are HeldGradients.

    Attributes:
        plan, store, tensors, gradients: what is exchanged; see :meth:`use`.
        step: number of steps that are finished, or in flight; part of a checkpoint.
        flight: the step that has left and not landed.
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
        ahead: bool = False,
    ) -> None:
        self.step = 0
        self.flight: Flight | None = None
        self.totals = Totals(lambda: self.store.residual_norms())
        self._transport = transport
        self._exchange = exchange
        self._ahead = ahead
        self._scale = scale
        self._ask_loss_scale = loss_scale
        self._turn = 0
        self._device = tensors[0].device
        self._levels = transport.levels
        # What packets cross; None on a rank that leads no host.
        self._crossing = transport if self._levels is None else self._levels.between
        self._drivers: dict[str, Driver] = {}  # "local": inside the host; "between": what packets cross
        self._waiting: list[set[int]] | None = None  # the parameters each bucket still waits for, once that is known
        self._lock = threading.Lock()
        self.use(plan, StateStore(transport.rank), tensors, gradients)

    def use(self, plan: Plan, store: StateStore, tensors: Sequence[Tensor], gradients: Gradients) -> None:
        """From the next step on; not while one is under way."""
        self.plan, self.store, self.tensors, self.gradients = plan, store, tensors, gradients
        gradients.watch([position for position, row in enumerate(plan.table) if row.codec.factored])
        self._bucket_of = {id(tensors[position]): bucket.index for position, bucket in plan.bucket_of.items()}
        self._host = None if self._levels is None else Host(self._levels, plan.table, gradients, self._device)
        self._start_step()

    def start(self) -> None:
        """Begin to exchange: the transport is connected."""
        if self._levels is not None:
            self._drivers["local"] = Driver(self._levels.local, Lane(self._device))
        if self._crossing is not None:
            self._drivers["between"] = Driver(self._crossing, Lane(self._device), last_first=self._ahead)

    def stop(self) -> None:
        """What is under way is dropped; a later step raises TransportError."""
        for driver in self._drivers.values():
            driver.stop()

    @property
    def named(self) -> list[tuple[str, Tensor]]:
        """Name and parameter."""
        return [(row.name, tensor) for row, tensor in zip(self.plan.table, self.tensors, strict=True)]

    @property
    def under_way(self) -> bool:
        """Whether a bucket of the next step has left already, or not all of the one before have landed."""
        return self._submitted > 0 or self.flight is not None

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
            while self._submitted < len(self.plan.buckets) and not self._waiting[self._submitted]:
                self._submit(self.plan.buckets[self._submitted])

    def finish(self) -> None:
        """Exchange what has not left yet, wait for all of it, commit residuals and put the sums in place.

        Raises:
            GradcompError: what a bucket failed with.
        """
        with self._record.held_up():
            nonfinite = self._finish()
        self.step += 1
        self.next_turn()
        self.gradients.end_step()
        self.totals.add(self._record, gradient_bytes=self.plan.gradient_bytes, nonfinite=nonfinite)
        self._start_step()

    def _finish(self) -> bool:
        """Whether the sums are not finite."""
        for bucket in self.plan.buckets[self._submitted :]:
            self._submit(bucket)
        with self._record.timed("wait_s"):
            self.drain()
        nonfinite = any(work.nonfinite for work in self._works)
        with torch.no_grad(), on(self._device):
            for work in self._works:
                work.finish(commit=not nonfinite)
            if self._host is not None:
                with self._record.timed("wait_s"), self._at("local"):
                    nonfinite = self._host.share(
                        self._turn, self.plan.buckets, nonfinite=nonfinite, timeout_s=self._transport.timeout_s
                    )
        return nonfinite

    def drain(self) -> None:
        """Wait until all buckets that have left are through; what they bring is put in place by :meth:`finish`.

        Raises:
            GradcompError: what a bucket failed with.
        """
        self._running()
        for level, driver in self._drivers.items():  # what was added up inside the host is submitted between hosts
            with self._at(level):
                driver.drain()

    def leave(self) -> None:
        """Submit what has not left yet, and wait for nothing: the step is in flight."""
        self.land()
        for bucket in self.plan.buckets[self._submitted :]:
            self._submit(bucket)
        if not isinstance(self.gradients, HeldGradients):
            raise TypeError("gradients of a step in flight must be held")
        self.flight = Flight(
            self._works,
            record=self._record,
            driver=self._drivers["between"],
            gradients=self.gradients,
            verdict=self._verdict,
            wait_for_all=self.store.holds_waiting,
            timeout_s=self._transport.timeout_s,
        )
        self.step += 1
        self.next_turn()
        self._start_step()

    @property
    def in_flight(self) -> frozenset[int]:
        """The parameters that are, by position."""
        left = () if self.flight is None else self.flight.left
        return frozenset(position for index in left for position in self.plan.buckets[index].parameters)

    def land(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Wait for the buckets of these parameters, or all, of the step in flight, if there is one.

        Raises:
            GradcompError: as :meth:`Flight.land`.
        """
        flight = self.flight
        if flight is None:
            return
        device = self._device.type
        plain = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        # Forward may run in any of these; what is made here must last beyond it.
        with torch.inference_mode(False), torch.no_grad(), plain:
            flight.land(
                None if parameters is None else {self._bucket_of[id(p)] for p in parameters if id(p) in self._bucket_of}
            )
        if flight.landed:
            self.flight = None
            self.gradients.end_step()
            self.totals.add(flight.record, gradient_bytes=self.plan.gradient_bytes, nonfinite=flight.nonfinite)

    def _start_step(self) -> None:
        self._verdict: Verdict | None = None
        self._waiting = None
        self._submitted = 0
        self._works: list[BucketWork] = []
        self._record = StepRecord(self._device)
        # Asked there, for GradScaler waits for the CUDA stream that computes it: backward must not.
        self._loss_scale = functools.cache(self._ask_loss_scale)

    def _submit(self, bucket: Bucket) -> None:
        self._running()
        self.gradients.hold(bucket.parameters)
        for position in bucket.parameters:
            check_gradient(self.plan.table[position].name, self.gradients.get(position))
        self._submitted += 1
        if self._host is None:
            self._exchange_bucket(bucket, self.gradients)
            return
        with self._at("local"):
            self._drivers["local"].submit(self._collect(bucket, self._host), self._record)

    def _collect(self, bucket: Bucket, host: Host) -> Generator[Sequence[Incoming], None, None]:
        """Inside the host first, and if this rank leads it, between hosts then."""
        sums = yield from host.collect(self._turn, bucket)
        if sums is not None:
            yield MY_TURN  # all leaders submit their buckets in the same order
            with self._at("between"):
                self._exchange_bucket(bucket, sums)

    def _exchange_bucket(self, bucket: Bucket, gradients: Gradients) -> None:
        if self._crossing is None:
            raise RuntimeError("this rank leads no host, and exchanges nothing by itself")
        pieces = self.plan.pieces[bucket.index]
        outlook: Outlook | None = None
        # Whether there is state is the same on all ranks; whether something waits is not.
        if self._ahead and self.plan.has_state:
            if self._verdict is None:
                self._verdict = Verdict(self._crossing, self._turn, len(self.plan.buckets))
            outlook = Outlook(
                pieces,
                rank=self._crossing.rank,
                world_size=self._crossing.world_size,
                foreseeable=self._exchange.foreseeable,
                tell=self._verdict.tell,
            )
        work = BucketWork(
            bucket=bucket,
            pieces=pieces,
            table=self.plan.table,
            gradients=gradients,
            device=self._device,
            store=self.store,
            transport=self._crossing,
            record=self._record,
            step=self._turn,
            scale=self._scale,
            loss_scale=self._loss_scale,
            watch_dense=self.plan.has_state or self.store.holds_waiting,
            outlook=outlook,
        )
        self._works.append(work)
        self._drivers["between"].submit(self._run(work, outlook), self._record)

    def _run(self, work: BucketWork, outlook: Outlook | None) -> Generator[Sequence[Incoming], None, None]:
        yield from self._exchange.run(work)
        if outlook is not None:
            outlook.over(nonfinite=work.nonfinite)
        work.over = True

    def _running(self) -> None:
        if not self._drivers:
            raise RuntimeError("the exchange has not been started")

    @contextmanager
    def _at(self, level: str) -> Iterator[None]:
        """Errors in here are of this level, if there are any."""
        if self._levels is None:
            yield
            return
        with at_level(self._levels, level):
            yield
