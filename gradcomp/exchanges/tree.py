"""Packets go up a tree of ranks, added up and compressed again on each hop, and the root's goes down to all."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradcomp.bucket import Piece, Unit
from gradcomp.interfaces import Exchange, Incoming, Work
from gradcomp.options import check_integer

__all__ = ["Tree"]


@dataclass(frozen=True, kw_only=True)
class Tree(Exchange):
    """Reduction up a k-ary tree and broadcast down, both compressed (FireCaffe: Iandola et al., CVPR 2016).

    Rank r's parent is (r - 1) // k, rank 0 is the root. A leaf sends its packet up; an inner node adds up its own and
    its children's, compresses the sum with a residual of its own, and sends that up. The root's packet goes down
    unchanged and every rank decodes it, so nothing is lost and all replicas stay bit-identical.

    Whatever the number N of ranks, a rank sends and receives at most k + 1 packets, the root k, a leaf one, and holds k
    at a time beside its own: a parameter server's link carries N of them. ``two_shot`` carries fewer still, 2(N - 1)/N,
    but in 2N(N - 1) messages; here there are 2(N - 1), each to a neighbour.

    The price is the depth d, about log_k(N): 2d trips one after the other, and d + 1 compressions of what a leaf sends.
    Each inner node holds back a part of its subtree's sum, so what is small arrives later than with ``two_shot``, and a
    ``signsgd`` vote becomes a vote of votes. A larger k is flatter: better accuracy and latency, more bytes at a node.
    Buckets overlap; within one, nothing is pipelined.

    Attributes:
        arity: children a node has at most, k.
    """

    id: ClassVar[str] = "tree"
    arity: int = 2

    def __post_init__(self) -> None:
        check_integer(self.id, "arity", self.arity, at_least=2)

    def cut(self, units: Sequence[Unit], world_size: int) -> list[Piece]:
        """Whole units, added up by every rank that has children."""
        inner = range(len(range(0, world_size - 1, self.arity)))
        return [Piece(i, 0, unit.numel, unit.shape, unit.codec, reducers=inner) for i, unit in enumerate(units)]

    def run(self, work: Work) -> Generator[Sequence[Incoming], None, None]:
        """One stage a level and direction. All ranks come to all of them, for a stage may be a collective operation."""
        first = self.arity * work.rank + 1
        children = range(min(first, work.world_size), min(first + self.arity, work.world_size))
        parent = (work.rank - 1) // self.arity
        height, level = self._level(work.world_size - 1), self._level(work.rank)
        message = work.encode(work.pieces)
        for stage, senders in enumerate(range(height, 0, -1)):
            outgoing = [(parent, message)] if level == senders else []
            expected = dict.fromkeys(children if level + 1 == senders else (), work.pieces)
            got = yield from work.swap(stage, outgoing, expected)
            if got:
                message = work.reduce(work.pieces, [message, *(got.pop(child) for child in children)])
        for receivers in range(1, height + 1):
            outgoing = [(child, message) for child in children] if level + 1 == receivers else []
            expected = {parent: work.pieces} if level == receivers else {}
            got = yield from work.swap(height + receivers - 1, outgoing, expected)
            message = got.pop(parent, message)
        work.deliver(work.pieces, [message])

    def _level(self, rank: int) -> int:
        """Hops from the root; the last rank's is the height of the tree."""
        hops = 0
        while rank > 0:
            rank = (rank - 1) // self.arity
            hops += 1
        return hops
