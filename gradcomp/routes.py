"""What an exchange has a rank do for one bucket, in seconds of work and bytes, without doing it.

The exchange itself is run, with a Work that weighs pieces instead of compressing them: so this knows no exchange by
name, and serves those of other packages as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcomp.bucket import Bucket, Piece
from gradcomp.compressors.cast import NoCompression
from gradcomp.interfaces import Compressor, Exchange, Incoming, Slot, Work
from gradcomp.message import Message
from gradcomp.options import check_integer, check_number

__all__ = ["CodecCost", "CostOf", "Part", "Route", "Stage", "route"]

_MOST_PARTS = 16  # of a stage: more would change a forecast by less than it is wrong
_ALL_RANKS = 8  # so many ranks are looked at one by one, of more some
_LENGTH_NBYTES = 16  # of a message's head, for each packet, with its padding


@dataclass(frozen=True, kw_only=True)
class CodecCost:
    """What a compressor takes, in seconds of one core, and how long its packets are.

    Attributes:
        encode_s, encode_s_per_element: for each piece, and each of its elements.
        commit_s_per_element: what the residual takes at the end of the step.
        part_commit_s_per_element: the same for a piece that is a part of a tensor; None: no more than for a whole one.
        decode_s, decode_s_per_element: adding up one rank's packet.
        clear_s_per_element: what is done once, however many packets are added: clearing what they are added to.
        packet_bytes: of a packet, whatever it holds.
        bytes_per_element: beside that.
        bytes_per_side: beside that, for each row and each column of a matrix: factors. None is longer than float32 is.
        rounds: all-reduces it takes, if linear.
    """

    encode_s: float = 0.0
    encode_s_per_element: float = 0.0
    commit_s_per_element: float = 0.0
    part_commit_s_per_element: float | None = None
    decode_s: float = 0.0
    decode_s_per_element: float = 0.0
    clear_s_per_element: float = 0.0
    packet_bytes: float = 32.0
    bytes_per_element: float = 4.0
    bytes_per_side: float = 0.0
    rounds: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and name != "rounds":
                check_number("CodecCost", name, value, at_least=0.0)
        check_integer("CodecCost", "rounds", self.rounds, at_least=1)

    def nbytes(self, piece: Piece) -> float:
        """Of the packet of a piece."""
        rows = piece.shape[0] if piece.shape else 1
        sides = rows + piece.numel // max(rows, 1)
        values = min(self.bytes_per_element * piece.numel + self.bytes_per_side * sides, 4.0 * piece.numel)
        return self.packet_bytes + values

    def encoding_s(self, numel: int) -> float:
        """Making a packet of so many elements."""
        return self.encode_s + self.encode_s_per_element * numel

    def decoding_s(self, numel: int, packets: int) -> float:
        """Adding up so many packets, from nothing."""
        return packets * (self.decode_s + self.decode_s_per_element * numel) + self.clear_s_per_element * numel

    def commit_s(self, numel: int, *, part: bool) -> float:
        """Making the residual what it is after the step."""
        if part and self.part_commit_s_per_element is not None:
            return self.part_commit_s_per_element * numel
        return self.commit_s_per_element * numel


CostOf = Callable[[Compressor], CodecCost]


@dataclass(frozen=True)
class Part:
    """Some work, and what then leaves."""

    work_s: float
    sent_bytes: float
    messages: int


@dataclass(frozen=True)
class Stage:
    """What is done, and what must have come in before the exchange goes on."""

    parts: tuple[Part, ...]
    received_bytes: float

    @property
    def work_s(self) -> float:
        return sum(part.work_s for part in self.parts)

    @property
    def sent_bytes(self) -> float:
        return sum(part.sent_bytes for part in self.parts)

    @property
    def messages(self) -> int:
        return sum(part.messages for part in self.parts)


@dataclass(frozen=True)
class Route:
    """One bucket's way.

    Attributes:
        stages: one after the other.
        deliver_s: work of the exchange thread once all is in.
        finish_s: work of the training thread at the end of the step: residuals, and sums held back until then.
        encode_s, decode_s: what of all work is for packets of gradients, and for the rest.
        sent_bytes: by the rank that sends most.
    """

    stages: tuple[Stage, ...]
    deliver_s: float
    finish_s: float
    encode_s: float
    decode_s: float
    sent_bytes: float


def route(
    exchange: Exchange,
    bucket: Bucket,
    pieces: Sequence[Piece],
    *,
    world_size: int,
    cost_of: CostOf,
    copy_s_per_element: float = 0.0,
) -> Route:
    """The way of one bucket. Where ranks have different parts, each stage is as long as the longest of them.

    Args:
        copy_s_per_element: what it takes to copy a float32: tensors that are exchanged as one are copied there and
            back.
    """

    costs = {id(codec): cost_of(codec) for codec in [piece.codec for piece in pieces]}
    plain = cost_of(NoCompression())

    def walk(rank: int) -> Route:
        scale = _Scale(rank, world_size, bucket, pieces, costs, plain, copy_s_per_element)
        return scale.walk(exchange)

    if world_size <= _ALL_RANKS:
        ranks = set(range(world_size))
    else:
        owned = Counter[int]()
        for piece in pieces:
            if piece.owner is not None:
                owned[piece.owner] += piece.numel
        ranks = {0, world_size - 1, *(rank for rank, _ in owned.most_common(1))}
        if any(piece.reducers for piece in pieces):  # whose levels begin further and further apart
            ranks |= {2**i - 1 for i in range(1, world_size.bit_length())}
    routes = [walk(rank) for rank in sorted(ranks)]
    if len(routes) == 1:
        return routes[0]
    most = max(len(found.stages) for found in routes)
    return Route(
        stages=tuple(_longest([r.stages[i] for r in routes if i < len(r.stages)]) for i in range(most)),
        deliver_s=max(r.deliver_s for r in routes),
        finish_s=max(r.finish_s for r in routes),
        encode_s=max(r.encode_s for r in routes),
        decode_s=max(r.decode_s for r in routes),
        sent_bytes=max(r.sent_bytes for r in routes),
    )


def _longest(stages: Sequence[Stage]) -> Stage:
    """The work of the rank that has most of it, and as much on the wire as any rank sends or receives."""
    busiest = max(stages, key=lambda stage: stage.work_s)
    sends = max(stages, key=lambda stage: stage.sent_bytes)
    parts = busiest.parts
    more = sends.sent_bytes - busiest.sent_bytes
    if more > 0:
        messages = sum(part.messages for part in sends.parts) - sum(part.messages for part in parts)
        parts = (*parts, Part(0.0, more, max(messages, 1)))
    return Stage(parts, max(stage.received_bytes for stage in stages))


@dataclass(frozen=True)
class _Weighed(Message):
    """A message of which only the length is known."""

    nbytes: float = 0.0


class _NotThere(Incoming):
    """A message that nobody sends."""

    def __init__(self, peer: int, slot: Slot) -> None:
        self.peer, self.slot = peer, slot

    @property
    def done(self) -> bool:
        return True

    @property
    def failed(self) -> bool:
        return False

    def result(self) -> memoryview:
        return memoryview(b"")


class _Scale(Work):
    """Weighs what an exchange asks for, in the order it does."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        bucket: Bucket,
        pieces: Sequence[Piece],
        costs: Mapping[int, CodecCost],
        plain: CodecCost,
        copy_s_per_element: float,
    ) -> None:
        self.rank, self.world_size, self.pieces = rank, world_size, pieces
        self._bucket = bucket
        self._costs, self._plain = costs, plain
        self._nbytes = {id(piece): costs[id(piece.codec)].nbytes(piece) + _LENGTH_NBYTES for piece in pieces}
        self._copy_s_per_element = copy_s_per_element
        self._stages: list[Stage] = []
        self._parts: list[Part] = []
        self._received_bytes = 0.0
        self._unsent_s = 0.0  # work since the last message left
        self._finish_s = self._encode_s = self._decode_s = 0.0

    def walk(self, exchange: Exchange) -> Route:
        """Run the exchange from one wait to the next."""
        for _ in exchange.run(self):
            self._end_stage()
        return Route(
            stages=tuple(self._stages),
            deliver_s=self._unsent_s,
            finish_s=self._finish_s,
            encode_s=self._encode_s,
            decode_s=self._decode_s,
            sent_bytes=sum(stage.sent_bytes for stage in self._stages),
        )

    def encode(self, pieces: Sequence[Piece]) -> Message:
        for piece in pieces:
            self._encoding(self._costs[id(piece.codec)].encoding_s(piece.numel) + self._joining_s(piece))
            self._commit(piece)
        return self._message(pieces)

    def reduce(self, pieces: Sequence[Piece], messages: Sequence[Message]) -> Message:
        for piece in pieces:
            cost = self._costs[id(piece.codec)]
            self._encoding(cost.decoding_s(piece.numel, len(messages)) + cost.encoding_s(piece.numel))
            if not piece.codec.stateless:
                self._encode_s += (again := cost.commit_s(piece.numel, part=False))
                self._finish_s += again
        return self._message(pieces)

    def deliver(self, pieces: Sequence[Piece], messages: Sequence[Message]) -> None:
        for piece in pieces:
            self._deliver(piece, len(messages))

    def rounds(self, pieces: Sequence[Piece]) -> Generator[Tensor, Tensor, None]:
        costs = [self._costs[id(piece.codec)] for piece in pieces]
        floats = [
            max(cost.nbytes(piece) - cost.packet_bytes, 0.0) / 4 for cost, piece in zip(costs, pieces, strict=True)
        ]
        for turn in range(max(cost.rounds for cost in costs)):
            numel = 0.0
            for piece, cost, length in zip(pieces, costs, floats, strict=True):
                if turn < cost.rounds:
                    work_s = cost.encoding_s(piece.numel) + self._joining_s(piece)
                    self._encoding(work_s / cost.rounds)
                    numel += length / cost.rounds
            yield torch.empty(max(round(numel), 1), device="meta")
        for piece in pieces:
            self._commit(piece)
            self._deliver(piece, 1)

    def all_reduce(self, turn: int, mine: Tensor, *, one_trip: bool) -> Generator[Sequence[Incoming], None, Tensor]:
        others, nbytes = self.world_size - 1, 4.0 * mine.numel()
        added_s = self._plain.decode_s_per_element * mine.numel()
        if others and one_trip:
            self._leave(others * nbytes, others)
            self._received_bytes += others * nbytes
            yield []
            self._encoding(self.world_size * added_s)
        elif others:
            for work_s in (added_s, self._copy_s_per_element * mine.numel()):
                self._leave(others / self.world_size * nbytes, others)
                self._received_bytes += others / self.world_size * nbytes
                yield []
                self._encoding(work_s)
        return mine

    def swap(
        self, stage: int, outgoing: Iterable[tuple[int, Message]], expected: Mapping[int, Sequence[Piece]]
    ) -> Generator[Sequence[Incoming], None, dict[int, Message]]:
        incoming = [self.recv(peer, stage) for peer in expected]
        for peer, message in outgoing:
            self.send(peer, stage, message)
        # Pieces of several peers are often the same: weighed once.
        weighed = {id(pieces): self._message(pieces) for pieces in expected.values()}
        found: dict[int, Message] = {peer: weighed[id(pieces)] for peer, pieces in expected.items()}
        self._received_bytes += sum(weighed[id(pieces)].nbytes for pieces in expected.values())
        yield incoming
        return found

    def send(self, peer: int, stage: int, message: Message) -> None:
        self._leave(message.nbytes if isinstance(message, _Weighed) else 0.0, 1)

    def recv(self, peer: int, stage: int) -> Incoming:
        return _NotThere(peer, Slot(0, self._bucket.index, stage))

    def parse(self, pieces: Sequence[Piece], incoming: Incoming) -> Message:
        message = self._message(pieces)
        if self._stages:  # it came in while the last stage was waited for
            last = self._stages.pop()
            self._stages.append(Stage(last.parts, last.received_bytes + message.nbytes))
        return message

    def _message(self, pieces: Sequence[Piece]) -> _Weighed:
        nbytes = sum(self._nbytes[id(piece)] for piece in pieces)
        return _Weighed((), (), nbytes=nbytes)

    def _leave(self, nbytes: float, messages: int) -> None:
        if self._parts and not self._unsent_s:
            last = self._parts.pop()
            self._parts.append(Part(last.work_s, last.sent_bytes + nbytes, last.messages + messages))
        else:
            self._parts.append(Part(self._unsent_s, nbytes, messages))
        self._unsent_s = 0.0

    def _end_stage(self) -> None:
        if self._unsent_s:
            self._leave(0.0, 0)
        self._stages.append(Stage(_few(self._parts), self._received_bytes))
        self._parts, self._received_bytes = [], 0.0

    def _encoding(self, work_s: float) -> None:
        self._unsent_s += work_s
        self._encode_s += work_s

    def _commit(self, piece: Piece) -> None:
        if not piece.codec.stateless:
            part = piece.numel < self._bucket.units[piece.unit].numel
            work_s = self._costs[id(piece.codec)].commit_s(piece.numel, part=part)
            self._finish_s += work_s
            self._encode_s += work_s

    def _deliver(self, piece: Piece, packets: int) -> None:
        work_s = self._costs[id(piece.codec)].decoding_s(piece.numel, packets) + self._joining_s(piece)
        self._decode_s += work_s
        if piece.codec.stateless:
            self._unsent_s += work_s
        else:
            self._finish_s += work_s

    def _joining_s(self, piece: Piece) -> float:
        joined = len(self._bucket.units[piece.unit].parameters) > 1
        return self._copy_s_per_element * piece.numel if joined else 0.0


def _few(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The same work and bytes in parts that are no more than can be told apart."""
    size = -(-len(parts) // _MOST_PARTS)
    if size <= 1:
        return tuple(parts)
    groups = [parts[i : i + size] for i in range(0, len(parts), size)]
    return tuple(
        Part(sum(p.work_s for p in group), sum(p.sent_bytes for p in group), sum(p.messages for p in group))
        for group in groups
    )
