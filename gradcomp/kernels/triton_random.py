"""Philox4x32-10 in Triton: the numbers of :mod:`gradcomp.kernels.reference_random`, bit for bit.

``tl.philox`` is that generator; what is ours is which counter an element has, and the order of its sixteen bits.

A stream is int64 [2] on the device, the bits of key and step: read when a kernel runs, so that one which was captured
in a graph draws fresh numbers once the step in it was counted up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcomp.kernels.triton import grid

__all__ = ["draw", "new_stream", "philox", "random_halves", "random_words"]

_GROUPS = 64
_COUNTERS = 512
_WORD = 1 << 64


@triton.jit
def words_at(stream, position):
    """The four words, uint32, at counters (position, step) under the key of ``stream``; ``position`` int64."""
    key = tl.load(stream)
    step = tl.load(stream + 1) + position * 0
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    return tl.philox(key, low, high, step.to(tl.uint32), (step >> 32).to(tl.uint32))


@triton.jit
def draw(stream, first_group, groups: tl.constexpr):
    """int32 [64 * groups]: sixteen random bits for each of the elements from ``64 * first_group`` on.

    A counter makes the bits of eight elements, eight apart, so they are drawn once and then brought into order.
    """
    lanes = first_group * 8 + tl.arange(0, 8 * groups)
    first, second, third, fourth = words_at(stream, lanes)
    halves = tl.join(
        tl.join(_halves(first, groups), _halves(second, groups)),
        tl.join(_halves(third, groups), _halves(fourth, groups)),
    )  # group, lane, half, word % 2, word // 2
    return tl.reshape(tl.permute(halves, (0, 4, 3, 2, 1)), (64 * groups,))


@triton.jit
def _halves(word, groups: tl.constexpr):
    low, high = (word & 0xFFFF).to(tl.int32), (word >> 16).to(tl.int32)
    return tl.join(tl.reshape(low, (groups, 8)), tl.reshape(high, (groups, 8)))


@triton.jit
def _philox(stream, start, out, count, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    first, second, third, fourth = words_at(stream, at + tl.load(start))
    tl.store(out + 4 * at, first.to(tl.int64), mask=inside)
    tl.store(out + 4 * at + 1, second.to(tl.int64), mask=inside)
    tl.store(out + 4 * at + 2, third.to(tl.int64), mask=inside)
    tl.store(out + 4 * at + 3, fourth.to(tl.int64), mask=inside)


@triton.jit
def _random_halves(stream, first_group, skipped, out, count, groups: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * groups
    at = group * 64 - skipped + tl.arange(0, 64 * groups)
    tl.store(out + at, draw(stream, first_group + group, groups), mask=(at >= 0) & (at < count))


def new_stream(key: int, step: int, device: torch.device) -> Tensor:
    """``key`` and ``step``, each in 0..2**64-1, where kernels read them."""
    return torch.tensor([_signed(key), _signed(step)], dtype=torch.int64).to(device, non_blocking=True)


def philox(key: int, step: int, start: int, count: int, device: torch.device) -> Tensor:
    """:func:`gradcomp.kernels.reference_random.philox`, bit for bit."""
    out = torch.empty((count, 4), dtype=torch.int64, device=device)
    if count:
        words = torch.tensor([_signed(key), _signed(step), _signed(start)], dtype=torch.int64)
        stream = words.to(device, non_blocking=True)
        _philox[grid(count, _COUNTERS)](stream, stream[2:], out, count, _COUNTERS)
    return out


def random_words(stream: Tensor, count: int) -> Tensor:
    """:func:`gradcomp.kernels.random.random_words`, bit for bit."""
    positions = -(-count // 4)
    out = torch.empty(4 * positions, dtype=torch.int64, device=stream.device)
    if count:
        _philox[grid(positions, _COUNTERS)](stream, torch.zeros_like(stream), out, positions, _COUNTERS)
    return out[:count]


def random_halves(key: int, step: int, start: int, count: int, device: torch.device) -> Tensor:
    """:func:`gradcomp.kernels.reference.random_halves`, bit for bit."""
    out = torch.empty(count, dtype=torch.int32, device=device)
    if count:
        skipped = start % 64
        stream = new_stream(key, step, device)
        _random_halves[grid(skipped + count, 64 * _GROUPS)](stream, start // 64, skipped, out, count, _GROUPS)
    return out


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word
