"""One bit an element, from the fastest backend for the tensors given; :mod:`gradcomp.kernels.reference` defines it."""

from __future__ import annotations

from torch import Tensor

from gradcomp.kernels import native, reference, triton

__all__ = ["add_bits", "encode_bits", "pack_signs", "pack_votes"]


def encode_bits(
    grad: Tensor,
    residual: Tensor | None,
    block: int,
    symmetric: bool = False,
    update: bool = False,
    threads: int | None = None,
) -> Tensor | float:
    """:func:`gradcomp.kernels.reference.encode_bits`, from the fastest backend."""
    if native.takes(grad):
        return native.module.encode_bits(
            native.floats(grad), residual, block, symmetric, update, native.thread_count(threads)
        )
    if triton.takes(grad):
        from gradcomp.kernels import triton_bits

        return triton_bits.encode_bits(grad, residual, block, symmetric, update)
    return reference.encode_bits(grad, residual, block, symmetric, update)


def add_bits(
    out: Tensor,
    scales: Tensor,
    bits: Tensor,
    block: int,
    addend: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """:func:`gradcomp.kernels.reference.add_bits`, from the fastest backend."""
    if native.takes(out):
        added = None if addend is None else native.floats(addend)
        native.module.add_bits(out, scales.reshape(-1), bits, block, added, native.thread_count(threads))
    elif triton.takes(out):
        from gradcomp.kernels import triton_bits

        triton_bits.add_bits(out, scales, bits, block, addend)
    else:
        reference.add_bits(out, scales, bits, block, addend)


def pack_signs(grad: Tensor, threads: int | None = None) -> tuple[Tensor, int] | float:
    """:func:`gradcomp.kernels.reference.pack_signs`, from the fastest backend."""
    if native.takes(grad):
        return native.module.pack_signs(native.floats(grad), native.thread_count(threads))
    if triton.takes(grad):
        from gradcomp.kernels import triton_bits

        return triton_bits.pack_signs(grad)
    return reference.pack_signs(grad)


def pack_votes(grad: Tensor, threads: int | None = None) -> Tensor:
    """:func:`gradcomp.kernels.reference.pack_votes`, from the fastest backend."""
    if native.takes(grad):
        return native.module.pack_votes(native.floats(grad), native.thread_count(threads))
    if triton.takes(grad):
        from gradcomp.kernels import triton_bits

        return triton_bits.pack_votes(grad)
    return reference.pack_votes(grad)
