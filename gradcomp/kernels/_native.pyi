"""What gradcomp/kernels/native/module.cpp exports."""

from collections.abc import Sequence

from torch import Tensor

LEVEL: str

def split(numel: int, align: int, threads: int) -> list[int]: ...
def encode_signs(
    grad: Tensor, residual: Tensor | None, tau: float, left: Tensor | None, threads: int, level: str = ...
) -> tuple[Tensor, int] | float: ...
def encode_signs_sampled(
    grad: Tensor,
    residual: Tensor,
    tau: float,
    stride: int,
    count: int,
    weight: float,
    left: Tensor,
    threads: int,
    level: str = ...,
) -> tuple[Tensor, int, float] | float: ...
def encode_largest(
    grad: Tensor, residual: Tensor | None, k: int, left: Tensor | None, threads: int, level: str = ...
) -> tuple[Tensor, int] | float: ...
def encode_above(
    grad: Tensor,
    residual: Tensor | None,
    tau: float,
    most: int,
    k: int,
    left: Tensor | None,
    threads: int,
    level: str = ...,
) -> tuple[Tensor, int] | float: ...
def sample_largest(grad: Tensor, residual: Tensor | None, stride: int, count: int, weight: float) -> Tensor: ...
def sample_threshold(grad: Tensor, residual: Tensor | None, stride: int, count: int, weight: float) -> float: ...
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
def sum_sets(
    out: Tensor,
    packets: Sequence[tuple[Tensor, int, int, float | None]],
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
def encode_bits(
    grad: Tensor,
    residual: Tensor | None,
    block: int,
    symmetric: bool,
    update: bool,
    threads: int,
    level: str = ...,
) -> Tensor | float: ...
def add_bits(
    out: Tensor,
    scales: Tensor,
    bits: Tensor,
    block: int,
    addend: Tensor | None,
    threads: int,
    level: str = ...,
) -> None: ...
def add_levels(
    out: Tensor,
    parameters: Tensor,
    codes: Tensor,
    bits: int,
    block: int,
    scale: float,
    addend: Tensor | None = None,
    threads: int = 1,
    level: str = ...,
) -> None: ...
def add_codes(
    out: Tensor,
    scales: Tensor,
    codes: Tensor,
    bits: int,
    block: int,
    scale: float,
    addend: Tensor | None = None,
    threads: int = 1,
    level: str = ...,
) -> None: ...
def add_float8(
    out: Tensor,
    scales: Tensor,
    codes: Tensor,
    block: int,
    scale: float,
    addend: Tensor | None = None,
    threads: int = 1,
    level: str = ...,
) -> None: ...
def find_code(packed: Tensor, count: int, bits: int, mask: int, threads: int = 1, level: str = ...) -> bool: ...
def encode_levels(
    grad: Tensor,
    residual: Tensor | None,
    bits: int,
    block: int,
    update: bool = False,
    threads: int = 1,
    level: str = ...,
) -> Tensor | float: ...
def encode_int8(
    grad: Tensor,
    residual: Tensor | None,
    block: int,
    update: bool = False,
    threads: int = 1,
    level: str = ...,
) -> Tensor | float: ...
def encode_float8(
    grad: Tensor,
    residual: Tensor | None,
    block: int,
    update: bool = False,
    threads: int = 1,
    level: str = ...,
) -> Tensor | float: ...
def encode_ternary(
    grad: Tensor,
    residual: Tensor | None,
    tau: float,
    update: bool = False,
    threads: int = 1,
    level: str = ...,
) -> Tensor | float: ...
def encode_stochastic(
    grad: Tensor,
    residual: Tensor | None,
    levels: int,
    block: int,
    l2: bool,
    clip: float,
    limit: float,
    key: int,
    step: int,
    update: bool,
    threads: int,
    level: str = ...,
) -> Tensor | float: ...
def encode_powers(
    grad: Tensor,
    residual: Tensor | None,
    block: int,
    key: int,
    step: int,
    update: bool,
    threads: int,
    level: str = ...,
) -> Tensor | float: ...
def add_powers(
    out: Tensor,
    scales: Tensor,
    codes: Tensor,
    block: int,
    scale: float,
    addend: Tensor | None,
    threads: int,
    level: str = ...,
) -> None: ...
def random_halves(key: int, step: int, start: int, count: int, level: str = ...) -> Tensor: ...
def cast(grad: Tensor, dtype: str, threads: int = 1, level: str = ...) -> Tensor: ...
def add_scaled(
    out: Tensor,
    payload: Tensor,
    dtype: str,
    scale: float,
    addend: Tensor | None = None,
    threads: int = 1,
    level: str = ...,
) -> None: ...
def pack_signs(grad: Tensor, threads: int, level: str = ...) -> tuple[Tensor, int] | float: ...
def pack_votes(grad: Tensor, threads: int, level: str = ...) -> Tensor: ...
def clear(out: Tensor) -> None: ...
def all_finite(values: Tensor, threads: int, level: str = ...) -> bool: ...
