"""Kernels that torch.compile may trace: operators of torch.library, ``torch.ops.gradcomp``, on any device.

These are the kernels whose results have a size that is known beforehand and which tell the host nothing: what adds a
packet to a vector, casts and packs. On CUDA they wait for nothing, so that a CUDA graph can hold them. The others
return what only the values decide (how many elements a packet names, whether one is not finite): no graph can.

While torch.compile traces, a call becomes the operator's; any other call is the plain function's, without the
dispatcher's 10 to 20 microseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradcomp.kernels import bits, codes, dense, stochastic, transform

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
    "pack_votes",
]

F = TypeVar("F", bound=Callable[..., Any])


def _nothing(*_: object) -> None:
    """What a kernel returns that writes where it is told."""


def _operator(plain: F, schema: str, shape_of: Callable[..., Tensor | None] = _nothing) -> F:
    """Register ``plain``, of this schema; the function to call, which is one or the other.

    Args:
        shape_of: gives an empty tensor like the one that ``plain`` returns, for the same arguments.
    """
    name = plain.__name__
    written = ("out",) if "(a!) out" in schema else ()
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
