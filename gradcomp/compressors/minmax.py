"""Uniform quantization between the extremes of each block, with 1 to 8 bits.

I. Markov, H. Ramezanikebrya, D. Alistarh, "CGX: adaptive system support for communication-efficient deep learning",
Middleware 2022.

With ``acc = grad + residual``, cut into blocks of ``block`` elements, and ``last = 2**bits - 1``:
``low = min(acc)``, ``step = (max(acc) - low) / last``, ``code = round((acc - low) / step)`` to nearest, ties to even,
and ``decoded = low + code * step``. The error of an element is at most half a step; ``residual = acc - decoded``.

A block whose elements are all equal has step 0 and is sent exactly. With 1 bit and error feedback the residual is not
bounded: it may be as wide as its block was, and widens the next one. From 2 bits on it is a third as wide at most.

Wire: a LEVELS packet. For each block float32 low and float32 step; then ``bits`` bits an element, lowest bits first.
With 4 bits and blocks of 1024 that is 4.06 bits an element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradcomp import kernels
from gradcomp.compressors import check_block
from gradcomp.compressors.quantizer import Quantizer
from gradcomp.options import check_integer
from gradcomp.packet import Kind

__all__ = ["MinMax"]


@dataclass(frozen=True, kw_only=True)
class MinMax(Quantizer):
    """Send the nearest of 2**bits levels, evenly between the lowest and the highest element of each block.

    Attributes:
        bits: of a code, 1 to 8. More: more traffic, smaller errors.
        block: elements that share their levels; a multiple of 8. Larger: fewer bytes, coarser levels.
    """

    id: ClassVar[str] = "minmax"
    kind: ClassVar[Kind] = Kind.LEVELS
    bits: int = 4
    block: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("minmax", "bits", self.bits, at_least=1, at_most=8)
        check_block("minmax", "block", self.block)

    def _header(self) -> tuple[int, int, float]:
        return self.bits, self.block, 0.0

    def _quantize(self, grad: Tensor, residual: Tensor | None, update: bool) -> Tensor | float:
        return kernels.encode_levels(grad, residual, self.bits, self.block, update)
