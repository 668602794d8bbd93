"""What gradcomp/kernels/native/module.cpp exports."""

from torch import Tensor

LEVEL: str

def split(numel: int, align: int, threads: int) -> list[int]: ...
def encode_bits(
    grad: Tensor,
    residual: Tensor | None,
    block: int,
    symmetric: bool,
    update: bool,
    threads: int,
    level: str = ...,
) -> tuple[Tensor, Tensor] | float: ...
def add_bits(
    out: Tensor,
    scales: Tensor,
    bits: Tensor,
    block: int,
    addend: Tensor | None,
    threads: int,
    level: str = ...,
) -> None: ...
def encode_signs(grad: Tensor, threads: int, level: str = ...) -> tuple[Tensor, int] | float: ...
def encode_sign_map(grad: Tensor, threads: int, level: str = ...) -> Tensor: ...
def select_threshold(
    grad: Tensor, residual: Tensor | None, tau: float, level: str = ...
) -> tuple[Tensor, Tensor] | float: ...
