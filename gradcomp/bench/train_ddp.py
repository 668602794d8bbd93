"""A task trained with torch's DistributedDataParallel: what ``gradcomp bench train`` puts beside gradcomp.

The same initial weights, samples, clock and evaluation as a worker of gradcomp's. BatchNorm's statistics stay local and
are averaged for evaluation, as there; DDP would send rank 0's in every step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import time
import warnings
from collections.abc import Callable
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gradcomp.bench.methods import TORCH_HOOKS
from gradcomp.bench.train_methods import DDP_RATIOS
from gradcomp.errors import ConfigError
from gradcomp.integrations import tasks
from gradcomp.integrations.report import Summary
from gradcomp.integrations.run_options import RunOptions, choose_device
from gradcomp.integrations.trainer import EVALUATION_BATCH, Trainer

__all__ = ["train_with_ddp"]

_TIMEOUT = datetime.timedelta(minutes=5)


def train_with_ddp(options: RunOptions, hook: str, sent_and_received: Callable[[], tuple[int, int]] | None) -> Summary:
    """Train this process's share of a task; rank, world size and rendezvous come from torchrun's environment.

    The process group stays: a rank that fails must say why before the others see it gone.

    Args:
        options: compressor, transport, exchange and what belongs to them are not looked at.
        hook: a key of DDP_RATIOS.
        sent_and_received: bytes so far; None where nobody counts them.

    Raises:
        ConfigError: bad options, or too few samples.
    """
    device = choose_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    function = tasks.load(options.task)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    rank = dist.get_rank()
    torch.manual_seed(options.seed)
    task = function.build(options.settings, epochs=options.epochs, batch_size=options.batch_size)
    task.model.to(device)
    torch.manual_seed(options.seed + 1 + rank * 1_000_003)  # as in a worker of gradcomp's
    with contextlib.ExitStack() as stack:
        log = None
        if rank == 0 and options.log is not None:
            log = stack.enter_context(open(options.log, "w", encoding="utf-8"))
        return _Run(options, hook, task, device, log, sent_and_received).train()


class _Run:
    """One rank's training loop."""

    def __init__(
        self,
        options: RunOptions,
        hook: str,
        task: tasks.Task,
        device: torch.device,
        log: TextIO | None,
        sent_and_received: Callable[[], tuple[int, int]] | None,
    ) -> None:
        self._options, self._hook, self._task, self._device, self._log = options, hook, task, device, log
        self._sent_and_received = sent_and_received
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the option's new name is not there before torch 2.13
            model = DistributedDataParallel(task.model, broadcast_buffers=False, gradient_as_bucket_view=True)
        if hook in TORCH_HOOKS:
            model.register_comm_hook(None, TORCH_HOOKS[hook])
        self._trainer = Trainer(dataclasses.replace(task, model=model), device)
        # DDP must not see evaluation: shares of the test data may differ by a batch.
        self._evaluator = Trainer(task, device)

    def train(self) -> Summary:
        trainer, accuracy = self._trainer, 0.0
        dist.barrier()  # all clocks start together
        for epoch in range(1, self._task.epochs + 1):
            accuracy = self._epoch(epoch)
        sent, received = self._sent_and_received() if self._sent_and_received is not None else (0, 0)
        dist.barrier()
        return Summary(
            rank=self._rank,
            task=self._options.task,
            compressor=f"ddp:{self._hook}",
            transport=str(dist.get_backend()),
            exchange="all_reduce",
            workers=self._world_size,
            seed=self._options.seed,
            accuracy=accuracy,
            steps=trainer.steps,
            train_s=trainer.train_s,
            bytes_sent=sent,
            bytes_received=received,
            ratio=DDP_RATIOS[self._hook],
        )

    def _epoch(self, epoch: int) -> float:
        """Train for one epoch and evaluate: the test accuracy in percent."""
        task, trainer = self._task, self._trainer
        batches = trainer.batches(epoch, seed=self._options.seed, rank=self._rank, world_size=self._world_size)
        task.model.train()
        record: dict[str, object] = {}
        with contextlib.closing(batches):
            started = time.perf_counter()
            for inputs, targets in batches:
                loss = trainer.step(inputs, targets)
                trainer.count(time.perf_counter() - started)
                self._write(record)  # the one before: the last of an epoch has more to say
                record = self._record(epoch, loss)
                started = time.perf_counter()
        if not record:
            raise ConfigError(
                f"task {self._options.task}: its training samples are less than one batch of {task.batch_size} "
                f"for each of {self._world_size} workers"
            )
        accuracy = self._evaluate()
        self._write(record | {"accuracy": accuracy})
        if task.scheduler is not None:
            task.scheduler.step()
        return accuracy

    def _record(self, epoch: int, loss: float) -> dict[str, object]:
        sent, received = self._sent_and_received() if self._sent_and_received is not None else (None, None)
        return {
            "step": self._trainer.steps,
            "epoch": epoch,
            "time_s": self._trainer.train_s,
            "loss": loss,
            "lr": self._task.optimizer.param_groups[0]["lr"],
            "bytes_sent": sent,
            "bytes_received": received,
            "ratio": DDP_RATIOS[self._hook],
        }

    def _write(self, record: dict[str, object]) -> None:
        if self._log is not None and record:
            self._log.write(json.dumps(record) + "\n")
            self._log.flush()

    def _evaluate(self) -> float:
        """Accuracy in percent over all test data, of which each rank takes its share; not on the training clock."""
        for buffer in self._task.model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self._sum(buffer) / self._world_size)
        batches = tasks.evaluation_batches(
            self._task.test_data, batch_size=EVALUATION_BATCH, rank=self._rank, world_size=self._world_size
        )
        right, count = self._sum(self._evaluator.count_right(batches)).tolist()
        return 100 * float(right) / float(count)

    def _sum(self, values: Tensor) -> Tensor:
        total = values.detach().to(self._device, copy=True)
        dist.all_reduce(total)
        return total
