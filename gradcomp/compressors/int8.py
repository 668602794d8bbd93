"""Block-scaled 8-bit integers: a byte an element, a scale a block.

T. Dettmers, "8-bit approximations for parallelism in deep learning", ICLR 2016, compares 8-bit types for gradients on
the wire; this is the linear one, with a scale for each block and error feedback.

With ``acc = grad + residual``, cut into blocks of ``block`` elements: ``scale = max|acc| / 127``,
``code = round(acc / scale)`` to nearest, ties to even, in -127..127, ``decoded = scale * code`` and
``residual = acc - decoded``. 0 stays 0, and an element's error is at most half a scale.

Wire: a CODES packet with 8 bits. For each block a float32 scale; then a byte an element, code + 127. With blocks of
1024 that is 8.03 bits an element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradcomp import kernels
from gradcomp.compressors import check_block
from gradcomp.compressors.quantizer import Quantizer
from gradcomp.packet import Kind

__all__ = ["Int8"]


@dataclass(frozen=True, kw_only=True)
class Int8(Quantizer):
    """Send every element as a multiple of its block's largest magnitude / 127.

    Attributes:
        block: elements that share a scale; a multiple of 8. Larger: fewer bytes, coarser scales.
    """

    id: ClassVar[str] = "int8"
    kind: ClassVar[Kind] = Kind.CODES
    block: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block("int8", "block", self.block)

    def _header(self) -> tuple[int, int, float]:
        return 8, self.block, 0.0

    def _quantize(self, grad: Tensor, residual: Tensor | None, update: bool) -> Tensor | float:
        return kernels.encode_int8(grad, residual, self.block, update)
