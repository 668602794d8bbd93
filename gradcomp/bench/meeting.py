"""All ranks of a benchmark: what they tell each other, and when they begin together."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradcomp.interfaces import Slot, Transport

__all__ = ["Meeting", "machine_name"]

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Meeting:
    """Made alike on every rank, and used alike.

    Args:
        transport: connected; None: this process is alone.
    """

    def __init__(self, transport: Transport | None) -> None:
        self.transport = transport
        self.rank = 0 if transport is None else transport.rank
        self.world_size = 1 if transport is None else transport.world_size
        self._turns = itertools.count()

    def next_turn(self) -> int:
        """A number for messages, the same on all ranks."""
        return next(self._turns)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order; what JSON holds."""
        if self.transport is None:
            return [value]
        found = self.transport.all_gather(Slot(self.next_turn(), 0, 0), json.dumps(value).encode())
        return [json.loads(bytes(one)) for one in found]

    def begin(self) -> None:
        """Wait for all."""
        self.gather(None)

    def others(self) -> Sequence[int]:
        """All ranks but this one, its neighbour first."""
        return [(self.rank + turn) % self.world_size for turn in range(1, self.world_size)]


def machine_name() -> str:
    """The same for all ranks that share this machine's cores, whatever hosts they take themselves for."""
    boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
    return boot or socket.gethostname()
