"""What ranks must agree on before the first gradient, and how a disagreement is named.

A hello is a flat dict, fields in the order in which they are compared. Short values (a version, a spec) are compared
and shown as they are; ``tensors`` is the tensor table as one 8-byte digest a tensor, so that the first tensor that
differs can be named without sending the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgpack
import xxhash

from gradcomp.errors import HandshakeError, PacketError

__all__ = ["MAX_HELLO_BYTES", "Hello", "compare", "digest_tensors", "pack", "unpack"]

Hello = Mapping[str, str | int | bytes]

MAX_HELLO_BYTES = 1 << 20
_MAX_FIELDS = 32
_SHOWN = 100  # characters of a long text on either side of where it differs
_MAX_TEXT_BYTES = 1 << 17  # rules for many parameters are long


def digest_tensors(lines: Sequence[str]) -> bytes:
    """Eight bytes a line; a line says all that ranks must agree on about one tensor, its name first."""
    return b"".join(xxhash.xxh3_64_digest(line.encode()) for line in lines)


def pack(hello: Hello) -> bytes:
    """A hello as msgpack."""
    for field, value in hello.items():
        if isinstance(value, str) and len(value.encode()) > _MAX_TEXT_BYTES:
            raise HandshakeError(f"hello: {field} has over {_MAX_TEXT_BYTES} bytes", field=field, peer=-1)
    packed: bytes = msgpack.packb(dict(hello))
    if len(packed) > MAX_HELLO_BYTES:
        raise HandshakeError(f"hello of {len(packed)} bytes is over {MAX_HELLO_BYTES}", field="tensors", peer=-1)
    return packed


def unpack(data: bytes | memoryview) -> dict[str, str | int | bytes]:
    """A hello from the network, checked for size and types.

    Raises:
        PacketError: not a flat msgpack map of at most 32 short fields.
    """
    if len(data) > MAX_HELLO_BYTES:
        raise PacketError(f"hello of {len(data)} bytes is over {MAX_HELLO_BYTES}")
    try:
        hello = msgpack.unpackb(
            data,
            strict_map_key=True,
            max_str_len=_MAX_TEXT_BYTES,
            max_bin_len=MAX_HELLO_BYTES,
            max_array_len=0,
            max_map_len=_MAX_FIELDS,
            max_ext_len=0,
        )
    except Exception as error:  # msgpack raises many types, ValueError and its own among them
        raise PacketError(f"hello is not msgpack within its limits: {error}") from None
    if not isinstance(hello, dict):
        raise PacketError(f"hello is a {type(hello).__name__}, not a map")
    for key, value in hello.items():
        if not isinstance(key, str) or isinstance(value, bool) or not isinstance(value, (str, int, bytes)):
            raise PacketError(f"hello field {key!r} must be a string, an integer or bytes")
    return hello


def compare(mine: Hello, theirs: Hello, *, rank: int, peer: int) -> None:
    """Raise unless both hellos say the same.

    Raises:
        HandshakeError: names the first field that differs and both values.
    """
    for field in [*mine, *(f for f in theirs if f not in mine)]:
        here, there = mine.get(field), theirs.get(field)
        if here == there:
            continue
        if field == "tensors" and isinstance(here, bytes) and isinstance(there, bytes):
            what = _first_difference(here, there)
        elif isinstance(here, str) and isinstance(there, str):
            what = "{!r} here, {!r} there".format(*_around_difference(here, there))
        else:
            what = f"{here!r} here, {there!r} there"
        raise HandshakeError(f"rank {rank} and rank {peer} differ in {field}: {what}", field=field, peer=peer)


def _first_difference(here: bytes, there: bytes) -> str:
    count = f"{len(here) // 8} tensors here, {len(there) // 8} there"
    for i in range(0, max(len(here), len(there)), 8):
        if here[i : i + 8] != there[i : i + 8]:
            return f"{count}; tensor {i // 8} is the first whose name, shape, dtype or compressor differs"
    return count


def _around_difference(here: str, there: str) -> tuple[str, str]:
    """Both texts, or what is around their first difference where they are long, as rules are."""
    if max(len(here), len(there)) <= 2 * _SHOWN:
        return here, there
    at = next((i for i, pair in enumerate(zip(here, there, strict=False)) if pair[0] != pair[1]), len(here))
    start = max(0, min(at, len(here), len(there)) - _SHOWN)
    return "..." * (start > 0) + here[start : at + _SHOWN], "..." * (start > 0) + there[start : at + _SHOWN]
