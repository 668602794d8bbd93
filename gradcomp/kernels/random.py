"""Random numbers, from the fastest backend; :mod:`gradcomp.kernels.reference_random` defines them."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcomp.kernels import reference_random, triton

__all__ = ["philox", "random_words", "words_of"]

_WORD = 1 << 64


def philox(key: int, step: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """:func:`gradcomp.kernels.reference_random.philox`, from the fastest backend."""
    device = torch.device(device)
    if device.type == "cuda" and triton.enabled():
        from gradcomp.kernels import triton_random

        return triton_random.philox(key, step, start, count, device)
    return reference_random.philox(key, step, start, count, device)


def random_words(stream: Tensor, count: int) -> Tensor:
    """The first ``count`` words of :func:`philox` from position 0 on, int64 [count]; on CUDA nothing waits for them.

    Args:
        stream: int64 [2], the bits of key and step, on the device where the words are wanted.
    """
    if triton.takes(stream):
        from gradcomp.kernels import triton_random

        return triton_random.random_words(stream, count)
    key, step = words_of(stream)
    return reference_random.philox(key, step, 0, -(-count // 4), stream.device).view(-1)[:count]


def words_of(stream: Tensor) -> tuple[int, int]:
    """Key and step of a stream, both in 0..2**64-1; waits for its device."""
    key, step = stream.tolist()
    return key % _WORD, step % _WORD
