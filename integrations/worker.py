"""A worker: trains one share of a task and exchanges gradients with the others.

``gradcomp train`` starts several on this machine; on many hosts torchrun does::

    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m gradcomp worker TASK
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import gradcomp
from gradcomp.errors import ConfigError
from gradcomp.integrations import tasks
from gradcomp.integrations.launch import follow_parent, record_failure
from gradcomp.integrations.report import Reporter, Summary, open_log
from gradcomp.options import check_choice, check_flag, check_integer, check_text
from gradcomp.rules import choose

if TYPE_CHECKING:
    from gradcomp.engine import GradientExchange

__all__ = ["RunOptions", "train", "work"]

EVALUATION_BATCH = 256
LOGGED = (
    "bytes_sent",
    "bytes_received",
    "ratio",
    "density",
    "tau",
    "residual_norm",
    "compress_ms",
    "wait_ms",
    "decompress_ms",
    "hidden_fraction",
)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What to train and how; the same for every worker of a run.

    Attributes:
        task: a Python file or a module with a function ``task`` (see :mod:`gradcomp.integrations.tasks`).
        settings: ``key=value`` texts for that function.
        compressor, transport, exchange: spec strings; compressor may be ``@FILE``, rules in JSON (gradcomp.rules);
            transport may be None: zmq, or what the exchange brings.
        overlap: what hides the exchange: ``backward``, or ``forward`` (:func:`gradcomp.attach`).
        epochs, batch_size: in place of the task's own; batch_size counts one worker's samples a step.
        seed: of the initial weights, the order of the samples, and (with the rank) of dropout and augmentation.
        device: ``cpu``, ``cuda`` (one GPU a worker, by local rank) or ``auto`` (cuda where there is one).
        log: file for one JSON object a step, written by rank 0.
        json: print the summary as JSON instead of a table.
        summary: file for the summary as JSON; nothing is printed then.
        quiet: no progress.
        label: what the progress line starts with; the compressor if empty.
    """

    task: str
    settings: tuple[str, ...] = ()
    compressor: str = "threshold"
    transport: str | None = None
    exchange: str = "auto"
    overlap: str = "backward"
    epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0
    device: str = "cpu"
    log: str | None = None
    json: bool = False
    quiet: bool = False
    label: str = ""
    summary: str | None = None

    def __post_init__(self) -> None:
        for field in ("task", "compressor", "exchange"):
            check_text("train", field, getattr(self, field))
        if self.transport is not None:
            check_text("train", "transport", self.transport)
        for field in ("epochs", "batch_size"):
            if getattr(self, field) is not None:
                check_integer("train", field, getattr(self, field), at_least=1)
        check_integer("train", "seed", self.seed, at_least=0, at_most=2**31 - 1)
        check_choice("train", "device", self.device, ("cpu", "cuda", "auto"))
        check_choice("train", "overlap", self.overlap, ("backward", "forward"))
        check_flag("train", "json", self.json)
        check_flag("train", "quiet", self.quiet)

    def check(self) -> None:
        """Find out what can be known without a worker: ids and options, the task's file and its settings, the log.

        Raises:
            ConfigError: what is wrong.
        """
        choose(self.compressor)
        gradcomp.exchange(self.exchange).transport(self.transport)
        tasks.load(self.task).parse(self.settings)
        _choose_device(self.device)
        if self.log is not None and not Path(self.log).resolve().parent.is_dir():
            raise ConfigError(f"--log {self.log}: its folder does not exist")

    def to_arguments(self) -> list[str]:
        """The command line that :mod:`gradcomp.cli` turns into these options again."""
        arguments = [self.task]
        for setting in self.settings:
            arguments += ["--set", setting]
        for field in (
            "compressor",
            "transport",
            "exchange",
            "overlap",
            "epochs",
            "batch_size",
            "seed",
            "device",
            "log",
            "label",
            "summary",
        ):
            value = getattr(self, field)
            if value is not None and value != "":
                arguments.append(f"--{field.replace('_', '-')}={value}")
        arguments += [f"--{field}" for field in ("json", "quiet") if getattr(self, field)]
        return arguments


def _choose_device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("train: device='cuda' is not allowed; this machine has no CUDA device that torch can use")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


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
        The summary; accuracy is the same on every rank, bytes are this rank's own.

    Raises:
        GradcompError: bad options, or the exchange failed.
        Exception: whatever the task raises.
    """
    with contextlib.ExitStack() as stack:
        return _train(options, stack)


def _train(options: RunOptions, stack: contextlib.ExitStack) -> Summary:
    """Train; what must be closed afterwards is left to ``stack``."""
    device = _choose_device(options.device)
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
        exchange=options.exchange,
        overlap=options.overlap,
        model=task.model,
    )
    stack.enter_context(sync)
    # Weights were drawn alike; dropout and augmentation should differ between ranks.
    torch.manual_seed(options.seed + 1 + sync.rank * 1_000_003)
    return _Run(options, task, sync, device).train(stack)


class _Run:
    """One worker's training loop and its clock."""

    def __init__(self, options: RunOptions, task: tasks.Task, sync: GradientExchange, device: torch.device) -> None:
        self.options, self.task, self.sync, self.device = options, task, sync, device
        self.steps = 0
        self.train_s = 0.0
        samples = len(task.train_data[0] if isinstance(task.train_data, tuple) else task.train_data)  # type: ignore[arg-type]
        self.steps_per_epoch = samples // sync.world_size // task.batch_size
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"task {options.task}: {samples} training samples are less than one batch of {task.batch_size} "
                f"for each of {sync.world_size} workers"
            )

    def train(self, stack: contextlib.ExitStack) -> Summary:
        task, options, first = self.task, self.options, self.sync.rank == 0
        reporter = stack.enter_context(
            Reporter(
                label=options.label or options.compressor,
                steps=self.steps_per_epoch * task.epochs,
                quiet=options.quiet or not first,
                log=open_log(options.log) if first and options.log is not None else None,
            )
        )
        accuracy = 0.0
        self.sync.average(torch.zeros(1))  # wait for every rank: all clocks start together
        for epoch in range(1, task.epochs + 1):
            loss, accuracy = self._epoch(epoch, reporter)
            reporter.epoch(epoch=epoch, epochs=task.epochs, loss=loss, accuracy=accuracy, train_s=self.train_s)
        self.sync.wait()
        stats = self.sync.stats()
        return Summary(
            rank=self.sync.rank,
            task=options.task,
            compressor=options.compressor,
            transport=options.transport or self.sync.transport.id,
            exchange=options.exchange,
            workers=self.sync.world_size,
            seed=options.seed,
            accuracy=accuracy,
            steps=self.steps,
            train_s=self.train_s,
            bytes_sent=stats["bytes_sent"],
            bytes_received=stats["bytes_received"],
            ratio=stats["ratio"],
        )

    def _epoch(self, epoch: int, reporter: Reporter) -> tuple[float, float]:
        """Train for one epoch and evaluate; the mean loss of this rank's batches, and the test accuracy in percent."""
        task, sync = self.task, self.sync
        batches = tasks.train_batches(
            task.train_data,
            batch_size=task.batch_size,
            rank=sync.rank,
            world_size=sync.world_size,
            seed=self.options.seed,
            epoch=epoch,
        )
        task.model.train()
        accuracy, losses = 0.0, []
        with contextlib.closing(batches):
            started = time.perf_counter()
            for number, (inputs, targets) in enumerate(batches, 1):
                losses.append(self._step(inputs, targets))
                self.train_s += time.perf_counter() - started
                record = self._record(epoch, losses[-1]) if reporter.logging else {}
                if number == self.steps_per_epoch:
                    record["accuracy"] = accuracy = self._evaluate()
                reporter.step(record)
                started = time.perf_counter()
        if task.scheduler is not None:
            task.scheduler.step()
        return sum(losses) / len(losses), accuracy

    def _step(self, inputs: Tensor, targets: Tensor) -> float:
        task = self.task
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        if task.augment is not None:
            inputs = task.augment(inputs)
        task.optimizer.zero_grad()
        loss = task.loss(task.model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        task.optimizer.step()
        self.steps += 1
        return float(loss.detach())

    def _record(self, epoch: int, loss: float) -> dict[str, object]:
        """One line of the log: bytes are totals of this rank so far, milliseconds those of this step."""
        stats = self.sync.stats()
        return {
            "step": self.steps,
            "epoch": epoch,
            "time_s": self.train_s,
            "loss": loss,
            "lr": self.task.optimizer.param_groups[0]["lr"],
        } | {key: stats[key] for key in LOGGED}

    def _evaluate(self) -> float:
        """Accuracy in percent over all test data, of which each rank takes its share; not on the training clock.

        Buffers such as BatchNorm's statistics differ between ranks, each of which saw other samples: they are averaged
        first, so that all ranks evaluate one and the same model.
        """
        task, sync = self.task, self.sync
        if sync.world_size > 1:
            for buffer in task.model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(sync.average(buffer))
        batches = tasks.evaluation_batches(
            task.test_data, batch_size=EVALUATION_BATCH, rank=sync.rank, world_size=sync.world_size
        )
        counts = torch.zeros(2)
        task.model.eval()
        with torch.no_grad(), contextlib.closing(batches):
            for inputs, targets in batches:
                found = task.model(inputs.to(self.device)).argmax(1).cpu()
                counts += torch.tensor([(found == targets.cpu()).sum(), len(targets)])
        task.model.train()
        mean = sync.average(counts)
        return 100 * float(mean[0]) / float(mean[1])
