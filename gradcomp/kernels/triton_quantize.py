"""Quantizers in Triton: a block's extremes, its codes and what they leave in the residual, in one sweep.

That is where a block fits a program. A larger one takes two: its extremes are found first, by all its programs. A
sweep that writes the residual comes after another over the gradient: whether acc is finite must be known before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcomp.kernels.triton import EXACT
from gradcomp.kernels.triton_blocks import (
    INFINITY,
    MAGNITUDE,
    Layout,
    check_gradient,
    load_acc,
    magnitude_of,
    nonfinite_sum,
    pack,
    place,
    status_of,
)
from gradcomp.kernels.triton_codes import float8_value

__all__ = ["encode_float8", "encode_int8", "encode_levels", "encode_ternary", "quantize"]

_LOWEST: tl.constexpr = tl.constexpr(-(2**31))
_LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
_LESS: tl.constexpr = tl.constexpr(1.0 - 2.0**-22)
_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2**23: what is added to it becomes whole, ties to even
# div_rn takes denormals for 0 in Triton 3.2, no longer in 3.6.
_FLUSHES: tl.constexpr = tl.constexpr(triton.__version__.startswith(("3.2.", "3.3.", "3.4.", "3.5.")))
_ROUNDER_BITS: tl.constexpr = tl.constexpr(0x4B400000)


@triton.jit
def _order(values):
    """Floats in order as integers, -0 below 0, NaN and the infinities beyond all that is finite; its own inverse."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & MAGNITUDE)


@triton.jit
def _float(order):
    """The inverse of :func:`_order`, but -0 becomes 0."""
    return (order ^ ((order >> 31) & MAGNITUDE)).to(tl.float32, bitcast=True) + 0.0


@triton.jit
def _extremes(acc, inside, exists, form: tl.constexpr):
    """Of each row, as integers that are larger the further out: highest and lowest, or twice the largest magnitude."""
    if form == "levels":
        order = _order(acc)
        top = tl.max(tl.where(inside, order, _LOWEST), axis=1)
        bottom = tl.max(tl.where(inside, ~order, _LOWEST), axis=1)
        return tl.where(exists, top, 0), tl.where(exists, bottom, 0)
    most = tl.max(magnitude_of(acc), axis=1)  # what is not inside is 0
    return most, most


@triton.jit
def _divide(dividend, divisor):
    """Of float32s, rounded to nearest. In float64 that is so, too: no quotient is that near to the middle of two."""
    if _FLUSHES:
        quotient = (dividend.to(tl.float64) / divisor.to(tl.float64)).to(tl.float32)
    else:
        quotient = tl.math.div_rn(dividend, divisor)
    return quotient


@triton.jit
def _finite_step(low, span, last: tl.constexpr):
    """span / last; a little less where rounding would make low + last * step infinite."""
    step = _divide(span, tl.full(span.shape, last, tl.float32))
    return tl.where(magnitude_of(low + step * last) < INFINITY, step, step * _LESS)


@triton.jit
def _measure(
    grad, residual, extremes, status, numel, block, tiles,
    form: tl.constexpr, has_residual: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    start, offset, inside, row = place(numel, block, tiles, rows, width)
    exists = tl.max(inside.to(tl.int32), axis=1) > 0  # the last block may end before its last program
    acc = load_acc(grad, residual, start + offset, inside, has_residual)
    top, bottom = _extremes(acc, inside, exists, form)
    if tl.max(tl.maximum(top, bottom), axis=0) >= INFINITY:
        tl.store(status, 1)
    tl.atomic_max(extremes + 2 * row, top, mask=exists)
    tl.atomic_max(extremes + 2 * row + 1, bottom, mask=exists)


@triton.jit
def _encode(
    grad, residual, parameters, codes, extremes, status, numel, block, tiles, tau,
    form: tl.constexpr, bits: tl.constexpr, has_residual: tl.constexpr, update: tl.constexpr, measured: tl.constexpr,
    rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    start, offset, inside, row = place(numel, block, tiles, rows, width)
    exists = row * block < numel
    acc = load_acc(grad, residual, start + offset, inside, has_residual)
    if measured:
        top = tl.load(extremes + 2 * row, mask=exists, other=0)
        bottom = tl.load(extremes + 2 * row + 1, mask=exists, other=0)
    else:
        top, bottom = _extremes(acc, inside, exists, form)
    worst = tl.maximum(top, bottom)
    if tl.max(worst, axis=0) >= INFINITY:
        tl.store(status + 1, 1)  # whichever program comes first: all write the same
    if form == "ternary":
        plus, minus = (acc >= tau).to(tl.int32), (acc <= -tau).to(tl.int32)
        code = plus + 2 * minus
        value = tau * (plus - minus).to(tl.float32)
    else:
        last: tl.constexpr = (1 << bits) - 1.0 if form == "levels" else 448.0 if form == "float8" else 127.0
        if form == "levels":
            low, high = _float(~bottom), _float(top)
            step = _finite_step(low, tl.minimum(high - low, _LARGEST), last)
            tl.store(parameters + 2 * row, low, mask=exists)
            tl.store(parameters + 2 * row + 1, step, mask=exists)
        else:
            most = top.to(tl.float32, bitcast=True)
            low = tl.zeros_like(most)
            step = _finite_step(low, most, last)
            tl.store(parameters + row, step, mask=exists)
        divisor = tl.where(step > 0, step, 1.0)[:, None]
        low, step = low[:, None], step[:, None]
        if form == "levels":
            quotient = tl.minimum(_divide(acc - low, tl.broadcast_to(divisor, acc.shape)), last)
        else:
            quotient = _divide(acc, tl.broadcast_to(divisor, acc.shape))
            quotient = tl.maximum(tl.minimum(quotient, last), -last)
        if form == "float8":
            code = _float8_code(quotient)
            value = step * float8_value(code)
        else:
            shifted = quotient + _ROUNDER
            whole = shifted - _ROUNDER
            code = shifted.to(tl.int32, bitcast=True) - _ROUNDER_BITS
            if form == "levels":
                value = low + whole * step
            else:
                code += 127
                value = step * whole
    pack(codes, tl.where(inside, code & 0xFF, 0), start, block, offset, inside, bits, rows, width)
    if update:  # noqa: SIM102 - the one is known when this is compiled, the other when it runs
        if tl.load(status) == 0:
            tl.store(residual + start + offset, acc - value, mask=inside & (worst < INFINITY)[:, None])


@triton.jit
def _float8_code(values):
    """The bits of a float8_e4m3fn, as int32, nearest to a float32 in -464..464, ties to even; above 448 it is 448."""
    magnitude = magnitude_of(values)
    sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
    # Below 2**-6 the spacing is 2**-9: that of floats at 2**14, where the addition rounds.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    return tl.where(magnitude < (121 << 23), small, normal) | sign


def quantize(
    grad: Tensor, residual: Tensor | None, form: str, bits: int, block: int, tau: float, update: bool
) -> tuple[Tensor, Tensor]:
    """Encode without ever waiting for the device.

    Args:
        form: "levels", "signed", "float8" or "ternary", which takes ``tau`` and has no blocks.

    Returns:
        The payload, and two int32: if one of them is not 0, acc is not finite, and the payload is worth nothing.
    """
    numel, update = grad.numel(), update and residual is not None
    layout = Layout.whole(numel) if form == "ternary" else Layout.of(numel, block)
    nbytes = {"levels": 8, "ternary": 0}.get(form, 4) * layout.blocks
    payload = torch.empty(nbytes + -(-numel * bits // 8), dtype=torch.uint8, device=grad.device)
    status = status_of(grad)
    if not numel:
        return payload, status
    other = grad if residual is None else residual
    has_residual, extremes = residual is not None, status
    measured = layout.tiles > 1 and form != "ternary"
    if measured:
        extremes = torch.full((2 * layout.blocks,), -(2**31), dtype=torch.int32, device=grad.device)
        _measure[layout.grid](
            grad, other, extremes, status, numel, layout.block, layout.tiles,
            form, has_residual, layout.rows, layout.width, **EXACT,
        )  # fmt: skip
    elif update:
        check_gradient(grad, other, status)
    _encode[layout.grid](
        grad, other, payload[:nbytes].view(torch.float32), payload[nbytes:], extremes, status, numel, layout.block,
        layout.tiles, tau, form, bits, has_residual, update, measured, layout.rows, layout.width, **EXACT,
    )  # fmt: skip
    return payload, status


def _finished(
    grad: Tensor, residual: Tensor | None, form: str, bits: int, block: int, tau: float, update: bool
) -> Tensor | float:
    payload, status = quantize(grad, residual, form, bits, block, tau, update)
    return nonfinite_sum(grad, residual) if any(status.tolist()) else payload


def encode_levels(grad: Tensor, residual: Tensor | None, bits: int, block: int, update: bool = False) -> Tensor | float:
    """:func:`gradcomp.kernels.reference.encode_levels`, bit for bit."""
    return _finished(grad, residual, "levels", bits, block, 0.0, update)


def encode_int8(grad: Tensor, residual: Tensor | None, block: int, update: bool = False) -> Tensor | float:
    """:func:`gradcomp.kernels.reference.encode_int8`, bit for bit."""
    return _finished(grad, residual, "signed", 8, block, 0.0, update)


def encode_float8(grad: Tensor, residual: Tensor | None, block: int, update: bool = False) -> Tensor | float:
    """:func:`gradcomp.kernels.reference.encode_float8`, bit for bit."""
    return _finished(grad, residual, "float8", 8, block, 0.0, update)


def encode_ternary(grad: Tensor, residual: Tensor | None, tau: float, update: bool = False) -> Tensor | float:
    """:func:`gradcomp.kernels.reference.encode_ternary`, bit for bit."""
    exact = torch.tensor(tau, dtype=torch.float32).item()  # interpreted, a number is not rounded when it is handed over
    return _finished(grad, residual, "ternary", 2, 0, exact, update)
