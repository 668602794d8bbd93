"""Low-rank factors, in plain torch operations whose order is fixed: the same bits on every machine and device.

Matrix products add in an order that depends on library, processor and number of threads. What all ranks must have alike
is therefore added element by element here: no matmul, no sum(), no fused multiply-add.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradcomp.kernels.reference_chunks import chunks

__all__ = ["add_factors", "norms", "orthonormal"]

# A row with so little left of it when those above are taken out is rounding noise.
_DEPENDENT = 2.0**-20


def orthonormal(rows: Tensor) -> Tensor:
    """Rows of unit length, orthogonal to each other, that span what ``rows`` do: modified Gram-Schmidt in float64.

    Args:
        rows: float32 [r, m], finite.

    Returns:
        float32 [r, m]; a row that depends on those above it is 0.
    """
    rows = rows.to(torch.float64)
    before = norms(rows)
    for i in range(len(rows)):
        length = norms(rows[i])
        if float(length) <= _DEPENDENT * float(before[i]):
            rows[i] = 0
            continue
        rows[i] /= length
        below = rows[i + 1 :]
        below -= _sum(below * rows[i]).unsqueeze(1) * rows[i]
    return rows.to(torch.float32)


def norms(rows: Tensor) -> Tensor:
    """Euclidean lengths along the last dimension, float64."""
    wide = rows.to(torch.float64)
    return _sum(wide * wide).sqrt()


def _sum(terms: Tensor) -> Tensor:
    """Sum along the last dimension, halves added to halves; overwrites ``terms``."""
    size = terms.shape[-1]
    while size > 1:
        half = size // 2
        terms[..., :half] += terms[..., size - half : size]
        size -= half
    return terms[..., 0]


def add_factors(out: Tensor, left: Tensor, right: Tensor, scale: float, addend: Tensor | None = None) -> None:
    """``out += scale * left.T @ right``, the products of one element added in the order of their rows.

    Args:
        out: flat float32, m * n elements.
        left, right: float32 [r, m] and [r, n], r at least 1.
        addend: flat, added to ``out`` first.
    """
    columns = right.shape[1]
    if addend is not None:
        out += addend
    for part in chunks(out.numel(), out.device, columns):
        first, last = part.start // columns, part.stop // columns
        block = out[part].view(last - first, columns)
        values = left[0, first:last, None] * right[0]
        for i in range(1, len(left)):
            values += left[i, first:last, None] * right[i]
        block += values.mul_(scale)
