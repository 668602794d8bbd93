"""What callbacks are told of a run and its steps, from an exchange's ``stats()``."""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import torch

from gradcomp.session import Session
from gradcomp.version import __version__

__all__ = ["LOG_FORMAT", "Recorder", "describe"]

LOG_FORMAT = 1
_LOGGED = (
    "bytes_sent",
    "bytes_received",
    "ratio",
    "pull_ratio",
    "density",
    "tau",
    "residual_norm",
    "compress_ms",
    "wait_ms",
    "decompress_ms",
    "exposed_ms",
    "hidden_fraction",
    "nonfinite_steps",
    "version",
)


def describe(sync: Session, **more: object) -> dict[str, Any]:
    """What runs where: ``run`` in a log's first line."""
    return {
        "format": LOG_FORMAT,
        "rank": sync.rank,
        "world_size": sync.world_size,
        **more,
        "host": socket.gethostname(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"gradcomp": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


class Recorder:
    """Makes a record of each step.

    Args:
        layers_every: one in so many records says how each layer does; 0: none.
    """

    def __init__(self, sync: Session, *, layers_every: int) -> None:
        self._sync, self._layers_every = sync, layers_every
        self._records = 0
        self._compressors: Mapping[str, str] = {}

    def record(self, step: int, **more: object) -> dict[str, Any]:
        """One step: bytes are totals of this rank so far, milliseconds those of the last step that was exchanged.

        Costs a pass over all residuals, for their norm.
        """
        stats = self._sync.stats()
        record = {"step": step, **more} | {key: stats[key] for key in _LOGGED if key in stats}
        compressors: Mapping[str, str] = stats.get("compressors", {})
        if compressors != self._compressors:
            self._compressors = compressors
            record["compressors"] = dict(compressors)
        if self._layers_every and self._records % self._layers_every == 0:
            record["layers"] = {
                name: row | ({"compressor": compressors[name]} if name in compressors else {})
                for name, row in stats["parameters"].items()
            }
        self._records += 1
        return record
