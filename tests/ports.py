"""Ports that servers of a test may listen on."""

from __future__ import annotations

import itertools
import os
import random
import socket

# Below what Linux gives to outgoing connections (32768 and up): one of those may take, at any moment, a port that was
# free when it was chosen. Workers of pytest-xdist share the rest; two suites at once start at different ports of it.
_FIRST, _EACH = 10000, 5000
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
_tried = itertools.count(random.SystemRandom().randrange(_EACH))


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on, and that no other call has returned lately."""
    for _ in range(_EACH):
        port = _FIRST + _worker * _EACH + next(_tried) % _EACH
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no port from {_FIRST} on is free")
