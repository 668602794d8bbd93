"""The hot loops, each from the fastest backend there is for the tensors it is given.

:mod:`gradcomp.kernels.reference` defines them all, on any device. Those that :mod:`gradcomp.kernels.native` has replace
them on the CPU, where they were built and not turned off, and the Triton ones (``triton_*.py``) on CUDA devices. One
file a family chooses between them, and :mod:`gradcomp.kernels.operators` lets torch.compile trace those that can be.
"""

from __future__ import annotations

from gradcomp.kernels.bits import encode_bits, pack_signs
from gradcomp.kernels.codes import find_code
from gradcomp.kernels.dense import all_finite
from gradcomp.kernels.indices import add_signs, add_values, sum_sets
from gradcomp.kernels.operators import (
    add_bits,
    add_codes,
    add_factors,
    add_float8,
    add_levels,
    add_powers,
    add_scaled,
    add_spectrum,
    cast,
    clear,
    code_bits,
    code_powers,
    code_stochastic,
    code_values,
    combine,
    largest_coefficients,
    norms,
    orthonormal,
    pack_votes,
    project,
    random_words,
)
from gradcomp.kernels.quantize import encode_float8, encode_int8, encode_levels, encode_ternary
from gradcomp.kernels.random import philox
from gradcomp.kernels.reference import sample_size
from gradcomp.kernels.select import (
    encode_above,
    encode_above_sampled,
    encode_largest,
    encode_signs,
    encode_signs_sampled,
    encode_signs_share,
    sample_largest,
    sample_threshold,
)
from gradcomp.kernels.stochastic import encode_powers, encode_stochastic

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
    "code_bits",
    "code_powers",
    "code_stochastic",
    "code_values",
    "combine",
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
    "pack_signs",
    "pack_votes",
    "philox",
    "project",
    "random_words",
    "sample_largest",
    "sample_size",
    "sample_threshold",
    "sum_sets",
]
