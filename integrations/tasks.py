"""Tasks: what ``gradcomp train`` trains. A Python file or module with a function ``task`` that returns a :class:`Task`.

The function's keyword arguments are the task's options, set with ``--set key=value``::

    def task(*, width: int = 64, lr: float = 0.1) -> Task:
        model = ...
        return Task(model=model, loss=..., optimizer=torch.optim.SGD(model.parameters(), lr=lr), ...)

It runs once in every worker, after the worker's random generators were seeded alike. A parameter called ``epochs`` or
``batch_size`` also receives ``--epochs`` or ``--batch-size``, so that a schedule can follow it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import sys
import traceback
import types
import typing
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from gradcomp.callbacks import Callback
from gradcomp.errors import ConfigError
from gradcomp.options import check_integer

__all__ = ["Data", "Task", "TaskFunction", "evaluation_batches", "load", "train_batches"]

Data = Dataset[Any] | tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model and all it takes to train it for classification.

    Attributes:
        model: on the CPU; the worker moves it.
        loss: (outputs, targets) -> the mean over the batch, a scalar tensor.
        optimizer: over ``model``'s parameters.
        train_data: (inputs, targets) tensors with one row a sample, or a map-style Dataset of such pairs.
        test_data: the same; targets are class numbers, outputs of the model (batch, classes).
        batch_size: samples a worker takes per step; a step of N workers sees N times as many.
        epochs: passes over the training data.
        scheduler: stepped after every epoch.
        step_scheduler: stepped after every step of this worker, for policies that count iterations, as Caffe's do.
        augment: applied to every batch of training inputs, on the worker's device.
        callbacks: hear of every step on the rank that made them (gradcomp.callbacks).
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Optimizer
    train_data: Data
    test_data: Data
    batch_size: int
    epochs: int
    scheduler: LRScheduler | None = None
    step_scheduler: LRScheduler | None = None
    augment: Callable[[Tensor], Tensor] | None = None
    callbacks: Sequence[Callback] = ()

    def __post_init__(self) -> None:
        for field, kind in (("model", nn.Module), ("optimizer", Optimizer)):
            if not isinstance(getattr(self, field), kind):
                found = type(getattr(self, field)).__name__
                raise ConfigError(f"task: {field} must be a torch {kind.__name__}; got {found}")
        if not callable(self.loss):
            raise ConfigError(f"task: loss must be callable; got {type(self.loss).__name__}")
        for callback in self.callbacks:
            if not isinstance(callback, Callback):
                raise ConfigError(f"task: callbacks must be gradcomp Callbacks; got {type(callback).__name__}")
        check_integer("task", "batch_size", self.batch_size, at_least=1)
        check_integer("task", "epochs", self.epochs, at_least=1)
        _check_data("train_data", self.train_data)
        _check_data("test_data", self.test_data)


def _check_data(field: str, data: object) -> None:
    if isinstance(data, tuple):
        if len(data) != 2 or not all(isinstance(part, Tensor) for part in data):
            raise ConfigError(f"task: {field} must be a Dataset or a pair of tensors (inputs, targets)")
        if len(data[0]) != len(data[1]):
            raise ConfigError(f"task: {field} has {len(data[0])} inputs and {len(data[1])} targets")
    elif not isinstance(data, Dataset) or not hasattr(data, "__len__"):
        raise ConfigError(
            f"task: {field} must be a Dataset with a length or a pair of tensors; got {type(data).__name__}"
        )
    if len(data) == 0 or (isinstance(data, tuple) and len(data[0]) == 0):
        raise ConfigError(f"task: {field} is empty")


def train_batches(
    data: Data, *, batch_size: int, rank: int, world_size: int, seed: int, epoch: int
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """This rank's batches of one epoch: its share of a permutation that depends on ``seed`` and ``epoch`` only.

    Incomplete batches are dropped, so that every rank takes the same number of steps.
    """
    sampler: DistributedSampler[Any] = DistributedSampler(
        typing.cast("Dataset[Any]", data[0] if isinstance(data, tuple) else data),
        num_replicas=world_size,
        rank=rank,
        shuffle=True,
        seed=seed,
        drop_last=True,
    )
    sampler.set_epoch(epoch)
    if not isinstance(data, tuple):
        yield from DataLoader(data, batch_size=batch_size, sampler=sampler, drop_last=True)
        return
    inputs, targets = data
    order = torch.tensor(list(sampler))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        rows = order[start : start + batch_size]
        yield inputs[rows], targets[rows]


def evaluation_batches(
    data: Data, *, batch_size: int, rank: int, world_size: int
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """This rank's share of the test data, every ``world_size``-th sample; over all ranks each sample comes once."""
    if isinstance(data, tuple):
        inputs, targets = (part[rank::world_size] for part in data)
        for start in range(0, len(inputs), batch_size):
            yield inputs[start : start + batch_size], targets[start : start + batch_size]
        return
    rows = range(rank, len(typing.cast("Sequence[object]", data)), world_size)
    yield from DataLoader(data, batch_size=batch_size, sampler=rows)


@dataclass(frozen=True)
class TaskFunction:
    """A task's function and where it was found."""

    where: str
    function: Callable[..., object]

    def parse(self, settings: Sequence[str]) -> dict[str, object]:
        """Keyword arguments from ``key=value`` texts; a value is JSON or a bare word, checked against the annotation.

        Raises:
            ConfigError: a setting without ``=``, an unknown, repeated or missing key, or a value that does not fit.
        """
        parameters = {
            name: p
            for name, p in inspect.signature(self.function).parameters.items()
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
        hints = _hints(self.function)
        found: dict[str, object] = {}
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals or not key:
                raise ConfigError(f"--set {setting!r} is not key=value")
            if key not in parameters:
                known = ", ".join(parameters) or "no options"
                raise ConfigError(f"task {self.where}: unknown option {key!r}; it has {known}")
            if key in found:
                raise ConfigError(f"task {self.where}: option {key!r} is given twice")
            found[key] = _parse_value(f"task {self.where}: {key}", text, hints.get(key, Any))
        missing = [n for n, p in parameters.items() if p.default is p.empty and n not in found]
        if missing:
            raise ConfigError(f"task {self.where}: needs --set {' --set '.join(f'{name}=...' for name in missing)}")
        return found

    def build(self, settings: Sequence[str] = (), *, epochs: int | None = None, batch_size: int | None = None) -> Task:
        """Call the function and put ``epochs`` and ``batch_size`` in place of the task's own where given.

        Raises:
            ConfigError: bad settings, or the function returned something else than a Task.
        """
        overrides = {k: v for k, v in (("epochs", epochs), ("batch_size", batch_size)) if v is not None}
        accepted = inspect.signature(self.function).parameters
        arguments = {k: v for k, v in overrides.items() if k in accepted} | self.parse(settings)
        task = self.function(**arguments)
        if not isinstance(task, Task):
            raise ConfigError(f"task {self.where}: task() must return a Task; got {type(task).__name__}")
        return dataclasses.replace(task, **overrides)  # type: ignore[arg-type]


def load(where: str) -> TaskFunction:
    """Find the function ``task`` in a Python file (a path ending in ``.py``) or a module (a dotted name).

    Raises:
        ConfigError: no such file or module, it does not import, or it has no function ``task``.
    """
    is_file = where.endswith(".py") or "/" in where
    if is_file and not Path(where).is_file():
        raise ConfigError(f"task {where}: no such file")
    try:
        module = _import_file(Path(where)) if is_file else importlib.import_module(where)
    except ModuleNotFoundError as error:
        if is_file or not where.startswith(str(error.name)):
            raise ConfigError(f"task {where}: {error}; is it installed?") from error
        raise ConfigError(f"task {where}: neither a file ending in .py nor a module that can be imported") from error
    except Exception as error:
        raise ConfigError(f"task {where} does not import: {_name_place(error)}") from error
    function = getattr(module, "task", None)
    if not inspect.isfunction(function):
        raise ConfigError(f"task {where}: it must define a function task() that returns a gradcomp Task")
    return TaskFunction(where, function)


def _import_file(path: Path) -> types.ModuleType:
    name = f"gradcomp_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"task {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickled models look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _name_place(error: Exception) -> str:
    """``NameError: ... (file, line 3)``: one line that says where."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _hints(function: Callable[..., object]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # an annotation that only a type checker can resolve
        return {}


def _parse_value(what: str, text: str, hint: Any) -> object:
    allowed = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    try:
        value: object = json.loads(text)
    except ValueError:
        value = text
    if value is None and type(None) in allowed:
        return None
    for kind in allowed:
        if kind is Any:
            return value
        if kind is str:
            return value if isinstance(value, str) else text
        if typing.get_origin(kind) is typing.Literal:
            choices = typing.get_args(kind)
            if value in choices:
                return value
            raise ConfigError(f"{what}={text} is not allowed; it must be one of {', '.join(map(str, choices))}")
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if kind not in (bool, int, float, type(None)):
            return value
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed if kind is not type(None))
    raise ConfigError(f"{what}={text} is not allowed; it must be {names}")
