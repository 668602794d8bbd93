"""Low-rank products and tiles of cosines, from the fastest backend; :mod:`gradcomp.kernels.reference` defines them."""

from __future__ import annotations

from torch import Tensor

from gradcomp.kernels import native, reference
from gradcomp.kernels.reference_dct import basis
from gradcomp.tiles import Tiling

__all__ = ["add_factors", "add_spectrum"]


def add_factors(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    scale: float,
    addend: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """:func:`gradcomp.kernels.reference.add_factors`, from the fastest backend."""
    if not native.takes(out):
        reference.add_factors(out, left, right, scale, addend)
        return
    native.module.add_factors(
        out,
        left.view(-1),
        right.view(-1),
        right.shape[1],
        scale,
        None if addend is None else native.floats(addend),
        native.thread_count(threads),
    )


def add_spectrum(
    out: Tensor,
    values: Tensor,
    index: Tensor,
    tiling: Tiling,
    scale: float,
    addend: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """:func:`gradcomp.kernels.reference.add_spectrum`, from the fastest backend."""
    if not native.takes(out):
        reference.add_spectrum(out, values, index, tiling, scale, addend)
        return
    native.module.add_spectrum(
        out,
        values.view(-1),
        index.view(-1),
        basis(tiling.height).view(-1),
        basis(tiling.width).view(-1),
        tiling.rows,
        tiling.columns,
        tiling.height,
        tiling.width,
        scale,
        None if addend is None else native.floats(addend),
        native.thread_count(threads),
    )
