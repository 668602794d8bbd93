"""What gradcomp/kernels/native/module.cpp exports."""

from torch import Tensor

LEVEL: str

def select_threshold(
    grad: Tensor, residual: Tensor | None, tau: float, level: str = ...
) -> tuple[Tensor, Tensor] | float: ...
