"""One worker's own part of training: a step on a batch, and counting what the model gets right."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator

import torch
from torch import Tensor

from gradcomp.integrations import tasks

__all__ = ["EVALUATION_BATCH", "Trainer"]

EVALUATION_BATCH = 256


class Trainer:
    """Trains a task's model; whoever attached to its optimizer exchanges the gradients.

    Args:
        slow_s: sleep so long in every step.

    Attributes:
        steps: taken so far.
        train_s: seconds spent in them.
    """

    def __init__(self, task: tasks.Task, device: torch.device, *, slow_s: float = 0.0) -> None:
        self.task, self.device = task, device
        self.steps = 0
        self.train_s = 0.0
        self._slow_s = slow_s

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """One optimizer step, and one of the schedule that counts them; the loss."""
        task = self.task
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        if task.augment is not None:
            inputs = task.augment(inputs)
        task.optimizer.zero_grad()
        loss = task.loss(task.model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._slow_s:
            time.sleep(self._slow_s)
        task.optimizer.step()
        if task.step_scheduler is not None:
            task.step_scheduler.step()
        self.steps += 1
        return float(loss.detach())

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
