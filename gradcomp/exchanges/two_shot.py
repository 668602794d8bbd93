"""Each rank owns a shard: it receives all packets for it, adds them up, compresses the sum and sends that to all."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from gradcomp.bucket import Piece, Unit
from gradcomp.interfaces import Exchange, Incoming, Work

__all__ = ["TwoShot"]

# A shard under so many elements costs more in packet and message heads than it saves in balance.
_SMALLEST_SHARD = 4096


@dataclass(frozen=True, kw_only=True)
class TwoShot(Exchange):
    """Reduce-scatter, then all-gather, both compressed: each of N ranks sends 2 (N-1)/N of a packet.

    The owner of a shard keeps a residual of its own for the second compression and decodes its own bytes like
    everybody else, so nothing is lost and all replicas stay bit-identical (Das et al. 2016; the two-stage scheme of
    1-bit Adam, Tang et al. 2021). Costs a second trip and a second compression error.
    """

    id: ClassVar[str] = "two_shot"
    foreseeable: ClassVar[bool] = True

    def cut(self, units: Sequence[Unit], world_size: int) -> list[Piece]:
        """Runs of rows, so that each rank owns about as many elements; small units stay whole."""
        total = sum(unit.numel for unit in units)
        pieces: list[Piece] = []
        before = 0
        for i, unit in enumerate(units):
            for start, stop, shape in _cut_rows(unit, before, total, world_size):
                middle = before + (start + stop) // 2
                owner = min(middle * world_size // max(total, 1), world_size - 1)
                pieces.append(Piece(i, start, stop, shape, unit.codec, owner))
            before += unit.numel
        return pieces

    def run(self, work: Work) -> Generator[Sequence[Incoming], None, None]:
        """Send each shard to its owner, reduce the own one, send it to everyone."""
        ranks = range(work.world_size)
        others = [(work.rank + turn) % work.world_size for turn in range(1, work.world_size)]
        shards = {owner: [piece for piece in work.pieces if piece.owner == owner] for owner in ranks}
        own = shards[work.rank]
        mine = work.encode(own) if own else None
        # One after the other: a shard is on its way while the next one is compressed.
        outgoing = ((owner, work.encode(shards[owner])) for owner in others if shards[owner])
        got = yield from work.swap(0, outgoing, dict.fromkeys(others, own) if own else {})
        reduced = {}
        if mine is not None:
            # Nothing of this stage is kept for the next one: a dense shard of every rank is a whole gradient.
            reduced[work.rank] = work.reduce(own, [mine if rank == work.rank else got.pop(rank) for rank in ranks])
        expected = {owner: shards[owner] for owner in others if shards[owner]}
        reduced |= yield from work.swap(1, [(peer, reduced[work.rank]) for peer in others if own], expected)
        for owner in ranks:
            if shards[owner]:
                work.deliver(shards[owner], [reduced[owner]])


def _cut_rows(unit: Unit, before: int, total: int, world_size: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """Cut where the bucket's shard boundaries fall, moved to the nearest row."""
    if unit.numel < 2 * _SMALLEST_SHARD or not unit.shape or unit.shape[0] < 2:
        return [(0, unit.numel, unit.shape)]
    row = unit.numel // unit.shape[0]
    cuts = [0]
    for shard in range(1, world_size):
        row_number = round((total * shard / world_size - before) / row)
        at = row_number * row
        if cuts[-1] + _SMALLEST_SHARD <= at <= unit.numel - _SMALLEST_SHARD:
            cuts.append(at)
    cuts.append(unit.numel)
    return [(a, b, ((b - a) // row, *unit.shape[1:])) for a, b in pairwise(cuts)]
