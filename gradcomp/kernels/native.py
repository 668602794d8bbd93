"""The C++ kernels for the CPU: the same results as :mod:`gradcomp.kernels.reference`, bit for bit, in fewer passes.

They are compiled when the package is installed, if there is a C++ compiler, and chosen at their first use. Setting the
environment variable ``GRADCOMP_KERNELS=torch`` before that keeps the torch kernels, to compare; ``native`` insists.

Attributes:
    AVAILABLE: whether they were built and load.
    REASON: why not, or "".
    module: the extension module itself; use it only where ``enabled()``.
    LEVEL: the instructions they use on this processor: "avx512", "avx2", "generic", or "none" if not available.
"""

from __future__ import annotations

import logging
import os
from functools import cache

import torch
from torch import Tensor

from gradcomp.errors import ConfigError

__all__ = ["AVAILABLE", "LEVEL", "REASON", "enabled", "floats", "module", "takes", "thread_count", "wanted"]

try:
    import gradcomp.kernels._native as module

    AVAILABLE, REASON, LEVEL = True, "", module.LEVEL
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
    asked = wanted()
    if asked == "native" and not AVAILABLE:
        raise ConfigError(f"GRADCOMP_KERNELS=native, but there are no native kernels: {REASON}")
    if not asked and not AVAILABLE:
        logging.getLogger("gradcomp").warning(
            "no native kernels (%s): running the torch kernels, which are slower", REASON
        )
    return AVAILABLE and asked != "torch"


def wanted() -> str:
    """What GRADCOMP_KERNELS asks for: "torch", "native", or "" for the fastest.

    Raises:
        ConfigError: it is something else.
    """
    asked = os.environ.get("GRADCOMP_KERNELS", "")
    if asked not in ("", "torch", "native"):
        raise ConfigError(f"GRADCOMP_KERNELS={asked!r} is not allowed; it must be torch or native, or not set")
    return asked


def takes(tensor: Tensor) -> bool:
    """Whether the native kernels are to work on ``tensor``: it is on the CPU, and they are enabled."""
    return tensor.device.type == "cpu" and enabled()


def floats(grad: Tensor) -> Tensor:
    """``grad`` as what the kernels read: float32, without its history."""
    return grad.detach().to(torch.float32)


def thread_count(threads: int | None) -> int:
    """How many threads a kernel may use: ``threads``, or as many as torch uses."""
    return torch.get_num_threads() if threads is None else threads
