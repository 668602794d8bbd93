"""Making replicas equal at the start, and proving that they still are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import xxhash
from torch import Tensor

from gradcomp import handshake
from gradcomp.errors import ConfigError, GradcompError, PacketError, ReplicaMismatch
from gradcomp.interfaces import Incoming, Slot, Transport

__all__ = [
    "BROADCAST_CHUNK_BYTES",
    "BUFFERS_BUCKET",
    "MEETING_BUCKET",
    "VECTORS_BUCKET",
    "VERDICT_BUCKET",
    "average",
    "broadcast",
    "check_agreed",
    "check_equal",
    "gather",
]

BROADCAST_CHUNK_BYTES = 8 << 20
# From FIRST_RESERVED_BUCKET on, so that these messages never meet a gradient's.
DIGEST_BUCKET = 0xFFFF_FFFF
BROADCAST_BUCKET = 0xFFFF_FFFE
AVERAGE_BUCKET = 0xFFFF_FFFD
AGREEMENT_BUCKET = 0xFFFF_FFFC
BUFFERS_BUCKET = 0xFFFF_FFFB  # gradcomp.buffers
MEETING_BUCKET = 0xFFFF_FFFA  # gradcomp.transports.hierarchical
VECTORS_BUCKET = 0xFFFF_FFF9  # gradcomp.vectors
VERDICT_BUCKET = 0xFFFF_FFF8  # gradcomp.verdict


def broadcast(transport: Transport, turn: int, tensors: Sequence[Tensor]) -> None:
    """Overwrite ``tensors`` on every rank by rank 0's, in place. Sends only digests where they are equal already.

    Rank 0 sends each other rank a part, and they pass the parts on: each link carries each byte about once.

    Args:
        turn: numbers the messages; no two broadcasts of a run share it.

    Raises:
        TransportError: as the transport's.
    """
    mine = _digest(tensors)
    first = turn << 32
    everyone = transport.all_gather(Slot(first, BROADCAST_BUCKET, 0), mine)
    if all(bytes(digest) == mine for digest in everyone):
        return
    levels = [transport]
    if transport.levels is not None:
        # Leaders of hosts first; each then passes it on inside its host.
        levels = [level for level in (transport.levels.between, transport.levels.local) if level is not None]
    for number, chunk in enumerate(_chunks(tensors), start=first + 1):
        for level in levels:
            if level.world_size > 1:
                _broadcast_chunk(level, number, chunk)


def _broadcast_chunk(transport: Transport, number: int, chunk: Tensor) -> None:
    if transport.rank == 0:
        # A copy: the parameters change while it may still be on its way.
        _scatter(transport, number, bytes(_bytes_of(chunk)))
    else:
        data = _gather(transport, number, chunk.numel() * chunk.element_size())
        chunk.copy_(torch.frombuffer(data, dtype=chunk.dtype).view_as(chunk))


def _scatter(transport: Transport, number: int, data: bytes) -> None:
    others = transport.world_size - 1
    for i in range(others):
        part = data[len(data) * i // others : len(data) * (i + 1) // others]
        transport.send(i + 1, Slot(number, BROADCAST_BUCKET, 1), [part])


def _gather(transport: Transport, number: int, nbytes: int) -> bytearray:
    peers = [peer for peer in range(1, transport.world_size) if peer != transport.rank]
    incoming: dict[int, Incoming] = {peer: transport.recv(peer, Slot(number, BROADCAST_BUCKET, 2)) for peer in peers}
    (own,) = transport.wait([transport.recv(0, Slot(number, BROADCAST_BUCKET, 1))])
    transport.send_to_all(peers, Slot(number, BROADCAST_BUCKET, 2), [own])
    transport.wait(list(incoming.values()))
    data = bytearray().join(
        own if r == transport.rank else incoming[r].result() for r in range(1, transport.world_size)
    )
    if len(data) != nbytes:
        raise PacketError(f"broadcast chunk {number} has {len(data)} bytes, expected {nbytes}")
    return data


def _chunks(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Views of at most 8 MiB that cover the tensors."""
    for tensor in tensors:
        flat = tensor.detach()
        if not flat.numel():
            continue  # nothing to send, and torch makes no tensor of no bytes
        if not flat.is_contiguous():  # no flat view of it exists: whole, however large
            yield flat
            continue
        yield from torch.split(flat.view(-1), BROADCAST_CHUNK_BYTES // tensor.element_size())


def check_equal(transport: Transport, turn: int, step: int, named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise on every rank unless all replicas of these tensors are bit-identical.

    Args:
        turn: numbers the messages; no two checks of a run share it.
        step: for the message.

    Raises:
        ReplicaMismatch: names the first tensor that differs from rank 0's on any rank.
    """
    digests = [_digest([tensor]) for _, tensor in named]
    summary = xxhash.xxh3_128_digest(b"".join(digests))
    everyone = transport.all_gather(Slot(turn, DIGEST_BUCKET, 0), summary)
    if all(bytes(other) == summary for other in everyone):
        return
    # Every rank sees the same summaries, so every rank comes here together.
    tables = [bytes(table) for table in transport.all_gather(Slot(turn, DIGEST_BUCKET, 1), b"".join(digests))]
    size = len(digests[0])
    for i, (name, _) in enumerate(named):
        rows = [table[i * size : (i + 1) * size] for table in tables]
        ranks = tuple(rank for rank, row in enumerate(rows) if row != rows[0])
        if ranks:
            raise ReplicaMismatch(
                f"step {step}: parameter {name!r} on rank {', '.join(map(str, ranks))} differs from rank 0's; "
                "the replicas are no longer the same model",
                parameter=name,
                ranks=ranks,
            )


def average(transport: Transport, turn: int, tensor: Tensor) -> Tensor:
    """See :meth:`gradcomp.GradientExchange.average`; ``turn`` numbers the messages, as for :func:`check_equal`."""
    return gather(transport, turn, tensor).mean(0)


def gather(transport: Transport, turn: int, tensor: Tensor) -> Tensor:
    """Every rank's small tensor, as for :func:`average`: float32, on the CPU, with a dimension for ranks in front."""
    mine = tensor.detach().to("cpu", torch.float32).contiguous()
    if mine.numel() * 4 > BROADCAST_CHUNK_BYTES:
        raise ConfigError(f"average: {mine.numel()} elements are too many; at most 8 MiB of float32")
    everyone = transport.all_gather(Slot(turn, AVERAGE_BUCKET, 0), mine.numpy().tobytes())
    rows = [torch.frombuffer(bytearray(row), dtype=torch.float32) if len(row) else mine for row in everyone]
    return torch.stack([row.view(mine.shape) for row in rows])


def check_agreed(transport: Transport, turn: int, hello: handshake.Hello, problem: GradcompError | None = None) -> None:
    """Raise on every rank unless all said the same ``hello``.

    Args:
        turn: numbers the messages, as for :func:`check_equal`.
        problem: raised here once the others have heard of it, through a hello that they do not agree with.

    Raises:
        HandshakeError: names the first field in which another rank differs from this one.
    """
    everyone = transport.all_gather(Slot(turn, AGREEMENT_BUCKET, 0), handshake.pack(hello))
    if problem is not None:
        raise problem
    for peer, theirs in enumerate(everyone):
        handshake.compare(hello, handshake.unpack(theirs), rank=transport.rank, peer=peer)


def _digest(tensors: Sequence[Tensor]) -> bytes:
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(_bytes_of(tensor))
    return digest.digest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Its bytes, where they lie if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
