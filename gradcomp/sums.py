"""Sums of float32 vectors over ranks, to the same bits on all of them, over any transport."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gradcomp.errors import PacketError
from gradcomp.interfaces import Buffer, Incoming, Slot, Transport

__all__ = ["sum_over_ranks"]


def sum_over_ranks(
    transport: Transport, slot: Slot, mine: Tensor, *, one_trip: bool
) -> Generator[Sequence[Incoming], None, Tensor]:
    """What :meth:`gradcomp.interfaces.Transport.all_reduce` does where a transport knows nothing better.

    In one trip each rank sends its vector to every other, N - 1 vectors, and adds up by itself. In two, rank i gets the
    i-th of N parts from everybody, adds it up and sends the sum to all: 2(N - 1)/N of a vector. Every element is added
    in the order of ranks, so both give the same bits.
    """
    rank, world_size = transport.rank, transport.world_size
    others = [(rank + turn) % world_size for turn in range(1, world_size)]
    if not others:
        return mine
    local = mine.cpu()
    if one_trip:
        total = yield from _sum_of(transport, slot, local, dict.fromkeys(others, local))
        return total.to(mine.device)
    cuts = [local.numel() * i // world_size for i in range(world_size + 1)]
    parts = [local[start:stop] for start, stop in pairwise(cuts)]
    own = yield from _sum_of(transport, slot, parts[rank], {peer: parts[peer] for peer in others})
    second = slot._replace(stage=slot.stage + 1)
    for peer in others:
        transport.send(peer, second, [_bytes(own)])
    incoming = {peer: transport.recv(peer, second) for peer in others}
    yield list(incoming.values())
    sums = [own if i == rank else _floats(incoming[i], parts[i].numel()) for i in range(world_size)]
    return torch.cat(sums).to(mine.device)


def _sum_of(
    transport: Transport, slot: Slot, mine: Tensor, outgoing: Mapping[int, Tensor]
) -> Generator[Sequence[Incoming], None, Tensor]:
    """Send each peer what is for it, and add up what all send for this rank."""
    incoming = {peer: transport.recv(peer, slot) for peer in outgoing}
    for peer, part in outgoing.items():
        transport.send(peer, slot, [_bytes(part)])
    yield list(incoming.values())
    total: Tensor | None = None
    for rank in range(transport.world_size):
        part = mine if rank == transport.rank else _floats(incoming.pop(rank), mine.numel())
        total = part.clone() if total is None else total.add_(part)
    return mine if total is None else total


def _bytes(values: Tensor) -> Buffer:
    return values.view(torch.uint8).numpy().data


def _floats(incoming: Incoming, numel: int) -> Tensor:
    data = incoming.result()
    if len(data) != 4 * numel:
        raise PacketError(f"rank {incoming.peer} sent {len(data)} bytes of a sum; {4 * numel} were expected")
    if not numel:
        return torch.empty(0)
    # A copy: the message's memory need not be writable, nor begin at a multiple of 4.
    return torch.frombuffer(bytearray(data), dtype=torch.float32)
