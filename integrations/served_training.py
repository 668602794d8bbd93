"""Training with a parameter server: workers come and go, and the run is over when the server has made its updates.

An epoch is as many updates as it takes for all workers together to go over the data once, whoever makes them: fast
workers take more batches than slow ones. Nobody waits for anybody but where the mode says so: rank 0 evaluates alone. A
worker that was ended and started again goes on from its clock.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections.abc import Generator
from typing import TYPE_CHECKING

from torch import Tensor

from gradcomp.errors import GradientError
from gradcomp.integrations import tasks
from gradcomp.integrations.progress import Progress
from gradcomp.integrations.report import Summary
from gradcomp.integrations.told import Told
from gradcomp.integrations.trainer import EVALUATION_BATCH, Trainer
from gradcomp.server.modes import Async, Mode, Softsync, Sync

if TYPE_CHECKING:
    from gradcomp.integrations.run_options import RunOptions
    from gradcomp.integrations.served import Served

__all__ = ["ServedRun", "batches_per_update"]


def batches_per_update(mode: Mode, workers: int) -> int:
    """Of how many batches an update is made."""
    if isinstance(mode, Sync):
        return workers
    if isinstance(mode, Softsync):
        return max(1, workers // mode.n)
    return mode.n_push if isinstance(mode, Async) else 1


class ServedRun:
    """One worker's training loop and its clock."""

    def __init__(self, options: RunOptions, trainer: Trainer, sync: Served, steps_per_epoch: int) -> None:
        self._options, self._trainer, self._sync = options, trainer, sync
        self._steps_per_epoch = steps_per_epoch
        per_update = batches_per_update(sync.mode, sync.world_size)
        self._updates_per_epoch = max(1, steps_per_epoch * sync.world_size // per_update)
        self._epoch = 0  # those that are over

    def train(self, stack: contextlib.ExitStack) -> Summary:
        """Train until all updates are made.

        Raises:
            GradientError: nothing but NaN and Inf for a whole epoch.
        """
        task, options, sync, trainer = self._trainer.task, self._options, self._sync, self._trainer
        first = sync.rank == 0
        updates = self._updates_per_epoch * task.epochs
        progress = stack.enter_context(
            Progress(label=options.label or options.compressor, steps=updates, quiet=options.quiet or not first)
        )
        told = stack.enter_context(Told(options, trainer, sync, updates=updates, exposed_in="optimizer_ms"))
        with warnings.catch_warnings():
            # A worker that comes later brings its schedule to where the run is, before its first step.
            warnings.simplefilter("ignore", UserWarning)
            self._advance_epoch()
        task.model.train()
        losses: list[float] = []
        accuracy: float | None = None
        with contextlib.closing(self._batches()) as batches:
            while self._epoch < task.epochs:
                started = time.perf_counter()
                losses.append(trainer.step(*next(batches)))
                trainer.count(time.perf_counter() - started)
                self._check_finite()
                record = told.record(self._epoch + 1, losses[-1])
                progress.step()
                if not self._advance_epoch():
                    told.step(record)
                    continue
                loss = sum(losses) / len(losses)
                losses.clear()
                if first:
                    if self._epoch == task.epochs:
                        sync.pull()
                    record["accuracy"] = accuracy = self._evaluate()
                    progress.epoch(
                        epoch=self._epoch, epochs=task.epochs, loss=loss, accuracy=accuracy, train_s=trainer.train_s
                    )
                told.step(record)
                told.epoch(self._epoch, loss=loss, **({"accuracy": record["accuracy"]} if first else {}))
        if accuracy is None and first:
            accuracy = self._evaluate()  # it came when all was over
        summary = self._summary(accuracy or 0.0)
        told.end(summary)
        return summary

    def _batches(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """This worker's batches from its clock on, epoch after epoch of its own."""
        sync = self._sync
        begun, done = divmod(sync.step, self._steps_per_epoch)
        for epoch in itertools.count(begun + 1):
            batches = self._trainer.batches(epoch, seed=self._options.seed, rank=sync.rank, world_size=sync.world_size)
            with contextlib.closing(batches):
                yield from itertools.islice(batches, done, None)
            done = 0

    def _advance_epoch(self) -> bool:
        """Step the schedule for every epoch that the server's updates have completed; whether there was one."""
        over = min(self._sync.version // self._updates_per_epoch, self._trainer.task.epochs)
        advanced = over > self._epoch
        for _ in range(self._epoch, over):
            if self._trainer.task.scheduler is not None:
                self._trainer.task.scheduler.step()
        self._epoch = max(over, self._epoch)
        return advanced

    def _check_finite(self) -> None:
        """Updates that nobody can make would be waited for without end."""
        lost = self._sync.nonfinite_in_a_row
        if lost >= self._steps_per_epoch:
            raise GradientError(f"the last {lost} gradients of this worker held NaN or Inf: training has diverged")

    def _evaluate(self) -> float:
        """Accuracy in percent over all test data, with this worker's copy of the parameters."""
        data = self._trainer.task.test_data
        batches = tasks.evaluation_batches(data, batch_size=EVALUATION_BATCH, rank=0, world_size=1)
        counts = self._trainer.count_right(batches)
        return 100 * float(counts[0]) / float(counts[1])

    def _summary(self, accuracy: float) -> Summary:
        options, sync = self._options, self._sync
        stats = sync.stats()
        return Summary(
            rank=sync.rank,
            task=options.task,
            compressor=options.compressor,
            transport="zmq",
            exchange=f"server, {sync.mode.id}",
            workers=sync.world_size,
            seed=options.seed,
            accuracy=accuracy,
            steps=self._trainer.steps,
            train_s=self._trainer.train_s,
            bytes_sent=stats["bytes_sent"],
            bytes_received=stats["bytes_received"],
            ratio=stats["ratio"],
            pull_ratio=stats["pull_ratio"],
            updates=stats["version"],
            late=stats["late"],
            staleness=stats["staleness"],
        )
