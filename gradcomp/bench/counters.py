"""Bytes on the wire, as the kernel counts them: one meter for everything that is compared."""

from __future__ import annotations

from pathlib import Path

from gradcomp.errors import ConfigError

__all__ = ["wire_bytes"]


def wire_bytes(interface: str) -> tuple[int, int]:
    """Bytes sent and received so far through a network interface of this process's network namespace, with all headers.

    Raises:
        ConfigError: there is no such interface, or no kernel that says so.
    """
    try:
        lines = Path("/proc/self/net/dev").read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"the kernel's byte counters are not to be had: {error}") from None
    for line in lines:
        name, _, counts = line.partition(":")
        if name.strip() == interface:
            columns = counts.split()
            return int(columns[8]), int(columns[0])
    raise ConfigError(f"there is no network interface {interface}")
