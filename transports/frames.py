"""The 64-byte header in front of every chunk on the wire; docs/FORMAT.md is its specification."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import xxhash

from gradcomp.errors import PacketError
from gradcomp.interfaces import Buffer

__all__ = [
    "ANSWER",
    "ASK",
    "BYE",
    "BYE_SEEN",
    "DATA",
    "HEADER_BYTES",
    "HELLO",
    "MAX_CHUNK_BYTES",
    "Header",
    "digest_payload",
    "other_version",
    "pack_header",
    "unpack_header",
    "verify",
]

MAGIC = b"GCMP"
VERSION = 1
HELLO, DATA, BYE, BYE_SEEN = 1, 2, 3, 4  # between ranks
ASK, ANSWER = 5, 6  # between workers and a parameter server
_BETWEEN_RANKS = (HELLO, DATA, BYE, BYE_SEEN)

HEADER_BYTES = 64
MAX_CHUNK_BYTES = 1 << 20

_FIELDS = struct.Struct("<4sBBBBQIIQIIIIQ")
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_AT = _FIELDS.size


class Header(NamedTuple):
    """What a chunk says about itself.

    Attributes:
        kind: HELLO, DATA, BYE or BYE_SEEN; ASK or ANSWER.
        run: which run this is, the same on every rank.
        epoch: how many connections of this run came before.
        incarnation: drawn at random by the sender when it connects.
        step, bucket, stage: the slot of the message (DATA; else 0).
        chunk: number of this chunk in its message, from 0.
        sequence: number of this frame between this sender and this receiver, from 0, modulo 2**32.
        length: bytes of payload that follow.
        total: bytes of the whole message.
    """

    kind: int
    run: int
    epoch: int
    incarnation: int
    step: int
    bucket: int
    stage: int
    chunk: int
    sequence: int
    length: int
    total: int


def digest_payload(payload: Buffer) -> int:
    """64-bit digest of a chunk's payload: computed once, however many peers the chunk goes to."""
    return xxhash.xxh3_64_intdigest(payload)


def pack_header(header: Header, payload_digest: int) -> bytes:
    """The 64 bytes for ``header``, with the checksum over them and the payload."""
    kind, run, epoch, incarnation, step, bucket, stage, chunk, sequence, length, total = header
    fields = _FIELDS.pack(
        MAGIC, VERSION, kind, stage, 0, run, epoch, incarnation, step, bucket, chunk, sequence, length, total
    )
    return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields, payload_digest))


def other_version(data: Buffer) -> int | None:
    """The version of a frame that another version of this format wrote; None if it is none, or this one's."""
    return data[4] if len(data) > 4 and bytes(data[:4]) == MAGIC and data[4] != VERSION else None


def unpack_header(data: Buffer, kinds: Sequence[int] = _BETWEEN_RANKS) -> Header:
    """The header in ``data``, checked as far as it can be by itself. :func:`verify` checks the checksum.

    Args:
        kinds: those that may come here.

    Raises:
        PacketError: not 64 bytes, another magic, version or kind, or lengths that contradict each other.
    """
    if len(data) != HEADER_BYTES:
        raise PacketError(f"frame header of {len(data)} bytes; it has {HEADER_BYTES}")
    magic, version, kind, stage, reserved, run, epoch, incarnation, step, bucket, chunk, sequence, length, total = (
        _FIELDS.unpack_from(data)
    )
    if magic != MAGIC:
        raise PacketError(f"frame magic {magic!r} is not {MAGIC!r}")
    if version != VERSION:
        raise PacketError(f"frame version {version}; this is version {VERSION}")
    if kind not in kinds:
        raise PacketError(f"unknown frame kind {kind}")
    if reserved:
        raise PacketError(f"reserved byte is {reserved}, not 0")
    if length > min(MAX_CHUNK_BYTES, total):
        raise PacketError(f"chunk of {length} bytes; the message has {total}, a chunk at most {MAX_CHUNK_BYTES}")
    if kind in (HELLO, BYE, BYE_SEEN):
        if step or bucket or stage or chunk or length != total:
            raise PacketError("control frame with a slot, or cut into chunks")
        if kind != HELLO and total:
            raise PacketError(f"farewell frame with {total} bytes of payload")
    elif length == 0 and total:
        raise PacketError("empty chunk of a message that is not empty")
    return Header(kind, run, epoch, incarnation, step, bucket, stage, chunk, sequence, length, total)


def verify(header: Buffer, payload: Buffer) -> None:
    """Check the checksum of a chunk.

    Raises:
        PacketError: header or payload changed on the way.
    """
    (found,) = _CHECKSUM.unpack_from(header, _CHECKSUM_AT)
    fields = memoryview(header)[:_CHECKSUM_AT]
    if found != xxhash.xxh3_64_intdigest(fields, digest_payload(payload)):
        raise PacketError("frame checksum does not match")
