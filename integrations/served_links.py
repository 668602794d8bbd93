"""A worker's conversation with the shards of a parameter server: it joins, pushes, pulls, and comes back."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from torch import Tensor

from gradcomp.errors import HandshakeError, PacketError, TransportError
from gradcomp.integrations.served_shard import ServedShard
from gradcomp.message import Message
from gradcomp.server.hello import hello
from gradcomp.server.links import Asked, Links
from gradcomp.server.messages import Options
from gradcomp.server.modes import Mode, Sync
from gradcomp.server.optimizers import Description
from gradcomp.server.protocol import (
    Acked,
    Add,
    Changed,
    Empty,
    Join,
    Leave,
    Look,
    Pull,
    Push,
    Reply,
    Request,
    Setup,
    Total,
    Unknown,
    Welcome,
    whole,
)
from gradcomp.server.totals import floats

__all__ = ["Counts", "ServedLinks"]

_LEAVE_S = 2.0
_FIRST_ANSWER_S = 2.0  # from a server that is not to be waited for

logger = logging.getLogger("gradcomp")


@dataclass
class Counts:
    """What became of the pushes, and what came in. Of all shards together.

    Attributes:
        staleness: number of applied pushes by their staleness.
        pulled_bytes: packets that came in.
        value_bytes: the same values as float32.
    """

    staleness: Counter[int] = field(default_factory=Counter)
    late: int = 0
    nonfinite: int = 0
    pulled_bytes: int = 0
    value_bytes: int = 0


@dataclass
class _Pushed:
    """A request under way, and what must be known of it when it is answered."""

    shard: ServedShard
    asked: Asked
    message: Message | None
    pull: bool


class _Me(TypedDict):
    """What all requests of a worker have in common; the links number them."""

    number: int
    worker: str
    incarnation: int


class ServedLinks:
    """Asks all shards at once, and makes of their answers what they are for.

    Args:
        links: the network.
        mode, workers, reduction, optimizer: what all workers must agree on.
        take_back: called with what was pushed in vain.

    Attributes:
        counts: see there.
    """

    def __init__(
        self,
        links: Links,
        shards: Sequence[ServedShard],
        *,
        worker: str,
        incarnation: int,
        mode: Mode,
        workers: int,
        reduction: str,
        optimizer: Description,
        take_back: Callable[[ServedShard, Message], None],
        timeout_s: float,
        retry: bool,
    ) -> None:
        self.counts = Counts()
        self._links = links
        self._shards = shards
        self._me: _Me = {"number": 0, "worker": worker, "incarnation": incarnation}
        self._hellos = [
            hello(
                table=shard.table,
                optimizer=optimizer,
                mode=mode,
                workers=workers,
                reduction=reduction,
                shard=shard.index,
                shards=len(shards),
            )
            for shard in shards
        ]
        self._optimizer = optimizer.text()
        self._take_back = take_back
        self._rounds = isinstance(mode, Sync)  # clocks are theirs then
        self._timeout_s = timeout_s
        self._retry = retry
        self._under_way: list[_Pushed] = []
        self._turn = 0

    @property
    def traffic(self) -> dict[str, int]:
        """All there was on the wire."""
        return {"bytes_sent": self._links.bytes_sent, "bytes_received": self._links.bytes_received}

    # -- meeting -------------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Join all shards; if they are empty, set them up.

        An empty shard chooses one worker to set it up, and lets others wait. Whoever is chosen by the first shard sets
        it up last, so that all shards begin with the values of one worker.

        Raises:
            HandshakeError: what this worker runs is not what the server runs; names the field.
            TransportTimeout: a shard is not there.
        """
        if not self._retry:
            self._look()
        first, *others = self._shards
        chosen = not self._join(first)
        for shard in others:
            if not self._join(shard):
                if not chosen:
                    raise TransportError(f"shard {shard.index} is empty although the first is not: it lost its state")
                self._set_up(shard)
        if chosen:
            self._set_up(first)
        for shard in self._shards:
            if shard.behind:
                self._ask_pull(shard)
        self._wait_for_all()
        self.counts.pulled_bytes = self.counts.value_bytes = 0  # where one begins is no change

    def _look(self) -> None:
        """Find out whether all shards are there, without waiting for long."""
        asked = [self._links.ask(shard.index, Look(**self._me)) for shard in self._shards]
        self._links.wait(asked, timeout_s=_FIRST_ANSWER_S)

    def _join(self, shard: ServedShard) -> bool:
        """Join one shard; not so if it is empty, and this worker is to set it up."""
        request = Join(**self._me, hello=self._hellos[shard.index], digest=shard.digest())
        return self._welcome(shard, self._answer(shard, request))

    def _set_up(self, shard: ServedShard) -> None:
        request = Setup(
            **self._me,
            hello=self._hellos[shard.index],
            digest=shard.digest(),
            table=shard.table.pack(),
            optimizer=self._optimizer,
            body=shard.value_bytes,
        )
        if not self._welcome(shard, self._answer(shard, request)):
            raise PacketError(f"shard {shard.index} is empty after it was set up")

    def _welcome(self, shard: ServedShard, reply: Reply) -> bool:
        if isinstance(reply, Welcome):
            shard.welcome(reply)
            self._turn = reply.turn if shard.index == 0 else self._turn
        elif not isinstance(reply, Empty):
            raise PacketError(f"shard {shard.index} answered a Join with {reply!r}")
        return isinstance(reply, Welcome)

    def _answer(self, shard: ServedShard, request: Request) -> Reply:
        asked = self._links.ask(shard.index, request)
        self._links.wait([asked], timeout_s=self._timeout_s)
        return asked.replies[-1]

    # -- steps ---------------------------------------------------------------------------------------------------------

    def push(self, messages: Sequence[Message], options: Options, *, steps: int, pull: bool) -> None:
        """Send each shard its part; returns at once.

        Args:
            options: of each parameter group, as they are now.
            steps: that this worker has taken, this one included.
        """
        for shard, message in zip(self._shards, messages, strict=True):
            shard.sequence += 1
            clock = shard.clock if self._rounds else steps
            request = Push(
                **self._me,
                sequence=shard.sequence,
                clock=clock,
                version=shard.used,
                options=options,
                pull=pull,
                have=shard.have,
                body=b"".join(message.buffers),
            )
            asked = self._links.ask(shard.index, request)
            self._under_way.append(_Pushed(shard, asked, message, pull))
            if not self._rounds:
                shard.clock = steps

    def pull(self) -> None:
        """Ask all shards what changed; returns at once."""
        for shard in self._shards:
            self._ask_pull(shard)

    def _ask_pull(self, shard: ServedShard) -> None:
        asked = self._links.ask(
            shard.index,
            Pull(
                **self._me,
                clock=shard.clock,
                have=shard.have,
            ),
        )
        self._under_way.append(_Pushed(shard, asked, None, True))

    def settle(self) -> bool:
        """Wait until all that was asked is answered, and take it in; whether published values came.

        Raises:
            TransportTimeout: a shard did not answer; names it.
            HandshakeError: it refused, or lost its state.
        """
        came = any(pushed.pull for pushed in self._under_way)
        self._wait_for_all()
        return came

    def _wait_for_all(self) -> None:
        while self._under_way:
            self._links.wait([pushed.asked for pushed in self._under_way], timeout_s=self._timeout_s)
            answered, self._under_way = self._under_way, []
            for pushed in answered:
                self._take_in(pushed)

    def _take_in(self, pushed: _Pushed) -> None:
        shard, counts = pushed.shard, self.counts
        acked = False
        for reply in pushed.asked.replies:
            if isinstance(reply, Acked):
                acked = True
                counts.staleness[reply.staleness] += reply.result == "applied"
                counts.late += reply.result == "late"
                counts.nonfinite += reply.result == "nonfinite"
                if reply.result != "applied" and pushed.message is not None:
                    self._take_back(shard, pushed.message)
            elif isinstance(reply, Changed):
                changed = reply.full or reply.published != shard.have
                packet_bytes = shard.take(reply)
                if self._rounds:
                    shard.clock = reply.clock
                if changed:
                    counts.pulled_bytes += packet_bytes
                counts.value_bytes += 4 * shard.table.numel
            elif isinstance(reply, Unknown):
                self._come_back(pushed, acked=acked)
            else:
                raise PacketError(f"shard {shard.index} answered with {reply!r}")

    def _come_back(self, pushed: _Pushed, *, acked: bool) -> None:
        """Join a shard again that has forgotten this worker, and ask again: what was applied is not applied twice."""
        shard = pushed.shard
        self._rejoin(shard)
        if acked:
            self._ask_pull(shard)
        else:
            asked = self._links.ask(shard.index, pushed.asked.request)
            self._under_way.append(_Pushed(shard, asked, pushed.message, pushed.pull))

    def _rejoin(self, shard: ServedShard) -> None:
        logger.warning("worker %s: shard %d had forgotten it; joining again", self._me["worker"], shard.index)
        before = (shard.run, shard.have, shard.version, shard.clock)
        if not self._join(shard) or shard.run != before[0]:
            raise TransportError(f"shard {shard.index} lost its state; start it with what it had, or all workers anew")
        _, shard.have, shard.version, shard.clock = before  # what this worker has did not change

    # -- sums and farewell ---------------------------------------------------------------------------------------------

    def add(self, term: Tensor) -> tuple[Tensor, int]:
        """The sum of all workers' terms, and how many are in it; by the first shard.

        Args:
            term: float32, flat, on the CPU.
        """
        self._wait_for_all()
        shard, body = self._shards[0], term.numpy().tobytes()
        reply: Reply | None = None
        while not isinstance(reply, Total):
            request = Add(**self._me, turn=self._turn + 1, body=body)
            reply = self._answer(shard, request)
            if isinstance(reply, Unknown):
                self._rejoin(shard)
            elif not isinstance(reply, Total) or len(reply.body) != len(body) or reply.terms < 1:
                raise PacketError(f"shard {shard.index} answered an Add with {reply!r}")
        self._turn += 1
        return floats(whole(reply.body)), reply.terms

    def leave(self) -> None:
        """Say goodbye, so that nobody waits for this worker, and hang up. Bounded."""
        with contextlib.suppress(TransportError, HandshakeError, PacketError):
            self._links.wait([pushed.asked for pushed in self._under_way], timeout_s=_LEAVE_S)
        with contextlib.suppress(TransportError):
            asked = [self._links.ask(s.index, Leave(**self._me)) for s in self._shards if s.run is not None]
            self._links.wait(asked, timeout_s=_LEAVE_S)
        self._links.close()


def new_incarnation() -> int:
    """Not a worker's before, with all likelihood."""
    return secrets.randbits(62) + 1
