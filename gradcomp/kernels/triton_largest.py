"""The k largest of what passed a threshold, in Triton: exact, of equal magnitudes those with the lowest index.

The magnitude of the k-th largest, as an integer, is found in two rounds: its upper 15 bits from a histogram of them,
its lower 16 from one of those that share these. What is larger is kept, and as many of its equals as are still wanted.
Nothing waits, and nothing is sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcomp.kernels.triton import EXACT, grid
from gradcomp.kernels.triton_indices import (
    CODING,
    COUNT,
    FLAGS,
    LEAST,
    LOW_BITS,
    NBYTES,
    PASSED,
    TIES,
    add_before,
    choose_coding,
)

__all__ = ["keep_largest"]

_UPPER: tl.constexpr = tl.constexpr(1 << 15)  # bins
_LOWER: tl.constexpr = tl.constexpr(1 << 16)
_BLOCK = 1024
_PICK_WARPS = 32  # one program reads a whole histogram into its registers


@triton.jit
def _is_payload(status, least, room):
    """Whether there is one, by what passed."""
    passed = tl.load(status + PASSED)
    return (tl.load(status + FLAGS) == 0) & (passed >= least) & (passed <= room)


@triton.jit(do_not_specialize=["most", "least", "room"])
def _gather(
    grad, residual, marks, values, histogram, status, most, least, room, has_residual: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """The values of what passed, and if not all of them are kept how many have which upper bits."""
    passed = tl.load(status + PASSED)
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < tl.where(_is_payload(status, least, room), passed, 0)
    position = tl.load(marks + at, mask=inside, other=0).to(tl.int64) >> 1
    value = tl.load(grad + position, mask=inside, other=0.0).to(tl.float32)
    if has_residual:
        value += tl.load(residual + position, mask=inside, other=0.0)
    tl.store(values + at, value, mask=inside)
    if passed > most:
        upper = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 16
        tl.atomic_add(histogram + upper, 1, mask=inside, sem="relaxed")


@triton.jit
def _find(counts, number, wanted):
    """The bin that holds the ``wanted``-th from the end, and how many are in those behind it."""
    behind = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)
    here = (behind < wanted) & (behind + counts >= wanted)
    return tl.sum(tl.where(here, number, 0), axis=0), tl.sum(tl.where(here, behind, 0), axis=0)


@triton.jit
def _pick(histogram, wanted, rows: tl.constexpr):
    """The bin that holds the ``wanted``-th from the end, and which of that bin's it is, from 1 on."""
    row, column = tl.arange(0, rows), tl.arange(0, 256)
    counts = tl.load(histogram + row[:, None] * 256 + column[None, :])
    found, behind = _find(tl.sum(counts, axis=1), row, wanted)
    wanted -= behind
    bin, behind = _find(tl.load(histogram + found * 256 + column), column, wanted)
    return found * 256 + bin, wanted - behind


@triton.jit(do_not_specialize=["wanted", "most"])
def _pick_upper(histogram, status, wanted, most, bins: tl.constexpr):
    if tl.load(status + PASSED) > most:
        upper, rest = _pick(histogram, wanted.to(tl.int64), bins // 256)
        tl.store(status + LEAST, upper.to(tl.int64) << 16)
        tl.store(status + TIES, rest)


@triton.jit(do_not_specialize=["most", "least", "room"])
def _count_lower(values, histogram, status, most, least, room, block: tl.constexpr):
    passed = tl.load(status + PASSED)
    if (passed > most) & _is_payload(status, least, room):
        at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        magnitude = tl.load(values + at, mask=at < passed, other=0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        near = (magnitude >> 16) == (tl.load(status + LEAST) >> 16)
        tl.atomic_add(histogram + (magnitude & 0xFFFF), 1, mask=near & (at < passed), sem="relaxed")


@triton.jit(do_not_specialize=["numel", "most", "wanted", "least", "room"])
def _settle(histogram, status, numel, most, wanted, least, room, bins: tl.constexpr):
    """What is sent, and how."""
    passed = tl.load(status + PASSED)
    count = passed
    if passed > most:
        lower, rest = _pick(histogram, tl.load(status + TIES), bins // 256)
        tl.store(status + LEAST, tl.load(status + LEAST) + lower)
        tl.store(status + TIES, rest)
        count = wanted.to(tl.int64)
    count = tl.where(_is_payload(status, least, room), count, 0)
    coding, low_bits, nbytes = choose_coding(count, numel, False)
    tl.store(status + COUNT, count)
    tl.store(status + CODING, coding)
    tl.store(status + LOW_BITS, low_bits)
    tl.store(status + NBYTES, 4 * count + nbytes)


@triton.jit
def _compare(values, at, status, passed):
    """Which are larger than the least that is sent, and which equal it."""
    magnitude = tl.load(values + at, mask=at < passed, other=0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    least = tl.load(status + LEAST)
    return (magnitude > least) & (at < passed), (magnitude == least) & (at < passed)


@triton.jit
def _count_kept(values, larger, ties, status, block: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * block
    passed = tl.load(status + PASSED)
    if (first < passed) & (tl.load(status + COUNT) > 0):
        above, equal = _compare(values, first + tl.arange(0, block), status, passed)
        tl.store(larger + tl.program_id(0), tl.sum(above.to(tl.int64), axis=0))
        tl.store(ties + tl.program_id(0), tl.sum(equal.to(tl.int64), axis=0))


@triton.jit
def _keep(marks, values, larger, ties, kept, out, left, status, leave: tl.constexpr, block: tl.constexpr):
    """Write the marks and values that are sent one after the other, and 0 to what is left of them."""
    first = tl.program_id(0).to(tl.int64) * block
    passed = tl.load(status + PASSED)
    if (first < passed) & (tl.load(status + COUNT) > 0):
        at = first + tl.arange(0, block)
        above, equal = _compare(values, at, status, passed)
        wanted = tl.load(status + TIES)
        ties_before = add_before(ties, tl.program_id(0), block)
        equal &= ties_before + tl.cumsum(equal.to(tl.int64), axis=0) <= wanted
        sent = above | equal
        before = add_before(larger, tl.program_id(0), block) + tl.minimum(ties_before, wanted)
        place = before + tl.cumsum(sent.to(tl.int64), axis=0) - 1
        mark = tl.load(marks + at, mask=sent, other=0)
        tl.store(kept + place, mark, mask=sent)
        tl.store(out + place, tl.load(values + at, mask=sent, other=0.0).to(tl.int32, bitcast=True), mask=sent)
        if leave:
            tl.store(left + (mark.to(tl.int64) >> 1), tl.zeros((block,), tl.float32), mask=sent)


def keep_largest(
    grad: Tensor, residual: Tensor | None, marks: Tensor, kept: Tensor, out: Tensor, status: Tensor,
    *, most: int, k: int, least: int, left: Tensor | None,
) -> None:  # fmt: skip
    """Of what is listed in ``marks``, keep all, or the ``k`` largest if that is more than ``most``.

    Nothing is sent if fewer than ``least`` passed, more than there is room for, or not all is finite.

    Args:
        kept: for the marks of what is sent, in order.
        out: int32, for the values of that, in order.
        left: becomes 0 where something is sent.
    """
    room, numel, device = len(marks), grad.numel(), grad.device
    values = torch.empty(room, dtype=torch.float32, device=device)
    histogram = torch.zeros(_UPPER.value + _LOWER.value, dtype=torch.int32, device=device)
    upper, lower = histogram[: _UPPER.value], histogram[_UPPER.value :]
    held, target = grad if residual is None else residual, grad if left is None else left
    launch = grid(room, _BLOCK)
    larger, ties = torch.empty((2, launch[0]), dtype=torch.int64, device=device)
    _gather[launch](grad, held, marks, values, upper, status, most, least, room, residual is not None, _BLOCK, **EXACT)
    if most < room:  # else all is kept
        _pick_upper[(1,)](upper, status, k, most, _UPPER.value, num_warps=_PICK_WARPS)
        _count_lower[launch](values, lower, status, most, least, room, _BLOCK)
    _settle[(1,)](lower, status, numel, most, k, least, room, _LOWER.value, num_warps=_PICK_WARPS)
    _count_kept[launch](values, larger, ties, status, _BLOCK)
    _keep[launch](marks, values, larger, ties, kept, out, target, status, left is not None, _BLOCK)
