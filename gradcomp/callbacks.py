"""Whoever wants to hear how a run goes: a log, a dashboard, a tracker of experiments.

What they hear are dicts that JSON can hold. docs/WATCHING.md lists the keys.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Callback", "Callbacks"]

logger = logging.getLogger("gradcomp")


class Callback(ABC):
    """Hears of one run, on each rank of its own; called by the thread that trains, which waits for it."""

    def on_start(self, info: Mapping[str, Any]) -> None:  # noqa: B027
        """What is run: ``rank``, ``world_size``, ``compressor`` and more. Once, before all others."""

    @abstractmethod
    def on_step(self, record: Mapping[str, Any]) -> None:
        """A step is over: ``step``, ``time_s``, what was sent, where the milliseconds went."""

    def on_epoch(self, record: Mapping[str, Any]) -> None:  # noqa: B027
        """An epoch is over, after its last step: ``epoch``, ``loss``, ``accuracy``, ``time_s``."""

    def on_end(self, summary: Mapping[str, Any]) -> None:  # noqa: B027
        """The run is over. If it failed, ``summary`` holds nothing but ``error``. Close what is open."""


class Callbacks:
    """Tells all of them, in the order given.

    One that raises an exception is named in the log ("gradcomp", with the traceback), and is told nothing more: a
    dashboard that is down does not end a training run.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self._callbacks = list(callbacks)

    def __bool__(self) -> bool:
        """Whether anybody listens."""
        return bool(self._callbacks)

    def start(self, info: Mapping[str, Any]) -> None:
        self._tell("on_start", info)

    def step(self, record: Mapping[str, Any]) -> None:
        self._tell("on_step", record)

    def epoch(self, record: Mapping[str, Any]) -> None:
        self._tell("on_epoch", record)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Tell them, and let them go."""
        self._tell("on_end", summary)
        self._callbacks.clear()

    def _tell(self, what: str, told: Mapping[str, Any]) -> None:
        self._callbacks = [callback for callback in self._callbacks if _heard(callback, what, told)]


def _heard(callback: Callback, what: str, told: Mapping[str, Any]) -> bool:
    try:
        getattr(callback, what)(told)
    except Exception:
        logger.exception("%s failed in %s, and is told nothing more", type(callback).__name__, what)
        return False
    return True
