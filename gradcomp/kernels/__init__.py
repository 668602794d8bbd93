"""The hot loops, each from the fastest backend there is for the tensors it is given.

:mod:`gradcomp.kernels.reference` defines them all, on any device. Those that :mod:`gradcomp.kernels.native` has replace
them on the CPU where they were built and not turned off. One file a family chooses between them.
"""

from __future__ import annotations

from gradcomp.kernels.reference import (
    add_bits,
    add_scaled,
    add_sign_map,
    encode_bits,
    largest_coefficients,
    norms,
    orthonormal,
    pack_bits,
    sample_largest,
    scatter_signs,
    unpack_bits,
)
from gradcomp.kernels.select import select_largest, select_threshold
from gradcomp.kernels.transform import add_factors, add_spectrum

__all__ = [
    "add_bits",
    "add_factors",
    "add_scaled",
    "add_sign_map",
    "add_spectrum",
    "encode_bits",
    "largest_coefficients",
    "norms",
    "orthonormal",
    "pack_bits",
    "sample_largest",
    "scatter_signs",
    "select_largest",
    "select_threshold",
    "unpack_bits",
]
