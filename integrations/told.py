"""What the workers of ``gradcomp train`` tell their callbacks: the log, TensorBoard, and the task's own."""

from __future__ import annotations

from dataclasses import asdict
from types import TracebackType
from typing import Any

from gradcomp.callbacks import Callback, Callbacks
from gradcomp.integrations.callbacks import JsonlCallback, TensorBoardCallback
from gradcomp.integrations.recorder import Recorder, describe
from gradcomp.integrations.report import Summary
from gradcomp.integrations.run_options import RunOptions
from gradcomp.integrations.trainer import Trainer
from gradcomp.session import Session

__all__ = ["Told"]


class Told:
    """The callbacks of one worker. On a stack of contexts it tells them of a failure.

    Args:
        exposed_in: the stage in which training stands still for the exchange: that time is taken off the stage's own.
        plan: how long the run will be, in ``steps`` or ``updates``.

    Raises:
        ConfigError: a log that cannot be written, or TensorBoard is missing.
    """

    def __init__(self, options: RunOptions, trainer: Trainer, sync: Session, *, exposed_in: str, **plan: int) -> None:
        self._trainer, self._exposed_in = trainer, exposed_in
        self._recorder = Recorder(sync, layers_every=options.log_layers)
        callbacks: list[Callback] = []
        if options.log is not None:
            callbacks.append(JsonlCallback(options.log, rank=sync.rank))
        if options.tensorboard is not None:
            callbacks.append(TensorBoardCallback(options.tensorboard, rank=sync.rank))
        self._callbacks = Callbacks([*callbacks, *trainer.task.callbacks])
        task = trainer.task
        about: dict[str, object] = {
            "label": options.label or options.compressor,
            "task": options.task,
            "settings": list(options.settings),
        }
        about |= {"compressor": options.compressor, "transport": _transport(options, sync)}
        exchange = f"server, {options.mode or 'sync'}" if options.server is not None else options.exchange
        about |= {"exchange": exchange, "overlap": options.overlap, "device": str(trainer.device)}
        about |= {"seed": options.seed, "epochs": task.epochs, "batch_size": task.batch_size}
        if self._callbacks:
            self._callbacks.start(describe(sync, **about, **plan))

    def record(self, epoch: int, loss: float) -> dict[str, Any]:
        """What there is to tell of the step that is over; nothing if nobody listens."""
        if not self._callbacks:
            return {}
        trainer = self._trainer
        stages = trainer.stages_ms()
        record = self._recorder.record(
            trainer.steps,
            epoch=epoch,
            time_s=trainer.train_s,
            loss=loss,
            lr=float(trainer.task.optimizer.param_groups[0]["lr"]),
            **stages,
        )
        record[self._exposed_in] = max(0.0, stages[self._exposed_in] - record["exposed_ms"])
        return record

    def step(self, record: dict[str, Any]) -> None:
        """Tell a :meth:`record`."""
        self._callbacks.step(record)

    def epoch(self, epoch: int, **fields: float) -> None:
        """An epoch is over."""
        self._callbacks.epoch({"epoch": epoch, "time_s": self._trainer.train_s, **fields})

    def end(self, summary: Summary) -> None:
        """The run is over."""
        self._callbacks.end(asdict(summary))

    def __enter__(self) -> Told:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._callbacks.end({"error": f"{type(error).__name__}: {error}"})


def _transport(options: RunOptions, sync: Session) -> str:
    if options.server is not None:
        return "zmq"
    carrier: str = getattr(sync, "transport").id  # noqa: B009  (of a GradientExchange)
    return options.transport or carrier
