"""Sums in an order that every backend can follow: float addition is not associative, and bits must be the same."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LANES", "RUN", "lane_sums"]

LANES = 16  # sums that run side by side, as vector registers do
RUN = 512  # elements after which they are added up


def lane_sums(rows: Tensor) -> Tensor:
    """The sum of each row of [rows, width], in float64.

    In each run of 512 elements, element i is added to lane i mod 16, in order; then lanes 8 to 15 are added to lanes 0
    to 7, 4 to 7 to 0 to 3, 2 and 3 to 0 and 1, 1 to 0. The runs' sums are added in order. All begin with +0.
    """
    width = rows.shape[1]
    unit = LANES if width <= RUN else RUN
    if width % unit:
        rows = torch.cat([rows, rows.new_zeros(len(rows), -width % unit)], 1)
    run = min(rows.shape[1], RUN)
    lanes = rows.reshape(len(rows), rows.shape[1] // run, run // LANES, LANES)
    sums = torch.zeros(*lanes.shape[:2], LANES, dtype=torch.float64, device=rows.device)
    for step in range(lanes.shape[2]):
        sums += lanes[:, :, step]
    for half in (8, 4, 2, 1):
        sums = sums[:, :, :half] + sums[:, :, half:]
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for sum_of_run in sums[:, :, 0].unbind(1):
        total = total + sum_of_run
    return total
