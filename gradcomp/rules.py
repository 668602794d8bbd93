"""Rules: which parameter goes through which compressor.

Wherever a compressor is given, rules can be: as :class:`Rules`, as their config, or as ``"@FILE"``, a JSON file that
holds the config::

    {
      "rules": [
        {"name": "*.conv*.weight", "compressor": "topk:ratio=0.01"},
        {"min_numel": 100000, "compressor": "threshold:density=0.001"}
      ],
      "default": "none"
    }

A rule decides alone on what it matches; :class:`gradcomp.DenseRule` has its say only on what is left to the default.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from gradcomp import registry
from gradcomp.errors import ConfigError
from gradcomp.interfaces import Compressor
from gradcomp.options import check_integer, check_text
from gradcomp.registry import Spec

__all__ = ["Choice", "Rule", "Rules", "choose", "choose_for"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a parameter must be, in every respect, to go through ``compressor``.

    Attributes:
        compressor: a spec string, a config or a Compressor.
        name: a pattern for the whole name, with ``*``, ``?`` and ``[...]`` as for files; a dot is nothing special.
        min_numel, max_numel: bounds of its number of elements, both included; None: no upper bound.
        min_dim, max_dim: the same for its number of dimensions.
    """

    compressor: Compressor
    name: str = "*"
    min_numel: int = 0
    max_numel: int | None = None
    min_dim: int = 0
    max_dim: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "compressor", registry.compressor(self.compressor))
        check_text("rule", "name", self.name)
        for least, most in (("min_numel", "max_numel"), ("min_dim", "max_dim")):
            check_integer("rule", least, getattr(self, least), at_least=0)
            if getattr(self, most) is not None:
                check_integer("rule", most, getattr(self, most), at_least=getattr(self, least))

    def config(self) -> dict[str, object]:
        """The JSON-able dict that builds an equal rule."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"compressor": self.compressor.config()}

    def matches(self, name: str, tensor: Tensor) -> bool:
        """Whether a parameter is what this rule is for."""
        return (
            fnmatchcase(name, self.name)
            and self.min_numel <= tensor.numel()
            and (self.max_numel is None or tensor.numel() <= self.max_numel)
            and self.min_dim <= tensor.dim()
            and (self.max_dim is None or tensor.dim() <= self.max_dim)
        )


@dataclass(frozen=True, init=False)
class Rules:
    """Compressors by parameter: the first rule that matches decides, else ``default`` is used.

    Attributes:
        rules: in order; a rule may also be given as its config.
        default: for what no rule matches, unless the dense rule sends it uncompressed.

    Raises:
        ConfigError: a rule that is none, or an option out of range.
    """

    rules: tuple[Rule, ...]
    default: Compressor

    def __init__(self, rules: Iterable[Rule | Mapping[str, object]] = (), default: Spec | Compressor = "none") -> None:
        object.__setattr__(self, "rules", tuple(_rule(number, rule) for number, rule in enumerate(rules)))
        object.__setattr__(self, "default", registry.compressor(default))

    def config(self) -> dict[str, object]:
        """The JSON-able dict that :func:`choose` turns into equal rules."""
        return {"rules": [rule.config() for rule in self.rules], "default": self.default.config()}

    def find(self, name: str, tensor: Tensor) -> Compressor | None:
        """The compressor of the first rule that matches; None if it is the default's."""
        return next((rule.compressor for rule in self.rules if rule.matches(name, tensor)), None)


Choice = Compressor | Rules


def _rule(number: int, rule: Rule | Mapping[str, object]) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, Mapping):
        raise ConfigError(f"rule {number} is {rule!r}; it must be a Rule or its config")
    known = [field.name for field in dataclasses.fields(Rule)]
    for key in rule:
        if key not in known:
            raise ConfigError(f"rule {number}: unknown option {key!r}; it has {', '.join(known)}")
    if "compressor" not in rule:
        raise ConfigError(f"rule {number} names no compressor: {dict(rule)!r}")
    return Rule(**rule)  # type: ignore[arg-type]


def choose(spec: Spec | Choice) -> Choice:
    """A compressor, or rules, from whatever may stand for one.

    Args:
        spec: as for :func:`gradcomp.compressor`; or Rules, their config, or ``"@FILE"``.

    Raises:
        ConfigError: as :func:`gradcomp.compressor`; also for a file that cannot be read or is not JSON.
    """
    if isinstance(spec, Rules):
        return spec
    if isinstance(spec, str) and spec.startswith("@"):
        return choose(_read(Path(spec[1:])))
    if isinstance(spec, Mapping) and "rules" in spec:
        options = dict(spec)
        rules, default = options.pop("rules"), options.pop("default", "none")
        if options:
            raise ConfigError(f"rules: unknown option {next(iter(options))!r}; there are rules, default")
        if not isinstance(rules, (list, tuple)):
            raise ConfigError(f"rules: rules={rules!r} is not allowed; it must be a list")
        return Rules(rules, default=default)  # type: ignore[arg-type]
    return registry.compressor(spec)


def choose_for(choice: Choice, name: str, tensor: Tensor) -> tuple[Compressor, bool]:
    """The compressor for a parameter, and whether a rule names it: the dense rule must then not be asked."""
    if isinstance(choice, Compressor):
        return choice, False
    found = choice.find(name, tensor)
    return (choice.default, False) if found is None else (found, True)


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"rules file {str(path)!r}: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f'rules file {str(path)!r} holds a {type(found).__name__}; it must be {{"rules": [...]}}')
    return found
