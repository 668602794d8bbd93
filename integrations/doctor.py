"""What gradcomp finds on this machine, and what it makes of it: ``gradcomp doctor``."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from gradcomp import registry
from gradcomp.errors import ConfigError
from gradcomp.kernels import native, triton
from gradcomp.version import __version__

__all__ = ["Finding", "examine"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at.
        found: what there is.
        advice: what to do about it; "" if all is well.
    """

    subject: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything that decides how fast gradcomp is here, or whether it runs at all."""
    return [
        Finding("gradcomp", f"{__version__}, Python {platform.python_version()}, {platform.platform()}"),
        _kernels(),
        _processor(),
        _torch(),
        _cuda(),
        _cuda_kernels(),
        _zeromq(),
        _plugins("compressors", registry.available_compressors()),
        _plugins("transports", registry.available_transports()),
        _plugins("exchanges", registry.available_exchanges()),
    ]


def _kernels() -> Finding:
    wanted = os.environ.get("GRADCOMP_KERNELS")
    try:
        enabled = native.enabled()
    except ConfigError as error:
        return Finding("CPU kernels", "none will run", str(error))
    if enabled:
        return Finding("CPU kernels", f"native (C++), {native.LEVEL}: the best this processor has")
    if native.AVAILABLE:
        return Finding(
            "CPU kernels",
            f"torch, because GRADCOMP_KERNELS={wanted}; native ones ({native.LEVEL}) are there",
            "unset GRADCOMP_KERNELS for the faster ones",
        )
    return Finding(
        "CPU kernels",
        f"torch, because there are no native ones: {native.REASON}",
        "they are some 2 to 10 times slower; install a C++17 compiler, then gradcomp again",
    )


def _processor() -> Finding:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    found = f"{allowed} for this process, torch and the kernels use {threads} threads"
    if threads > allowed:
        return Finding("cores", found, f"more threads than cores: set OMP_NUM_THREADS to {allowed} at most")
    return Finding("cores", found)


def _torch() -> Finding:
    distributed = torch.distributed.is_available()
    backends = [name for name in ("gloo", "nccl") if distributed and torch.distributed.is_backend_available(name)]
    found = f"{torch.__version__}, torch.distributed with {', '.join(backends) or 'no backend'}"
    if distributed and "nccl" not in backends and torch.cuda.is_available():
        return Finding("torch", found, "transport nccl needs a torch that was built with NCCL; gloo and zmq do not")
    if not distributed:
        return Finding("torch", found, "ranks meet in a torch.distributed.TCPStore: this torch was built without it")
    return Finding("torch", found)


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return Finding("CUDA", f"none: torch is {built}" + (", and finds no device" if torch.version.cuda else ""))
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("CUDA", f"{torch.version.cuda}: {', '.join(names)}")


def _cuda_kernels() -> Finding:
    """What gradients on CUDA devices run, or would run if there were any."""
    try:
        enabled = triton.enabled()
    except ConfigError as error:
        return Finding("CUDA kernels", "none will run", str(error))
    if enabled:
        from triton import __version__ as triton_version

        return Finding("CUDA kernels", f"Triton {triton_version}")
    slow = torch.cuda.is_available()  # else nothing is lost
    if triton.AVAILABLE:
        advice = "unset GRADCOMP_KERNELS for the faster ones" if slow else ""
        return Finding("CUDA kernels", f"torch, because GRADCOMP_KERNELS={native.wanted()}; Triton is there", advice)
    advice = "they take several sweeps where Triton takes one: pip install triton" if slow else ""
    return Finding("CUDA kernels", "torch, because Triton is not installed", advice)


def _zeromq() -> Finding:
    import zmq

    curve = zmq.has("curve")
    found = f"{zmq.zmq_version()}, pyzmq {zmq.__version__}, {'with' if curve else 'without'} CURVE encryption"
    if not curve:
        return Finding("ZeroMQ", found, "its wheels from PyPI have it: pip install --force-reinstall pyzmq")
    return Finding("ZeroMQ", found)


def _plugins(kind: str, names: list[str]) -> Finding:
    return Finding(kind, ", ".join(names))
