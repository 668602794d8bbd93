"""The hot loops in plain torch operations: any device, and the definition of what every other backend computes.

One file a family, gathered here. In all of them ``grad`` is flat, contiguous float32, float16 or bfloat16; ``residual``
is flat float32 of the same length, or None for zeros; ``acc = float32(grad) + residual`` is what is compressed.

A kernel that reads all of ``acc`` returns a float instead of its result if it finds NaN or Inf: NaN if there is a NaN
or both infinities, else the infinity.
"""

from gradcomp.kernels.reference_bits import add_bits, encode_bits, pack_bits, unpack_bits
from gradcomp.kernels.reference_dct import add_spectrum, largest_coefficients
from gradcomp.kernels.reference_dense import add_scaled
from gradcomp.kernels.reference_factors import add_factors, norms, orthonormal
from gradcomp.kernels.reference_indices import add_signs, add_values
from gradcomp.kernels.reference_select import (
    encode_above,
    encode_largest,
    encode_signs,
    sample_largest,
    sample_size,
    scatter_signs,
    select_largest,
    select_threshold,
)

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
    "sample_size",
    "scatter_signs",
    "select_largest",
    "select_threshold",
    "unpack_bits",
]
