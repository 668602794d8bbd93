"""The kinds of packets, and what each allows its header and payload to be. docs/FORMAT.md is the specification."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcomp import indices, kernels
from gradcomp.errors import PacketError
from gradcomp.indices import Coding

if TYPE_CHECKING:
    from gradcomp.packet import Packet

__all__ = ["MAX_BLOCK", "Kind", "check", "name_of"]

MAX_BLOCK = 1 << 30
_FIRST_PRIVATE = 128


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


def _expect_finite(packet: Packet, nbytes: int) -> None:
    if not bool(packet.payload[:nbytes].view(torch.float32).isfinite().all()):
        raise PacketError("packet holds a value or scale that is not finite")


def _check_index_set(packet: Packet, start: int, *, signed: bool) -> None:
    expected = indices.choose(packet.count, packet.numel, signed=signed)
    if packet.coding is not expected:
        raise PacketError(f"packet codes its index set as {packet.coding.name}; it must be {expected.name}")
    if signed and packet.coding is Coding.MAP:  # decoded without indices
        _expect_payload(packet, indices.max_coded_nbytes(packet.count, packet.numel, packet.coding, signed=True))
        indices.check_map(packet.payload[start:], packet.count, packet.numel, signed=True)
    else:
        _ = packet.index_set
