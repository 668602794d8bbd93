"""Frozen configs: what a spec string turns into, and the checks that name field, value and range."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, TypeVar

from gradcomp.errors import ConfigError

__all__ = ["Configured", "check_choice", "check_flag", "check_integer", "check_number", "check_text"]

C = TypeVar("C", bound="Configured")


class Configured:
    """Base of everything a spec string names. Subclasses are ``@dataclass(frozen=True, kw_only=True)``."""

    id: ClassVar[str]

    def config(self) -> dict[str, object]:
        """The JSON-able dict that builds an equal object: ``{"id": ..., field: value, ...}``."""
        return {"id": self.id} | {name: getattr(self, name) for name in self._option_names()}

    @classmethod
    def _option_names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]

    @classmethod
    def from_options(cls: type[C], options: Mapping[str, object]) -> C:
        """Build from options, refusing unknown ones.

        Raises:
            ConfigError: an option this class does not have, or a value it does not allow.
        """
        known = cls._option_names()
        for key in options:
            if key not in known:
                raise ConfigError(f"{cls.id}: unknown option {key!r}; it has {', '.join(known) or 'no options'}")
        return cls(**dict(options))


def _refuse(owner: str, field: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{owner}: {field}={value!r} is not allowed; {field} must be {allowed}")


def check_number(
    owner: str,
    field: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raise ConfigError unless ``value`` is a finite number, above < value < below, at_least <= value <= at_most."""
    bounds = []
    if above > -math.inf:
        bounds.append(f"> {above:g}")
    if at_least > -math.inf:
        bounds.append(f">= {at_least:g}")
    if at_most < math.inf:
        bounds.append(f"<= {at_most:g}")
    if below < math.inf:
        bounds.append(f"< {below:g}")
    allowed = "a finite number" + ("" if not bounds else " " + " and ".join(bounds))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _refuse(owner, field, value, allowed)
    if not (above < value < below and at_least <= value <= at_most):
        raise _refuse(owner, field, value, allowed)


def check_integer(owner: str, field: str, value: object, *, at_least: int, at_most: int | None = None) -> None:
    """Raise ConfigError unless ``value`` is an int with at_least <= value <= at_most."""
    allowed = f"an integer >= {at_least}" + ("" if at_most is None else f" and <= {at_most}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refuse(owner, field, value, allowed)
    if value < at_least or (at_most is not None and value > at_most):
        raise _refuse(owner, field, value, allowed)


def check_choice(owner: str, field: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise _refuse(owner, field, value, "one of " + ", ".join(choices))


def check_flag(owner: str, field: str, value: object) -> None:
    """Raise ConfigError unless ``value`` is true or false."""
    if not isinstance(value, bool):
        raise _refuse(owner, field, value, "true or false")


def check_text(owner: str, field: str, value: object) -> None:
    """Raise ConfigError unless ``value`` is a non-empty string."""
    if not isinstance(value, str) or not value:
        raise _refuse(owner, field, value, "a non-empty string")
