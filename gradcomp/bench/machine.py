"""What a benchmark ran on: figures count only beside it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from gradcomp.errors import ConfigError
from gradcomp.kernels import native
from gradcomp.version import __version__

__all__ = ["describe_machine", "free_memory_bytes"]


def describe_machine() -> dict[str, str | int | float]:
    """Processor, cores for this process, memory, load, and the versions that matter."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = _from_proc("meminfo", "MemTotal")
    try:
        kernels = native.LEVEL if native.enabled() else "torch"
    except ConfigError as error:
        kernels = str(error)
    return {
        "processor": _from_proc("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "memory_gib": round(_kib(memory) / 2**20, 1),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "gradcomp": __version__,
        "kernels": kernels,
    }


def free_memory_bytes() -> int:
    """What the kernel says is available; 0 where it does not."""
    return 1024 * _kib(_from_proc("meminfo", "MemAvailable"))


def _from_proc(file: str, key: str) -> str:
    try:
        lines = Path("/proc", file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((text.strip() for name, _, text in (line.partition(":") for line in lines) if name.strip() == key), "")


def _kib(text: str) -> int:
    number = text.partition(" ")[0]
    return int(number) if number.isdigit() else 0
