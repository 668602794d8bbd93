"""What a request does, and who is answered: a server without its socket and its clock."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from gradcomp.errors import StateError
from gradcomp.options import check_integer, check_number
from gradcomp.server import hello
from gradcomp.server.journal import Journal, NoJournal
from gradcomp.server.messages import (
    Add,
    Alive,
    Beat,
    Busy,
    Changed,
    Empty,
    Forgot,
    Join,
    Leave,
    Left,
    Look,
    Message,
    Published,
    Pull,
    Push,
    Refused,
    Reply,
    Request,
    Setup,
    Status,
    Summed,
    Total,
    Unknown,
    Wait,
    Welcome,
)
from gradcomp.server.protocol import whole
from gradcomp.server.refusal import Refusal
from gradcomp.server.roster import Waiting, Worker
from gradcomp.server.run import Run

__all__ = ["Service"]

Replies = list[tuple[bytes, Reply]]
_MAX_NAME = 256  # characters
_DIGEST_NBYTES = 16
_FORMAT = 1


class Service:
    """The state machine of one shard. It starts empty; the first worker that joins sets it up.

    Args:
        journal: where everything is written down before it is answered.
        lease_s: a worker that is not heard of for longer is forgotten.
        max_numel: the largest shard that it takes, in elements.

    Attributes:
        durable: whether all that was answered is in the journal, and not lost with this process.
    """

    def __init__(self, *, journal: Journal | None = None, lease_s: float = 10.0, max_numel: int = 1 << 31) -> None:
        check_number("server", "lease_s", lease_s, above=0.0)
        check_integer("server", "max_numel", max_numel, at_least=1)
        self.durable = True
        self._journal = journal or NoJournal()
        self._lease_s = float(lease_s)
        self._max_numel = max_numel
        self._run: Run | None = None
        self._setting_up: tuple[str, int, float] | None = None  # worker, incarnation, until when others are put off
        self._refused = 0

    @property
    def journal(self) -> Journal:
        """Where it is written what was done. A new one, begun upon a state that is safe, makes it durable again."""
        return self._journal

    @journal.setter
    def journal(self, journal: Journal) -> None:
        self._journal = journal
        self.durable = True

    @property
    def version(self) -> int:
        """Updates so far."""
        return 0 if self._run is None else self._run.shard.version

    @property
    def published(self) -> int:
        """Number of published changes so far."""
        return 0 if self._run is None else self._run.shard.published.number

    def renew(self, now: float) -> None:
        """All leases begin now: after a recovery that took long."""
        if self._run is not None:
            self._run.roster.renew(now)

    def handle(self, request: Request, sender: bytes, now: float) -> Replies:
        """Do what is asked for.

        Args:
            sender: where replies go.
            now: seconds on a clock that never goes back.

        Returns:
            Replies and where they go, in order; some may be for others, who waited for this.
        """
        try:
            if isinstance(request, Look):
                return [(sender, Status(number=request.number, body=json.dumps(self.status()).encode()))]
            if not 0 < len(request.worker) <= _MAX_NAME:
                raise Refusal("worker", f"a name of {len(request.worker)} characters; it must have 1 to {_MAX_NAME}")
            if isinstance(request, (Join, Setup)):
                return self._join(request, sender, now)
            return self._known(request, sender, now)
        except Refusal as refusal:
            self._refused += 1
            return [(sender, Refused(number=request.number, field=refusal.field, reason=str(refusal)))]

    def tick(self, now: float) -> Replies:
        """Forget whose lease ran out; returns replies to those who waited for them."""
        if self._run is None:
            return []
        replies: Replies = []
        for worker in self._run.roster.overdue(now, self._lease_s):
            replies += self._forget(self._run, worker)
        return replies

    # -- coming and going ----------------------------------------------------------------------------------------------

    def _join(self, request: Join | Setup, sender: bytes, now: float) -> Replies:
        if len(request.digest) != _DIGEST_NBYTES:
            raise Refusal("digest", f"{len(request.digest)} bytes; it must have {_DIGEST_NBYTES}")
        run = self._run
        if run is None:
            if isinstance(request, Join):
                return [(sender, self._ask_for_setup(request, now))]
            run = Run.begin(request, self._max_numel)
            self._write(request)
            self._run = run
            return [(sender, self._welcome(run, run.admit(request, now), request))]
        hello.check_same(run.hello, request.hello, "this run", f"worker {request.worker!r}")
        replies: Replies = []
        known = run.roster.known.get(request.worker)
        if known is not None:
            if known.incarnation == request.incarnation:
                if known.live:
                    known.seen = now
                    return [(sender, self._welcome(run, known, request))]
                if request.number <= known.left_at:
                    return []  # sent before it left, and late
            elif known.live:
                silent_s = now - known.seen
                if silent_s <= self._lease_s:
                    reason = f"another worker {request.worker!r} was heard of {silent_s:.1f} s ago"
                    return [(sender, Busy(number=request.number, reason=reason))]
                replies += self._forget(run, known)
        if not run.pace.may_join(request.worker, run.shard.version):
            return [*replies, (sender, Busy(number=request.number, reason="one worker warms up alone"))]
        self._write(_as_join(request))
        worker = run.admit(request, now)
        return [(sender, self._welcome(run, worker, request)), *replies, *self._answer(run)]

    def _ask_for_setup(self, join: Join, now: float) -> Reply:
        """Of one worker at a time: what it sends is as large as the shard."""
        who = (join.worker, join.incarnation)
        if self._setting_up is not None and self._setting_up[:2] != who and now < self._setting_up[2]:
            return Busy(number=join.number, reason=f"worker {self._setting_up[0]!r} sets this shard up")
        self._setting_up = (*who, now + self._lease_s)
        return Empty(number=join.number)

    def _welcome(self, run: Run, worker: Worker, request: Join | Setup) -> Welcome:
        return Welcome(
            number=request.number,
            run=run.number,
            version=run.shard.version,
            published=run.shard.published.number,
            have=0 if request.digest == run.digest else -1,
            clock=worker.clock,
            turn=run.totals.turn,
            lease_s=self._lease_s,
        )

    def _forget(self, run: Run, worker: Worker) -> Replies:
        self._write(Forgot(number=0, worker=worker.name, incarnation=worker.incarnation))
        run.part(worker)
        return self._answer(run)

    # -- requests of workers that have joined --------------------------------------------------------------------------

    def _known(self, request: Request, sender: bytes, now: float) -> Replies:
        run = self._run
        worker = None if run is None else run.roster.find(request)
        if run is None or worker is None:
            if isinstance(request, Leave):
                return [(sender, Left(number=request.number))]
            return [(sender, Unknown(number=request.number, run=0 if run is None else run.number))]
        worker.seen = now
        if isinstance(request, Push):
            return self._push(run, worker, request, sender)
        if isinstance(request, Pull):
            return self._pull(run, worker, Waiting(sender, request.number, self._check_have(run, request.have)))
        if isinstance(request, Add):
            return self._add(run, worker, request, sender)
        if isinstance(request, Beat):
            return [(sender, Alive(number=request.number, version=run.shard.version))]
        if isinstance(request, Leave):
            self._write(request)
            run.part(worker, left_at=request.number)
            return [(sender, Left(number=request.number)), *self._answer(run)]
        raise Refusal("kind", f"no worker sends {type(request).__name__}")

    def _push(self, run: Run, worker: Worker, push: Push, sender: bytes) -> Replies:
        self._check_have(run, push.have)
        replies: Replies = []
        if 1 <= push.sequence <= worker.sequence:
            run.counters.duplicates += 1
            if push.sequence < worker.sequence:
                return []  # so old that its worker has its answer
        else:
            checked = run.check(worker, push)
            self._write(push)
            run.push(worker, push, checked)
            replies = self._answer(run)
        replies.insert(0, (sender, worker.acked(push.number)))
        if push.pull:
            replies += self._pull(run, worker, Waiting(sender, push.number, push.have))
        return replies

    def _pull(self, run: Run, worker: Worker, pull: Waiting) -> Replies:
        if worker.pull is None or pull.number >= worker.pull.number:
            worker.pull = pull
        if run.pace.may_go(worker):
            return self._answer(run)
        return [(pull.sender, Wait(number=pull.number, reason="others have not come so far"))]

    def _add(self, run: Run, worker: Worker, add: Add, sender: bytes) -> Replies:
        if not 1 <= add.turn == run.totals.turn:
            run.totals.add(worker.name, add.turn, whole(add.body))
        worker.term = Waiting(sender, add.number, add.turn)
        replies = self._answer(run)
        if worker.term is not None:
            replies.append((sender, Wait(number=add.number, reason="others have not given their terms")))
        return replies

    def _check_have(self, run: Run, have: int) -> int:
        if have > run.shard.published.number:
            raise Refusal("have", f"published change {have}; there are {run.shard.published.number}")
        return have

    # -- answers -------------------------------------------------------------------------------------------------------

    def _answer(self, run: Run) -> Replies:
        """Whatever can be answered now of all that waits."""
        replies: Replies = []
        names = [worker.name for worker in run.roster.live]
        if run.pace.may_sum(run.shard.version) and run.totals.complete(names):
            total, terms = run.totals.sum()
            turn = run.totals.turn + 1
            self._write(Summed(number=0, turn=turn, terms=terms, body=total))
            run.totals.close(turn, total, terms)
        for worker in run.roster.live:
            pull, term = worker.pull, worker.term
            if pull is not None and run.pace.may_go(worker):
                worker.pull = None
                replies.append((pull.sender, self._changed(run, pull)))
            if term is not None and term.mark <= run.totals.turn:
                worker.term = None
                done = run.totals
                total_of = Total(number=term.number, turn=done.turn, terms=done.terms, body=done.total)
                replies.append((term.sender, total_of))
        return replies

    def _changed(self, run: Run, pull: Waiting) -> Changed:
        published = run.shard.published
        newer = run.shard.version > published.version
        if newer or (pull.mark == published.number and not published.drained):
            self._write(Published(number=0))
            run.shard.publish()
        body = published.since(pull.mark)
        full = body is None
        if body is None:
            body = [published.snapshot()]
        run.counters.pulled_bytes += sum(len(part) for part in body)
        return Changed(
            number=pull.number,
            have=0 if full else pull.mark,
            published=published.number,
            version=published.version,
            clock=run.pace.common_clock(),
            full=full,
            body=body,
        )

    # -- what lasts ----------------------------------------------------------------------------------------------------

    def _write(self, entry: Message) -> None:
        """Before it is answered. A full disk does not stop the run, but what is done from then on may be lost."""
        if not self.durable:
            return  # a journal with a gap could not be replayed
        try:
            self._journal.append(entry)
        except OSError as error:
            self.durable = False
            logging.getLogger("gradcomp").error("journal: %s; going on, not durable until the next checkpoint", error)

    def state_dict(self) -> dict[str, Any]:
        """Copies of all there is, as plain tensors, strings, numbers, lists and dicts."""
        return {"format": _FORMAT} | ({} if self._run is None else {"run": self._run.state_dict()})

    def load_state_dict(self, state: Mapping[str, Any], now: float) -> None:
        """Become what gave ``state``; all leases begin now.

        Raises:
            StateError: it is not such a state; nothing has changed.
        """
        if state.get("format") != _FORMAT:
            raise StateError(f"state of a server has format {state.get('format')!r}; this build reads {_FORMAT}")
        self._run = Run.restore(state["run"], now, self._max_numel) if "run" in state else None

    def replay(self, entry: Message, now: float) -> None:
        """Do again what is in a journal; nobody is answered, nothing is written.

        Raises:
            StateError: it does not follow upon what was done so far.
        """
        try:
            if isinstance(entry, Setup) and self._run is None:
                self._run = Run.begin(entry, self._max_numel)
                self._run.admit(entry, now)
                return
            act = _REPLAYED.get(type(entry))
            if self._run is None or act is None:
                raise StateError(f"journal: {type(entry).__name__} at the wrong place")
            act(self._run, entry, now)
        except Refusal as refusal:
            raise StateError(f"journal: {type(entry).__name__}.{refusal.field}: {refusal}") from None

    def status(self) -> dict[str, Any]:
        """How it is going, as JSON has it."""
        found: dict[str, Any] = {"durable": self.durable, "lease_s": self._lease_s, "refused": self._refused}
        return found if self._run is None else found | self._run.status()


def _as_join(request: Join | Setup) -> Join:
    """What a journal needs of a Setup that came second."""
    return Join(
        number=request.number,
        worker=request.worker,
        incarnation=request.incarnation,
        hello=request.hello,
        digest=request.digest,
    )


def _replay_join(run: Run, entry: Any, now: float) -> None:
    run.admit(entry, now)


def _replay_push(run: Run, entry: Any, now: float) -> None:
    worker = _worker(run, entry)
    run.push(worker, entry, run.check(worker, entry))


def _replay_leave(run: Run, entry: Any, now: float) -> None:
    run.part(_worker(run, entry), left_at=entry.number)


def _replay_forgot(run: Run, entry: Any, now: float) -> None:
    run.part(_worker(run, entry))


def _replay_published(run: Run, entry: Any, now: float) -> None:
    run.shard.publish()


def _replay_summed(run: Run, entry: Any, now: float) -> None:
    run.totals.close(entry.turn, bytes(whole(entry.body)), entry.terms)


def _worker(run: Run, entry: Any) -> Worker:
    worker = run.roster.find(entry)
    if worker is None:
        raise StateError(f"journal: {type(entry).__name__} of {entry.worker!r}, who has not joined")
    return worker


_REPLAYED: dict[type[Message], Callable[[Run, Any, float], None]] = {
    Join: _replay_join,
    Push: _replay_push,
    Leave: _replay_leave,
    Forgot: _replay_forgot,
    Published: _replay_published,
    Summed: _replay_summed,
}
