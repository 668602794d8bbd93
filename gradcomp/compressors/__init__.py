"""The built-in compressors, one file a family. The registry finds them through entry points, as it finds plug-ins."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcomp.errors import GradientError

__all__ = ["flat_gradient"]


def flat_gradient(grad: Tensor) -> Tensor:
    """``grad`` as a vector, without its history and, if contiguous, without a copy.

    Raises:
        GradientError: not a dense float32, float16 or bfloat16 tensor.
    """
    if grad.layout != torch.strided or grad.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise GradientError(f"gradient must be dense float32, float16 or bfloat16; got {grad.layout}, {grad.dtype}")
    return grad.detach().reshape(-1)
