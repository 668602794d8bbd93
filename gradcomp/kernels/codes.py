"""Packed codes and what they stand for, from the fastest backend; :mod:`gradcomp.kernels.reference` defines it."""

from __future__ import annotations

from torch import Tensor

from gradcomp.kernels import native, reference, triton

__all__ = ["add_codes", "add_float8", "add_levels", "find_code"]


def add_levels(
    out: Tensor,
    parameters: Tensor,
    codes: Tensor,
    bits: int,
    block: int,
    scale: float,
    addend: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """:func:`gradcomp.kernels.reference.add_levels`, from the fastest backend."""
    if native.takes(out):
        other = None if addend is None else native.floats(addend)
        workers = native.thread_count(threads)
        native.module.add_levels(out, parameters.view(-1), codes, bits, block, scale, other, workers)
    elif triton.takes(out):
        from gradcomp.kernels import triton_codes

        triton_codes.add_levels(out, parameters, codes, bits, block, scale, addend)
    else:
        reference.add_levels(out, parameters, codes, bits, block, scale, addend)


def add_codes(
    out: Tensor,
    scales: Tensor,
    codes: Tensor,
    bits: int,
    block: int,
    scale: float,
    addend: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """:func:`gradcomp.kernels.reference.add_codes`, from the fastest backend."""
    if native.takes(out):
        other = None if addend is None else native.floats(addend)
        native.module.add_codes(out, scales, codes, bits, block, scale, other, native.thread_count(threads))
    elif triton.takes(out):
        from gradcomp.kernels import triton_codes

        triton_codes.add_codes(out, scales, codes, bits, block, scale, addend)
    else:
        reference.add_codes(out, scales, codes, bits, block, scale, addend)


def add_float8(
    out: Tensor,
    scales: Tensor,
    codes: Tensor,
    block: int,
    scale: float,
    addend: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """:func:`gradcomp.kernels.reference.add_float8`, from the fastest backend."""
    if native.takes(out):
        other = None if addend is None else native.floats(addend)
        native.module.add_float8(out, scales, codes, block, scale, other, native.thread_count(threads))
    elif triton.takes(out):
        from gradcomp.kernels import triton_codes

        triton_codes.add_float8(out, scales, codes, block, scale, addend)
    else:
        reference.add_float8(out, scales, codes, block, scale, addend)


def find_code(packed: Tensor, count: int, bits: int, mask: int, threads: int | None = None) -> bool:
    """:func:`gradcomp.kernels.reference.find_code`, from the fastest backend."""
    if native.takes(packed):
        return native.module.find_code(packed, count, bits, mask, native.thread_count(threads))
    if triton.takes(packed):
        from gradcomp.kernels import triton_codes

        return triton_codes.find_code(packed, count, bits, mask)
    return reference.find_code(packed, count, bits, mask)
