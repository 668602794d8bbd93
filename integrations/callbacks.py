"""Callbacks that come with gradcomp: a log file, Python's logging, TensorBoard."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradcomp.callbacks import Callback
from gradcomp.errors import ConfigError
from gradcomp.integrations.report import size
from gradcomp.options import check_integer

__all__ = ["JsonlCallback", "LoggingCallback", "TensorBoardCallback", "rank_path"]


def rank_path(path: str | Path, rank: int) -> Path:
    """Where a rank's log is: ``run.jsonl`` is rank 0's, ``run.rank1.jsonl`` beside it rank 1's."""
    path = Path(path)
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


class JsonlCallback(Callback):
    """The log: a line of JSON a step. NaN and infinities become null.

    The first line also has what is run, under ``run``, and the last what it came to, under ``end``. A line is written
    when the next step is over, or the run.

    Args:
        path: rank 0's file; that of ``rank`` is beside it (:func:`rank_path`).

    Raises:
        ConfigError: it cannot be written.
    """

    def __init__(self, path: str | Path, *, rank: int = 0) -> None:
        path = rank_path(path, rank)
        try:
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115  (until on_end)
        except OSError as error:
            raise ConfigError(f"--log {path}: {error.strerror or error}") from None
        self._line: dict[str, Any] = {}  # the next one, as far as it is known
        self._about: dict[str, Any] = {}

    def on_start(self, info: Mapping[str, Any]) -> None:
        self._about = {"run": dict(info)}

    def on_step(self, record: Mapping[str, Any]) -> None:
        self._write(self._line)
        self._line = dict(record) | self._about
        self._about = {}

    def on_end(self, summary: Mapping[str, Any]) -> None:
        with self._file:
            self._write(self._line | self._about | {"end": dict(summary)})

    def _write(self, line: Mapping[str, Any]) -> None:
        if not line:
            return
        try:
            text = json.dumps(line, allow_nan=False)
        except ValueError:
            text = json.dumps(_finite(line))
        self._file.write(text + "\n")
        self._file.flush()


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return {key: _finite(item) for key, item in value.items()} if isinstance(value, Mapping) else value


class LoggingCallback(Callback):
    """A line of Python's logging every so many steps.

    Args:
        every: in steps, as the records count them.
        logger: its name.
    """

    def __init__(self, *, every: int = 100, logger: str = "gradcomp") -> None:
        check_integer("LoggingCallback", "every", every, at_least=1)
        self._every, self._logger = every, logging.getLogger(logger)
        self._next = 0

    def on_start(self, info: Mapping[str, Any]) -> None:
        self._logger.info(
            "rank %d of %d: compressor %s, transport %s, exchange %s",
            *(info.get(key, "-") for key in ("rank", "world_size", "compressor", "transport", "exchange")),
        )

    def on_step(self, record: Mapping[str, Any]) -> None:
        if record["step"] < self._next:
            return
        self._next = record["step"] + self._every
        loss = f"loss {record['loss']:.4g}, " if "loss" in record else ""
        self._logger.info(
            "step %d: %ssent %s, ratio %.1fx, %.1f ms not hidden",
            record["step"],
            loss,
            size(record["bytes_sent"]),
            record["ratio"],
            record["exposed_ms"],
        )

    def on_epoch(self, record: Mapping[str, Any]) -> None:
        self._logger.info("%s", ", ".join(f"{key} {_short(value)}" for key, value in record.items()))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        if "error" in summary:
            self._logger.warning("the run failed: %s", summary["error"])


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class TensorBoardCallback(Callback):
    """Scalars for TensorBoard: every number of a record, and ``layers/KEY/NAME`` of each layer.

    Args:
        folder: each rank writes to a folder ``rank0``, ``rank1``, ... in it, which TensorBoard shows as runs.

    Raises:
        ConfigError: TensorBoard is not installed, or the folder cannot be made.
    """

    def __init__(self, folder: str | Path, *, rank: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("TensorBoard is not installed: pip install 'gradcomp[tensorboard]'") from None
        try:
            self._writer = SummaryWriter(str(Path(folder) / f"rank{rank}"))
        except OSError as error:
            raise ConfigError(f"--tensorboard {folder}: {error.strerror or error}") from None

    def on_start(self, info: Mapping[str, Any]) -> None:
        rows = "\n".join(f"    {key}: {value}" for key, value in info.items())
        self._writer.add_text("run", rows)

    def on_step(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        for key, value in record.items():
            if key != "step":
                self._add(key, value, step)
        for name, row in record.get("layers", {}).items():
            for key, value in row.items():
                if key != "numel":
                    self._add(f"layers/{key}/{name}", value, step)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._writer.close()

    def _add(self, tag: str, value: object, step: int) -> None:
        if isinstance(value, (int, float)):
            self._writer.add_scalar(tag, value, step)
