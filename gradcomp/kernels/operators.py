"""Kernels that torch.compile may trace: operators of torch.library, ``torch.ops.gradcomp``, on any device.

These are the kernels whose results have a size that is known beforehand and which tell the host nothing: what adds a
packet to a vector, casts, packs and quantizes. With Triton they wait for nothing on CUDA, so that a CUDA graph can hold
them. The others return what only the values decide (how many elements a packet names): no graph can.

While torch.compile traces, a call becomes the operator's; any other call is the plain function's: by way of the
dispatcher the smallest of them took 13 times as long.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradcomp.kernels import bits, codes, dense, quantize, stochastic, transform, triton

__all__ = [
    "add_bits",
    "add_codes",
    "add_factors",
    "add_float8",
    "add_levels",
    "add_powers",
    "add_scaled",
    "cast",
    "clear",
    "code_bits",
    "code_values",
    "pack_votes",
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
