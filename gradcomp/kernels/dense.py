"""Casts, and adding what was cast, from the fastest backend; :mod:`gradcomp.kernels.reference` defines them."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcomp.kernels import native, reference, triton

__all__ = ["add_scaled", "all_finite", "cast", "clear"]

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def cast(grad: Tensor, dtype: torch.dtype, threads: int | None = None) -> Tensor:
    """:func:`gradcomp.kernels.reference.cast`, from the fastest backend."""
    if grad.dtype == torch.float32 and native.takes(grad):
        return native.module.cast(grad.detach(), _NAMES[dtype], native.thread_count(threads))
    return reference.cast(grad, dtype)


def add_scaled(
    out: Tensor, values: Tensor, scale: float, addend: Tensor | None = None, threads: int | None = None
) -> None:
    """:func:`gradcomp.kernels.reference.add_scaled`, from the fastest backend."""
    if values.dtype in _NAMES and native.takes(out):
        other = None if addend is None else native.floats(addend)
        payload, name = values.view(torch.uint8), _NAMES[values.dtype]
        native.module.add_scaled(out, payload, name, scale, other, native.thread_count(threads))
    elif values.dtype in _NAMES and triton.takes(out):
        from gradcomp.kernels import triton_dense

        triton_dense.add_scaled(out, values, scale, addend)
    else:
        reference.add_scaled(out, values, scale, addend)


def clear(out: Tensor) -> None:
    """``out`` becomes 0; flat, contiguous float32."""
    if native.takes(out):
        native.module.clear(out)
    else:
        out.zero_()


def all_finite(values: Tensor, threads: int | None = None) -> bool:
    """Whether ``values``, flat float32, hold neither NaN nor Inf."""
    if native.takes(values):
        return native.module.all_finite(values, native.thread_count(threads))
    if triton.takes(values):
        from gradcomp.kernels import triton_dense

        return triton_dense.all_finite(values)
    return bool(values.isfinite().all())
