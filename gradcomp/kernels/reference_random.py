"""Philox4x32-10, in plain torch operations.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

A bijection of 128-bit counters under a 64-bit key that passes BigCrush: no state, any number by its counter. Ours is
(position, step), 64 bits each, low words first.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["philox", "random_halves"]

_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(key: int, step: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The four words at counters (start, step) to (start + count - 1, step).

    Args:
        key, step, start: in 0..2**64-1.

    Returns:
        int64 [count, 4], each a word in 0..2**32-1.
    """
    position = torch.arange(count, device=device) + (start if start < 1 << 63 else start - (1 << 64))
    words = [
        position & _LOW,
        (position >> 32) & _LOW,
        torch.full_like(position, step & _LOW),
        torch.full_like(position, step >> 32),
    ]
    low_key, high_key = key & _LOW, key >> 32
    for _ in range(_ROUNDS):
        # An int64 product keeps the low 64 bits, which are all there are of two 32-bit words.
        first, second = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            ((second >> 32) & _LOW) ^ words[1] ^ low_key,
            second & _LOW,
            ((first >> 32) & _LOW) ^ words[3] ^ high_key,
            first & _LOW,
        ]
        low_key, high_key = (low_key + _WEYL[0]) & _LOW, (high_key + _WEYL[1]) & _LOW
    return torch.stack(words, 1)


def random_halves(key: int, step: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Sixteen random bits for each of the elements start to start + count - 1.

    Eight positions make the bits of 64 elements: element i has half ``i // 8 % 2`` (the low one first) of word
    ``i // 16 % 4`` at position ``i // 64 * 8 + i % 8``. So eight counters side by side in vector registers give their
    elements' bits in order, eight at a time.

    Args:
        start: element, at least 0; ``start + count`` below 2**63.

    Returns:
        int32 [count], in 0..2**16-1.
    """
    first, last = start // 64, -(-(start + count) // 64)
    words = philox(key, step, 8 * first, 8 * (last - first), device).view(-1, 8, 4)  # group, lane, word
    halves = torch.stack([words & 0xFFFF, words >> 16], 3).to(torch.int32)  # group, lane, word, half
    inside = start - 64 * first
    return halves.permute(0, 2, 3, 1).reshape(-1)[inside : inside + count]
