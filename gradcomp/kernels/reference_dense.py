"""Dense values, cast and added, and maps of signs, in plain torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcomp.kernels.reference_chunks import chunks

__all__ = ["add_scaled", "add_sign_map", "cast"]


def add_sign_map(out: Tensor, codes: Tensor, magnitude: float) -> None:
    """``out`` plus what a checked MAP of signs says: four elements a byte, 01 plus, 10 minus ``magnitude``."""
    byte = torch.arange(256, device=out.device).unsqueeze(1)
    code = (byte >> torch.tensor([0, 2, 4, 6], device=out.device)) & 3
    sign = (code == 1).to(torch.float32) - (code == 2).to(torch.float32)
    table = sign * torch.tensor(magnitude, dtype=torch.float32, device=out.device)
    for part in chunks(out.numel(), out.device, 4):
        rows = table[codes[part.start // 4 : -(-part.stop // 4)].to(torch.int32)]
        out[part] += rows.view(-1)[: part.stop - part.start]


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
