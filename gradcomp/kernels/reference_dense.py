"""Dense values, cast and added, in plain torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcomp.kernels.reference_chunks import chunks

__all__ = ["add_scaled", "cast"]


def cast(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of ``grad`` as float32, float16 or bfloat16, rounded to nearest even; always a copy.

    Narrowing makes every NaN the positive quiet one without a payload (0x7e00, 0x7fc0): what torch makes of it differs
    between processors, and along one tensor.
    """
    found = grad.to(dtype, copy=True)
    if dtype != torch.float32:
        found.masked_fill_(found.isnan(), torch.nan)
    return found.view(torch.uint8)


def add_scaled(out: Tensor, values: Tensor, scale: float, addend: Tensor | None = None) -> None:
    """``out = (out + addend) + scale * values``, each operation rounded to float32; ``values`` of any float type."""
    if addend is None and scale in (1.0, -1.0):
        out.add_(values, alpha=scale)  # nothing to round, so nothing to keep apart
        return
    for part in chunks(out.numel(), out.device):
        target = out[part]
        if addend is not None:
            target += addend[part]
        target += values[part].to(torch.float32) * scale
