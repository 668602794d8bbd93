"""Vectors of the user's own, added up over ranks: what :meth:`gradcomp.GradientExchange.all_reduce` does.

First each rank says what it is about to add up, so that ranks that differ are told instead of adding up apples and
pears. A small vector goes along in that message, one trip in all. A large one follows in chunks: each rank adds up a
part of a chunk and sends the sum to all (gradcomp.sums), or the transport does it by itself. Either way it is done by
the thread that calls, beside the buckets of gradients that are under way; only an all-reduce of the transport's own,
which must come in the same order on all ranks, waits until these are through.

Where ranks are a hierarchy, each host adds up what its ranks have, leaders add up what hosts have, and the sum is
handed out by adding to it: nothing, on the members' part.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gradcomp import handshake, registry
from gradcomp.compressors.cast import BFloat16, Float16, NoCompression
from gradcomp.errors import ConfigError, HandshakeError, PacketError
from gradcomp.hosts import at_level
from gradcomp.interfaces import MY_TURN, Compressor, Incoming, Levels, Slot, Transport
from gradcomp.options import check_choice
from gradcomp.registry import Spec
from gradcomp.replicas import VECTORS_BUCKET
from gradcomp.sums import ordered_sum, sum_over_ranks

__all__ = ["Vectors", "all_reduce"]

Vectors = TypeVar("Vectors", Tensor, Sequence[Tensor])
_Cast = NoCompression | Float16 | BFloat16
_CASTS = (NoCompression, Float16, BFloat16)
_Sum = Generator[Sequence[Incoming], None, Tensor]

_SMALL_BYTES = 64 << 10  # goes along with the first message
# Two chunks under way are what a rank may send another before it is asked for, in full if there are but two ranks, else
# in parts: 8 MiB at most, half of what any connection allows.
_CHUNK_BYTES, _UNDER_WAY = 8 << 20, 2
_TRIP_BYTES = 256 << 10  # as in exchange all_reduce: what a link carries in the time of one more trip
_LENGTH = struct.Struct("<I")
_HAND_OUT_STAGE = 2


def all_reduce(
    transport: Transport,
    turn: int,
    tensors: Vectors,
    reduction: str,
    compressor: Spec | Compressor,
    *,
    settle: Callable[[], None],
) -> Vectors:
    """The sum or mean of ``tensors`` over ranks; all ranks must call it at the same point.

    Args:
        turn: numbers the messages; no two calls of a run share it.
        tensors: one or several, of any shape and floating-point type; the same shapes in the same order on all ranks.
        reduction: ``"sum"`` or ``"mean"``, the sum divided by the number of ranks.
        compressor: ``none``, ``fp16`` or ``bf16``: what each rank's vectors are rounded to, and the result; they are
            added up in float32. In a hierarchy that is so between hosts, and inside a host nothing is rounded.
        settle: waits until all buckets under way are through.

    Returns:
        A float32 tensor for each, of its shape and on its device, bit-identical on all ranks. Where any rank has Inf or
        NaN, no rank gets a finite value.

    Raises:
        ConfigError: what this rank asks for is not possible; the others get a HandshakeError.
        HandshakeError: ranks differ in shapes, reduction or compressor; says in which, on all of them. Nothing was
            added up, and the run can go on.
        TransportError: a rank is gone, or did not come to it in time.
    """
    given = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    flat, dtype = torch.empty(0), torch.float32
    hello: handshake.Hello
    problem: ConfigError | None = None
    try:
        codec = _check(transport, given, reduction, compressor)
        dtype = codec.dtype
        shapes = handshake.digest_tensors([str(list(tensor.shape)) for tensor in given])
        hello = {"reduction": reduction, "compressor": codec.id, "tensors": shapes}
        flat = _join(given)
    except ConfigError as error:
        # The others must hear of it, or they would wait for this rank.
        problem = error
        hello = {"reduction": f"refused on rank {transport.rank}: {error}"[:1000]}
    slot = Slot(turn << 20, VECTORS_BUCKET, 0)
    divisor = transport.world_size if reduction == "mean" else 1
    small = flat.nbytes <= _SMALL_BYTES and _in_one_trip(flat, transport.world_size)
    mine = flat.cpu().to(dtype) if small else torch.empty(0, dtype=dtype)
    everyone = _meet(transport, slot, hello, mine, problem)
    if small:
        total = ordered_sum(everyone, dtype, divisor).to(flat.device, torch.float32)
    else:
        total = _by_chunks(transport, slot, flat, dtype, divisor, settle)
    parts = torch.split(total, [tensor.numel() for tensor in given])
    results = [part.view(tensor.shape).to(tensor.device) for part, tensor in zip(parts, given, strict=True)]
    return results[0] if isinstance(tensors, Tensor) else results


def _check(transport: Transport, tensors: list[Tensor], reduction: str, compressor: Spec | Compressor) -> _Cast:
    check_choice("all_reduce", "reduction", reduction, ("sum", "mean"))
    codec = registry.compressor(compressor)
    if not isinstance(codec, _CASTS):
        raise ConfigError(
            f"all_reduce: compressor={codec.id!r} is not allowed; compressor must be none, fp16 or bf16: others keep "
            "what they do not send for the next time, and a vector that is added up once has none"
        )
    for number, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            kind = f"{tensor.layout} of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ConfigError(f"all_reduce: tensor {number} is {kind}; only dense floating-point tensors are added up")
    if tensors:
        transport.check_device(tensors[0].device)
    return codec


def _join(tensors: list[Tensor]) -> Tensor:
    """A copy of all of them, flat, where the first one lies."""
    device = tensors[0].device if tensors else "cpu"
    return torch.cat(
        [torch.empty(0, device=device), *(t.detach().to(device, torch.float32).reshape(-1) for t in tensors)]
    )


def _in_one_trip(mine: Tensor, world_size: int) -> bool:
    """Whether a second trip would cost more than it saves."""
    return (world_size - 1) * (1 - 2 / world_size) * mine.nbytes <= _TRIP_BYTES


def _meet(
    transport: Transport, slot: Slot, hello: handshake.Hello, mine: Tensor, problem: ConfigError | None
) -> list[Tensor]:
    """Every rank's ``mine``, once all have said the same ``hello``."""
    packed = handshake.pack(hello)
    payload = b"".join([_LENGTH.pack(len(packed)), packed, mine.view(torch.uint8).numpy().data])
    everyone = transport.all_gather(slot, payload)
    if problem is not None:
        raise problem
    return [_open(data, hello, mine, transport.rank, peer) for peer, data in enumerate(everyone)]


def _open(data: memoryview, hello: handshake.Hello, mine: Tensor, rank: int, peer: int) -> Tensor:
    """What ``peer`` sends in :meth:`_meet`."""
    start = _LENGTH.size + (_LENGTH.unpack_from(data)[0] if len(data) >= _LENGTH.size else 0)
    try:
        handshake.compare(hello, handshake.unpack(data[_LENGTH.size : start]), rank=rank, peer=peer)
    except HandshakeError as error:
        raise HandshakeError(f"all_reduce: {error}", field=error.field, peer=error.peer) from None
    if len(data) != start + mine.nbytes:
        raise PacketError(f"rank {peer} sent {len(data)} bytes of a vector; {start + mine.nbytes} were expected")
    # A copy: the message's memory need not be writable, nor the values begin at a multiple of 4.
    return torch.frombuffer(bytearray(data[start:]), dtype=mine.dtype) if mine.numel() else mine


def _by_chunks(
    transport: Transport, slot: Slot, flat: Tensor, dtype: torch.dtype, divisor: int, settle: Callable[[], None]
) -> Tensor:
    chunks = torch.split(flat, (_CHUNK_BYTES if transport.world_size > 2 else _CHUNK_BYTES // 2) // 4)
    slots = [slot._replace(step=slot.step + number) for number in range(1, len(chunks) + 1)]
    pairs = zip(slots, chunks, strict=True)
    if transport.levels is not None:
        levels, timeout_s = transport.levels, transport.timeout_s
        return torch.cat([_over_levels(levels, *pair, dtype, divisor, settle, timeout_s) for pair in pairs])
    sums = [_sum(transport, *pair, dtype, divisor) for pair in pairs]
    # All ranks must begin an all-reduce of the transport's own in the same order: one at a time.
    return torch.cat(_run(transport, sums, 1 if transport.adds_up else _UNDER_WAY, settle, transport.timeout_s))


def _over_levels(
    levels: Levels,
    slot: Slot,
    mine: Tensor,
    dtype: torch.dtype,
    divisor: int,
    settle: Callable[[], None],
    timeout_s: float,
) -> Tensor:
    """Up to the leader of the host, across to other leaders, and down again."""
    local, between = levels.local, levels.between
    with at_level(levels, "local"):
        (total,) = _run(local, [_sum(local, slot, mine, torch.float32, 1)], 1, settle, timeout_s)
    if between is None:
        total = torch.zeros_like(mine)
    else:
        with at_level(levels, "between"):
            (total,) = _run(between, [_sum(between, slot, total, dtype, divisor)], 1, settle, timeout_s)
    with at_level(levels, "local"):
        # The leader's sum and zeros. Members wait for it as long as it may wait for other leaders.
        handed_out = _sum(local, slot._replace(stage=_HAND_OUT_STAGE), total, torch.float32, 1)
        (total,) = _run(local, [handed_out], 1, settle, timeout_s)
    return total


def _sum(transport: Transport, slot: Slot, mine: Tensor, dtype: torch.dtype, divisor: int) -> _Sum:
    """Over the ranks of ``transport``; begins once it is first asked to go on."""
    one_trip = _in_one_trip(mine, transport.world_size)
    if dtype == torch.float32:
        total = yield from transport.all_reduce(slot, mine, one_trip=one_trip)
        return total if divisor == 1 else total / divisor
    # No transport's own all-reduce rounds.
    return (yield from sum_over_ranks(transport, slot, mine, one_trip=one_trip, dtype=dtype, divisor=divisor))


def _run(
    transport: Transport, sums: Iterable[_Sum], under_way: int, settle: Callable[[], None], timeout_s: float
) -> list[Tensor]:
    """Bring these sums to their end, so many at a time; by the thread that calls."""
    todo, totals = deque(enumerate(sums)), dict[int, Tensor]()
    running: deque[tuple[int, _Sum, Sequence[Incoming]]] = deque()

    def go_on(number: int, one: _Sum) -> None:
        try:
            running.append((number, one, next(one)))
        except StopIteration as end:
            totals[number] = end.value

    while todo or running:
        while todo and len(running) < under_way:
            go_on(*todo.popleft())
        if running:
            number, one, awaited = running.popleft()
            if awaited is MY_TURN:
                settle()
            else:
                transport.wait(awaited, timeout_s=timeout_s)
            go_on(number, one)
    return [totals[number] for number in sorted(totals)]
