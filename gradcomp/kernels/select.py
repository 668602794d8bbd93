"""Selection, from the fastest backend for the tensors given; :mod:`gradcomp.kernels.reference` defines it."""

from __future__ import annotations

from torch import Tensor

from gradcomp.kernels import native, reference

__all__ = ["select_largest", "select_threshold"]


def select_threshold(grad: Tensor, residual: Tensor | None, tau: float) -> tuple[Tensor, Tensor] | float:
    """:func:`gradcomp.kernels.reference.select_threshold`, from the fastest backend."""
    if native.takes(grad):
        return native.module.select_threshold(native.floats(grad), residual, tau)
    return reference.select_threshold(grad, residual, tau)


def select_largest(grad: Tensor, residual: Tensor | None, k: int) -> tuple[Tensor, Tensor] | float:
    """:func:`gradcomp.kernels.reference.select_largest` on the fastest :func:`select_threshold`."""
    return reference.select_largest(grad, residual, k, select_threshold)
