"""Dense values and maps of signs, added in plain torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcomp.kernels.reference_chunks import chunks

__all__ = ["add_scaled", "add_sign_map"]


def add_sign_map(out: Tensor, codes: Tensor, magnitude: float) -> None:
    """``out`` plus what a checked MAP of signs says: four elements a byte, 01 plus, 10 minus ``magnitude``."""
    byte = torch.arange(256, device=out.device).unsqueeze(1)
    code = (byte >> torch.tensor([0, 2, 4, 6], device=out.device)) & 3
    sign = (code == 1).to(torch.float32) - (code == 2).to(torch.float32)
    table = sign * torch.tensor(magnitude, dtype=torch.float32, device=out.device)
    for part in chunks(out.numel(), out.device, 4):
        rows = table[codes[part.start // 4 : -(-part.stop // 4)].to(torch.int32)]
        out[part] += rows.view(-1)[: part.stop - part.start]


def add_scaled(out: Tensor, values: Tensor, scale: float) -> None:
    """``out += scale * values``, each product rounded to float32 before it is added; ``values`` of any float type."""
    if scale in (1.0, -1.0):
        out.add_(values, alpha=scale)  # nothing to round, so nothing to keep apart
        return
    for part in chunks(out.numel(), out.device):
        out[part] += values[part].to(torch.float32) * scale
