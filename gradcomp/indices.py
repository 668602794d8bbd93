"""Index sets as bytes: which elements a sparse packet speaks of, and with what sign.

An index set is strictly increasing, below ``numel``, with a sign for each element if it is *signed*. Four codings, all
little-endian, lowest bits first; count and numel alone say which one is used (:func:`choose`), so both ends know it
beforehand:

======  ==========================  =================================================================================
WORDS   4 bytes an element          u32: index in the low 31 bits, bit 31 the sign. numel <= 2**31 only.
GAPS    2 bytes an element          u16: low bit the sign, the upper 15 bits how many elements lie between this one
                                    and the one before. numel <= 2**15 only.
MAP     1 bit for every element of  Whether the set names it. Then, if signed, a sign bit for each element it names.
        numel, 1 for each sign
RICE    log2(numel / count) + 1.5   For each element its sign and the low r bits of how many elements lie between it
        bits an element, about;     and the one before, packed. Then for each the rest of that number, as so many bits
        1 for each sign             0, and a 1. r = floor(log2((numel - count) / count)), or 0.
======  ==========================  =================================================================================

RICE is Golomb's code with a power of two: S. W. Golomb, "Run-length encodings", IEEE Transactions on Information
Theory, 1966; R. F. Rice, J. R. Plaunt, "Adaptive variable-length coding for efficient compression of spacecraft
television data", IEEE Transactions on Communication Technology, 1971. Its two halves lie apart, as in P. Elias,
"Efficient storage and retrieval by content and address of static files", Journal of the ACM, 1974: neither is then
read bit by bit.

A set is a pair ``(index, negative)``: int64 indices, bool signs. Everything runs on the tensors' device.
"""

from __future__ import annotations

from torch import Tensor

from gradcomp.kernels import indices as kernels
from gradcomp.kernels.reference_indices import Coding, choose, max_coded_nbytes

__all__ = ["Coding", "check", "choose", "decode", "encode", "max_coded_nbytes"]


def encode(index: Tensor, negative: Tensor | None, numel: int, coding: Coding) -> Tensor:
    """Write a set.

    Args:
        index: int64, strictly increasing, in 0..numel-1.
        negative: bool, as many; None for an unsigned set.

    Returns:
        uint8, flat, on the device of ``index``.

    Raises:
        ValueError: not such a set, or one that ``coding`` cannot hold.
    """
    return kernels.encode(index, negative, numel, coding)


def decode(
    payload: Tensor, count: int, numel: int, coding: Coding, *, signed: bool, checked: bool = False
) -> tuple[Tensor, Tensor]:
    """Read and check a set.

    Args:
        payload: uint8, flat, starting at a multiple of 4 bytes in its storage.
        checked: whether :func:`check` was called. On CUDA nothing then waits for the device.

    Returns:
        int64 indices, strictly increasing, ``count`` of them, all below numel; bool signs, all False if not ``signed``.

    Raises:
        PacketError: anything else, found before more than a small multiple of the payload is allocated.
    """
    return kernels.decode(payload, count, numel, coding, signed=signed, checked=checked)


def check(payload: Tensor, count: int, numel: int, coding: Coding, *, signed: bool) -> None:
    """Raise PacketError unless :func:`decode` would return a set."""
    kernels.check(payload, count, numel, coding, signed=signed)
