"""What each mode does with a push, and whom it lets go on: it follows from the order of events alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from gradcomp.message import Message
from gradcomp.server.messages import Options
from gradcomp.server.modes import Async, Mode, Softsync, Ssp, Stale, Sync
from gradcomp.server.refusal import Refusal
from gradcomp.server.roster import Roster, Worker
from gradcomp.server.shard import Update

__all__ = ["Collected", "Pace", "pace"]


@dataclass(frozen=True)
class Collected:
    """A push that waits for its update.

    Attributes:
        gradient: None: it was not finite, and there is nothing to wait for any more.
        staleness: updates since the parameters it was computed from.
    """

    worker: str
    gradient: Message | None
    staleness: int
    options: Options


class Pace(ABC):
    """The rules of one mode.

    Args:
        mean: whether several gradients of one update are averaged, or else added up.

    Attributes:
        collected: pushes that wait for their update.
        reached: a number of the mode's own that must last: the round, or the clock of the slowest.
    """

    def __init__(self, roster: Roster, *, mean: bool) -> None:
        self.roster = roster
        self.collected: list[Collected] = []
        self.reached = 0
        self._mean = mean

    def may_join(self, worker: str, updates: int) -> bool:
        """Whether a new worker is let in now."""
        return True

    def may_sum(self, updates: int) -> bool:
        """Whether all are here who are in a sum."""
        return self.roster.begun

    @abstractmethod
    def is_late(self, worker: Worker, clock: int) -> bool:
        """Whether a push that is meant for ``clock`` comes too late.

        Raises:
            Refusal: there can be no such push now.
        """

    @abstractmethod
    def advance(self, worker: Worker, clock: int) -> None:
        """Set the worker's clock: it has pushed."""

    def collect(self, push: Collected) -> None:
        """Take in a push that is not late."""
        if push.gradient is not None:
            self.collected.append(push)

    @abstractmethod
    def due(self) -> bool:
        """Whether what is collected is to become an update now."""

    def close(self) -> list[Collected]:
        """The pushes of the update that is due; the next ones are collected from here on."""
        done, self.collected = self.collected, []
        return done

    def combine(self, pushes: Sequence[Collected]) -> Update:
        """The update these pushes make, one at least."""
        return _combine(pushes, [1.0] * len(pushes), mean=self._mean)

    def may_go(self, worker: Worker) -> bool:
        """Whether this worker may begin its next clock."""
        return True

    def common_clock(self) -> int:
        """What a worker that goes on is told: the slowest's clock, or the round."""
        return self.roster.slowest() or 0

    def first_clock(self, worker: Worker) -> int:
        """The clock of a worker that has joined."""
        return worker.clock


class RoundsPace(Pace):
    """sync: a round is open until all workers but some have pushed, and then is one update."""

    def __init__(self, mode: Sync, roster: Roster, *, mean: bool) -> None:
        super().__init__(roster, mean=mean)
        self._backup = mode.backup
        self.reached = 1

    def is_late(self, worker: Worker, clock: int) -> bool:
        if clock > self.reached:
            raise Refusal("clock", f"push for round {clock}; round {self.reached} is not closed yet")
        # Of a worker that was started again, an earlier life may have pushed for this round.
        return clock < self.reached or self._has_pushed(worker)

    def advance(self, worker: Worker, clock: int) -> None:
        worker.clock = clock

    def collect(self, push: Collected) -> None:
        self.collected.append(push)

    def due(self) -> bool:
        missing = sum(not self._has_pushed(worker) for worker in self.roster.live)
        return self.roster.begun and bool(self.collected) and missing <= self._backup

    def close(self) -> list[Collected]:
        self.reached += 1
        # By name, so that the sum does not depend on who came first.
        return sorted((push for push in super().close() if push.gradient is not None), key=lambda push: push.worker)

    def may_go(self, worker: Worker) -> bool:
        return not self._has_pushed(worker)

    def first_clock(self, worker: Worker) -> int:
        return self.reached

    def common_clock(self) -> int:
        return self.reached

    def _has_pushed(self, worker: Worker) -> bool:
        return any(push.worker == worker.name for push in self.collected)


class StalePace(Pace):
    """Base of those in which parameters change while a gradient is computed."""

    def __init__(self, mode: Stale, roster: Roster, *, mean: bool) -> None:
        super().__init__(roster, mean=mean)
        self._aware = mode.staleness_aware

    def is_late(self, worker: Worker, clock: int) -> bool:
        return False

    def advance(self, worker: Worker, clock: int) -> None:
        worker.clock = max(worker.clock, clock)

    def due(self) -> bool:
        return bool(self.collected)

    def combine(self, pushes: Sequence[Collected]) -> Update:
        weights = [1.0 / max(1, push.staleness) if self._aware else 1.0 for push in pushes]
        return _combine(pushes, weights, mean=self._mean)


class AsyncPace(StalePace):
    """async: each push is an update."""

    def __init__(self, mode: Async, roster: Roster, *, mean: bool) -> None:
        super().__init__(mode, roster, mean=mean)
        self._warm_start = mode.warm_start

    def may_join(self, worker: str, updates: int) -> bool:
        return updates >= self._warm_start or all(other.name == worker for other in self.roster.live)

    def may_sum(self, updates: int) -> bool:
        return updates < self._warm_start or super().may_sum(updates)


class SspPace(StalePace):
    """ssp: each push is an update and a clock, and nobody is more than so many clocks ahead of the slowest.

    Clocks are counted here, so that the bound does not depend on what workers say.
    """

    def __init__(self, mode: Ssp, roster: Roster, *, mean: bool) -> None:
        super().__init__(mode, roster, mean=mean)
        self._staleness = mode.staleness

    def is_late(self, worker: Worker, clock: int) -> bool:
        if not self.may_go(worker):
            raise Refusal(
                "clock", f"push number {worker.clock + 1} of {worker.name!r}; the slowest is at {self.common_clock()}"
            )
        return False

    def advance(self, worker: Worker, clock: int) -> None:
        worker.clock += 1
        self.reached = self.common_clock()

    def may_go(self, worker: Worker) -> bool:
        return worker.clock - self.common_clock() <= self._staleness

    def common_clock(self) -> int:
        slowest = self.roster.slowest()
        return self.reached if slowest is None else slowest

    def first_clock(self, worker: Worker) -> int:
        others = (other.clock for other in self.roster.live if other is not worker)
        return max(worker.clock, min(others, default=self.reached))


class SoftsyncPace(StalePace):
    """softsync: as many pushes as floor(workers / n) are an update."""

    def __init__(self, mode: Softsync, roster: Roster, *, mean: bool) -> None:
        super().__init__(mode, roster, mean=mean)
        self._n = mode.n

    def due(self) -> bool:
        workers = len(self.roster.live) if self.roster.begun else self.roster.expected
        return len(self.collected) >= max(1, workers // self._n)


def pace(mode: Mode, roster: Roster, reduction: str) -> Pace:
    """The rules of ``mode``."""
    mean = reduction == "mean"
    if isinstance(mode, Sync):
        return RoundsPace(mode, roster, mean=mean)
    if isinstance(mode, Async):
        return AsyncPace(mode, roster, mean=mean)
    if isinstance(mode, Ssp):
        return SspPace(mode, roster, mean=mean)
    if isinstance(mode, Softsync):
        return SoftsyncPace(mode, roster, mean=mean)
    raise TypeError(f"no pace for {mode!r}")


def _combine(pushes: Sequence[Collected], weights: Sequence[float], *, mean: bool) -> Update:
    """The update sum(weight * gradient) / pushes at the usual learning rate; or, of ``sum``, without the division.

    An optimizer may normalise gradients, so that a factor on them is lost: as far as all weights have it in common it
    is put on the learning rate. With SGD that is the same.
    """
    total = sum(weights)
    share = total if mean else total / len(pushes)
    parts = [
        (push.gradient, weight / share)
        for push, weight in zip(pushes, weights, strict=True)
        if push.gradient is not None
    ]
    return Update(parts, pushes[0].options, total / len(pushes))
