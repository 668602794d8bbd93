"""Random numbers, from the fastest backend; :mod:`gradcomp.kernels.reference_random` defines them."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcomp.kernels import reference_random, triton

__all__ = ["philox"]


def philox(key: int, step: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """:func:`gradcomp.kernels.reference_random.philox`, from the fastest backend."""
    device = torch.device(device)
    if device.type == "cuda" and triton.enabled():
        from gradcomp.kernels import triton_random

        return triton_random.philox(key, step, start, count, device)
    return reference_random.philox(key, step, start, count, device)
