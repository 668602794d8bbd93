"""The optimizers a server runs: classes of torch.optim by name, with options that are checked before they are used.

All of them work element by element, so that a parameter may be cut and its pieces live on several shards. An optimizer
travels as JSON: ``{"class": "Adam", "groups": [{"lr": 0.001, "betas": [0.9, 0.999], ...}, ...]}``. Numbers may change
with each push (schedulers); the two of a pair are then named ``betas.0`` and ``betas.1``. ``fused=True`` is kept: it
gives other bits, and on large shards Adam in a quarter of the time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradcomp.errors import ConfigError, StateError
from gradcomp.options import check_choice, check_flag, check_number
from gradcomp.server.messages import Options

__all__ = ["OPTIMIZERS", "Description", "ShardOptimizer", "describe", "numbers"]

Value = float | bool | list[float]
Bounds = dict[str, float]
Allowed = dict[str, str | Bounds | tuple[Bounds, Bounds]]
_FLAG = "flag"
_LARGEST = 1e10  # so that what a step computes of it is a float32, but for the strangest options
_ANY: Bounds = {"at_least": -_LARGEST, "at_most": _LARGEST}
_NOT_NEGATIVE: Bounds = {"at_least": 0.0, "at_most": _LARGEST}
_SHARE: Bounds = {"at_least": 0.0, "at_most": 1.0}
_BETA: Bounds = {"at_least": 0.0, "below": 1.0}
_BETAS = (_BETA, _BETA)
_EVERY: Allowed = {"lr": _NOT_NEGATIVE, "maximize": _FLAG}
_USUAL: Allowed = _EVERY | {"weight_decay": _NOT_NEGATIVE}
_ADAM: Allowed = _USUAL | {"betas": _BETAS, "eps": _NOT_NEGATIVE}
# What a large row is cut into: the temporary tensors of a step then stay in the cache.
_CHUNK_NUMEL = 1 << 17

# By class: what each option may be. A pair has bounds for either number.
OPTIMIZERS: Mapping[str, Allowed] = {
    "SGD": _USUAL | {"momentum": _NOT_NEGATIVE, "dampening": _ANY, "nesterov": _FLAG, "fused": _FLAG},
    "Adagrad": _USUAL
    | {
        "lr_decay": _NOT_NEGATIVE,
        "initial_accumulator_value": _NOT_NEGATIVE,
        "eps": _NOT_NEGATIVE,
        "fused": _FLAG,
    },
    "Adadelta": _USUAL | {"rho": _SHARE, "eps": _NOT_NEGATIVE},
    "RMSprop": _USUAL | {"momentum": _NOT_NEGATIVE, "alpha": _NOT_NEGATIVE, "eps": _NOT_NEGATIVE, "centered": _FLAG},
    "Adam": _ADAM | {"amsgrad": _FLAG, "fused": _FLAG},
    "AdamW": _ADAM | {"amsgrad": _FLAG, "fused": _FLAG},
    "Adamax": _ADAM,
    "NAdam": _ADAM | {"momentum_decay": _NOT_NEGATIVE, "decoupled_weight_decay": _FLAG},
    "RAdam": _ADAM | {"decoupled_weight_decay": _FLAG},
    "Rprop": _EVERY
    | {"etas": ({"above": 0.0, "below": 1.0}, {"above": 1.0, "at_most": _LARGEST}), "step_sizes": (_ANY, _ANY)},
    "ASGD": _USUAL | {"lambd": _ANY, "alpha": _ANY, "t0": _ANY},
}


@dataclass(frozen=True)
class Description:
    """An optimizer: its class and the options of each parameter group, checked."""

    name: str
    groups: tuple[dict[str, Value], ...]

    @classmethod
    def parse(cls, text: str) -> Description:
        """What :meth:`text` wrote.

        Raises:
            ConfigError: names the class or the option that is not allowed.
        """
        try:
            found = json.loads(text)
            name, groups = found["class"], found["groups"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ConfigError(f"optimizer: {text[:100]!r} is not JSON with a class and groups") from None
        if len(found) != 2 or not isinstance(groups, list) or not groups:
            raise ConfigError("optimizer: groups must be a list of one or more, with class and nothing else beside it")
        check_choice("optimizer", "class", name, tuple(OPTIMIZERS))
        return cls(name, tuple(_checked(name, number, group) for number, group in enumerate(groups)))

    def text(self) -> str:
        """As JSON."""
        return json.dumps({"class": self.name, "groups": list(self.groups)}, sort_keys=True)

    def structure(self) -> str:
        """What workers must agree on: class, number of groups and flags; numbers may differ, and change."""
        flags = [{key: value for key, value in group.items() if isinstance(value, bool)} for group in self.groups]
        return json.dumps({"class": self.name, "groups": flags}, sort_keys=True)

    def check(self, options: Options) -> None:
        """Raise ConfigError unless ``options`` are numbers for the groups there are."""
        if len(options) != len(self.groups):
            raise ConfigError(f"optimizer: options={len(options)} groups; there are {len(self.groups)}")
        for number, (group, changes) in enumerate(zip(self.groups, options, strict=True)):
            known = _flat(group)
            for key, value in changes.items():
                if key not in known:
                    raise ConfigError(f"{self.name} group {number}: unknown number {key!r}; it has {', '.join(known)}")
                option, _, which = key.partition(".")
                bounds = OPTIMIZERS[self.name][option]
                if isinstance(bounds, tuple):
                    bounds = bounds[int(which)]
                if isinstance(bounds, dict):
                    check_number(f"{self.name} group {number}", key, value, **bounds)


def describe(optimizer: torch.optim.Optimizer) -> Description:
    """The description of an optimizer, from its parameter groups as they are now.

    Raises:
        ConfigError: not one of :data:`OPTIMIZERS`, or an option out of range.
    """
    name = type(optimizer).__name__
    if type(optimizer) is not getattr(torch.optim, name, None) or name not in OPTIMIZERS:
        name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    check_choice("optimizer", "class", name, tuple(OPTIMIZERS))
    if name == "Adam" and any(group.get("decoupled_weight_decay") for group in optimizer.param_groups):
        name = "AdamW"  # as torch has it
    return Description(
        name,
        tuple(
            _checked(name, number, {key: _plain(group[key], OPTIMIZERS[name][key]) for key in OPTIMIZERS[name]})
            for number, group in enumerate(optimizer.param_groups)
        ),
    )


def numbers(optimizer: torch.optim.Optimizer) -> Options:
    """What a push carries: the numbers among the options of each group as they are now."""
    known = OPTIMIZERS.get(type(optimizer).__name__, {})
    return [
        _flat({key: _plain(group[key], known[key]) for key in known if key in group})
        for group in optimizer.param_groups
    ]


class ShardOptimizer:
    """A torch optimizer over the rows of one shard.

    Args:
        rows: flat float32; changed in place.
        groups: the parameter group of each row; a group may have none here.

    Raises:
        ConfigError: torch does not take the options.
    """

    def __init__(self, description: Description, rows: Sequence[Tensor], groups: Sequence[int]) -> None:
        self.description = description
        # Plain SGD has no temporaries, and what is fused neither: there more pieces only cost more calls.
        whole = description.name == "SGD" or description.groups[0].get("fused") is True
        self._chunks = [[row] if whole else list(torch.split(row, _CHUNK_NUMEL)) for row in rows]
        members: list[list[Tensor]] = [[] for _ in description.groups]
        for chunks, group in zip(self._chunks, groups, strict=True):
            members[group] += chunks
        given = [{key: _given(value) for key, value in options.items()} for options in description.groups]
        named = [{"params": params, **options} for params, options in zip(members, given, strict=True)]
        try:
            # As usual options, too: torch checks those, and Adagrad begins with what they say, not the groups.
            self._torch = getattr(torch.optim, description.name)(named, **given[0])
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"optimizer: {description.name} is not to be had with these options: {error}") from None
        self._options: Options = []

    def step(self, gradients: Sequence[Tensor | None], options: Options, rate: float = 1.0) -> bool:
        """One update; returns whether it could be computed: options that are allowed may still be too extreme together.

        Args:
            gradients: of each row, flat; None: none, as in torch.
            options: numbers of each group from now on, checked (:meth:`Description.check`).
            rate: learning rates are multiplied by that, this once.
        """
        groups = self._groups
        if options != self._options:
            for group, changes in zip(groups, options, strict=True):
                _set(group, changes)
            self._options = options
        for chunks, gradient in zip(self._chunks, gradients, strict=True):
            parts = [None] * len(chunks) if gradient is None else torch.split(gradient, _length(chunks))
            for chunk, part in zip(chunks, parts, strict=True):
                chunk.grad = part
        rates = [group["lr"] for group in groups]
        if rate != 1.0:
            for group in groups:
                group["lr"] *= rate
        try:
            self._torch.step()
        except (ArithmeticError, RuntimeError) as error:
            # Options that are 0 or infinite together. What else may happen here is not the worker's doing.
            if not isinstance(error, ArithmeticError) and "overflow" not in str(error):
                raise
            return False
        finally:
            for group, usual in zip(groups, rates, strict=True):
                group["lr"] = usual
        return True

    def state_dict(self) -> dict[str, Any]:
        """Copies of the tensors of each row, and the options as they are now."""
        known = OPTIMIZERS[self.description.name]
        options = [{key: _plain(group[key], known[key]) for key in known} for group in self._groups]
        return {
            "optimizer": Description(self.description.name, tuple(options)).text(),
            "rows": [self._joined(chunks) for chunks in self._chunks],
        }

    def _joined(self, chunks: Sequence[Tensor]) -> dict[str, Tensor]:
        """The state of a row: each field as one tensor, cut nowhere."""
        states = [self._torch.state.get(chunk, {}) for chunk in chunks]
        joined = {}
        for field, first in states[0].items():
            cut = isinstance(first, Tensor) and first.dim() > 0
            joined[field] = torch.cat([state[field] for state in states]) if cut else torch.as_tensor(first).clone()
        return joined

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            StateError: of another optimizer or of other rows.
        """
        try:
            saved = Description.parse(state["optimizer"])
        except ConfigError as error:
            raise StateError(f"state of the optimizer: {error}") from None
        if saved.structure() != self.description.structure() or len(state["rows"]) != len(self._chunks):
            raise StateError(f"state is of {saved.structure()}, this is {self.description.structure()}")
        for row, (chunks, fields) in enumerate(zip(self._chunks, state["rows"], strict=True)):
            numel = sum(chunk.numel() for chunk in chunks)
            for field, tensor in fields.items():
                if not isinstance(tensor, Tensor) or tensor.shape not in ((), (numel,)):
                    raise StateError(f"state of row {row}: {field} is not a tensor of {numel} elements")
                parts = torch.split(tensor, _length(chunks)) if tensor.dim() else [tensor] * len(chunks)
                for chunk, part in zip(chunks, parts, strict=True):
                    self._torch.state[chunk][field] = part.detach().clone()
        for group, options in zip(self._groups, saved.groups, strict=True):
            group.update({key: _given(value) for key, value in options.items()})
        self._options = []

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._torch.param_groups  # type: ignore[no-any-return]


def _length(chunks: Sequence[Tensor]) -> int:
    return max(1, chunks[0].numel())


def _checked(name: str, number: int, group: object) -> dict[str, Value]:
    known = OPTIMIZERS[name]
    where = f"{name} group {number}"
    if not isinstance(group, dict):
        raise ConfigError(f"{where}: options={group!r} is not allowed; options must be a map")
    for key in group:
        if key not in known:
            raise ConfigError(f"{where}: unknown option {key!r}; it has {', '.join(known)}")
    for key, bounds in known.items():
        if key not in group:
            raise ConfigError(f"{where}: {key} is missing")
        value = group[key]
        if isinstance(bounds, str):
            check_flag(where, key, value)
        elif isinstance(bounds, dict):
            check_number(where, key, value, **bounds)
        else:
            if not isinstance(value, list) or len(value) != 2:
                raise ConfigError(f"{where}: {key}={value!r} is not allowed; {key} must be two numbers")
            for i, (one, its) in enumerate(zip(value, bounds, strict=True)):
                check_number(where, f"{key}.{i}", one, **its)
    return {key: group[key] for key in known}


def _plain(value: Any, allowed: object) -> Value:
    """An option as JSON has it."""
    if allowed == _FLAG:
        return bool(value)  # fused may be None
    if isinstance(value, (tuple, list)):
        return [float(one) for one in value]
    return float(value)


def _given(value: Value) -> float | bool | tuple[float, ...]:
    """An option as torch wants it."""
    return tuple(value) if isinstance(value, list) else value


def _flat(group: Mapping[str, Value]) -> dict[str, float]:
    """Its numbers; a pair as two."""
    flat: dict[str, float] = {}
    for key, value in group.items():
        if isinstance(value, list):
            flat |= {f"{key}.{i}": one for i, one in enumerate(value)}
        elif not isinstance(value, bool):
            flat[key] = value
    return flat


def _set(group: dict[str, Any], changes: Mapping[str, float]) -> None:
    for key, value in changes.items():
        option, _, which = key.partition(".")
        if which:
            pair = list(group[option])
            pair[int(which)] = value
            group[option] = tuple(pair)
        else:
            group[option] = value
