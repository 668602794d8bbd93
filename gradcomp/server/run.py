"""One run on one shard: all that a server remembers, and how it changes. What is decided here follows from the order of
what is in the journal alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from gradcomp.errors import ConfigError, GradcompError, PacketError, StateError
from gradcomp.message import Message
from gradcomp.server import hello
from gradcomp.server.counters import Counters
from gradcomp.server.messages import Hello, Push, Request, Setup
from gradcomp.server.optimizers import Description
from gradcomp.server.paces import Collected, pace
from gradcomp.server.protocol import whole
from gradcomp.server.refusal import Refusal
from gradcomp.server.roster import Roster, Worker
from gradcomp.server.shard import Shard
from gradcomp.server.table import ShardTable
from gradcomp.server.totals import Totals, floats

__all__ = ["Run"]


@dataclass(frozen=True)
class Checked:
    """A push that is well-formed.

    Attributes:
        gradient: None if it is not finite.
        late: whether its round is closed.
    """

    gradient: Message | None
    late: bool

    @property
    def result(self) -> str:
        """What its worker is told."""
        return "nonfinite" if self.gradient is None else "late" if self.late else "applied"


class Run:
    """See the module.

    Attributes:
        number: of the run; another run has another.
        digest: of the parameters it began with.

    Raises:
        Refusal: something does not fit; names the field of the Setup or of its hello.
    """

    def __init__(
        self, number: int, said: Hello, digest: bytes, table: ShardTable, optimizer: Description, values: Tensor
    ) -> None:
        self.number = number
        self.hello = said
        self.digest = digest
        mode = hello.check(said, table, optimizer)
        if any(row.group >= len(optimizer.groups) for row in table.rows):
            raise Refusal("table", f"a row is of a parameter group beyond the optimizer's {len(optimizer.groups)}")
        self.optimizer = optimizer
        try:
            self.shard = Shard(table, optimizer, values)
        except ConfigError as error:
            raise Refusal("optimizer" if str(error).startswith("optimizer") else "table", str(error)) from None
        self.roster = Roster(int(said["workers"]))
        self.pace = pace(mode, self.roster, str(said["reduction"]))
        self.totals = Totals(max(table.numel, 1 << 20))
        self.counters = Counters()

    @classmethod
    def begin(cls, setup: Setup, max_numel: int) -> Run:
        """A run as the first worker wants it, checked before anything is allocated.

        Raises:
            Refusal: names the field that is wrong.
        """
        body = whole(setup.body)
        try:
            table = ShardTable.unpack(setup.table, max_numel=max_numel)
        except (GradcompError, RecursionError) as error:
            raise Refusal("table", str(error)) from None
        try:
            optimizer = Description.parse(setup.optimizer)
        except ConfigError as error:
            raise Refusal("optimizer", str(error)) from None
        if len(body) != 4 * table.numel:
            raise Refusal("body", f"{len(body)} bytes for {table.numel} float32")
        if xxhash.xxh3_128_digest(body) != setup.digest:
            raise Refusal("digest", "it is not that of the values beside it")
        # Random, for incarnations are; and the same when the journal is replayed.
        seed = f"{setup.incarnation} {setup.worker} {setup.number}".encode() + setup.digest
        return cls(xxhash.xxh3_64_intdigest(seed) >> 1, setup.hello, setup.digest, table, optimizer, floats(body))

    # -- what changes it -----------------------------------------------------------------------------------------------

    def admit(self, request: Request, now: float) -> Worker:
        """Take in a worker."""
        worker = self.roster.join(request, now)
        worker.clock = self.pace.first_clock(worker)
        self._update()
        return worker

    def part(self, worker: Worker, *, left_at: int | None = None) -> None:
        """A worker left, or was forgotten."""
        self.roster.part(worker, left_at=left_at)
        self.totals.forget(worker.name)
        self._update()

    def check(self, worker: Worker, push: Push) -> Checked:
        """What becomes of a push; nothing has changed yet.

        Raises:
            Refusal: names the field that is wrong.
        """
        if push.sequence != worker.sequence + 1:
            raise Refusal("sequence", f"push {push.sequence} of {worker.name!r}; {worker.sequence + 1} is next")
        if not 0 <= push.version <= self.shard.version:
            raise Refusal("version", f"{push.version}; there were {self.shard.version} updates")
        if push.clock < 0:
            raise Refusal("clock", f"{push.clock} is negative")
        try:
            self.optimizer.check(push.options)
        except ConfigError as error:
            raise Refusal("options", str(error)) from None
        late = self.pace.is_late(worker, push.clock)
        try:
            gradient = self.shard.parse(whole(push.body))
            finite = self.shard.try_out(gradient)
        except PacketError as error:
            raise Refusal("body", str(error)) from None
        return Checked(gradient if finite else None, late)

    def push(self, worker: Worker, push: Push, checked: Checked) -> None:
        """Do what :meth:`check` said."""
        staleness = self.shard.version - push.version
        self.pace.advance(worker, push.clock)
        self.counters.count(checked.result, len(whole(push.body)))
        if not checked.late:
            self.pace.collect(Collected(worker.name, checked.gradient, staleness, push.options))
        self._update()
        worker.sequence, worker.result = push.sequence, checked.result
        worker.staleness, worker.version = staleness, self.shard.version

    def _update(self) -> None:
        while self.pace.due():
            pushes = self.pace.close()
            if not pushes:
                continue  # a round without a finite gradient
            if self.shard.update(self.pace.combine(pushes)):
                for push in pushes:
                    self.counters.staleness.add(push.staleness)
            else:
                self.counters.overflowed += len(pushes)

    def status(self) -> dict[str, Any]:
        """Numbers worth showing, as JSON has them."""
        published = self.shard.published
        workers = {
            worker.name: {"live": worker.live, "pushes": worker.sequence, "clock": worker.clock}
            for worker in self.roster.known.values()
        }
        return {
            "run": self.number,
            "mode": self.hello["mode"],
            "shard": self.hello["shard"],
            "optimizer": self.optimizer.name,
            "elements": self.shard.table.numel,
            "updates": self.shard.version,
            "published": published.number,
            "ring_bytes": published.ring_nbytes,
            "sums": self.totals.turn,
            "live": len(self.roster.live),
            "workers": workers,
            "done": self.roster.done,
            **self.counters.summary(),
        }

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that must last: tensors, numbers, strings, and lists and dicts of them."""
        collected = [
            {
                "worker": push.worker,
                "staleness": push.staleness,
                "options": [dict(group) for group in push.options],
                "gradient": [] if push.gradient is None else [_tensor(b"".join(push.gradient.buffers))],
            }
            for push in self.pace.collected
        ]
        return {
            "number": self.number,
            "hello": {key: _tensor(value) if isinstance(value, bytes) else value for key, value in self.hello.items()},
            "digest": _tensor(self.digest),
            "table": _tensor(self.shard.table.pack()),
            "description": self.optimizer.text(),
            "shard": self.shard.state_dict(),
            "roster": self.roster.state_dict(),
            "pace": self.pace.reached,
            "collected": collected,
            "totals": self.totals.state_dict(),
            "counters": self.counters.state_dict(),
        }

    @classmethod
    def restore(cls, state: Mapping[str, Any], now: float, max_numel: int) -> Run:
        """The run that gave ``state``; all leases begin now.

        Raises:
            StateError: it is not such a state.
        """
        try:
            said = {key: _bytes(value) if isinstance(value, Tensor) else value for key, value in state["hello"].items()}
            table = ShardTable.unpack(_bytes(state["table"]), max_numel=max_numel)
            optimizer = Description.parse(state["description"])
            run = cls(int(state["number"]), said, _bytes(state["digest"]), table, optimizer, state["shard"]["values"])
            run.shard.load_state_dict(state["shard"])
            run.roster = run.pace.roster = Roster.restore(state["roster"], now)
            run.pace.reached = int(state["pace"])
            for push in state["collected"]:
                gradients = [run.shard.parse(memoryview(_bytes(data))) for data in push["gradient"]]
                one = gradients[0] if gradients else None
                run.pace.collected.append(Collected(push["worker"], one, int(push["staleness"]), push["options"]))
            run.totals.load_state_dict(state["totals"])
            run.counters.load_state_dict(state["counters"])
        except StateError:
            raise
        except (Refusal, GradcompError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise StateError(f"not the state of a server's run: {error!r}") from None
        return run


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
