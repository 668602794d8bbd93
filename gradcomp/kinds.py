"""The kinds of packets, and what each allows its header and payload to be. docs/FORMAT.md is the specification."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING

import torch

from gradcomp import indices
from gradcomp.errors import PacketError

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


_CHECKS: dict[int, Callable[[Packet], None]] = {
    Kind.DENSE_F32: _dense(4),
    Kind.DENSE_F16: _dense(2),
    Kind.DENSE_BF16: _dense(2),
    Kind.SIGNS: _signs,
    Kind.VALUES: _values,
    Kind.BITS: _bits,
    Kind.NONFINITE: _nonfinite,
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


def _expect_finite(packet: Packet, nbytes: int) -> None:
    if not bool(packet.payload[:nbytes].view(torch.float32).isfinite().all()):
        raise PacketError("packet holds a value or scale that is not finite")


def _check_index_set(packet: Packet, start: int, *, signed: bool) -> None:
    expected = indices.choose(packet.count, packet.numel, signed=signed)
    if packet.coding is not expected:
        raise PacketError(f"packet codes its index set as {packet.coding.name}; it must be {expected.name}")
    if packet.needs_index_set:
        _ = packet.index_set
    else:
        indices.check(packet.payload[start:], packet.count, packet.numel, packet.coding, signed=signed)
