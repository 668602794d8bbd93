"""Fixtures and skips that all tests share."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch

# Without a GPU the Triton kernels are interpreted. Triton reads this when they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Runs are compared bit for bit.
torch.backends.cudnn.deterministic = True

# Ranks are threads or processes beside each other: one torch thread each, or they fight over the cores.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Where tests start processes of Python, have the one that forks them get ready meanwhile."""
    if "zygote" in sys.modules:
        sys.modules["zygote"].zygote()


def pytest_unconfigure() -> None:
    if "zygote" in sys.modules:
        sys.modules["zygote"].close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, saying why."""
    reasons = {"gpu": _no_gpu(), "root": _no_namespaces()}
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu() -> str:
    return "" if torch.cuda.is_available() else "no CUDA device"


def _no_namespaces() -> str:
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not installed (Debian: iproute2)" if missing else ""
