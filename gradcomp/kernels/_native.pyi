"""What gradcomp/kernels/native/module.cpp exports."""

from torch import Tensor

LEVEL: str

def split(numel: int, align: int, threads: int) -> list[int]: ...
def encode_signs(
    grad: Tensor, residual: Tensor | None, tau: float, update: bool, threads: int, level: str = ...
) -> tuple[Tensor, int] | float: ...
def encode_largest(
    grad: Tensor, residual: Tensor | None, k: int, update: bool, threads: int, level: str = ...
) -> tuple[Tensor, int] | float: ...
def encode_above(
    grad: Tensor,
    residual: Tensor | None,
    tau: float,
    most: int,
    k: int,
    update: bool,
    threads: int,
    level: str = ...,
) -> tuple[Tensor, int] | float: ...
def sample_largest(grad: Tensor, residual: Tensor | None, stride: int, count: int, weight: float) -> Tensor: ...
