"""Quantizers, from the fastest backend; :mod:`gradcomp.kernels.reference` defines them."""

from __future__ import annotations

from torch import Tensor

from gradcomp.kernels import native, reference, triton

__all__ = ["encode_float8", "encode_int8", "encode_levels", "encode_ternary"]


def encode_levels(
    grad: Tensor, residual: Tensor | None, bits: int, block: int, update: bool = False, threads: int | None = None
) -> Tensor | float:
    """:func:`gradcomp.kernels.reference.encode_levels`, from the fastest backend."""
    if native.takes(grad):
        workers = native.thread_count(threads)
        return native.module.encode_levels(native.floats(grad), residual, bits, block, update, workers)
    if triton.takes(grad):
        from gradcomp.kernels import triton_quantize

        return triton_quantize.encode_levels(grad, residual, bits, block, update)
    return reference.encode_levels(grad, residual, bits, block, update)


def encode_int8(
    grad: Tensor, residual: Tensor | None, block: int, update: bool = False, threads: int | None = None
) -> Tensor | float:
    """:func:`gradcomp.kernels.reference.encode_int8`, from the fastest backend."""
    if native.takes(grad):
        return native.module.encode_int8(native.floats(grad), residual, block, update, native.thread_count(threads))
    if triton.takes(grad):
        from gradcomp.kernels import triton_quantize

        return triton_quantize.encode_int8(grad, residual, block, update)
    return reference.encode_int8(grad, residual, block, update)


def encode_float8(
    grad: Tensor, residual: Tensor | None, block: int, update: bool = False, threads: int | None = None
) -> Tensor | float:
    """:func:`gradcomp.kernels.reference.encode_float8`, from the fastest backend."""
    if native.takes(grad):
        return native.module.encode_float8(native.floats(grad), residual, block, update, native.thread_count(threads))
    if triton.takes(grad):
        from gradcomp.kernels import triton_quantize

        return triton_quantize.encode_float8(grad, residual, block, update)
    return reference.encode_float8(grad, residual, block, update)


def encode_ternary(
    grad: Tensor, residual: Tensor | None, tau: float, update: bool = False, threads: int | None = None
) -> Tensor | float:
    """:func:`gradcomp.kernels.reference.encode_ternary`, from the fastest backend."""
    if native.takes(grad):
        return native.module.encode_ternary(native.floats(grad), residual, tau, update, native.thread_count(threads))
    if triton.takes(grad):
        from gradcomp.kernels import triton_quantize

        return triton_quantize.encode_ternary(grad, residual, tau, update)
    return reference.encode_ternary(grad, residual, tau, update)
