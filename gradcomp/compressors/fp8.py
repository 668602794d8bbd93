"""Block-scaled 8-bit floats: a byte an element, a scale a block.

P. Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433, 2022, for the type: e4m3 has a sign, 4 bits
of exponent and 3 of mantissa, no infinity, and 448 as its largest value.

With ``acc = grad + residual``, cut into blocks of ``block`` elements: ``scale = max|acc| / 448``, ``code`` is
``acc / scale`` cast to float8_e4m3fn, to nearest, ties to even; ``decoded = scale * code`` and ``residual = acc -
decoded``. The relative error is at most 1/16 down to 2**-6 / 448 = 3.5e-5 of the block's largest: better than ``int8``
where magnitudes differ much within a block, worse where they do not.

Wire: a FLOAT8 packet. For each block a float32 scale; then a byte an element. With blocks of 1024 that is 8.03 bits an
element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradcomp import kernels
from gradcomp.compressors import check_block
from gradcomp.compressors.quantizer import Quantizer
from gradcomp.packet import Kind

__all__ = ["Float8"]


@dataclass(frozen=True, kw_only=True)
class Float8(Quantizer):
    """Send every element as float8_e4m3fn, scaled so that the largest of its block is 448.

    Attributes:
        block: elements that share a scale; a multiple of 8. Larger: fewer bytes, and more of the small ones become 0.
    """

    id: ClassVar[str] = "fp8"
    kind: ClassVar[Kind] = Kind.FLOAT8
    block: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block("fp8", "block", self.block)

    def _header(self) -> tuple[int, int, float]:
        return 8, self.block, 0.0

    def _quantize(self, grad: Tensor, residual: Tensor | None, update: bool) -> Tensor | float:
        return kernels.encode_float8(grad, residual, self.block, update)
