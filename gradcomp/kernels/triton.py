"""The Triton kernels for CUDA: the same results as :mod:`gradcomp.kernels.reference` in one sweep over the data.

One file a family, ``triton_*.py``, imported only where a tensor on a CUDA device asks for it: Triton need not be there,
and the torch kernels run where it is not. ``GRADCOMP_KERNELS=torch`` keeps those, to compare. With
``TRITON_INTERPRET=1`` set before the first of them is imported they run on CPU tensors, slowly: so they are tested.

Attributes:
    AVAILABLE: whether Triton is installed.
    EXACT: what every launch is given, so that a product and a sum are rounded one by one, as torch does it.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gradcomp.errors import ConfigError
from gradcomp.kernels import native

__all__ = ["AVAILABLE", "EXACT", "enabled", "grid", "takes"]

AVAILABLE = importlib.util.find_spec("triton") is not None
EXACT: dict[str, Any] = {"enable_fp_fusion": False}


@cache
def enabled() -> bool:
    """Whether this process runs the Triton kernels; decided once, and said in the log if they are missing.

    Raises:
        ConfigError: GRADCOMP_KERNELS is not allowed.
    """
    if native.wanted() == "torch":
        return False
    if not AVAILABLE:
        logging.getLogger("gradcomp").warning("Triton is not installed: gradients on GPUs run the slower torch kernels")
    return AVAILABLE


def takes(tensor: Tensor) -> bool:
    """Whether the Triton kernels are to work on ``tensor``: it is on a CUDA device, and they are enabled.

    Raises:
        ConfigError: it is on another CUDA device than the current one, where Triton would launch them.
    """
    if not tensor.is_cuda or not enabled():
        return False
    current = torch.cuda.current_device()
    if tensor.get_device() != current:
        raise ConfigError(
            f"device={str(tensor.device)!r} is not allowed here; kernels run on the current device, cuda:{current}: "
            "call within torch.cuda.device(tensor.device)"
        )
    return True


def grid(numel: int, block: int) -> tuple[int]:
    """How many programs cover ``numel`` elements, ``block`` each."""
    return (-(-numel // block),)
