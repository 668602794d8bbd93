"""The hot loops, each from the fastest backend there is for the tensors it is given.

:mod:`gradcomp.kernels.reference` defines them all, on any device. Those that :mod:`gradcomp.kernels.native` has replace
them on the CPU where they were built and not turned off. One file a family chooses between them.
"""

from __future__ import annotations

from gradcomp.kernels.indices import add_signs, add_values
from gradcomp.kernels.reference import (
    add_bits,
    add_scaled,
    encode_bits,
    largest_coefficients,
    norms,
    orthonormal,
    pack_bits,
    select_largest,
    select_threshold,
    unpack_bits,
)
from gradcomp.kernels.select import encode_above, encode_largest, encode_signs, sample_largest
from gradcomp.kernels.transform import add_factors, add_spectrum

__all__ = [
    "add_bits",
    "add_factors",
    "add_scaled",
    "add_signs",
    "add_spectrum",
    "add_values",
    "encode_above",
    "encode_bits",
    "encode_largest",
    "encode_signs",
    "largest_coefficients",
    "norms",
    "orthonormal",
    "pack_bits",
    "sample_largest",
    "select_largest",
    "select_threshold",
    "unpack_bits",
]
