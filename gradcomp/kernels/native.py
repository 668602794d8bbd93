"""The C++ kernels for the CPU: the same results as :mod:`gradcomp.kernels.reference`, bit for bit, in fewer passes.

They are compiled when the package is installed, if there is a C++ compiler, and chosen at their first use. Setting the
environment variable ``GRADCOMP_KERNELS=torch`` before that keeps the torch kernels, to compare; ``native`` insists.

Attributes:
    AVAILABLE: whether they were built and load.
    REASON: why not, or "".
    LEVEL: the instructions they use on this processor: "avx512", "avx2", "generic", or "none" if not available.
"""

from __future__ import annotations

import logging
import os
from functools import cache

import torch
from torch import Tensor

from gradcomp.errors import ConfigError
from gradcomp.kernels import reference

__all__ = ["AVAILABLE", "LEVEL", "REASON", "enabled", "select_threshold"]

try:
    import gradcomp.kernels._native as _native

    AVAILABLE, REASON, LEVEL = True, "", _native.LEVEL
except ModuleNotFoundError:
    AVAILABLE, REASON, LEVEL = False, "not compiled when gradcomp was installed", "none"
except ImportError as error:  # compiled for another Python or another C++ library
    AVAILABLE, REASON, LEVEL = False, str(error), "none"


@cache
def enabled() -> bool:
    """Whether this process runs the native kernels; decided once, and said in the log if they are missing.

    Raises:
        ConfigError: GRADCOMP_KERNELS is neither torch nor native, or native where there are none.
    """
    wanted = os.environ.get("GRADCOMP_KERNELS", "")
    if wanted not in ("", "torch", "native"):
        raise ConfigError(f"GRADCOMP_KERNELS={wanted!r} is not allowed; it must be torch or native, or not set")
    if wanted == "native" and not AVAILABLE:
        raise ConfigError(f"GRADCOMP_KERNELS=native, but there are no native kernels: {REASON}")
    if not wanted and not AVAILABLE:
        logging.getLogger("gradcomp").warning(
            "no native kernels (%s): running the torch kernels, which are slower", REASON
        )
    return AVAILABLE and wanted != "torch"


def select_threshold(grad: Tensor, residual: Tensor | None, tau: float) -> tuple[Tensor, Tensor] | float:
    """:func:`gradcomp.kernels.reference.select_threshold` for CPU tensors, in one pass; other than float32 as there."""
    if grad.dtype != torch.float32:
        return reference.select_threshold(grad, residual, tau)
    return _native.select_threshold(grad.detach(), residual, tau)
