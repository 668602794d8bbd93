"""Low-rank products and tiles of cosines, from the fastest backend; :mod:`gradcomp.kernels.reference` defines them."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from gradcomp.kernels import native, reference, triton
from gradcomp.kernels.reference_dct import basis
from gradcomp.kernels.select import encode_signs
from gradcomp.tiles import Tiling

__all__ = ["add_factors", "add_spectrum", "combine", "norms", "orthonormal", "project"]


def project(grad: Tensor, residual: Tensor | None, right: Tensor) -> Tensor:
    """``right @ M.T`` of the matrix ``M = grad + residual``, in no order that others must keep.

    Args:
        grad, residual: flat, m * n elements.
        right: float32 [r, n].

    Returns:
        float32 [r, m]; NaN among them if M is not finite everywhere.
    """
    if triton.takes(grad):
        from gradcomp.kernels import triton_factors

        if len(right) <= triton_factors.MOST_RANK:
            return triton_factors.project(grad, residual, right)
    columns = right.shape[1]
    # Nothing finite passes the largest number there is: one reading of both, and nothing written.
    if isinstance(encode_signs(grad, residual, torch.finfo(torch.float32).max), float):
        return torch.full((len(right), grad.numel() // columns), math.nan, device=grad.device)
    # Not the sum's product: it would have to be written first.
    sums = reduce(torch.add, [part.view(-1, columns) @ right.t() for part in _parts(grad, residual)])
    return sums.t().contiguous()


def combine(grad: Tensor, residual: Tensor | None, left: Tensor) -> Tensor:
    """``left @ M``: float32 [r, n] of [r, m]; otherwise as :func:`project`, but M is finite."""
    if triton.takes(grad):
        from gradcomp.kernels import triton_factors

        if len(left) <= triton_factors.MOST_RANK:
            return triton_factors.combine(grad, residual, left)
    rows = left.shape[1]
    return reduce(torch.add, [left @ part.view(rows, -1) for part in _parts(grad, residual)])


def orthonormal(rows: Tensor) -> Tensor:
    """:func:`gradcomp.kernels.reference.orthonormal`, from the fastest backend."""
    if triton.takes(rows):
        from gradcomp.kernels import triton_factors

        return triton_factors.orthonormal(rows)
    return reference.orthonormal(rows.contiguous())


def norms(rows: Tensor) -> Tensor:
    """:func:`gradcomp.kernels.reference.norms` of float32 [r, m], from the fastest backend."""
    if triton.takes(rows):
        from gradcomp.kernels import triton_factors

        return triton_factors.norms(rows)
    return reference.norms(rows)


def add_factors(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    scale: float,
    addend: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """:func:`gradcomp.kernels.reference.add_factors`, from the fastest backend."""
    if triton.takes(out):
        from gradcomp.kernels import triton_factors

        triton_factors.add_factors(out, left, right, scale, addend)
        return
    if not native.takes(out):
        reference.add_factors(out, left, right, scale, addend)
        return
    native.module.add_factors(
        out,
        left.view(-1),
        right.view(-1),
        right.shape[1],
        scale,
        None if addend is None else native.floats(addend),
        native.thread_count(threads),
    )


def add_spectrum(
    out: Tensor,
    values: Tensor,
    index: Tensor,
    tiling: Tiling,
    scale: float,
    addend: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """:func:`gradcomp.kernels.reference.add_spectrum`, from the fastest backend."""
    if not native.takes(out):
        reference.add_spectrum(out, values, index, tiling, scale, addend)
        return
    native.module.add_spectrum(
        out,
        values.view(-1),
        index.view(-1),
        basis(tiling.height).view(-1),
        basis(tiling.width).view(-1),
        tiling.rows,
        tiling.columns,
        tiling.height,
        tiling.width,
        scale,
        None if addend is None else native.floats(addend),
        native.thread_count(threads),
    )


def _parts(grad: Tensor, residual: Tensor | None) -> list[Tensor]:
    values = grad.to(torch.float32)
    return [values] if residual is None else [values, residual]
