"""Stochastic quantizers, from the fastest backend; :mod:`gradcomp.kernels.reference` defines what they compute."""

from __future__ import annotations

from torch import Tensor

from gradcomp.kernels import native, reference, triton
from gradcomp.kernels.reference_stochastic import stochastic_limit

__all__ = ["add_powers", "encode_powers", "encode_stochastic"]


def encode_stochastic(
    grad: Tensor,
    residual: Tensor | None,
    levels: int,
    block: int,
    norm: str,
    clip: float,
    key: int,
    step: int,
    update: bool = False,
    threads: int | None = None,
) -> Tensor | float:
    """:func:`gradcomp.kernels.reference.encode_stochastic`, from the fastest backend."""
    if native.takes(grad):
        limit = stochastic_limit(levels.bit_length() + 1)
        workers = native.thread_count(threads)
        return native.module.encode_stochastic(
            native.floats(grad), residual, levels, block, norm == "l2", clip, limit, key, step, update, workers
        )
    if triton.takes(grad):
        from gradcomp.kernels import triton_stochastic

        return triton_stochastic.encode_stochastic(grad, residual, levels, block, norm, clip, key, step, update)
    return reference.encode_stochastic(grad, residual, levels, block, norm, clip, key, step, update)


def encode_powers(
    grad: Tensor,
    residual: Tensor | None,
    block: int,
    key: int,
    step: int,
    update: bool = False,
    threads: int | None = None,
) -> Tensor | float:
    """:func:`gradcomp.kernels.reference.encode_powers`, from the fastest backend."""
    if native.takes(grad):
        workers = native.thread_count(threads)
        return native.module.encode_powers(native.floats(grad), residual, block, key, step, update, workers)
    if triton.takes(grad):
        from gradcomp.kernels import triton_stochastic

        return triton_stochastic.encode_powers(grad, residual, block, key, step, update)
    return reference.encode_powers(grad, residual, block, key, step, update)


def add_powers(
    out: Tensor,
    scales: Tensor,
    codes: Tensor,
    block: int,
    scale: float,
    addend: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """:func:`gradcomp.kernels.reference.add_powers`, from the fastest backend."""
    if native.takes(out):
        other = None if addend is None else native.floats(addend)
        native.module.add_powers(out, scales, codes, block, scale, other, native.thread_count(threads))
    elif triton.takes(out):
        from gradcomp.kernels import triton_stochastic

        triton_stochastic.add_powers(out, scales, codes, block, scale, addend)
    else:
        reference.add_powers(out, scales, codes, block, scale, addend)
