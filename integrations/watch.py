"""Callbacks for a training loop of one's own::

sync = gradcomp.attach(optimizer, model=model)
told = watch(sync, optimizer, [JsonlCallback("run.jsonl", rank=sync.rank), LoggingCallback()])
...
    optimizer.step()
    told.note(loss=loss.item())         # goes with the next record
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from gradcomp.callbacks import Callback, Callbacks
from gradcomp.integrations.recorder import Recorder, describe
from gradcomp.options import Configured, check_integer
from gradcomp.registry import format_spec
from gradcomp.session import Session

__all__ = ["Watch"]

_OURS = ("step", "time_s")


class Watch:
    """Tells callbacks of an exchange that was attached to ``optimizer``, until it is detached or its block ends.

    Make one on every rank that has something to tell: nothing here waits for another rank.

    Args:
        every: so many exchanges make a record, in ``optimizer.step()``. One costs a pass over the residuals.
        layers_every: one in so many records says how each layer does; 0: none.
        info: more to say of the run, such as ``task="..."`` or ``steps=10_000``, how many it will take.

    Raises:
        ConfigError: ``every`` or ``layers_every`` out of range.
    """

    def __init__(
        self,
        sync: Session,
        optimizer: Optimizer,
        callbacks: Iterable[Callback],
        *,
        every: int = 10,
        layers_every: int = 10,
        **info: object,
    ) -> None:
        check_integer("Watch", "every", every, at_least=1)
        check_integer("Watch", "layers_every", layers_every, at_least=0)
        self._sync, self._every = sync, every
        self._callbacks = Callbacks(callbacks)
        self._recorder = Recorder(sync, layers_every=layers_every)
        self._step = sync.step
        self._since = 0
        self._started = time.perf_counter()
        self._noted: dict[str, Any] = {}
        self._callbacks.start(describe(sync, **_kinds(sync), **info))
        sync.add_handle(self)
        sync.add_handle(optimizer.register_step_post_hook(self._after_step))

    def note(self, **fields: object) -> None:
        """Put numbers of your own into the next record, such as ``loss=0.3`` or ``accuracy=97.1`` (percent)."""
        self._noted |= {key: value for key, value in fields.items() if key not in _OURS}

    def epoch(self, epoch: int, **fields: object) -> None:
        """An epoch is over."""
        self._callbacks.epoch({"epoch": epoch, "time_s": self._time_s()} | fields)

    def remove(self) -> None:
        """The run is over: what ``sync.detach()`` calls, and the end of its ``with`` block."""
        error = sys.exc_info()[1]
        if error is not None:
            self._callbacks.end({"error": f"{type(error).__name__}: {error}"})
            return
        if self._since or self._noted:
            self._tell()
        self._callbacks.end({"rank": self._sync.rank, "steps": self._step, "train_s": self._time_s()})

    def _time_s(self) -> float:
        return time.perf_counter() - self._started

    def _after_step(self, *_: object) -> None:
        # With overlap="forward" the optimizer also steps for the parameters that have come in, and no exchange is over.
        if self._sync.step == self._step:
            return
        self._step = self._sync.step
        self._since += 1
        if self._since >= self._every and self._callbacks:
            self._tell()

    def _tell(self) -> None:
        self._since = 0
        noted, self._noted = self._noted, {}
        self._callbacks.step(self._recorder.record(self._step, time_s=self._time_s(), **noted))


def _kinds(sync: Session) -> dict[str, object]:
    """How it exchanges, as far as it tells."""
    compressor = getattr(sync, "compressor", None)
    spec = format_spec(compressor) if isinstance(compressor, Configured) else "rules"
    others = {"transport": "transport", "exchange": "exchange_kind"}
    found = {key: getattr(getattr(sync, attribute, None), "id", None) for key, attribute in others.items()}
    return {"compressor": spec} | {key: value for key, value in found.items() if value is not None}
