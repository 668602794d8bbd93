"""Sums in an order that every backend can follow: float addition is not associative, and bits must be the same."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["lane_sums", "robust_sums"]

_LANES = 16  # sums that run side by side, as vector registers do
_RUN = 512  # elements after which they are added up
_SCALE_DOWN, _SCALE_UP = 2.0**-40, 2.0**40


def lane_sums(rows: Tensor) -> Tensor:
    """The sum of each row of [rows, width], in float64.

    In each run of 512 elements, element i is added to lane i mod 16, in order and in the dtype of ``rows``; then lanes
    8 to 15 are added to lanes 0 to 7, 4 to 7 to 0 to 3, 2 and 3 to 0 and 1, 1 to 0. The runs' sums are added in order,
    in float64. All begin with +0.
    """
    width = rows.shape[1]
    unit = _LANES if width <= _RUN else _RUN
    if width % unit:
        rows = torch.cat([rows, rows.new_zeros(len(rows), -width % unit)], 1)
    run = min(rows.shape[1], _RUN)
    lanes = rows.reshape(len(rows), rows.shape[1] // run, run // _LANES, _LANES)
    sums = rows.new_zeros(*lanes.shape[:2], _LANES)
    for step in range(lanes.shape[2]):
        sums += lanes[:, :, step]
    for half in (8, 4, 2, 1):
        sums = sums[:, :, :half] + sums[:, :, half:]
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for sum_of_run in sums[:, :, 0].unbind(1):
        total = total + sum_of_run
    return total


def robust_sums(rows: Tensor) -> Tensor:
    """:func:`lane_sums` of float32; where that is not finite, those of the elements times 2**-40, times 2**40.

    So the sum is finite if the elements are, and costs no more than sums in float32 do.
    """
    sums = lane_sums(rows)
    bad = ~sums.isfinite()
    if bool(bad.any()):
        sums[bad] = lane_sums(rows[bad] * _SCALE_DOWN) * _SCALE_UP
    return sums
