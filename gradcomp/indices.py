"""Index sets as bytes: which elements a sparse packet speaks of, and with what sign.

An index set is strictly increasing, below ``numel``, with a sign for each element if it is *signed*. Three codings, all
little-endian; the count and numel alone say which one is used (:func:`choose`), so both ends know it beforehand:

======  ==========================  ==================================================================================
WORDS   4 bytes an element          u32: index in the low 31 bits, bit 31 the sign. numel <= 2**31 only.
GAPS    2 bytes an element, and     u16: low bit the sign, the upper 15 bits how many elements lie between this one and
        2 for every 32767 skipped   the one before. 0xFFFF skips 32767 elements and names none.
MAP     2 bits (signed) or 1 bit    00 absent, 01 plus, 10 minus, four to a byte; unsigned: 0 or 1, eight to a byte;
        for every element of numel  lowest bits first.
======  ==========================  ==================================================================================

A set is a pair ``(index, negative)``: int64 indices, bool signs. Everything runs on the tensors' device.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from gradcomp.errors import PacketError

__all__ = ["Coding", "check_map", "choose", "decode", "encode", "max_coded_nbytes"]


class Coding(IntEnum):
    """How a packet's index set is written; NONE where there is none."""

    NONE = 0
    WORDS = 1
    GAPS = 2
    MAP = 3


_SKIP = 0x7FFF  # elements one escape unit skips; an element's own gap is smaller, so every set has one encoding
_MAX_WORDS_NUMEL = 1 << 31


def max_coded_nbytes(count: int, numel: int, coding: Coding, *, signed: bool) -> int:
    """The most bytes a set of ``count`` elements of ``numel`` can take; exact for WORDS and MAP, reached by GAPS."""
    if coding is Coding.WORDS:
        return 4 * count
    if coding is Coding.GAPS:
        return 2 * (count + (numel - count) // _SKIP) if count else 0
    return -(-numel // (4 if signed else 8))


def choose(count: int, numel: int, *, signed: bool) -> Coding:
    """The coding with the smallest worst case; of equal ones the first of WORDS, GAPS, MAP.

    >>> [choose(count, 1_000_000, signed=True).name for count in (20, 1000, 200_000)]
    ['WORDS', 'GAPS', 'MAP']
    """
    codings = [Coding.WORDS] if numel <= _MAX_WORDS_NUMEL else []
    codings += [Coding.GAPS, Coding.MAP]
    return min(codings, key=lambda coding: max_coded_nbytes(count, numel, coding, signed=signed))


def encode(index: Tensor, negative: Tensor | None, numel: int, coding: Coding) -> Tensor:
    """Write a set.

    Args:
        index: int64, strictly increasing, in 0..numel-1. Trusted: it comes from this process.
        negative: bool, as many; None for an unsigned set.

    Returns:
        uint8, flat, on the device of ``index``.
    """
    if coding is Coding.WORDS:
        # index - 2**31 has the bits of index with bit 31 set, and fits an int32.
        words = index if negative is None else index - (negative.to(torch.int64) << 31)
        return words.to(torch.int32).view(torch.uint8)
    if coding is Coding.GAPS:
        return _encode_gaps(index, negative)
    if coding is Coding.MAP:
        return _encode_map(index, negative, numel)
    raise ValueError(f"coding must be WORDS, GAPS or MAP; got {coding!r}")


def decode(payload: Tensor, count: int, numel: int, coding: Coding, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Read and check a set.

    Args:
        payload: uint8, flat, starting at a multiple of 4 bytes in its storage.

    Returns:
        int64 indices, strictly increasing, ``count`` of them, all below numel; bool signs, all False if not ``signed``.

    Raises:
        PacketError: anything else, found before more than a small multiple of the payload is allocated.
    """
    most = max_coded_nbytes(count, numel, coding, signed=signed)
    size = payload.numel()
    if size > most or size < (2 * count if coding is Coding.GAPS else most):
        raise PacketError(f"index set: {size} bytes do not fit {count} of {numel} elements as {coding.name}")
    if coding is Coding.WORDS:
        return _decode_words(payload, numel, signed)
    if coding is Coding.GAPS:
        return _decode_gaps(payload, count, numel, signed)
    check_map(payload, count, numel, signed=signed)
    return _decode_map(payload, signed)


def _encode_gaps(index: Tensor, negative: Tensor | None) -> Tensor:
    gap = index.diff(prepend=index.new_full((1,), -1)) - 1
    skips = gap.div(_SKIP, rounding_mode="floor")
    units = (gap - skips * _SKIP) << 1
    if negative is not None:
        units += negative
    ends = skips.cumsum(0)
    escapes = int(ends[-1]) if len(ends) else 0
    if escapes:
        with_escapes = units.new_full((len(units) + escapes,), 0xFFFF)
        with_escapes[torch.arange(len(units), device=units.device) + ends] = units
        units = with_escapes
    # The low half of each int32, by its bytes: a cast to int16 need not wrap.
    return _packed(units.to(torch.int32).view(torch.int16)[::2]).view(torch.uint8)


def _encode_map(index: Tensor, negative: Tensor | None, numel: int) -> Tensor:
    width = 8 if negative is None else 4
    codes = torch.zeros(-(-numel // width) * width, dtype=torch.uint8, device=index.device)
    codes[index] = 1 if negative is None else negative.to(torch.uint8) + 1
    if negative is None:
        # Byte i of a word moves to bit i of its top byte; no two partial products overlap.
        return _packed((codes.view(torch.int64) * 0x0102040810204080).view(torch.uint8)[7::8])
    return _packed((codes.view(torch.int32) * 0x01041040).view(torch.uint8)[3::4])


def _packed(strided: Tensor) -> Tensor:
    # Not contiguous(): that returns a single element as it is, stride and all.
    return strided.clone(memory_format=torch.contiguous_format)


def _decode_words(payload: Tensor, numel: int, signed: bool) -> tuple[Tensor, Tensor]:
    words = payload.view(torch.int32)
    negative = words < 0
    if not signed and bool(negative.any()):
        raise PacketError("index set: a sign bit is set in a set without signs")
    index = (words & 0x7FFFFFFF).to(torch.int64)
    if len(index) and (int(index[-1]) >= numel or not bool((index[1:] > index[:-1]).all())):
        raise PacketError(f"index set: indices are not strictly increasing and below {numel}")
    return index, negative


def _decode_gaps(payload: Tensor, count: int, numel: int, signed: bool) -> tuple[Tensor, Tensor]:
    if payload.numel() % 2:
        raise PacketError(f"index set: {payload.numel()} bytes are no whole number of 2-byte units")
    units = payload.view(torch.int16).to(torch.int32) & 0xFFFF
    if bool((units == 0xFFFE).any()):
        raise PacketError("index set: unit 0xFFFE")
    position = (units >> 1).to(torch.int64)
    sign = (units & 1).to(torch.bool)
    if len(units) > count:
        element = units != 0xFFFF
        if int(element.sum()) != count or not bool(element[-1]):
            raise PacketError(f"index set: not {count} elements, or an escape after the last one")
        position = (position + element).cumsum(0)[element] - 1
        sign = sign[element]
    else:
        if bool((units == 0xFFFF).any()):
            raise PacketError(f"index set: fewer than {count} elements")
        position = (position + 1).cumsum(0) - 1
    if count and int(position[-1]) >= numel:
        raise PacketError(f"index set: index {int(position[-1])} is not below {numel}")
    if not signed and bool(sign.any()):
        raise PacketError("index set: a sign bit is set in a set without signs")
    return position, sign


def check_map(payload: Tensor, count: int, numel: int, *, signed: bool) -> None:
    """Raise PacketError unless a MAP of the right length holds ``count`` elements, all below numel."""
    seen = torch.bincount(payload, minlength=256).cpu()
    byte = torch.arange(256)
    low, high = byte & 0x55, (byte >> 1) & 0x55
    if signed and bool(seen[(low & high) != 0].any()):
        raise PacketError("index set: code 11 in a map")
    bits = sum(((byte >> k) & 1 for k in range(8)), torch.zeros_like(byte))
    if int((seen * bits).sum()) != count:
        raise PacketError(f"index set: the map does not hold {count} elements")
    used = numel % 4 * 2 if signed else numel % 8
    if used and int(payload[-1]) >> used:
        raise PacketError(f"index set: the map names elements beyond {numel}")


def _decode_map(payload: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    width = 2 if signed else 1
    # Only bytes that hold something: the map of a sparse set is mostly zeros.
    where = payload.nonzero().view(-1)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=payload.device)
    codes = (payload[where].unsqueeze(1) >> shifts) & ((1 << width) - 1)
    row, column = codes.nonzero(as_tuple=True)
    index = where[row] * (8 // width) + column
    return index, codes[row, column] == 2
