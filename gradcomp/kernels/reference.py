"""The hot loops in plain torch operations: any device, and the definition of what every other backend computes.

One file a family, gathered here. In all of them ``grad`` is flat, contiguous float32, float16 or bfloat16; ``residual``
is flat float32 of the same length, or None for zeros; ``acc = float32(grad) + residual`` is what is compressed.

A kernel that reads all of ``acc`` returns a float instead of its result if it finds NaN or Inf: NaN if there is a NaN
or both infinities, else the infinity.
"""

from gradcomp.kernels.reference_bits import add_bits, encode_bits, pack_bits, pack_signs, pack_votes, unpack_bits
from gradcomp.kernels.reference_codes import add_codes, add_float8, add_levels, find_code, pack_codes, unpack_codes
from gradcomp.kernels.reference_dct import add_spectrum, largest_coefficients
from gradcomp.kernels.reference_dense import add_scaled, cast
from gradcomp.kernels.reference_factors import add_factors, norms, orthonormal
from gradcomp.kernels.reference_indices import add_signs, add_values, sum_sets
from gradcomp.kernels.reference_quantize import encode_float8, encode_int8, encode_levels, encode_ternary
from gradcomp.kernels.reference_random import random_halves
from gradcomp.kernels.reference_select import (
    below_least,
    best_threshold,
    encode_above,
    encode_above_sampled,
    encode_largest,
    encode_signs,
    encode_signs_sampled,
    encode_signs_share,
    sample_largest,
    sample_size,
    sample_threshold,
    scatter_signs,
    select_largest,
    select_threshold,
)
from gradcomp.kernels.reference_stochastic import add_powers, encode_powers, encode_stochastic

__all__ = [
    "add_bits",
    "add_codes",
    "add_factors",
    "add_float8",
    "add_levels",
    "add_powers",
    "add_scaled",
    "add_signs",
    "add_spectrum",
    "add_values",
    "below_least",
    "best_threshold",
    "cast",
    "encode_above",
    "encode_above_sampled",
    "encode_bits",
    "encode_float8",
    "encode_int8",
    "encode_largest",
    "encode_levels",
    "encode_powers",
    "encode_signs",
    "encode_signs_sampled",
    "encode_signs_share",
    "encode_stochastic",
    "encode_ternary",
    "find_code",
    "largest_coefficients",
    "norms",
    "orthonormal",
    "pack_bits",
    "pack_codes",
    "pack_signs",
    "pack_votes",
    "random_halves",
    "sample_largest",
    "sample_size",
    "sample_threshold",
    "scatter_signs",
    "select_largest",
    "select_threshold",
    "sum_sets",
    "unpack_bits",
    "unpack_codes",
]
