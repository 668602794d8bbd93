"""What to train and how: the options of ``gradcomp train`` and ``gradcomp worker``."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from gradcomp import registry
from gradcomp.errors import ConfigError
from gradcomp.exchanges.server import Server
from gradcomp.integrations import tasks
from gradcomp.interfaces import Exchange
from gradcomp.options import check_choice, check_flag, check_integer, check_text
from gradcomp.rules import choose

__all__ = ["RunOptions", "choose_device"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What to train and how; the same for every worker of a run.

    Attributes:
        task: a Python file or a module with a function ``task`` (see :mod:`gradcomp.integrations.tasks`).
        settings: ``key=value`` texts for that function.
        compressor, transport, exchange: spec strings; compressor may be ``@FILE``, rules in JSON (gradcomp.rules);
            transport may be None: zmq, or what the exchange brings.
        server: addresses of a parameter server's shards, ``HOST:PORT`` with commas between, instead of an exchange.
        mode, pull: options of exchange ``server``.
        overlap: what hides the exchange: ``backward``, or ``forward`` (:func:`gradcomp.attach`).
        epochs, batch_size: in place of the task's own; batch_size counts one worker's samples a step.
        seed: of the initial weights, the order of the samples, and (with the rank) of dropout and augmentation.
        device: ``cpu``, ``cuda`` (one GPU a worker, by local rank) or ``auto`` (cuda where there is one).
        log: file for one JSON object a step, by rank 0; those of other ranks are beside it.
        log_layers: one in so many steps says how each layer does; 0: none.
        tensorboard: folder for TensorBoard's files.
        json: print the summary as JSON instead of a table.
        summary: file for the summary as JSON; nothing is printed then.
        quiet: no progress.
        slow: ``RANK=SECONDS``: that worker sleeps so long in every step; for experiments with stragglers.
        label: what the progress line starts with; the compressor if empty.
    """

    task: str
    settings: tuple[str, ...] = ()
    compressor: str = "threshold"
    transport: str | None = None
    exchange: str = "auto"
    server: str | None = None
    mode: str | None = None
    pull: str | None = None
    overlap: str = "backward"
    epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0
    device: str = "cpu"
    log: str | None = None
    log_layers: int = 10
    tensorboard: str | None = None
    json: bool = False
    quiet: bool = False
    label: str = ""
    slow: str | None = None
    summary: str | None = None

    def __post_init__(self) -> None:
        for field in ("task", "compressor", "exchange"):
            check_text("train", field, getattr(self, field))
        for field in ("transport", "server", "mode", "pull", "tensorboard"):
            if getattr(self, field) is not None:
                check_text("train", field, getattr(self, field))
        for field in ("epochs", "batch_size"):
            if getattr(self, field) is not None:
                check_integer("train", field, getattr(self, field), at_least=1)
        check_integer("train", "seed", self.seed, at_least=0, at_most=2**31 - 1)
        check_integer("train", "log_layers", self.log_layers, at_least=0)
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
        exchange = self.chosen_exchange()
        if not isinstance(exchange, Server):
            exchange.transport(self.transport)
        elif self.transport is not None:
            raise ConfigError(f"--transport {self.transport} is not allowed with a server: workers do not meet")
        self.slow_s(0)
        tasks.load(self.task).parse(self.settings)
        choose_device(self.device)
        if self.log is not None and not Path(self.log).resolve().parent.is_dir():
            raise ConfigError(f"--log {self.log}: its folder does not exist")
        if self.tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
            raise ConfigError("TensorBoard is not installed: pip install 'gradcomp[tensorboard]'")

    def chosen_exchange(self) -> Exchange:
        """The exchange itself.

        Raises:
            ConfigError: unknown or out of range, or options of a server without one.
        """
        if self.server is None:
            for field in ("mode", "pull"):
                if getattr(self, field) is not None:
                    raise ConfigError(
                        f"--{field} {getattr(self, field)} is not allowed without --server (or, of train, --servers)"
                    )
            return registry.exchange(self.exchange)
        if self.exchange != "auto":
            raise ConfigError(f"--exchange {self.exchange} is not allowed with --server, which is one")
        given = {"mode": self.mode, "pull": self.pull}
        options = {name: value for name, value in given.items() if value is not None}
        return registry.exchange({"id": Server.id, "addresses": self.server.split(","), **options})

    def slow_s(self, rank: int) -> float:
        """How long the worker of this rank sleeps in every step, in seconds.

        Raises:
            ConfigError: not RANK=SECONDS.
        """
        if self.slow is None:
            return 0.0
        whose, _, seconds = self.slow.partition("=")
        try:
            return float(seconds) if int(whose) == rank else 0.0
        except ValueError:
            raise ConfigError(f"--slow {self.slow} is not allowed; it must be RANK=SECONDS") from None

    def to_arguments(self) -> list[str]:
        """The command line that :mod:`gradcomp.cli` turns into these options again."""
        arguments = [self.task]
        for setting in self.settings:
            arguments += ["--set", setting]
        for field in (
            "compressor",
            "transport",
            "exchange",
            "server",
            "mode",
            "pull",
            "slow",
            "overlap",
            "epochs",
            "batch_size",
            "seed",
            "device",
            "log",
            "log_layers",
            "tensorboard",
            "label",
            "summary",
        ):
            value = getattr(self, field)
            if value is not None and value != "":
                arguments.append(f"--{field.replace('_', '-')}={value}")
        arguments += [f"--{field}" for field in ("json", "quiet") if getattr(self, field)]
        return arguments


def choose_device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("train: device='cuda' is not allowed; this machine has no CUDA device that torch can use")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
