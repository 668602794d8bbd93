"""A worker: trains one share of a task and exchanges gradients with the others.

``gradcomp train`` starts several on this machine; on many hosts torchrun does::

    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m gradcomp worker TASK
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import torch

import gradcomp
from gradcomp.engine import GradientExchange
from gradcomp.errors import ConfigError
from gradcomp.integrations import tasks
from gradcomp.integrations.launch import follow_parent, record_failure
from gradcomp.integrations.progress import Progress
from gradcomp.integrations.report import Summary
from gradcomp.integrations.run_options import RunOptions, choose_device
from gradcomp.integrations.served import Served
from gradcomp.integrations.served_training import ServedRun
from gradcomp.integrations.told import Told
from gradcomp.integrations.trainer import EVALUATION_BATCH, Trainer

__all__ = ["RunOptions", "train", "work"]


def work(options: RunOptions, *, launched: bool = False) -> int:
    """Be one worker of a run: train, print the result on rank 0, explain a failure.

    Args:
        launched: by :func:`gradcomp.integrations.launch.launch`, which says itself why a worker failed.

    Returns:
        The exit status: 0, or 1 for a failure, 2 if an option was at fault, 130 if interrupted.
    """
    if launched:
        follow_parent()
    with contextlib.ExitStack() as stack:
        try:
            summary = _train(options, stack)
        except KeyboardInterrupt:
            if not launched:
                raise
            return 130  # the launcher was interrupted, and says so
        except Exception as error:
            # Before the stack closes the transport and the others hear of it: this is the cause, theirs are not.
            failure = record_failure(error, int(os.environ.get("RANK", "0")))
            if not launched:
                print("\n".join(filter(None, (failure.details, failure.headline))), file=sys.stderr, flush=True)
            return 2 if isinstance(error, ConfigError) else 1
    if summary.rank == 0:
        if options.summary is not None:
            Path(options.summary).write_text(summary.json())
        else:
            print(summary.json() if options.json else summary.table(), flush=True)
    return 0


def train(options: RunOptions) -> Summary:
    """Train this process's share of a task. Rank, world size and rendezvous come from torchrun's environment.

    Returns:
        The summary; accuracy is the same on every rank (but with a server, where rank 0 alone evaluates), bytes are
        this rank's own.

    Raises:
        GradcompError: bad options, or the exchange failed.
        Exception: whatever the task raises.
    """
    with contextlib.ExitStack() as stack:
        return _train(options, stack)


def _train(options: RunOptions, stack: contextlib.ExitStack) -> Summary:
    """Train; what must be closed afterwards is left to ``stack``."""
    device = choose_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    function = tasks.load(options.task)
    torch.manual_seed(options.seed)
    task = function.build(options.settings, epochs=options.epochs, batch_size=options.batch_size)
    task.model.to(device)
    sync = gradcomp.attach(
        task.optimizer,
        compressor=options.compressor,
        transport=options.transport,
        exchange=options.chosen_exchange(),
        overlap=options.overlap,
        model=task.model,
    )
    stack.enter_context(sync)
    # Weights were drawn alike; dropout and augmentation should differ between ranks.
    torch.manual_seed(options.seed + 1 + sync.rank * 1_000_003)
    trainer = Trainer(task, device, slow_s=options.slow_s(sync.rank))
    steps_per_epoch = _steps_per_epoch(options, task, sync.world_size)
    if isinstance(sync, Served):
        return ServedRun(options, trainer, sync, steps_per_epoch).train(stack)
    if not isinstance(sync, GradientExchange):
        raise TypeError(f"attach() gave a {type(sync).__name__}, which this loop does not know")
    return _Run(options, trainer, sync, steps_per_epoch).train(stack)


def _steps_per_epoch(options: RunOptions, task: tasks.Task, world_size: int) -> int:
    samples = len(task.train_data[0] if isinstance(task.train_data, tuple) else task.train_data)  # type: ignore[arg-type]
    steps = samples // world_size // task.batch_size
    if steps == 0:
        raise ConfigError(
            f"task {options.task}: {samples} training samples are less than one batch of {task.batch_size} "
            f"for each of {world_size} workers"
        )
    return steps


class _Run:
    """One worker's training loop."""

    def __init__(self, options: RunOptions, trainer: Trainer, sync: GradientExchange, steps_per_epoch: int) -> None:
        self.options, self.trainer, self.sync = options, trainer, sync
        self.steps_per_epoch = steps_per_epoch

    def train(self, stack: contextlib.ExitStack) -> Summary:
        task, options, first = self.trainer.task, self.options, self.sync.rank == 0
        steps = self.steps_per_epoch * task.epochs
        progress = stack.enter_context(
            Progress(label=options.label or options.compressor, steps=steps, quiet=options.quiet or not first)
        )
        # What is not hidden is waited for in backward, or in the next forward.
        exposed_in = f"{options.overlap}_ms"
        told = stack.enter_context(Told(options, self.trainer, self.sync, steps=steps, exposed_in=exposed_in))
        accuracy = 0.0
        self.sync.average(torch.zeros(1))  # wait for every rank: all clocks start together
        for epoch in range(1, task.epochs + 1):
            loss, accuracy = self._epoch(epoch, progress, told)
            progress.epoch(epoch=epoch, epochs=task.epochs, loss=loss, accuracy=accuracy, train_s=self.trainer.train_s)
            told.epoch(epoch, loss=loss, accuracy=accuracy)
        self.sync.wait()
        stats = self.sync.stats()
        summary = Summary(
            rank=self.sync.rank,
            task=options.task,
            compressor=options.compressor,
            transport=options.transport or self.sync.transport.id,
            exchange=options.exchange,
            workers=self.sync.world_size,
            seed=options.seed,
            accuracy=accuracy,
            steps=self.trainer.steps,
            train_s=self.trainer.train_s,
            bytes_sent=stats["bytes_sent"],
            bytes_received=stats["bytes_received"],
            ratio=stats["ratio"],
        )
        told.end(summary)
        return summary

    def _epoch(self, epoch: int, progress: Progress, told: Told) -> tuple[float, float]:
        """Train for one epoch and evaluate; the mean loss of this rank's batches, and the test accuracy in percent."""
        task, sync, trainer = self.trainer.task, self.sync, self.trainer
        batches = trainer.batches(epoch, seed=self.options.seed, rank=sync.rank, world_size=sync.world_size)
        task.model.train()
        accuracy, losses = 0.0, []
        with contextlib.closing(batches):
            started = time.perf_counter()
            for number, (inputs, targets) in enumerate(batches, 1):
                losses.append(trainer.step(inputs, targets))
                trainer.count(time.perf_counter() - started)
                record = told.record(epoch, losses[-1])
                if number == self.steps_per_epoch:
                    record["accuracy"] = accuracy = self._evaluate()
                told.step(record)
                progress.step()
                started = time.perf_counter()
        if task.scheduler is not None:
            task.scheduler.step()
        return sum(losses) / len(losses), accuracy

    def _evaluate(self) -> float:
        """Accuracy in percent over all test data, of which each rank takes its share; not on the training clock.

        Buffers such as BatchNorm's statistics differ between ranks, each of which saw other samples: they are averaged
        first, so that all ranks evaluate one and the same model.
        """
        task, sync = self.trainer.task, self.sync
        if sync.world_size > 1:
            for buffer in task.model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(sync.average(buffer))
        batches = tasks.evaluation_batches(
            task.test_data, batch_size=EVALUATION_BATCH, rank=sync.rank, world_size=sync.world_size
        )
        mean = sync.average(self.trainer.count_right(batches))
        return 100 * float(mean[0]) / float(mean[1])
