"""The discrete cosine transform of tiles, in plain torch operations; the inverse in a fixed order.

Tiles are numbered row by row. Coefficient ``u * width + v`` of a tile belongs to ``basis(height)[u]`` down and
``basis(width)[v]`` across. The forward transform is a matrix product: its last bit may differ between machines, which
only decides what a rank sends. The inverse makes replicas, so it adds coefficient after coefficient, in the order sent:
the same bits everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from gradcomp.tiles import Tiling

__all__ = ["add_spectrum", "basis", "largest_coefficients"]

_GROUP = 1 << 18  # elements transformed at a time, or one row of tiles if that is more


@cache
def basis(size: int) -> Tensor:
    """The orthonormal DCT-II: row u is ``sqrt(2 / size) cos(pi (2 i + 1) u / (2 size))``, row 0 ``sqrt(1 / size)``.

    Returns:
        float32 [size, size]; nobody may write to it.
    """
    # The turn 2 pi is 4 size steps of the angle. Not math.cos: C libraries differ in its last bit.
    table = [_cosine(step, 4 * size) for step in range(4 * size)]
    rows = [
        [math.sqrt((2.0 if u else 1.0) / size) * table[(2 * i + 1) * u % (4 * size)] for i in range(size)]
        for u in range(size)
    ]
    return torch.tensor(rows, dtype=torch.float32)


@cache
def _basis_on(size: int, device: torch.device) -> Tensor:
    """:func:`basis` on a device: copied there once, for a copy waits and cannot be captured in a CUDA graph."""
    return basis(size).to(device)


def _cosine(step: int, turn: int) -> float:
    """cos(2 pi step / turn), 0 <= step < turn, ``turn`` a multiple of 4, from IEEE operations alone."""
    step = min(step, turn - step)
    if 4 * step > turn:
        return -_cosine(turn // 2 - step, turn)
    angle = 2 * math.pi * step / turn
    if 8 * step > turn:
        return _series(2 * math.pi * (turn // 4 - step) / turn, 1)
    return _series(angle, 0)


def _series(angle: float, first: int) -> float:
    """Taylor's series of cos (``first`` = 0) or sin (1) for 0 <= angle <= pi/4; the terms left out are below 1e-18."""
    total, term = 0.0, angle if first else 1.0
    for power in range(first, first + 18, 2):
        total += term
        term = -term * angle * angle / ((power + 1) * (power + 2))
    return total


def _groups(tiling: Tiling) -> Iterator[tuple[slice, slice]]:
    """Ranges of rows of tiles, and of rows of the matrix."""
    step = max(1, _GROUP // (tiling.across * tiling.tile_numel))
    for first in range(0, tiling.down, step):
        last = min(first + step, tiling.down)
        yield slice(first, last), slice(first * tiling.height, min(last * tiling.height, tiling.rows))


def largest_coefficients(grad: Tensor, residual: Tensor | None, tiling: Tiling, kept: int) -> tuple[Tensor, Tensor]:
    """The ``kept`` coefficients of largest magnitude of each tile of acc. Beyond the edge, tiles hold zeros.

    Returns:
        float32 and int64 [tiles, kept]: coefficients, and which, increasing. Not finite where acc or sums are not.
    """
    down, across = _basis_on(tiling.height, grad.device), _basis_on(tiling.width, grad.device)
    values, indices = [], []
    padded_columns = tiling.across * tiling.width
    for tiles, rows in _groups(tiling):
        part = slice(rows.start * tiling.columns, rows.stop * tiling.columns)
        padded = torch.zeros(
            (tiles.stop - tiles.start) * tiling.height, padded_columns, dtype=torch.float32, device=grad.device
        )
        inside = padded[: rows.stop - rows.start, : tiling.columns]
        inside.copy_(grad[part].view(-1, tiling.columns))
        if residual is not None:
            inside += residual[part].view(-1, tiling.columns)
        cut = padded.view(-1, tiling.height, tiling.across, tiling.width).transpose(1, 2)
        spectrum = (down @ cut @ across.t()).reshape(-1, tiling.tile_numel)
        index = spectrum.abs().topk(kept, sorted=False).indices.sort().values
        indices.append(index)
        values.append(spectrum.gather(1, index))
    return torch.cat(values), torch.cat(indices)


def add_spectrum(
    out: Tensor, values: Tensor, index: Tensor, tiling: Tiling, scale: float, addend: Tensor | None = None
) -> None:
    """``out += scale * decoded``: for each tile, in the order given, coefficient times row of basis times row of basis.

    Args:
        out: flat float32, rows * columns elements.
        values: float32 [tiles, kept].
        index: int16, to be read as unsigned, [tiles, kept], below tile_numel; kept at least 1.
        addend: flat, added to ``out`` first.
    """
    if addend is not None:
        out += addend
    down, across = _basis_on(tiling.height, out.device), _basis_on(tiling.width, out.device)
    matrix = out.view(tiling.rows, tiling.columns)
    for tiles, rows in _groups(tiling):
        part = slice(tiles.start * tiling.across, tiles.stop * tiling.across)
        where = index[part].to(torch.int64) & 0xFFFF
        u, v = where // tiling.width, where % tiling.width
        left = values[part].unsqueeze(2) * down[u]
        decoded = left[:, 0, :, None] * across[v[:, 0]][:, None, :]
        for i in range(1, where.shape[1]):
            decoded += left[:, i, :, None] * across[v[:, i]][:, None, :]
        whole = decoded.view(-1, tiling.across, tiling.height, tiling.width).transpose(1, 2)
        whole = whole.reshape(-1, tiling.across * tiling.width)
        matrix[rows] += whole[: rows.stop - rows.start, : tiling.columns] * scale
