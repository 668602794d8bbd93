"""The kinds of packets, and what each allows its header and payload to be. docs/FORMAT.md is the specification."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcomp import indices, kernels
from gradcomp.errors import PacketError
from gradcomp.tiles import Tiling

if TYPE_CHECKING:
    from gradcomp.packet import Packet

__all__ = ["MAX_BLOCK", "Kind", "check", "name_of"]

MAX_BLOCK = 1 << 30
_FIRST_PRIVATE = 128
_HEAD_NBYTES = 16  # what the payloads of FACTORS, SPECTRUM and SEEDED begin with
_MIN_CHUNK, _MAX_CHUNK = 8, 256


class Kind(IntEnum):
    """What a payload holds. 128 to 255 belong to plug-ins, which check their payloads themselves."""

    DENSE_F32 = 1
    DENSE_F16 = 2
    DENSE_BF16 = 3
    SIGNS = 4  # a signed index set; every element is +-scalar
    VALUES = 5  # float32 values, then an unsigned index set
    BITS = 6  # two float32 scales a block, then a sign bit an element
    NONFINITE = 7  # no payload: the gradient held NaN or Inf, and scalar says which
    LEVELS = 8  # two float32 a block, low and step; codes: low + code * step
    CODES = 9  # a float32 scale a block, or scalar for all; signed codes: scale * code
    FLOAT8 = 10  # a float32 scale a block; float8_e4m3fn codes: scale * code
    POWERS = 11  # a float32 power of two a block; a byte an element: sign, and powers of two below that
    FACTORS = 12  # two thin float32 matrices whose product it is
    SPECTRUM = 13  # a few float32 coefficients of each tile, and which
    SEEDED = 14  # float32 values of elements that a key and a step choose


def name_of(kind: int) -> str:
    """A kind's name, or its number if it has none."""
    return Kind(kind).name if kind in set(Kind) else str(kind)


def check(packet: Packet) -> None:
    """Raise PacketError unless fields and payload are what the packet's kind allows."""
    if packet.count > packet.numel:
        raise PacketError(f"packet names {packet.count} of {packet.numel} elements")
    if packet.kind >= _FIRST_PRIVATE:
        return  # its own decode_add looks at the rest
    found = _CHECKS.get(packet.kind)
    if found is None:
        raise PacketError(f"packet kind {packet.kind} is not known")
    found(packet)


def _dense(itemsize: int) -> Callable[[Packet], None]:
    def check_dense(packet: Packet) -> None:
        _expect_zero(packet, "count", "coding", "bits", "block", "scalar")
        _expect_payload(packet, itemsize * packet.numel)

    return check_dense


def _signs(packet: Packet) -> None:
    _expect_zero(packet, "bits", "block")
    if not 0.0 <= packet.scalar < math.inf or math.copysign(1.0, packet.scalar) < 0:
        raise PacketError(f"packet magnitude is {packet.scalar!r}; it must be finite and not negative")
    _check_index_set(packet, 0, signed=True)


def _values(packet: Packet) -> None:
    _expect_zero(packet, "bits", "block", "scalar")
    if packet.payload.numel() < 4 * packet.count:
        raise PacketError(f"packet payload of {packet.payload.numel()} bytes is too short for {packet.count} values")
    _expect_finite(packet, 4 * packet.count)
    _check_index_set(packet, 4 * packet.count, signed=False)


def _bits(packet: Packet) -> None:
    _expect_zero(packet, "count", "coding", "bits", "scalar")
    _expect_block(packet)
    scales_nbytes = 8 * -(-packet.numel // packet.block)
    _expect_payload(packet, scales_nbytes + -(-packet.numel // 8))
    _expect_finite(packet, scales_nbytes)
    if packet.numel % 8 and int(packet.payload[-1]) >> packet.numel % 8:
        raise PacketError("packet has a sign bit beyond its last element")


def _nonfinite(packet: Packet) -> None:
    _expect_zero(packet, "count", "coding", "bits", "block")
    _expect_payload(packet, 0)
    if math.isfinite(packet.scalar):
        raise PacketError(f"packet says non-finite, but its value is {packet.scalar!r}")


def _factors(packet: Packet) -> None:
    _expect_zero(packet, "count", "coding", "bits", "block", "scalar")
    columns, rank = head = _read_head(packet, "<QQ")
    rows = _rows(packet, columns)
    if not 1 <= rank <= min(rows, columns):
        raise PacketError(f"packet has factors of rank {rank} for a matrix of {rows} by {columns}")
    nbytes = _HEAD_NBYTES + 4 * rank * (rows + columns)
    _expect_smaller_than_dense(packet, nbytes)
    _expect_payload(packet, nbytes)
    _expect_finite(packet, nbytes, _HEAD_NBYTES)
    object.__setattr__(packet, "_head", head)


def _spectrum(packet: Packet) -> None:
    _expect_zero(packet, "coding", "bits", "block", "scalar")
    columns, chunk, kept = _read_head(packet, "<QII")
    rows = _rows(packet, columns)
    if not _MIN_CHUNK <= chunk <= _MAX_CHUNK:
        raise PacketError(f"packet has tiles of {chunk}; it must be {_MIN_CHUNK}..{_MAX_CHUNK}")
    tiling = Tiling.of(rows, columns, chunk)
    if not 1 <= kept <= tiling.tile_numel or packet.count != kept * tiling.tiles:
        raise PacketError(f"packet has {packet.count} coefficients, {kept} for each of {tiling.tiles} tiles")
    values_end = _HEAD_NBYTES + 4 * packet.count
    nbytes = values_end + 2 * packet.count
    _expect_smaller_than_dense(packet, nbytes)
    _expect_payload(packet, nbytes)
    _expect_finite(packet, values_end, _HEAD_NBYTES)
    index = packet.payload[values_end:].view(torch.int16).view(-1, kept).to(torch.int32) & 0xFFFF
    if not bool((index[:, 1:] > index[:, :-1]).all()) or int(index[:, -1].max()) >= tiling.tile_numel:
        raise PacketError(f"packet has coefficients that are not strictly increasing and below {tiling.tile_numel}")


def _seeded(packet: Packet) -> None:
    _expect_zero(packet, "coding", "bits", "block", "scalar")
    if packet.numel and not packet.count:
        raise PacketError(f"packet has no values for {packet.numel} elements")
    nbytes = _HEAD_NBYTES + 4 * packet.count
    _expect_payload(packet, nbytes)
    _expect_finite(packet, nbytes, _HEAD_NBYTES)


def _read_head(packet: Packet, layout: str) -> tuple[int, ...]:
    if packet.payload.numel() < _HEAD_NBYTES:
        raise PacketError(f"packet payload is {packet.payload.numel()} bytes; it begins with {_HEAD_NBYTES} of its own")
    return struct.unpack(layout, bytes(packet.payload[:_HEAD_NBYTES].tolist()))


def _rows(packet: Packet, columns: int) -> int:
    if not 1 <= columns <= packet.numel or packet.numel % columns:
        raise PacketError(f"packet has {columns} columns; that does not divide its {packet.numel} elements")
    return packet.numel // columns


def _levels(packet: Packet) -> None:
    _expect_zero(packet, "count", "coding", "scalar")
    _expect_bits(packet, 1)
    _expect_block(packet)
    parameters = _expect_codes(packet, 2).view(-1, 2)
    low, step = parameters[:, 0], parameters[:, 1]
    # Rounding keeps order: with the first and the last level finite, all of them are.
    _expect_all((low + step * ((1 << packet.bits) - 1)).isfinite(), "a level that is not finite")
    _expect_all(step.view(torch.int32) >= 0, "a negative step")


def _codes(packet: Packet) -> None:
    _expect_zero(packet, "count", "coding")
    _expect_bits(packet, 2)
    if packet.block:
        _expect_zero(packet, "scalar")
        _expect_block(packet)
        scales = _expect_codes(packet, 1)
    else:
        _expect_codes(packet, 0)
        scales = torch.tensor([packet.scalar], dtype=torch.float32)
    _expect_scales(scales, (1 << (packet.bits - 1)) - 1)
    _expect_no_code(packet, (1 << packet.bits) - 1)


def _float8(packet: Packet) -> None:
    _expect_zero(packet, "count", "coding", "scalar")
    _expect_bits(packet, 8)
    _expect_block(packet)
    _expect_scales(_expect_codes(packet, 1), 448)
    _expect_no_code(packet, 0x7F)


def _powers(packet: Packet) -> None:
    _expect_zero(packet, "count", "coding", "scalar")
    _expect_bits(packet, 8)
    _expect_block(packet)
    scale = _expect_codes(packet, 1).view(torch.int32)
    _expect_all((scale & 0x7FFFFF == 0) & (scale >= 127 << 23), "a scale that is no power of two in 1..2**127")
    _expect_no_code(packet, 0xFF)


_CHECKS: dict[int, Callable[[Packet], None]] = {
    Kind.DENSE_F32: _dense(4),
    Kind.DENSE_F16: _dense(2),
    Kind.DENSE_BF16: _dense(2),
    Kind.SIGNS: _signs,
    Kind.VALUES: _values,
    Kind.BITS: _bits,
    Kind.NONFINITE: _nonfinite,
    Kind.FACTORS: _factors,
    Kind.SPECTRUM: _spectrum,
    Kind.SEEDED: _seeded,
    Kind.LEVELS: _levels,
    Kind.CODES: _codes,
    Kind.FLOAT8: _float8,
    Kind.POWERS: _powers,
}


def _expect_zero(packet: Packet, *names: str) -> None:
    for name in names:
        value = getattr(packet, name)
        if value or math.copysign(1.0, value) < 0:
            raise PacketError(f"packet kind {name_of(packet.kind)} does not use {name}; it is {value!r}, not 0")


def _expect_block(packet: Packet) -> None:
    if packet.block < 8 or packet.block % 8 or packet.block > MAX_BLOCK:
        raise PacketError(f"packet block is {packet.block}; it must be a multiple of 8 in 8..{MAX_BLOCK}")


def _expect_payload(packet: Packet, nbytes: int) -> None:
    if packet.payload.numel() != nbytes:
        raise PacketError(f"packet payload is {packet.payload.numel()} bytes; it must be {nbytes}")


def _expect_smaller_than_dense(packet: Packet, nbytes: int) -> None:
    if nbytes >= 4 * packet.numel:
        raise PacketError(f"packet payload is {nbytes} bytes; a dense one would not be larger, and must be sent")


def _expect_bits(packet: Packet, least: int) -> None:
    if not least <= packet.bits <= 8:
        raise PacketError(f"packet codes have {packet.bits} bits; they must have {least}..8")


def _expect_codes(packet: Packet, parameters: int) -> Tensor:
    """Check that the payload is ``parameters`` float32 a block, then codes; the float32s, which are finite."""
    nbytes = 4 * parameters * -(-packet.numel // packet.block) if parameters else 0
    _expect_payload(packet, nbytes + -(-packet.numel * packet.bits // 8))
    _expect_finite(packet, nbytes)
    used = packet.numel * packet.bits % 8
    if used and int(packet.payload[-1]) >> used:
        raise PacketError("packet has bits set beyond its last code")
    return packet.payload[:nbytes].view(torch.float32)


def _expect_scales(scales: Tensor, most: int) -> None:
    """Check scales that are multiplied by ``most`` at most."""
    _expect_all((scales * most).isfinite(), "a scale whose largest multiple is not finite")
    _expect_all(scales.view(torch.int32) >= 0, "a negative scale")


def _expect_no_code(packet: Packet, mask: int) -> None:
    codes = packet.payload[packet.payload.numel() - -(-packet.numel * packet.bits // 8) :]
    if kernels.find_code(codes, packet.numel, packet.bits, mask):
        raise PacketError("packet holds a code that stands for nothing")


def _expect_all(right: Tensor, what: str) -> None:
    if not bool(right.all()):
        raise PacketError(f"packet holds {what}")


def _expect_finite(packet: Packet, stop: int, start: int = 0) -> None:
    if not kernels.all_finite(packet.payload[start:stop].view(torch.float32)):
        raise PacketError("packet holds a value or scale that is not finite")


def _check_index_set(packet: Packet, start: int, *, signed: bool) -> None:
    expected = indices.choose(packet.count, packet.numel, signed=signed)
    if packet.coding is not expected:
        raise PacketError(f"packet codes its index set as {packet.coding.name}; it must be {expected.name}")
    if packet.needs_index_set:
        _ = packet.index_set
    else:
        indices.check(packet.payload[start:], packet.count, packet.numel, packet.coding, signed=signed)
