"""Natural compression: each element rounded at random to a power of two.

S. Horvath, C.-Y. Ho, L. Horvath, A. N. Sahu, M. Canini, P. Richtarik, "Natural compression for distributed deep
learning", 2019 (arXiv:1905.10988; MSML 2022).

An element between two powers of two, ``p <= |g| <= 2 p``, is decoded as ``2 p`` with probability ``(|g| - p) / p``,
else as ``p``, so that the mean is g; the variance is at most ``g**2 / 8``, whatever the others are. The paper sends a
sign and the 8 bits of float32's exponent. Here there are 7: the 127 powers of two from a block's scale down, and 0, to
which what is smaller than the smallest is rounded, at random too. The scale is 1 unless a block holds something
larger, so nothing is lost that float32 could say until a block holds both that and something below 2**-126 of it.

Wire: a POWERS packet. A float32 scale a block, then a byte an element: the sign in its top bit, and how many powers of
two below the scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradcomp import kernels
from gradcomp.compressors import check_block
from gradcomp.compressors.stochastic import StochasticCompressor
from gradcomp.packet import Kind

__all__ = ["Natural"]


@dataclass(frozen=True, kw_only=True)
class Natural(StochasticCompressor):
    """Send signs and exponents: a byte an element, and a relative error of its own for each.

    State: ``random`` (int64, key and step); with ``feedback`` also ``residual`` (float32, flat).

    Attributes:
        block: elements that share a scale; a multiple of 8. Matters little.
    """

    id: ClassVar[str] = "natural"
    kind: ClassVar[Kind] = Kind.POWERS
    block: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block("natural", "block", self.block)

    @property
    def _block(self) -> int:
        return self.block

    @property
    def _bits(self) -> int:
        return 8

    def _encode(self, grad: Tensor, residual: Tensor | None, key: int, step: int, update: bool) -> Tensor | float:
        return kernels.encode_powers(grad, residual, self.block, key, step, update=update)

    def _add(self, out: Tensor, scales: Tensor, codes: Tensor, scale: float, addend: Tensor | None) -> None:
        kernels.add_powers(out, scales, codes, self.block, scale, addend)
