"""QSGD: each element rounded at random to one of a few levels of its bucket's norm.

D. Alistarh, D. Grubic, J. Li, R. Tomioka, M. Vojnovic, "QSGD: communication-efficient SGD via gradient quantization and
encoding", NeurIPS 2017.

The gradient is cut into buckets of ``bucket`` elements. With ``norm`` the bucket's largest magnitude (what the paper's
experiments use) or its Euclidean norm (what its theorems use), an element g is decoded as ``sign(g) * norm * k /
levels``, k being ``|g| / norm * levels`` rounded up or down at random, so that the mean is g. An error in one element
is below ``norm / levels``; without error feedback the variance is at most ``norm**2 / (4 levels**2)`` an element.

Wire: a CODES packet. ``norm / levels`` in float32 for each bucket, then as few bits an element as hold 2 levels + 1
codes: 8 for 127, 4 for 7, 2 for 1. The paper's Elias coding is left out: it pays where most codes are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradcomp import kernels
from gradcomp.compressors import check_block
from gradcomp.compressors.stochastic import StochasticCompressor
from gradcomp.options import check_choice, check_integer
from gradcomp.packet import Kind

__all__ = ["QSGD"]


@dataclass(frozen=True, kw_only=True)
class QSGD(StochasticCompressor):
    """Round to levels at random, without bias.

    State: ``random`` (int64, key and step); with ``feedback`` also ``residual`` (float32, flat).

    Attributes:
        levels: above 0, 1 to 127; one less than a power of two wastes no code. Fewer: fewer bits, more noise.
        bucket: elements that share a norm; a multiple of 8. Smaller: less noise, more norms to send.
        norm: ``max`` or ``l2``; with the latter levels are the square root of ``bucket`` times further apart at most.
    """

    id: ClassVar[str] = "qsgd"
    kind: ClassVar[Kind] = Kind.CODES
    levels: int = 127
    bucket: int = 512
    norm: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("qsgd", "levels", self.levels, at_least=1, at_most=127)
        check_block("qsgd", "bucket", self.bucket)
        check_choice("qsgd", "norm", self.norm, ("max", "l2"))

    @property
    def _block(self) -> int:
        return self.bucket

    @property
    def _bits(self) -> int:
        return self.levels.bit_length() + 1

    def _encode(self, grad: Tensor, residual: Tensor | None, key: int, step: int, update: bool) -> Tensor | float:
        return kernels.encode_stochastic(
            grad, residual, self.levels, self.bucket, self.norm, 0.0, key, step, update=update
        )

    def _add(self, out: Tensor, scales: Tensor, codes: Tensor, scale: float, addend: Tensor | None) -> None:
        kernels.add_codes(out, scales, codes, self._bits, self.bucket, scale, addend)
