"""Sums of float32 vectors over ranks, to the same bits on all of them, over any transport."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gradcomp.errors import PacketError
from gradcomp.interfaces import Buffer, Incoming, Slot, Transport
from gradcomp.lanes import to_device, to_host

__all__ = ["ordered_sum", "sum_over_ranks"]


def sum_over_ranks(
    transport: Transport,
    slot: Slot,
    mine: Tensor,
    *,
    one_trip: bool,
    dtype: torch.dtype = torch.float32,
    divisor: int = 1,
) -> Generator[Sequence[Incoming], None, Tensor]:
    """What :meth:`gradcomp.interfaces.Transport.all_reduce` does where a transport knows nothing better.

    In one trip each rank sends its vector to every other, N - 1 vectors, and adds up by itself. In two, rank i gets the
    i-th of N parts from everybody, adds it up and sends the sum to all: 2(N - 1)/N of a vector. Every element is added
    in the order of ranks, so both give the same bits.

    Args:
        dtype: what all that is sent is rounded to, sums included.
        divisor: what sums are divided by before that.
    """
    rank, world_size = transport.rank, transport.world_size
    others = [(rank + turn) % world_size for turn in range(1, world_size)]
    local = to_host(mine).to(dtype)
    if one_trip or not others:
        total = yield from _sum_of(transport, slot, local, dict.fromkeys(others, local), divisor)
        return to_device(total.to(torch.float32), mine.device)
    cuts = [local.numel() * i // world_size for i in range(world_size + 1)]
    parts = [local[start:stop] for start, stop in pairwise(cuts)]
    own = yield from _sum_of(transport, slot, parts[rank], {peer: parts[peer] for peer in others}, divisor)
    second = slot._replace(stage=slot.stage + 1)
    transport.send_to_all(others, second, [_bytes(own)])
    incoming = {peer: transport.recv(peer, second) for peer in others}
    yield list(incoming.values())
    sums = [own if i == rank else _values(incoming[i], parts[i]) for i in range(world_size)]
    return to_device(torch.cat(sums).to(torch.float32), mine.device)


def ordered_sum(parts: Iterable[Tensor], dtype: torch.dtype, divisor: int) -> Tensor:
    """Added up one after the other in float32, divided, and rounded to ``dtype``; new memory."""
    rest = iter(parts)
    total = next(rest).to(torch.float32, copy=True)
    for part in rest:
        total.add_(part)
    return (total if divisor == 1 else total.div_(divisor)).to(dtype)


def _sum_of(
    transport: Transport, slot: Slot, mine: Tensor, outgoing: Mapping[int, Tensor], divisor: int
) -> Generator[Sequence[Incoming], None, Tensor]:
    """Send each peer what is for it, and add up what all send for this rank."""
    incoming = {peer: transport.recv(peer, slot) for peer in outgoing}
    for peer, part in outgoing.items():
        transport.send(peer, slot, [_bytes(part)])
    yield list(incoming.values())
    ranks = range(transport.world_size)
    # One after the other, so that what was added up need not be kept.
    parts = (mine if rank == transport.rank else _values(incoming.pop(rank), mine) for rank in ranks)
    return ordered_sum(parts, mine.dtype, divisor)


def _bytes(values: Tensor) -> Buffer:
    return values.view(torch.uint8).numpy().data


def _values(incoming: Incoming, like: Tensor) -> Tensor:
    data = incoming.result()
    if len(data) != like.nbytes:
        raise PacketError(f"rank {incoming.peer} sent {len(data)} bytes of a sum; {like.nbytes} were expected")
    if not like.numel():
        return torch.empty_like(like)
    if not data.readonly:
        there = torch.frombuffer(data, dtype=torch.uint8)
        if there.data_ptr() % like.element_size() == 0:
            return there.view(like.dtype)  # only read
    return torch.frombuffer(bytearray(data), dtype=like.dtype)
