"""The hot loops, each from the fastest backend there is for the tensors it is given.

:mod:`gradcomp.kernels.reference` defines them all, on any device. Those that :mod:`gradcomp.kernels.native` has replace
them on the CPU where they were built and not turned off. One file a family chooses between them.
"""

from __future__ import annotations

from gradcomp.kernels.bits import add_bits, encode_bits, pack_signs, pack_votes
from gradcomp.kernels.codes import add_codes, add_float8, add_levels, find_code
from gradcomp.kernels.dense import add_scaled, all_finite, cast, clear
from gradcomp.kernels.indices import add_signs, add_values, sum_sets
from gradcomp.kernels.quantize import encode_float8, encode_int8, encode_levels, encode_ternary
from gradcomp.kernels.reference import (
    largest_coefficients,
    norms,
    orthonormal,
    sample_size,
)
from gradcomp.kernels.select import (
    encode_above,
    encode_largest,
    encode_signs,
    encode_signs_sampled,
    sample_largest,
    sample_threshold,
)
from gradcomp.kernels.random import philox
from gradcomp.kernels.reference import largest_coefficients, sample_size
from gradcomp.kernels.select import encode_above, encode_largest, encode_signs, sample_largest
from gradcomp.kernels.stochastic import add_powers, encode_powers, encode_stochastic
from gradcomp.kernels.transform import add_factors, add_spectrum, combine, norms, orthonormal, project

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
    "all_finite",
    "cast",
    "clear",
    "combine",
    "encode_above",
    "encode_bits",
    "encode_float8",
    "encode_int8",
    "encode_largest",
    "encode_levels",
    "encode_powers",
    "encode_signs",
    "encode_signs_sampled",
    "encode_stochastic",
    "encode_ternary",
    "find_code",
    "largest_coefficients",
    "norms",
    "orthonormal",
    "pack_signs",
    "pack_votes",
    "philox",
    "project",
    "sample_largest",
    "sample_size",
    "sample_threshold",
    "sum_sets",
]
