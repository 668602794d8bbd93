"""The hot loops, each from the fastest backend there is for the tensors it is given.

:mod:`gradcomp.kernels.reference` defines them all, on any device. Those that :mod:`gradcomp.kernels.native` has replace
them on the CPU where they were built and not turned off. One file a family chooses between them.
"""

from __future__ import annotations

from gradcomp.kernels.bits import add_bits, encode_bits, encode_sign_map, encode_signs
from gradcomp.kernels.codes import add_codes, add_float8, add_levels, find_code
from gradcomp.kernels.dense import add_scaled, cast
from gradcomp.kernels.quantize import encode_float8, encode_int8, encode_levels, encode_ternary
from gradcomp.kernels.reference import (
    add_sign_map,
    pack_bits,
    sample_largest,
    scatter_signs,
    unpack_bits,
)
from gradcomp.kernels.select import select_largest, select_threshold
from gradcomp.kernels.stochastic import add_powers, encode_powers, encode_stochastic

__all__ = [
    "add_bits",
    "add_codes",
    "add_float8",
    "add_levels",
    "add_powers",
    "add_scaled",
    "add_sign_map",
    "cast",
    "encode_bits",
    "encode_float8",
    "encode_int8",
    "encode_levels",
    "encode_powers",
    "encode_sign_map",
    "encode_signs",
    "encode_stochastic",
    "encode_ternary",
    "find_code",
    "pack_bits",
    "sample_largest",
    "scatter_signs",
    "select_largest",
    "select_threshold",
    "unpack_bits",
]
