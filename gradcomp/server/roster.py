"""Who works: incarnations, sequence numbers, leases, clocks, and who waits for an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from gradcomp.errors import StateError
from gradcomp.server.messages import Acked, Request

__all__ = ["Roster", "Worker"]

# So many that are gone are remembered, so that a push of theirs that comes late, or again, is not applied twice.
_MOST_GONE = 4096
_KEPT = ("name", "incarnation", "live", "left_at", "sequence", "result", "staleness", "version", "clock")


@dataclass
class Waiting:
    """An answer that is due once others are there.

    Attributes:
        sender: where it goes.
        number: of the request.
        mark: the published number that a pull starts from; the turn of a sum.
    """

    sender: bytes
    number: int
    mark: int


@dataclass
class Worker:
    """What a server remembers of a worker, by name. What it hears of ``seen``, ``pull`` and ``term`` it forgets when it
    is started again.

    Attributes:
        live: whether it counts: it has joined, has not left, and its lease runs.
        left_at: number of the request with which this incarnation left; a Join from before that is an old one.
        sequence, result, staleness, version: of its last push, and what was answered.
        clock: steps it has taken.
        seen: when it was last heard of.
        pull: the one pull that waits; term: the one sum.
    """

    name: str
    incarnation: int
    live: bool = True
    left_at: int = -1
    sequence: int = 0
    result: str = ""
    staleness: int = 0
    version: int = 0
    clock: int = 0
    seen: float = 0.0
    pull: Waiting | None = None
    term: Waiting | None = None

    def acked(self, number: int) -> Acked:
        """The answer to its last push."""
        return Acked(
            number=number,
            sequence=self.sequence,
            result=self.result,
            staleness=self.staleness,
            version=self.version,
        )


class Roster:
    """The workers of a run.

    Args:
        expected: how many the run is declared to have.
    """

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.begun = False
        self._workers: dict[str, Worker] = {}
        self._live: list[Worker] = []

    @property
    def live(self) -> list[Worker]:
        """Those that count, by name."""
        return self._live

    @property
    def known(self) -> Mapping[str, Worker]:
        """All that are remembered."""
        return self._workers

    @property
    def done(self) -> bool:
        """Whether as many as are expected came, and all are gone: they left, or some did and the lease of the others
        ran out."""
        return self.begun and not self._live and any(worker.left_at >= 0 for worker in self._workers.values())

    def renew(self, now: float) -> None:
        """All leases begin now."""
        for worker in self._live:
            worker.seen = now

    def find(self, request: Request) -> Worker | None:
        """The live worker that ``request`` is from; None if it is not known, or another incarnation is."""
        worker = self._workers.get(request.worker)
        if worker is None or not worker.live or worker.incarnation != request.incarnation:
            return None
        return worker

    def join(self, request: Request, now: float) -> Worker:
        """Take in a worker. One whose lease had run out goes on where it was; a new incarnation begins anew."""
        old = self._workers.pop(request.worker, None)
        if old is None or old.incarnation != request.incarnation:
            clock = 0 if old is None else old.clock
            old = Worker(request.worker, request.incarnation, clock=clock)
        old.live, old.seen = True, now
        self._workers[request.worker] = old
        self._changed()
        gone = [name for name, worker in self._workers.items() if not worker.live]
        for name in gone[: max(0, len(gone) - _MOST_GONE)]:
            del self._workers[name]
        self.begun = self.begun or len(self._workers) >= self.expected
        return old

    def part(self, worker: Worker, *, left_at: int | None = None) -> None:
        """It left, with request ``left_at``, or its lease ran out: it does not count any more."""
        worker.live, worker.pull, worker.term = False, None, None
        if left_at is not None:
            worker.left_at = left_at
        self._changed()

    def overdue(self, now: float, lease_s: float) -> list[Worker]:
        """Those that were not heard of for longer than their lease."""
        return [worker for worker in self._live if now - worker.seen > lease_s]

    def slowest(self) -> int | None:
        """The smallest clock of all that count; None if nobody does."""
        return min((worker.clock for worker in self._live), default=None)

    def _changed(self) -> None:
        self._live = sorted((w for w in self._workers.values() if w.live), key=lambda worker: worker.name)

    def state_dict(self) -> dict[str, Any]:
        """What must last."""
        rows = [{field: getattr(worker, field) for field in _KEPT} for worker in self._workers.values()]
        return {"expected": self.expected, "begun": self.begun, "workers": rows}

    @classmethod
    def restore(cls, state: Mapping[str, Any], now: float) -> Roster:
        """A roster from :meth:`state_dict`; all leases begin now.

        Raises:
            StateError: a field is missing or of another type.
        """
        kinds = {field.name: {"str": str, "int": int, "bool": bool}.get(str(field.type)) for field in fields(Worker)}
        try:
            roster = cls(int(state["expected"]))
            roster.begun = bool(state["begun"])
            for row in state["workers"]:
                for field in _KEPT:
                    if type(row[field]) is not kinds[field]:
                        raise StateError(f"state of worker {row['name']!r}: {field} is {row[field]!r}")
                roster._workers[row["name"]] = Worker(**{field: row[field] for field in _KEPT}, seen=now)
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"state of the workers: {error!r}") from None
        roster._changed()
        return roster
