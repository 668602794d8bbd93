"""TernGrad: each element becomes -1, 0 or 1 times its block's scale, at random.

W. Wen, C. Xu, F. Yan, C. Wu, Y. Wang, Y. Chen, H. Li, "TernGrad: ternary gradients to reduce communication in
distributed deep learning", NeurIPS 2017.

With s the largest magnitude of a block, an element g is decoded as ``sign(g) * s`` with probability ``|g| / s``, else
as 0, so that the mean is g. The paper clips each layer's gradients first, to 2.5 standard deviations, so that a few
large elements do not make s, and with it the noise, large: ``clip`` does that with the root mean square of each block.
What is clipped is lost (with ``feedback``, sent later). The paper has one scale a layer; with one for every block of
1024 elements, outliers are few to begin with, and ``clip`` is off unless asked for.

Wire: a CODES packet of 2 bits an element, 00 zero, 01 plus, 10 minus, after a float32 scale a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradcomp import kernels
from gradcomp.compressors import check_block
from gradcomp.compressors.stochastic import StochasticCompressor
from gradcomp.options import check_number
from gradcomp.packet import Kind

__all__ = ["TernGrad"]

_MOST_CLIP = 1e6


@dataclass(frozen=True, kw_only=True)
class TernGrad(StochasticCompressor):
    """Send signs, each with a probability that grows with the magnitude.

    State: ``random`` (int64, key and step); with ``feedback`` also ``residual`` (float32, flat).

    Attributes:
        block: elements that share a scale; a multiple of 8. Smaller: less noise, more scales to send.
        clip: a block's scale is at most so many times its root mean square; 0 for no limit. The paper's is 2.5.
    """

    id: ClassVar[str] = "terngrad"
    kind: ClassVar[Kind] = Kind.CODES
    block: int = 1024
    clip: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block("terngrad", "block", self.block)
        check_number("terngrad", "clip", self.clip, at_least=0.0, at_most=_MOST_CLIP)
        object.__setattr__(self, "clip", float(self.clip))

    @property
    def _block(self) -> int:
        return self.block

    @property
    def _bits(self) -> int:
        return 2

    def _encode(self, grad: Tensor, residual: Tensor | None, key: int, step: int, update: bool) -> Tensor | float:
        return kernels.encode_stochastic(grad, residual, 1, self.block, "max", self.clip, key, step, update=update)

    def _add(self, out: Tensor, scales: Tensor, codes: Tensor, scale: float, addend: Tensor | None) -> None:
        kernels.add_codes(out, scales, codes, 2, self.block, scale, addend)
