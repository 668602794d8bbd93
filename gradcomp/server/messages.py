"""The messages that workers and a shard of the parameter server exchange, and what its journal holds.

A worker has at most one request under way to a shard beside its heartbeats. Whatever is not answered is sent again: a
server answers the same request the same way, and does what it asks for once.

Join -> Welcome | Empty | Busy | Refused     Setup -> as Join
Push -> Acked, and Changed where ``pull``    Pull  -> Changed | Wait, then Changed
Add  -> Total | Wait, then Total             Beat  -> Alive         Leave -> Left
Look -> Status                               any   -> Refused | Unknown

A journal holds what was done, in order, in the same form: requests (Setup, Join, Push, Leave) and the server's own
events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from gradcomp.interfaces import Buffer

__all__ = [
    "Acked",
    "Add",
    "Alive",
    "Beat",
    "Busy",
    "Changed",
    "Empty",
    "Event",
    "Forgot",
    "Hello",
    "Join",
    "Leave",
    "Left",
    "Look",
    "Message",
    "Options",
    "Published",
    "Pull",
    "Push",
    "Refused",
    "Reply",
    "Request",
    "Setup",
    "Status",
    "Summed",
    "Total",
    "Unknown",
    "Wait",
    "Welcome",
]

Hello = dict[str, str | int | bytes]
Options = list[dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Message:
    """Base of all. Integers are in -1..2**63 - 1.

    Attributes:
        number: of the request, counted by its worker; a reply has its request's.
        body: raw bytes; a sequence of buffers to be joined where it is sent.
    """

    code: ClassVar[int]
    number: int
    body: Sequence[Buffer] | Buffer = field(default=b"", compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Request(Message):
    """From a worker.

    Attributes:
        worker: its name; no two workers of a run share one.
        incarnation: drawn at random when it joins, so that a worker that was started again is another one.
    """

    worker: str
    incarnation: int


@dataclass(frozen=True, kw_only=True)
class Join(Request):
    """I am here: what all workers must agree on, and a digest of my parameters on this shard (XXH3-128)."""

    code = 1
    hello: Hello
    digest: bytes


@dataclass(frozen=True, kw_only=True)
class Setup(Request):
    """As Join, with all that an empty server needs. Body: the parameters' values, float32, row after row.

    Attributes:
        table: of this shard, packed.
        optimizer: class name and options of each group, as JSON (gradcomp.server.optimizers).
    """

    code = 2
    hello: Hello
    digest: bytes
    table: bytes
    optimizer: str


@dataclass(frozen=True, kw_only=True)
class Push(Request):
    """A gradient. Body: a gradcomp.message.Message with a packet for each row of the table.

    Attributes:
        sequence: of pushes of this incarnation, from 1; one that was applied is never applied again.
        clock: steps this worker has taken in the run, this one included; the round it is meant for in mode ``sync``,
            where rounds count from 1.
        version: number of updates in the parameters it was computed from.
        options: what each parameter group's options are now, numbers only (gradcomp.server.optimizers.numbers).
        pull: whether the answer should bring what changed.
        have: number of the published changes that the worker has.
    """

    code = 3
    sequence: int
    clock: int
    version: int
    options: Options
    pull: bool
    have: int


@dataclass(frozen=True, kw_only=True)
class Pull(Request):
    """What changed, once the mode lets a worker at this clock go on."""

    code = 4
    clock: int
    have: int


@dataclass(frozen=True, kw_only=True)
class Add(Request):
    """A term of a sum over all workers, which all of them come to. Body: float32.

    Attributes:
        turn: of sums of the run, from 1.
    """

    code = 5
    turn: int


@dataclass(frozen=True, kw_only=True)
class Beat(Request):
    """I am still here: renews the lease."""

    code = 6


@dataclass(frozen=True, kw_only=True)
class Leave(Request):
    """I am done."""

    code = 7


@dataclass(frozen=True, kw_only=True)
class Look(Request):
    """How is it going? From anybody; ``worker`` may be empty."""

    code = 8


@dataclass(frozen=True, kw_only=True)
class Reply(Message):
    """From a server."""


@dataclass(frozen=True, kw_only=True)
class Welcome(Reply):
    """You are in.

    Attributes:
        run: drawn at random when the server was set up; a server that lost its state has another.
        version: updates so far.
        published: number of published changes so far.
        have: what the worker's own parameters are equal to: a published number; or -1: it must pull all of them.
        clock: the clock this worker goes on from: steps it has taken in the run before, or in rounds, the round.
        turn: number of the last sum.
        lease_s: a worker that is not heard of for so long is forgotten.
    """

    code = 65
    run: int
    version: int
    published: int
    have: int
    clock: int
    turn: int
    lease_s: float


@dataclass(frozen=True, kw_only=True)
class Empty(Reply):
    """I hold nothing yet: send a Setup."""

    code = 66


@dataclass(frozen=True, kw_only=True)
class Busy(Reply):
    """Not now, ask again: another worker sets me up, or one of your name has not been silent for long enough."""

    code = 67
    reason: str


@dataclass(frozen=True, kw_only=True)
class Refused(Reply):
    """Never: the request is wrong, or does not fit the run.

    Attributes:
        field: what of the hello or the request.
    """

    code = 68
    field: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Unknown(Reply):
    """I do not know this incarnation: its lease ran out, or I was started anew without my state. Join again."""

    code = 69
    run: int


@dataclass(frozen=True, kw_only=True)
class Acked(Reply):
    """The push is in the journal, and will not be applied again.

    Attributes:
        result: ``applied`` (or will be, with its round), ``late`` (its round was closed: take it back) or
            ``nonfinite`` (not applied).
        staleness: updates between the parameters it was computed from and its own.
        version: updates so far.
    """

    code = 70
    sequence: int
    result: str
    staleness: int
    version: int


@dataclass(frozen=True, kw_only=True)
class Changed(Reply):
    """What changed. Body: if ``full``, all published values, float32; else one gradcomp.message.Message a change, each
    with its length before it (eight bytes, little-endian). gradcomp.server.changes reads and adds them.

    Attributes:
        have: published number this starts from, 0 if ``full``.
        published: published number it leads to.
        version: updates in it.
        clock: of the round that may begin now, in mode ``sync``; else the slowest worker's.
    """

    code = 71
    have: int
    published: int
    version: int
    clock: int
    full: bool


@dataclass(frozen=True, kw_only=True)
class Wait(Reply):
    """Understood; the answer comes once others are there. Ask again from time to time, for it may get lost."""

    code = 72
    reason: str


@dataclass(frozen=True, kw_only=True)
class Total(Reply):
    """The sum over workers. Body: float32. ``terms``: how many workers are in it."""

    code = 73
    turn: int
    terms: int


@dataclass(frozen=True, kw_only=True)
class Alive(Reply):
    """Lease renewed."""

    code = 74
    version: int


@dataclass(frozen=True, kw_only=True)
class Left(Reply):
    """Goodbye."""

    code = 75


@dataclass(frozen=True, kw_only=True)
class Status(Reply):
    """Counters, as JSON in the body."""

    code = 76


@dataclass(frozen=True, kw_only=True)
class Event(Message):
    """What a server does of itself; only in its journal, never on the wire."""


@dataclass(frozen=True, kw_only=True)
class Forgot(Event):
    """A worker's lease ran out."""

    code = 129
    worker: str
    incarnation: int


@dataclass(frozen=True, kw_only=True)
class Published(Event):
    """What had changed was compressed and became the next published change. Replaying compresses it again."""

    code = 130


@dataclass(frozen=True, kw_only=True)
class Summed(Event):
    """A sum is complete. Body: float32."""

    code = 131
    turn: int
    terms: int
