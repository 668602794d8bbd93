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
def choose_coding(count: int, numel: int, signed: bool) -> int: ...
def max_coded_nbytes(count: int, numel: int, coding: int, signed: bool) -> int: ...
def encode_indices(index: Tensor, negative: Tensor | None, numel: int, coding: int, level: str = ...) -> Tensor: ...
def encode_planes(mask: Tensor, negative: Tensor | None, numel: int, coding: int, level: str = ...) -> Tensor: ...
def check_indices(
    payload: Tensor, count: int, numel: int, coding: int, signed: bool, level: str = ...
) -> str | None: ...
def decode_indices(
    payload: Tensor, count: int, numel: int, coding: int, signed: bool, level: str = ...
) -> tuple[Tensor, Tensor] | str: ...
def add_signs(
    out: Tensor, payload: Tensor, count: int, coding: int, magnitude: float, level: str = ..., threads: int = ...
) -> str | None: ...
def add_values(
    out: Tensor,
    payload: Tensor,
    count: int,
    coding: int,
    values: Tensor,
    scale: float,
    level: str = ...,
    threads: int = ...,
) -> str | None: ...
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
