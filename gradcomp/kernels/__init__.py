"""The hot loops, each from the fastest backend there is for the tensors it is given.

:mod:`gradcomp.kernels.reference` defines them all, on any device. Those that :mod:`gradcomp.kernels.native` has replace
them on the CPU where they were built and not turned off.
"""

from __future__ import annotations

from torch import Tensor

from gradcomp.kernels import native, reference
from gradcomp.kernels.reference import (
    add_bits,
    add_scaled,
    add_sign_map,
    encode_bits,
    pack_bits,
    sample_largest,
    scatter_signs,
    unpack_bits,
)

__all__ = [
    "add_bits",
    "add_scaled",
    "add_sign_map",
    "encode_bits",
    "pack_bits",
    "sample_largest",
    "scatter_signs",
    "select_largest",
    "select_threshold",
    "unpack_bits",
]


def select_threshold(grad: Tensor, residual: Tensor | None, tau: float) -> tuple[Tensor, Tensor] | float:
    """:func:`gradcomp.kernels.reference.select_threshold`, from the fastest backend."""
    if grad.device.type == "cpu" and native.enabled():
        return native.select_threshold(grad, residual, tau)
    return reference.select_threshold(grad, residual, tau)


def select_largest(grad: Tensor, residual: Tensor | None, k: int) -> tuple[Tensor, Tensor] | float:
    """:func:`gradcomp.kernels.reference.select_largest` on the fastest :func:`select_threshold`."""
    return reference.select_largest(grad, residual, k, select_threshold)
