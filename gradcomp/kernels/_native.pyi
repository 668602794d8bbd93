"""What gradcomp/kernels/native/module.cpp exports."""

from torch import Tensor

LEVEL: str

def split(numel: int, align: int, threads: int) -> list[int]: ...
def select_threshold(
    grad: Tensor, residual: Tensor | None, tau: float, level: str = ...
) -> tuple[Tensor, Tensor] | float: ...
