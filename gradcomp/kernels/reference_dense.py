"""Dense values, added in plain torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcomp.kernels.reference_chunks import chunks

__all__ = ["add_scaled"]


def add_scaled(out: Tensor, values: Tensor, scale: float) -> None:
    """``out += scale * values``, each product rounded to float32 before it is added; ``values`` of any float type."""
    if scale in (1.0, -1.0):
        out.add_(values, alpha=scale)  # nothing to round, so nothing to keep apart
        return
    for part in chunks(out.numel(), out.device):
        out[part] += values[part].to(torch.float32) * scale
