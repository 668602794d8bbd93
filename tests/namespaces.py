"""Two hosts that are network namespaces of this machine, joined by a cable."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def ip(*words: str, check: bool = True) -> str:
    """What iproute2's ``ip`` prints."""
    return subprocess.run(["ip", *words], check=check, capture_output=True, timeout=20, text=True).stdout


@contextmanager
def two_hosts(prefix: str, network: str, rate: str | None = None) -> Iterator[list[str]]:
    """Names of two namespaces, ``network``.1 and ``network``.2; skips the test where there can be none.

    Args:
        prefix: of their names, so that tests beside each other keep apart.
        rate: of the cable, as ``tc`` writes it; None: as fast as it goes.
    """
    names = [f"{prefix}{os.getpid()}-{i}" for i in range(2)]
    shape = ["qdisc", "add", "dev", "eth0", "root", "tbf", "rate", rate or "", "burst", "512kb", "latency", "50ms"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{network}.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            if rate is not None:
                subprocess.run(["tc", "-n", name, *shape], check=True, capture_output=True, timeout=20, text=True)
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine makes no network namespaces: {error.stderr.strip()}")
    finally:
        for name in names:
            ip("netns", "del", name, check=False)
