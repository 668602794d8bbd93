"""Hearing how a run goes: Python's logging; a log file, TensorBoard, Weights & Biases or MLflow if asked for.

    torchrun --standalone --nproc-per-node 2 examples/callbacks.py
    torchrun --standalone --nproc-per-node 2 examples/callbacks.py --jsonl run.jsonl --tensorboard boards
    torchrun --standalone --nproc-per-node 2 examples/callbacks.py --wandb PROJECT --mlflow EXPERIMENT

A callback is a class with a method or two; those for W&B and MLflow below are all there is to it.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import gradcomp
from gradcomp.callbacks import Callback
from gradcomp.examples.tasks.digits import lenet, load_digits
from gradcomp.integrations.callbacks import JsonlCallback, LoggingCallback, TensorBoardCallback
from gradcomp.integrations.watch import Watch


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn, each layer's density and residual norm included."""
    found = {key: value for key, value in record.items() if isinstance(value, (int, float))}
    for name, row in record.get("layers", {}).items():
        found |= {f"{key}/{name}": row[key] for key in ("density", "residual_norm") if key in row}
    return found


class WandbCallback(Callback):
    """Weights & Biases: pip install wandb."""

    def __init__(self, project: str) -> None:
        import wandb

        self.wandb, self.project = wandb, project

    def on_start(self, info: Mapping[str, Any]) -> None:
        self.run = self.wandb.init(project=self.project, config=dict(info), name=f"rank{info['rank']}")

    def on_step(self, record: Mapping[str, Any]) -> None:
        self.run.log(numbers(record), step=record["step"])

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self.run.summary.update(dict(summary))
        self.run.finish(exit_code=1 if "error" in summary else 0)


class MlflowCallback(Callback):
    """MLflow: pip install mlflow."""

    def __init__(self, experiment: str) -> None:
        import mlflow

        self.mlflow = mlflow
        mlflow.set_experiment(experiment)

    def on_start(self, info: Mapping[str, Any]) -> None:
        self.mlflow.start_run(run_name=f"rank{info['rank']}")
        self.mlflow.log_params({key: str(value) for key, value in info.items()})

    def on_step(self, record: Mapping[str, Any]) -> None:
        self.mlflow.log_metrics(numbers(record), step=record["step"])

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self.mlflow.end_run("FAILED" if "error" in summary else "FINISHED")


def chosen(arguments: argparse.Namespace, rank: int) -> list[Callback]:
    callbacks: list[Callback] = [LoggingCallback(every=40)]
    if arguments.jsonl:
        callbacks.append(JsonlCallback(arguments.jsonl, rank=rank))
    if arguments.tensorboard:
        callbacks.append(TensorBoardCallback(arguments.tensorboard, rank=rank))
    if arguments.wandb and rank == 0:  # one rank's are enough for a dashboard
        callbacks.append(WandbCallback(arguments.wandb))
    if arguments.mlflow and rank == 0:
        callbacks.append(MlflowCallback(arguments.mlflow))
    return callbacks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    for option in ("jsonl", "tensorboard", "wandb", "mlflow"):
        parser.add_argument(f"--{option}")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = lenet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    (images, digits), (test_images, test_digits) = load_digits()
    with gradcomp.attach(optimizer, model=model, compressor="threshold:density=0.01") as sync:
        logging.basicConfig(level=logging.INFO if sync.rank == 0 else logging.WARNING, format="%(message)s")
        told = Watch(sync, optimizer, chosen(arguments, sync.rank), every=5, task="digits")
        samples = len(images) // sync.world_size
        images, digits = (part[sync.rank :: sync.world_size][:samples] for part in (images, digits))
        for epoch in range(1, arguments.epochs + 1):
            for rows in torch.randperm(samples, generator=torch.Generator().manual_seed(epoch)).split(16):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(images[rows]), digits[rows])
                loss.backward()
                told.note(loss=loss.item(), epoch=epoch)
                optimizer.step()
            with torch.no_grad():
                accuracy = 100 * (model(test_images).argmax(1) == test_digits).float().mean().item()
            told.note(accuracy=accuracy)
            told.epoch(epoch, loss=loss.item(), accuracy=accuracy)


if __name__ == "__main__":
    main()
