"""Stochastic quantizers in plain torch operations: rounded up or down at random, so that the mean is the value.

Each element's chance comes from sixteen random bits, ``u`` (:func:`gradcomp.kernels.reference_random.random_halves`),
as ``r = (u + 1/2) / 2**16``. Half the random numbers that 32 bits would take, which is most of what encoding costs,
and enough: the probability of rounding up is off by 2**-17 at most, and 2**-18 more by float32's rounding, in either
direction. So the mean of what is decoded is off by less than 2**-16 of the distance between two levels, while rounding
a single element errs by up to half of it and more: over n roundings the bias stands out of the noise, which falls as 1
/ (2 sqrt(n)), only as n nears 2**30. What lies on a level stays there, 0 above all.

All return a packet's payload: float32 scales, one a block, as bytes; then codes. Or a float if acc is not finite
everywhere. With ``update`` the residual becomes acc - decoded, unless acc is not finite.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradcomp.kernels.reference_chunks import accumulate, chunks, nonfinite_value
from gradcomp.kernels.reference_codes import add_codes, pack_codes
from gradcomp.kernels.reference_random import random_halves
from gradcomp.kernels.reference_sums import lane_sums

__all__ = ["add_powers", "encode_powers", "encode_stochastic", "stochastic_limit"]

_FLOAT32 = torch.finfo(torch.float32)
_MAGNITUDE, _MANTISSA, _MANTISSA_BITS = 0x7FFFFFFF, 0x7FFFFF, 23
_LARGEST_EXPONENT = 254

Quantize = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def stochastic_limit(bits: int) -> float:
    """The largest scale whose every multiple by a code of ``bits`` bits is finite, or a little less."""
    return float(_FLOAT32.max) / ((1 << (bits - 1)) - 1) * (1.0 - 2.0**-22)


def encode_stochastic(
    grad: Tensor,
    residual: Tensor | None,
    levels: int,
    block: int,
    norm: str,
    clip: float,
    key: int,
    step: int,
    update: bool = False,
) -> Tensor | float:
    """One of ``levels`` even levels of |acc| up to the block's norm, and the sign.

    scale = norm / levels, at most :func:`stochastic_limit`; 0 where it would be below the smallest normal number, and
    all codes with it. The level is floor(min(|acc| * (1 / scale), levels) + r).

    Args:
        levels: 1 to 127, in codes of as few bits as will do, 2 at least.
        block: a multiple of 8.
        norm: "max", the largest |acc|, or "l2".
        clip: with "max": the norm is at most so many root mean squares of the block; 0 for no limit.
        key, step: of the random numbers.

    Returns:
        Scales, then signed codes as :func:`add_codes` takes them; or a float.
    """
    bits = levels.bit_length() + 1
    bias = (1 << (bits - 1)) - 1
    limit = torch.tensor(stochastic_limit(bits), dtype=torch.float32)

    def quantize(rows: Tensor, largest: Tensor, members: Tensor, halves: Tensor) -> tuple[Tensor, Tensor]:
        bound = largest.to(torch.float64)
        if norm == "l2" or clip:
            squares = lane_sums(rows.to(torch.float64) ** 2)
            bound = squares.sqrt() if norm == "l2" else torch.minimum(bound, (squares / members).sqrt() * clip)
        scale = (bound / torch.full_like(bound, levels)).clamp(max=float(limit)).to(torch.float32)
        scale = torch.where(scale < _FLOAT32.tiny, 0.0, scale)
        inverse = torch.where(scale > 0, 1.0 / scale.to(torch.float64), 0.0).to(torch.float32)
        chance = halves.to(torch.float32) * 2.0**-16 + 2.0**-17
        level = ((rows.abs() * inverse.unsqueeze(1)).clamp(max=levels) + chance).to(torch.uint8)
        if bits == 2:
            return scale, torch.where(rows < 0, 2 * level, level)
        return scale, torch.where(rows < 0, bias - level, bias + level)

    payload = _encode(grad, residual, block, bits, key, step, quantize)
    if update and residual is not None and isinstance(payload, Tensor):
        scales, codes = _parts(payload, grad, block)
        add_codes(residual, scales, codes, bits, block, -1.0, grad)
    return payload


def encode_powers(
    grad: Tensor, residual: Tensor | None, block: int, key: int, step: int, update: bool = False
) -> Tensor | float:
    """|acc| as one of the two powers of two around it, and the sign.

    A random 23-bit number added to the bits of a float32 carries into its exponent with the probability that the
    mantissa says. The block's scale is the power of two that its largest |acc| can become, 1 at least and 2**127 at
    most (what is larger becomes 2**127). A code's low 7 bits say how many powers of two below that, 127 for 0; below
    scale * 2**-126 the two powers are 0 and that.

    Returns:
        Scales, then a byte an element, 0x80 set if negative; or a float.
    """

    def quantize(rows: Tensor, largest: Tensor, members: Tensor, halves: Tensor) -> tuple[Tensor, Tensor]:
        top = ((largest.view(torch.int32) + _MANTISSA) >> _MANTISSA_BITS).clamp(127, _LARGEST_EXPONENT)
        scale = (top << _MANTISSA_BITS).view(torch.float32)
        # By the inverse of the scale, exactly: where that is denormal its bits are not an exponent's.
        inverse = ((254 - top) << _MANTISSA_BITS).clamp(min=1 << (_MANTISSA_BITS - 1)).view(torch.float32)
        magnitude = (rows.abs() * inverse.unsqueeze(1)).view(torch.int32)
        exponent = ((magnitude + (halves << 7) + 64) >> _MANTISSA_BITS).clamp(max=127)
        negative = (rows < 0) & (exponent > 0)
        return scale, ((127 - exponent) + (negative.to(torch.int32) << 7)).to(torch.uint8)

    payload = _encode(grad, residual, block, 8, key, step, quantize)
    if update and residual is not None and isinstance(payload, Tensor):
        add_powers(residual, *_parts(payload, grad, block), block, -1.0, grad)
    return payload


def add_powers(
    out: Tensor, scales: Tensor, codes: Tensor, block: int, scale: float, addend: Tensor | None = None
) -> None:
    """``out = (out + addend) + decoded * scale``, each operation rounded to float32.

    Args:
        scales: float32 [blocks], powers of two in 1..2**127.
        codes: as :func:`encode_powers`; none is 0xFF.
    """
    for part in chunks(out.numel(), out.device, block):
        size = part.stop - part.start
        code = codes[part].to(torch.int32)
        # Bits of 2**(127 - code - 127), and of 0 where the code is 127.
        power = ((127 - (code & 127)) << _MANTISSA_BITS).view(torch.float32)
        of_block = scales[part.start // block : -(-part.stop // block)].repeat_interleave(min(block, size))[:size]
        target = out[part]
        if addend is not None:
            target += addend[part]
        target += torch.where(code > 127, -power, power) * of_block * scale


def _encode(
    grad: Tensor, residual: Tensor | None, block: int, bits: int, key: int, step: int, quantize: Quantize
) -> Tensor | float:
    """``quantize`` turns blocks, their largest magnitudes, sizes and random bits into scales and codes."""
    block = min(block, max(-(-grad.numel() // 8) * 8, 8))  # no padding to a block that is never full
    scales, codes = [], [grad.new_empty(0, dtype=torch.uint8)]
    for part in chunks(grad.numel(), grad.device, block):
        acc = accumulate(grad, residual, part, None)
        size = acc.numel()
        rows = torch.cat([acc, acc.new_zeros(-size % block)]).view(-1, block)
        largest = rows.abs().amax(1)
        if not bool(largest.isfinite().all()):
            return nonfinite_value(accumulate(grad, residual, slice(part.start, None), None))
        members = torch.full((len(rows),), block, dtype=torch.int64, device=acc.device)
        members[-1] -= rows.numel() - size
        halves = random_halves(key, step, part.start, rows.numel(), grad.device).view(-1, block)
        scale, code = quantize(rows, largest, members, halves)
        scales.append(scale.view(torch.uint8))
        codes.append(pack_codes(code.view(-1)[:size], bits))
    return torch.cat([*scales, *codes])


def _parts(payload: Tensor, grad: Tensor, block: int) -> tuple[Tensor, Tensor]:
    nbytes = 4 * -(-grad.numel() // block)
    return payload[:nbytes].view(torch.float32), payload[nbytes:]
