"""Logs as `gradcomp train --log` writes them, made up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradcomp.integrations.callbacks import rank_path

HEADER: dict[str, Any] = {
    "format": 1,
    "world_size": 2,
    "label": "threshold",
    "task": "digits.py",
    "compressor": "threshold",
    "transport": "zmq",
    "exchange": "auto",
    "seed": 0,
    "epochs": 2,
    "steps": 40,
    "versions": {"gradcomp": "0.1.0"},
}
END = {"rank": 0, "accuracy": 90.0}


def step(number: int, **more: Any) -> dict[str, Any]:
    """A step; every tenth one says how two layers do, the 20th and the 40th have an accuracy."""
    stages = {"forward_ms": 10.0, "backward_ms": 20.0, "optimizer_ms": 2.0, "wait_ms": 5.0, "exposed_ms": 6.0}
    row = {"density": 0.001, "tau": 0.1, "residual_norm": 3.0, "numel": 1000, "compressor": "threshold"}
    record = {"step": number, "epoch": 1 + number // 21, "time_s": 0.04 * number, "loss": 2.0 / number}
    record |= {"step_ms": 40.0, "bytes_sent": 1000 * number, "bytes_received": 1000 * number, "ratio": 250.0}
    record |= {"density": 0.001, "tau": 0.1, "residual_norm": 4.0, "compress_ms": 3.0, "decompress_ms": 1.0}
    record |= {"hidden_fraction": 0.5, "nonfinite_steps": 0, **stages}
    if number % 10 == 1:
        record["layers"] = {"fc2.weight": row | {"residual_norm": 5.0}, "fc1.weight": row}
    if number == 1:
        record["compressors"] = {"fc1.weight": "threshold", "fc2.weight": "threshold", "fc2.bias": "none"}
    if number % 20 == 0:
        record["accuracy"] = 45.0 * number / 20
    return record | more


def write(
    path: Path,
    *,
    steps: Sequence[Mapping[str, Any]] | None = None,
    header: Mapping[str, Any] | None = None,
    end: Mapping[str, Any] | None = END,
    ranks: int = 2,
    rest: str = "",
) -> Path:
    """Logs of a run, one a rank; ``rest`` comes last in rank 0's."""
    for rank in range(ranks):
        lines = [dict(record) for record in (map(step, range(1, 41)) if steps is None else steps)] or [{}]
        lines[0]["run"] = HEADER | {"rank": rank} | dict(header or {})
        if end is not None:
            lines[-1]["end"] = dict(end)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        rank_path(path, rank).write_text(text + (rest if rank == 0 else ""))
    return path
