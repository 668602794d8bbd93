"""Low-rank products and tiles of cosines, from the fastest backend; :mod:`gradcomp.kernels.reference` defines them."""

from __future__ import annotations

from gradcomp.kernels.reference import add_factors, add_spectrum

__all__ = ["add_factors", "add_spectrum"]
