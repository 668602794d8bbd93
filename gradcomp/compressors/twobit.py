"""Two-bit compression: plus tau, minus tau or nothing, for every element.

T. Chen et al., "MXNet: a flexible and efficient machine learning library for heterogeneous distributed systems", NIPS
workshop on machine learning systems, 2015; the scheme is that of its documentation, "Gradient compression" (2017),
after N. Strom, "Scalable distributed DNN training using commodity GPU cloud computing", Interspeech 2015.

With ``acc = grad + residual``: an element with ``acc >= tau`` is sent as +tau, one with ``acc <= -tau`` as -tau, any
other as 0; ``residual = acc - sent``. ``threshold`` sends the same in fewer bytes where few elements pass; here the
size does not depend on the gradient: 2 bits an element. tau should be near what a gradient's elements are: with a much
larger one all is sent late, and where elements stay above it the residual grows without bound.

Wire: a CODES packet with 2 bits and one scale for all, tau, in the header; 00 nothing, 01 plus, 10 minus, four elements
to a byte, lowest bits first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcomp import kernels
from gradcomp.compressors.quantizer import Quantizer
from gradcomp.options import check_number
from gradcomp.packet import Kind

__all__ = ["TwoBit"]

_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True, kw_only=True)
class TwoBit(Quantizer):
    """Send +tau, -tau or 0 for every element.

    Attributes:
        tau: the threshold and what is sent, in units of the gradient.
    """

    id: ClassVar[str] = "twobit"
    kind: ClassVar[Kind] = Kind.CODES
    tau: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("twobit", "tau", self.tau, at_least=_FLOAT32.tiny, at_most=_FLOAT32.max)
        object.__setattr__(self, "tau", float(self.tau))  # 1 and 1.0 are the same config

    def _header(self) -> tuple[int, int, float]:
        return 2, 0, self.tau

    def _quantize(self, grad: Tensor, residual: Tensor | None, update: bool) -> Tensor | float:
        return kernels.encode_ternary(grad, residual, self.tau, update)
