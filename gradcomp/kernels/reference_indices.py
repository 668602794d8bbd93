"""Index sets as bytes, in plain torch operations: the codings that :mod:`gradcomp.indices` shows."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from gradcomp.errors import PacketError
from gradcomp.kernels.reference_bits import pack_bits, unpack_bits
from gradcomp.kernels.reference_chunks import chunks
from gradcomp.kernels.reference_select import scatter_signs

__all__ = [
    "CodedPacket",
    "Coding",
    "add_signs",
    "add_values",
    "check",
    "check_size",
    "choose",
    "decode",
    "encode",
    "max_coded_nbytes",
    "rice_bits",
    "rice_fields_nbytes",
    "sum_sets",
]


class Coding(IntEnum):
    """How a packet's index set is written; NONE where there is none."""

    NONE = 0
    WORDS = 1
    GAPS = 2
    MAP = 3
    RICE = 4


# Payload, elements named, their coding, and the magnitude of SIGNS; None for VALUES, whose payload begins with these.
CodedPacket = tuple[Tensor, int, Coding, float | None]

# The most elements a tensor may have for a coding. The last: more than any memory holds, so that no sum overflows.
_MAX_NUMEL = {Coding.WORDS: 1 << 31, Coding.GAPS: 1 << 15, Coding.MAP: 1 << 59, Coding.RICE: 1 << 59}


def max_coded_nbytes(count: int, numel: int, coding: Coding, *, signed: bool) -> int:
    """The most bytes a set of ``count`` elements of ``numel`` can take; exact for all but RICE, which reaches it."""
    if coding is Coding.WORDS:
        return 4 * count
    if coding is Coding.GAPS:
        return 2 * count
    if coding is Coding.RICE:
        most_zeros = (numel - count) >> rice_bits(count, numel)
        return rice_fields_nbytes(count, numel, signed) + -(-(count + most_zeros) // 8) if count else 0
    if coding is Coding.MAP:
        return -(-numel // 8) + (-(-count // 8) if signed else 0)
    raise ValueError(f"coding must be WORDS, GAPS, MAP or RICE; got {coding!r}")


def choose(count: int, numel: int, *, signed: bool) -> Coding:
    """The coding both ends use: MAP above a density of 1/8, else the one with the smallest worst case.

    Of equal ones the first. Above 1/8 RICE would be smaller still, but to decode its positions takes longer than a pass
    over the whole tensor does.

    >>> [choose(count, 1_000_000, signed=True).name for count in (1, 3, 1000, 200_000)]
    ['WORDS', 'RICE', 'RICE', 'MAP']
    >>> choose(1, 1000, signed=True).name
    'GAPS'
    """
    if 8 * count > numel:
        return Coding.MAP
    codings = [coding for coding, most in _MAX_NUMEL.items() if numel <= most]
    return min(codings, key=lambda coding: max_coded_nbytes(count, numel, coding, signed=signed))


def encode(index: Tensor, negative: Tensor | None, numel: int, coding: Coding) -> Tensor:
    """:func:`gradcomp.indices.encode`, on any device."""
    if len(index) > numel or numel > _MAX_NUMEL.get(coding, 0):
        raise ValueError(f"{len(index)} of {numel} elements cannot be written as {coding.name}")
    if len(index) and (int(index[0]) < 0 or int(index[-1]) >= numel or not bool((index[1:] > index[:-1]).all())):
        raise ValueError(f"index must be strictly increasing, from 0 on and below {numel}")
    if coding is Coding.WORDS:
        # index - 2**31 has the bits of index with bit 31 set, and fits an int32.
        words = index if negative is None else index - (negative.to(torch.int64) << 31)
        return words.to(torch.int32).view(torch.uint8)
    if coding is Coding.GAPS:
        return _encode_gaps(index, negative)
    if coding is Coding.RICE:
        return _encode_rice(index, negative, numel)
    named = torch.zeros(numel, dtype=torch.bool, device=index.device)
    named[index] = True
    return pack_bits(named) if negative is None else torch.cat([pack_bits(named), pack_bits(negative)])


def decode(payload: Tensor, count: int, numel: int, coding: Coding, *, signed: bool) -> tuple[Tensor, Tensor]:
    """:func:`gradcomp.indices.decode`, on any device."""
    check_size(payload, count, numel, coding, signed)
    if coding is Coding.WORDS:
        return _decode_words(payload, numel, signed)
    if coding is Coding.GAPS:
        return _decode_gaps(payload, numel, signed)
    if coding is Coding.RICE:
        return _decode_rice(payload, count, numel, signed)
    _check_map(payload, count, numel, signed)
    map_nbytes = -(-numel // 8)
    # Only bytes that hold something: the map of a sparse set is mostly zeros.
    where = payload[:map_nbytes].nonzero().view(-1)
    row, column = unpack_bits(payload[where], 8 * len(where)).view(-1, 8).nonzero(as_tuple=True)
    signs = unpack_bits(payload[map_nbytes:], count) if signed else payload.new_zeros(count, dtype=torch.bool)
    return where[row] * 8 + column, signs


def check(payload: Tensor, count: int, numel: int, coding: Coding, *, signed: bool) -> None:
    """:func:`gradcomp.indices.check`, on any device."""
    if coding is Coding.MAP:  # without its indices, which may be many
        check_size(payload, count, numel, coding, signed)
        _check_map(payload, count, numel, signed)
    else:
        decode(payload, count, numel, coding, signed=signed)


def add_signs(
    out: Tensor,
    payload: Tensor,
    count: int,
    coding: Coding,
    magnitude: float,
    index_set: tuple[Tensor, Tensor] | None = None,
) -> None:
    """``out`` plus ``magnitude`` at the elements of a signed set, minus it at the negative ones; the others stay.

    Args:
        out: flat float32; as many elements as the set is one of.
        index_set: what the payload decodes to, if that is known already.

    Raises:
        PacketError: the payload does not hold such a set; ``out`` is then unchanged.
    """
    if coding is not Coding.MAP:
        index, negative = index_set or decode(payload, count, out.numel(), coding, signed=True)
        scatter_signs(out, index, negative, magnitude)
        return
    check(payload, count, out.numel(), coding, signed=True)
    plus = torch.tensor(magnitude, dtype=torch.float32, device=out.device)
    signs = payload[-(-out.numel() // 8) :]
    start = 0  # in the signs
    for part in chunks(out.numel(), out.device, 8):
        named = unpack_bits(payload[part.start // 8 : -(-part.stop // 8)], part.stop - part.start)
        stop = start + int(named.sum())
        negative = unpack_bits(signs[start // 8 : -(-stop // 8)], stop - start // 8 * 8)[start % 8 :]
        # x + -0.0 is x, whatever x is; -0.0 + 0.0 is not.
        terms = torch.full_like(out[part], -0.0)
        out[part] += terms.masked_scatter_(named, torch.where(negative, -plus, plus))
        start = stop


def add_values(
    out: Tensor,
    payload: Tensor,
    count: int,
    coding: Coding,
    values: Tensor,
    scale: float,
    index_set: tuple[Tensor, Tensor] | None = None,
) -> None:
    """``out[index] += values * scale`` for an unsigned set, each product rounded to float32; as :func:`add_signs`."""
    index, _ = index_set or decode(payload, count, out.numel(), coding, signed=False)
    out[index] += values * scale


def sum_sets(out: Tensor, packets: Sequence[CodedPacket], scale: float) -> None:
    """``out`` becomes 0, plus ``scale`` times one packet after the other: as :func:`add_signs` or :func:`add_values`.

    Raises:
        PacketError: a payload does not hold such a set.
    """
    out.zero_()
    for payload, count, coding, magnitude in packets:
        if magnitude is not None:
            add_signs(out, payload, count, coding, float(torch.tensor(magnitude) * scale))
        elif payload.numel() < 4 * count:
            raise PacketError("index set: it is too short for its values")
        else:
            values = payload[: 4 * count].view(torch.float32)
            add_values(out, payload[4 * count :], count, coding, values, scale)


def check_size(payload: Tensor, count: int, numel: int, coding: Coding, signed: bool) -> None:
    """Raise PacketError unless a payload of so many bytes can hold such a set."""
    fits = 0 <= count <= numel <= _MAX_NUMEL[coding]
    if fits:
        least = most = max_coded_nbytes(count, numel, coding, signed=signed)
        if coding is Coding.RICE:
            least = rice_fields_nbytes(count, numel, signed) + -(-count // 8)
        fits = least <= payload.numel() <= most
    if not fits:
        raise PacketError(f"index set: {payload.numel()} bytes do not fit {count} of {numel} elements as {coding.name}")


def _check_last(position: Tensor, numel: int) -> None:
    if len(position) and int(position[-1]) >= numel:
        raise PacketError(f"index set: index {int(position[-1])} is not below {numel}")


def _check_signs(negative: Tensor, signed: bool) -> None:
    if not signed and bool(negative.any()):
        raise PacketError("index set: a sign bit is set in a set without signs")


def _check_spare(part: Tensor, used: int) -> None:
    """``part``, whose last byte holds bits of which the first ``used`` (modulo 8) mean something."""
    if used % 8 and int(part[-1]) >> used % 8:
        raise PacketError("index set: a bit is set beyond the last element")


def _check_map(payload: Tensor, count: int, numel: int, signed: bool) -> None:
    map_nbytes = -(-numel // 8)
    seen = torch.bincount(payload[:map_nbytes], minlength=256).cpu()
    byte = torch.arange(256)
    ones = sum(((byte >> k) & 1 for k in range(8)), torch.zeros_like(byte))
    if int((seen * ones).sum()) != count:
        raise PacketError(f"index set: the map does not name {count} elements")
    _check_spare(payload[:map_nbytes], numel)
    if signed:
        _check_spare(payload, count)


def _encode_gaps(index: Tensor, negative: Tensor | None) -> Tensor:
    units = index.diff(prepend=index.new_full((1,), -1)) - 1 << 1
    if negative is not None:
        units += negative
    # The low half of each int32, by its bytes: a cast to int16 need not wrap. Not contiguous(): that returns a single
    # element as it is, stride and all.
    halves = units.to(torch.int32).view(torch.int16)[::2]
    return halves.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _decode_words(payload: Tensor, numel: int, signed: bool) -> tuple[Tensor, Tensor]:
    words = payload.view(torch.int32)
    negative = words < 0
    _check_signs(negative, signed)
    index = (words & 0x7FFFFFFF).to(torch.int64)
    if not bool((index[1:] > index[:-1]).all()):
        raise PacketError("index set: indices are not strictly increasing")
    _check_last(index, numel)
    return index, negative


def _decode_gaps(payload: Tensor, numel: int, signed: bool) -> tuple[Tensor, Tensor]:
    units = payload.view(torch.int16).to(torch.int64) & 0xFFFF
    negative = (units & 1).to(torch.bool)
    _check_signs(negative, signed)
    position = ((units >> 1) + 1).cumsum(0) - 1
    _check_last(position, numel)
    return position, negative


def rice_bits(count: int, numel: int) -> int:
    """How many low bits of a gap are written as they are: the worst case is then smallest, the average nearly so."""
    return max(((numel - count) // count).bit_length() - 1, 0) if count else 0


def rice_fields_nbytes(count: int, numel: int, signed: bool) -> int:
    """How many bytes of RICE come before the bits that end elements."""
    return -(-count * (rice_bits(count, numel) + signed) // 8)


def _encode_rice(index: Tensor, negative: Tensor | None, numel: int) -> Tensor:
    count = len(index)
    if not count:
        return index.new_empty(0, dtype=torch.uint8)
    low_bits = rice_bits(count, numel)
    gap = index.diff(prepend=index.new_full((1,), -1)) - 1
    fields = gap & ((1 << low_bits) - 1)
    width = low_bits
    if negative is not None:
        fields = fields << 1 | negative
        width += 1
    field_bits = torch.empty((count, width), dtype=torch.bool, device=index.device)
    for k in range(width):
        field_bits[:, k] = fields >> k & 1
    ends = (gap >> low_bits).cumsum(0) + torch.arange(count, device=index.device)
    unary = torch.zeros(int(ends[-1]) + 1, dtype=torch.bool, device=index.device)
    unary[ends] = True
    return torch.cat([pack_bits(field_bits.view(-1)), pack_bits(unary)])


def _decode_rice(payload: Tensor, count: int, numel: int, signed: bool) -> tuple[Tensor, Tensor]:
    low_bits, fields_nbytes = rice_bits(count, numel), rice_fields_nbytes(count, numel, signed)
    unary = payload[fields_nbytes:]
    ends = unpack_bits(unary, 8 * len(unary)).nonzero().view(-1)
    if len(ends) != count or (count and not int(unary[-1])):
        raise PacketError(f"index set: not {count} elements, or bytes after the last one")
    width = low_bits + signed
    _check_spare(payload[:fields_nbytes], count * width)
    number = torch.arange(count, device=payload.device)
    fields = _unpack_fields(payload[:fields_nbytes], number * width, width)
    position = ((ends - number) << low_bits) + (fields >> int(signed)).cumsum(0) + number
    _check_last(position, numel)
    return position, ((fields & 1) if signed else torch.zeros_like(fields)).to(torch.bool)


def _unpack_fields(packed: Tensor, start: Tensor, width: int) -> Tensor:
    """``width`` bits from each bit ``start`` on, as int64."""
    padded = torch.cat([packed, packed.new_zeros(9)])
    byte, shift = start >> 3, start & 7
    fields = padded[byte].to(torch.int64) >> shift
    for k in range(1, (width + 14) // 8):
        fields |= padded[byte + k].to(torch.int64) << (8 * k - shift)
    return fields & ((1 << width) - 1)
