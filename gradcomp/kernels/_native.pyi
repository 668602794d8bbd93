"""What gradcomp/kernels/native/module.cpp exports."""

from torch import Tensor

LEVEL: str

def split(numel: int, align: int, threads: int) -> list[int]: ...
def select_threshold(
    grad: Tensor, residual: Tensor | None, tau: float, level: str = ...
) -> tuple[Tensor, Tensor] | float: ...
def add_factors(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    columns: int,
    scale: float,
    addend: Tensor | None = None,
    threads: int = 1,
    level: str = ...,
) -> None: ...
def add_spectrum(
    out: Tensor,
    values: Tensor,
    index: Tensor,
    down: Tensor,
    across: Tensor,
    rows: int,
    columns: int,
    height: int,
    width: int,
    scale: float,
    addend: Tensor | None = None,
    threads: int = 1,
    level: str = ...,
) -> None: ...
