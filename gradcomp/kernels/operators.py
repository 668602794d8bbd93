"""Kernels that torch.compile may trace: operators of torch.library, ``torch.ops.gradcomp``, on any device.

These are the kernels whose results have a size that is known beforehand and which tell the host nothing: what adds a
packet to a vector, casts, packs, quantizes and transforms. With Triton they wait for nothing on CUDA, so that a CUDA
graph can hold them. The others return what only the values decide (how many elements a packet names): no graph can.

While torch.compile traces, a call becomes the operator's; any other call is the plain function's: by way of the
dispatcher the smallest of them took 13 times as long.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradcomp.errors import ConfigError
from gradcomp.kernels import bits, codes, dense, quantize, random, reference, stochastic, transform, triton
from gradcomp.tiles import Tiling

__all__ = [
    "add_bits",
    "add_codes",
    "add_factors",
    "add_float8",
    "add_levels",
    "add_powers",
    "add_scaled",
    "add_spectrum",
    "cast",
    "clear",
    "code_bits",
    "code_powers",
    "code_stochastic",
    "code_values",
    "combine",
    "largest_coefficients",
    "norms",
    "orthonormal",
    "pack_votes",
    "project",
    "random_words",
]

F = TypeVar("F", bound=Callable[..., Any])


def _nothing(*_: object) -> None:
    """What a kernel returns that writes where it is told."""


def _operator(plain: F, schema: str, shape_of: Callable[..., object] = _nothing) -> F:
    """Register ``plain``, of this schema; the function to call, which is one or the other.

    Args:
        shape_of: gives empty tensors like those that ``plain`` returns, for the same arguments.
    """
    name = plain.__name__.lstrip("_")
    written = re.findall(r"\(a!\)\S* (\w+)", schema)
    torch.library.custom_op(f"gradcomp::{name}", plain, mutates_args=written, schema=schema).register_fake(shape_of)
    operator = getattr(torch.ops.gradcomp, name)

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        return operator(*args, **kwargs) if torch.compiler.is_compiling() else plain(*args, **kwargs)

    return call  # type: ignore[return-value]


add_scaled = _operator(
    dense.add_scaled,
    "(Tensor(a!) out, Tensor values, float scale, Tensor? addend=None, int? threads=None) -> ()",
)
clear = _operator(dense.clear, "(Tensor(a!) out) -> ()")
cast = _operator(
    dense.cast,
    "(Tensor grad, ScalarType dtype, int? threads=None) -> Tensor",
    lambda grad, dtype, threads=None: torch.empty_like(grad, dtype=dtype).view(torch.uint8),
)
add_bits = _operator(
    bits.add_bits,
    "(Tensor(a!) out, Tensor scales, Tensor bits, int block, Tensor? addend=None, int? threads=None) -> ()",
)
pack_votes = _operator(
    bits.pack_votes,
    "(Tensor grad, int? threads=None) -> Tensor",
    lambda grad, threads=None: grad.new_empty((grad.numel() + 3) // 4, dtype=torch.uint8),
)
add_levels = _operator(
    codes.add_levels,
    "(Tensor(a!) out, Tensor parameters, Tensor codes, int bits, int block, float scale, Tensor? addend=None, "
    "int? threads=None) -> ()",
)
add_codes = _operator(
    codes.add_codes,
    "(Tensor(a!) out, Tensor scales, Tensor codes, int bits, int block, float scale, Tensor? addend=None, "
    "int? threads=None) -> ()",
)
add_float8 = _operator(
    codes.add_float8,
    "(Tensor(a!) out, Tensor scales, Tensor codes, int block, float scale, Tensor? addend=None, int? threads=None) "
    "-> ()",
)
add_powers = _operator(
    stochastic.add_powers,
    "(Tensor(a!) out, Tensor scales, Tensor codes, int block, float scale, Tensor? addend=None, int? threads=None) "
    "-> ()",
)
add_factors = _operator(
    transform.add_factors,
    "(Tensor(a!) out, Tensor left, Tensor right, float scale, Tensor? addend=None, int? threads=None) -> ()",
)


def _payload_nbytes(form: str, numel: int, bits: int, block: int) -> int:
    parameters = 0 if form == "ternary" else (8 if form == "levels" else 4) * -(-numel // block)
    return parameters + -(-numel * bits // 8)


def _code_values(
    grad: Tensor, residual: Tensor | None, form: str, bits: int, block: int, tau: float, update: bool = False
) -> tuple[Tensor, Tensor]:
    """The payload of a quantizer, and what says whether it is worth anything; on CUDA the host need not wait for it.

    Args:
        grad, residual, update: as for :func:`gradcomp.kernels.reference.encode_levels`.
        form: ``"levels"`` with so many ``bits``, ``"signed"`` (int8), ``"float8"``, or ``"ternary"`` with ``tau``.

    Returns:
        uint8, and two int32: if one of them is not 0, then ``grad + residual`` is not finite.
    """
    if triton.takes(grad):
        from gradcomp.kernels import triton_quantize

        return triton_quantize.quantize(grad, residual, form, bits, block, tau, update)
    if form == "levels":
        found = quantize.encode_levels(grad, residual, bits, block, update)
    elif form == "ternary":
        found = quantize.encode_ternary(grad, residual, tau, update)
    else:
        encode = quantize.encode_float8 if form == "float8" else quantize.encode_int8
        found = encode(grad, residual, block, update)
    return _with_status(found, grad, _payload_nbytes(form, grad.numel(), bits, block))


def _with_status(found: Tensor | float, grad: Tensor, nbytes: int) -> tuple[Tensor, Tensor]:
    status = torch.zeros(2, dtype=torch.int32, device=grad.device)
    if isinstance(found, Tensor):
        return found, status
    return grad.new_zeros(nbytes, dtype=torch.uint8), status.add_(1)


def _like_coded(grad: Tensor, nbytes: int) -> tuple[Tensor, Tensor]:
    return grad.new_empty(nbytes, dtype=torch.uint8), grad.new_empty(2, dtype=torch.int32)


code_values = _operator(
    _code_values,
    "(Tensor grad, Tensor(a!)? residual, str form, int bits, int block, float tau, bool update=False) "
    "-> (Tensor, Tensor)",
    lambda grad, residual, form, bits, block, tau, update=False: _like_coded(
        grad, _payload_nbytes(form, grad.numel(), bits, block)
    ),
)


def _code_bits(
    grad: Tensor, residual: Tensor | None, block: int, symmetric: bool = False, update: bool = False
) -> tuple[Tensor, Tensor]:
    """As :func:`code_values`, of :func:`gradcomp.kernels.reference.encode_bits`."""
    if triton.takes(grad):
        from gradcomp.kernels import triton_bits

        return triton_bits.code_bits(grad, residual, block, symmetric, update)
    found = bits.encode_bits(grad, residual, block, symmetric, update)
    return _with_status(found, grad, _bits_nbytes(grad.numel(), block))


def _bits_nbytes(numel: int, block: int) -> int:
    return 8 * -(-numel // block) + -(-numel // 8)


code_bits = _operator(
    _code_bits,
    "(Tensor grad, Tensor(a!)? residual, int block, bool symmetric=False, bool update=False) -> (Tensor, Tensor)",
    lambda grad, residual, block, symmetric=False, update=False: _like_coded(grad, _bits_nbytes(grad.numel(), block)),
)


def _code_stochastic(
    grad: Tensor,
    residual: Tensor | None,
    levels: int,
    block: int,
    norm: str,
    clip: float,
    stream: Tensor,
    update: bool = False,
) -> tuple[Tensor, Tensor]:
    """As :func:`code_values`, of :func:`gradcomp.kernels.reference.encode_stochastic`.

    Args:
        stream: int64 [2] on grad's device, the bits of key and step: what decides all random numbers. It is read when
            the kernels run, and not changed. The same stream gives the same codes, so who captures this in a CUDA graph
            counts the step on, in place, once for every replay: ``stream[1].add_(1)``, captured with it or called
            between replays. Another key for each tensor and rank: :func:`gradcomp.randomness.stream_key`.
    """
    _check_stream(stream, grad)
    if triton.takes(grad):
        from gradcomp.kernels import triton_stochastic

        return triton_stochastic.code_stochastic(grad, residual, levels, block, norm, clip, stream, update)
    key, step = random.words_of(stream)
    found = stochastic.encode_stochastic(grad, residual, levels, block, norm, clip, key, step, update)
    return _with_status(found, grad, _stochastic_nbytes(grad.numel(), levels, block))


def _code_powers(
    grad: Tensor, residual: Tensor | None, block: int, stream: Tensor, update: bool = False
) -> tuple[Tensor, Tensor]:
    """As :func:`code_stochastic`, of :func:`gradcomp.kernels.reference.encode_powers`."""
    _check_stream(stream, grad)
    if triton.takes(grad):
        from gradcomp.kernels import triton_stochastic

        return triton_stochastic.code_powers(grad, residual, block, stream, update)
    found = stochastic.encode_powers(grad, residual, block, *random.words_of(stream), update)
    return _with_status(found, grad, _payload_nbytes("powers", grad.numel(), 8, block))


def _check_stream(stream: Tensor, grad: Tensor) -> None:
    if stream.dtype != torch.int64 or stream.shape != (2,) or stream.device != grad.device:
        raise ConfigError(
            f"stream={stream.dtype}{list(stream.shape)} on {stream.device} is not allowed; it must be torch.int64[2] "
            f"on {grad.device}, as grad is"
        )


def _stochastic_nbytes(numel: int, levels: int, block: int) -> int:
    return _payload_nbytes("stochastic", numel, levels.bit_length() + 1, block)


code_stochastic = _operator(
    _code_stochastic,
    "(Tensor grad, Tensor(a!)? residual, int levels, int block, str norm, float clip, Tensor stream, "
    "bool update=False) -> (Tensor, Tensor)",
    lambda grad, residual, levels, block, norm, clip, stream, update=False: _like_coded(
        grad, _stochastic_nbytes(grad.numel(), levels, block)
    ),
)
code_powers = _operator(
    _code_powers,
    "(Tensor grad, Tensor(a!)? residual, int block, Tensor stream, bool update=False) -> (Tensor, Tensor)",
    lambda grad, residual, block, stream, update=False: _like_coded(
        grad, _payload_nbytes("powers", grad.numel(), 8, block)
    ),
)
random_words = _operator(
    random.random_words,
    "(Tensor stream, int count) -> Tensor",
    lambda stream, count: stream.new_empty(count),
)


def _add_spectrum(
    out: Tensor,
    values: Tensor,
    index: Tensor,
    tiling: Sequence[int],
    scale: float,
    addend: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """:func:`gradcomp.kernels.transform.add_spectrum`; ``tiling``: a :class:`gradcomp.tiles.Tiling`."""
    transform.add_spectrum(out, values, index, Tiling(*tiling), scale, addend, threads)


def _largest_coefficients(
    grad: Tensor, residual: Tensor | None, tiling: Sequence[int], kept: int
) -> tuple[Tensor, Tensor]:
    """:func:`gradcomp.kernels.reference.largest_coefficients`."""
    return reference.largest_coefficients(grad, residual, Tiling(*tiling), kept)


def _like_coefficients(
    grad: Tensor, residual: Tensor | None, tiling: Sequence[int], kept: int
) -> tuple[Tensor, Tensor]:
    shape = Tiling(*tiling).tiles, kept
    return grad.new_empty(shape, dtype=torch.float32), grad.new_empty(shape, dtype=torch.int64)


add_spectrum = _operator(
    _add_spectrum,
    "(Tensor(a!) out, Tensor values, Tensor index, int[] tiling, float scale, Tensor? addend=None, int? threads=None) "
    "-> ()",
)
largest_coefficients = _operator(
    _largest_coefficients,
    "(Tensor grad, Tensor? residual, int[] tiling, int kept) -> (Tensor, Tensor)",
    _like_coefficients,
)
project = _operator(
    transform.project,
    "(Tensor grad, Tensor? residual, Tensor right) -> Tensor",
    lambda grad, residual, right: right.new_empty((right.shape[0], grad.numel() // right.shape[1])),
)
combine = _operator(
    transform.combine,
    "(Tensor grad, Tensor? residual, Tensor left) -> Tensor",
    lambda grad, residual, left: left.new_empty((left.shape[0], grad.numel() // left.shape[1])),
)
orthonormal = _operator(
    transform.orthonormal,
    "(Tensor rows) -> Tensor",
    lambda rows: rows.new_empty(rows.shape),
)
norms = _operator(
    transform.norms,
    "(Tensor rows) -> Tensor",
    lambda rows: rows.new_empty(rows.shape[:1], dtype=torch.float64),
)
