"""One worker's own part of training: a step on a batch, and counting what the model gets right."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator

import torch
from torch import Tensor

from gradcomp.integrations import tasks
from gradcomp.marks import Mark

__all__ = ["EVALUATION_BATCH", "Trainer"]

EVALUATION_BATCH = 256


class Trainer:
    """Trains a task's model; whoever attached to its optimizer exchanges the gradients.

    Args:
        slow_s: sleep so long in every step.

    Attributes:
        steps: taken so far.
        train_s: seconds spent in them, and in fetching their batches; what the loop counts.
    """

    def __init__(self, task: tasks.Task, device: torch.device, *, slow_s: float = 0.0) -> None:
        self.task, self.device = task, device
        self.steps = 0
        self.train_s = 0.0
        self._slow_s = slow_s
        self._step_s = 0.0
        self._marks: list[Mark] = []

    def count(self, step_s: float) -> None:
        """Put the last step on the training clock."""
        self.train_s += step_s
        self._step_s = step_s

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """One optimizer step, and one of the schedule that counts them; the loss."""
        task = self.task
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        if task.augment is not None:
            inputs = task.augment(inputs)
        task.optimizer.zero_grad()
        marks = [Mark(self.device)]
        loss = task.loss(task.model(inputs), targets)
        marks.append(Mark(self.device))
        loss.backward()  # type: ignore[no-untyped-call]
        if self._slow_s:
            time.sleep(self._slow_s)
        marks.append(Mark(self.device))
        task.optimizer.step()
        if task.step_scheduler is not None:
            task.step_scheduler.step()
        marks.append(Mark(self.device))
        self._marks = marks
        self.steps += 1
        return float(loss.detach())

    def stages_ms(self) -> dict[str, float]:
        """Where the last step's milliseconds went; what is missing in the sum is the batch's way to the model.

        On CUDA those of the stream, from the first kernel of a stage to its last.
        """
        stages = ("forward_ms", "backward_ms", "optimizer_ms")
        ends = zip(stages, self._marks, self._marks[1:], strict=False)
        return {"step_ms": self._step_s * 1e3} | {stage: start.until(stop) * 1e3 for stage, start, stop in ends}

    def batches(
        self, epoch: int, *, seed: int, rank: int, world_size: int
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """This rank's training batches of one epoch: :func:`gradcomp.integrations.tasks.train_batches`."""
        return tasks.train_batches(
            self.task.train_data,
            batch_size=self.task.batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            epoch=epoch,
        )

    def count_right(self, batches: Generator[tuple[Tensor, Tensor], None, None]) -> Tensor:
        """How many samples the model classifies right, and how many there are; float32 of 2."""
        task = self.task
        counts = torch.zeros(2)
        task.model.eval()
        with torch.no_grad(), contextlib.closing(batches):
            for inputs, targets in batches:
                found = task.model(inputs.to(self.device)).argmax(1).cpu()
                counts += torch.tensor([(found == targets.cpu()).sum(), len(targets)])
        task.model.train()
        return counts
