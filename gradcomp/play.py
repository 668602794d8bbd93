"""A step, played through event by event, with time that passes only here."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from gradcomp.routes import Route

if TYPE_CHECKING:
    from gradcomp.forecast import Link, StepProfile

__all__ = ["Play", "most_cores"]


def most_cores(wanted: float, thread_cores: float) -> float:
    """What somebody who could use so many cores, a thread on each, gets of them where he is alone."""
    return min(wanted, max(wanted, 1.0) * thread_cores)


@dataclass
class _Job:
    """Something that takes so long where it has all the cores it wants."""

    left_s: float
    cores: float = 1.0


_Process = Generator["_Job | Callable[[], bool]", None, None]  # takes a job's time, or waits until something is true


class _Machine:
    """Time passes here, and jobs share cores: none gets more than it wants, and none less than its share."""

    def __init__(self, cores: float, thread_cores: float) -> None:
        self.now_s = 0.0
        self._cores, self._thread_cores = cores, thread_cores
        self._working: list[tuple[_Job, _Process]] = []
        self._waiting: list[tuple[Callable[[], bool], _Process]] = []

    def start(self, process: _Process) -> None:
        """Run it up to where it first takes time."""
        for wish in process:
            if isinstance(wish, _Job):
                if wish.left_s > 0.0:
                    self._working.append((wish, process))
                    return
            elif not wish():
                self._waiting.append((wish, process))
                return

    def run(self) -> None:
        """Until nothing is left to do."""
        self._wake()
        while self._working:
            speeds = self._speeds([job.cores for job, _ in self._working])
            passed_s = min(job.left_s / speed for (job, _), speed in zip(self._working, speeds, strict=True))
            self.now_s += passed_s
            over = []
            for (job, process), speed in zip(self._working, speeds, strict=True):
                job.left_s -= passed_s * speed
                if job.left_s <= 1e-12:
                    over.append(process)
            self._working = [(job, process) for job, process in self._working if job.left_s > 1e-12]
            for process in over:
                self.start(process)
            self._wake()

    def _wake(self) -> None:
        woken = True
        while woken:
            woken = False
            for entry in list(self._waiting):
                if entry[0]():
                    self._waiting.remove(entry)
                    self.start(entry[1])
                    woken = True

    def _speeds(self, wanted: Sequence[float]) -> list[float]:
        speeds = [1.0] * len(wanted)
        most = [most_cores(cores, self._thread_cores) for cores in wanted]
        left, sharing = self._cores, sum(cores > 0 for cores in wanted)
        for i in sorted(range(len(wanted)), key=lambda i: most[i]):
            if wanted[i] > 0:
                got = min(most[i], left / sharing)
                speeds[i] = got / wanted[i]
                left -= got
                sharing -= 1
        return speeds


# -- what happens in a step --------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What became of a bucket; in each step it begins anew."""

    began_s: float  # the step
    ready_s: float = 0.0
    wire_s: float = 0.0
    done_s: float = 0.0
    stage: int = 0
    on_the_way: int = 0  # parts that have not arrived
    new: bool = True
    done: bool = False


@dataclass(frozen=True)
class _Sending:
    """Bytes for the link."""

    bucket: int
    stage: int
    nbytes: float
    bytes_per_s: float


class Play:
    """See :func:`forecast`; the processes of one rank."""

    def __init__(self, routes: Sequence[Route], profile: StepProfile, link: Link) -> None:
        self.routes, self.profile, self.link = routes, profile, link
        self.seen: list[_Seen] = []
        self.awaited_from_s = 0.0  # when training began to wait
        self._urgent = False
        self._machine = _Machine(profile.cores, profile.thread_cores)
        self._submitted: list[int] = []  # new ones first, as gradcomp.driver has them
        self._to_send: list[_Sending] = []
        self._ends_s: list[float] = []

    def step(self) -> float:
        """One step whose exchange is over when it is."""
        self._start(self._training())
        return self._ends_s[-1]

    def ahead(self) -> float:
        """One of many steps, each of which ends during the next one's forward."""
        self._urgent = True
        self._start(self._training_ahead(steps=4))
        return self._ends_s[-1] - self._ends_s[-2]

    def _start(self, training: _Process) -> None:
        self._begin_step(0.0)
        for process in (self._exchange_thread(), self._wire(), training):
            self._machine.start(process)
        self._machine.run()

    def _training(self) -> _Process:
        profile = self.profile
        yield self._compute(profile.forward_s)
        yield from self._backward()
        self.awaited_from_s = self._machine.now_s
        yield lambda: all(seen.done for seen in self.seen)
        yield _Job(sum(way.finish_s for way in self.routes) + profile.overhead_s)
        yield self._compute(profile.optimizer_s)
        self._ends_s.append(self._machine.now_s)

    def _training_ahead(self, steps: int) -> _Process:
        """The first layers' bucket is the last one; forward takes about as much of its time for each as backward."""
        profile, routes = self.profile, self.routes
        shares = [b - a for a, b in pairwise((0.0, *profile.ready_s))]
        total = sum(shares)
        shares = [share / total if total > 0 else 1.0 / len(routes) for share in shares]
        for step in range(steps):
            began_s = self._machine.now_s
            for i in reversed(range(len(routes))):
                if step:
                    if i == len(routes) - 1:
                        self.awaited_from_s = self._machine.now_s - self.seen[i].began_s
                    yield lambda i=i: self.seen[i].done  # type: ignore[misc]
                    yield _Job(routes[i].finish_s)
                    yield self._compute(profile.optimizer_s * shares[i])
                yield self._compute(profile.forward_s * shares[i])
            self._ends_s.append(self._machine.now_s)  # of forward: any moment of a step does
            if step < steps - 1:
                self._begin_step(began_s)
                yield from self._backward()
                yield _Job(profile.overhead_s)

    def _backward(self) -> _Process:
        at = 0.0
        for i, ready_s in enumerate(self.profile.ready_s):
            # Buckets leave in order, ready ones waiting for those before them.
            upto = min(max(ready_s, at), self.profile.backward_s)
            yield self._compute(upto - at)
            at = upto
            self.seen[i].ready_s = self._machine.now_s - self.seen[i].began_s
            self._submitted.append(i)
        yield self._compute(self.profile.backward_s - at)

    def _compute(self, seconds: float) -> _Job:
        return _Job(max(seconds, 0.0), self.profile.compute_cores)

    def _begin_step(self, began_s: float) -> None:
        self.seen = [_Seen(began_s) for _ in self.routes]

    def _exchange_thread(self) -> _Process:
        """A new bucket before all others, then the first that has what it waits for."""
        while True:
            yield lambda: self._next() is not None
            i = self._next()
            if i is None:
                continue
            seen, way = self.seen[i], self.routes[i]
            seen.new = False
            if seen.stage < len(way.stages):
                stage = way.stages[seen.stage]
                seen.stage += 1
                seen.on_the_way += 1  # nothing goes on before all parts have left
                rate = self.link.rate(stage.messages)
                for part in stage.parts:
                    yield _Job(part.work_s + part.messages * self.link.cpu_s_per_message)
                    self._send(_Sending(i, seen.stage, part.sent_bytes, rate))
                self._send(_Sending(i, seen.stage, stage.received_bytes - stage.sent_bytes, rate))
                seen.on_the_way -= 1
            else:
                yield _Job(way.deliver_s)
                seen.done_s = self._machine.now_s - seen.began_s
                seen.done = True
                self._submitted.remove(i)

    def _next(self) -> int | None:
        new = next((i for i in self._submitted if self.seen[i].new), None)
        if new is not None:
            return new
        return next((i for i in self._submitted if not self.seen[i].on_the_way), None)

    def _send(self, sending: _Sending) -> None:
        if sending.nbytes > 0:
            self.seen[sending.bucket].on_the_way += 1
            self._to_send.append(sending)

    def _wire(self) -> _Process:
        """A token bucket: :attr:`gradcomp.forecast.Link.burst_bytes` are saved while nothing is sent."""
        free_at_s = -self.link.burst_bytes / self.link.bytes_per_s  # from then on the link has carried nothing
        while True:
            yield lambda: bool(self._to_send)
            sending = self._to_send.pop(self._first())
            seen = self.seen[sending.bucket]
            free_at_s = max(free_at_s, self._machine.now_s - self.link.burst_bytes / sending.bytes_per_s)
            free_at_s += sending.nbytes / sending.bytes_per_s
            moving_s = self.link.cpu_s_per_byte * sending.nbytes
            takes_s = max(free_at_s - self._machine.now_s, moving_s)
            seen.wire_s += takes_s
            yield _Job(takes_s, moving_s / takes_s if takes_s else 0.0)
            self._machine.start(self._arrive(seen))

    def _arrive(self, seen: _Seen) -> _Process:
        yield _Job(self.link.latency_s, 0.0)
        seen.on_the_way -= 1

    def _first(self) -> int:
        """Bytes leave as they were queued; with the next forward waiting for them, what it needs first goes first."""
        if not self._urgent:
            return 0
        return min(range(len(self._to_send)), key=lambda i: (self._to_send[i].stage, -self._to_send[i].bucket))
