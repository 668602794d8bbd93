"""Methods that ``gradcomp bench train`` compares: ``[NAME=]SPEC[;KEY=VALUE...]``.

SPEC is a compressor (``threshold:density=0.005``, ``@rules.json``) or ``ddp:fp32``, ``ddp:fp16``, ``ddp:bf16``:
DistributedDataParallel with torch's own hook. KEY is ``exchange``, ``transport``, ``overlap``, ``servers``, ``mode`` or
``pull``, as of ``gradcomp train``, or ``set:OPTION`` for an option of the task that this method wants otherwise::

    none
    sparse=threshold:density=0.005;exchange=two_shot;set:lr=0.1
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gradcomp.errors import ConfigError

__all__ = ["DDP_RATIOS", "Method", "merge_settings", "parse_method", "parse_methods"]

# What can follow "ddp:", and how many bytes of float32 gradients each makes one byte.
DDP_RATIOS = {"fp32": 1.0, "fp16": 2.0, "bf16": 2.0}
_NAME = re.compile(r"\s*([^:;=@]+)=(?=.)")
_KEYS = ("exchange", "transport", "overlap", "servers", "mode", "pull")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train.

    Attributes:
        name: what tables and pictures call it.
        spec: a compressor, or ``ddp:HOOK``.
        settings: options of the task, ``key=value``, before those that all methods share.
        servers: through a parameter server of so many shards; mode and pull are its.
    """

    name: str
    spec: str
    exchange: str = "auto"
    transport: str | None = None
    overlap: str = "backward"
    servers: int | None = None
    mode: str | None = None
    pull: str | None = None
    settings: tuple[str, ...] = ()

    @property
    def hook(self) -> str | None:
        """Of DDP; None for gradcomp's methods."""
        return self.spec.partition(":")[2] if self.family == "ddp" else None

    @property
    def family(self) -> str:
        """The compressor's id; ``@FILE`` for rules."""
        return self.spec if self.spec.startswith("@") else self.spec.partition(":")[0].strip()


def parse_method(text: str) -> Method:
    """A method from its text; see the module.

    Raises:
        ConfigError: what is wrong with it. Compressor and exchange are not looked up.
    """
    name = _NAME.match(text)
    rest = text[name.end() :] if name else text
    spec, *items = (item.strip() for item in rest.split(";"))
    options: dict[str, str] = {}
    settings: list[str] = []
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not value:
            raise ConfigError(f"method {text!r}: {item!r} is not KEY=VALUE")
        if key.startswith("set:"):
            settings.append(f"{key[4:]}={value}")
        elif key not in _KEYS:
            raise ConfigError(f"method {text!r}: unknown key {key!r}; it has {', '.join(_KEYS)}, set:OPTION")
        elif key in options:
            raise ConfigError(f"method {text!r}: {key} is given twice")
        else:
            options[key] = value
    for setting in settings:
        if setting.partition("=")[0] in ("epochs", "batch_size"):
            raise ConfigError(f"method {text!r}: set:{setting} is not allowed; all methods see the same samples")
    if spec == "ddp" or spec.startswith("ddp:"):
        _check_ddp(text, spec, options)
    servers = options.pop("servers", None)
    if servers is not None and not servers.isdecimal():
        raise ConfigError(f"method {text!r}: servers={servers} is not allowed; servers must be a number of shards")
    return Method(
        name=name[1].strip() if name else rest.strip(),
        spec=spec,
        settings=tuple(settings),
        servers=None if servers is None else int(servers),
        **options,
    )


def _check_ddp(text: str, spec: str, options: dict[str, str]) -> None:
    hook = spec.partition(":")[2]
    if hook not in DDP_RATIOS:
        known = ", ".join(f"ddp:{name}" for name in DDP_RATIOS)
        raise ConfigError(f"method {text!r}: {spec} is not allowed; DistributedDataParallel is one of {known}")
    if options:
        raise ConfigError(f"method {text!r}: DistributedDataParallel takes no {', '.join(options)}")


def parse_methods(texts: Sequence[str]) -> list[Method]:
    """All of a benchmark's.

    Raises:
        ConfigError: as :func:`parse_method`, or two of one name.
    """
    methods = [parse_method(text) for text in texts]
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two methods are called {name!r}; give one a name of its own: NAME=SPEC")
    return methods


def merge_settings(shared: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
    """Options of the task for one method: its own in place of shared ones with the same key.

    >>> merge_settings(["lr=0.2", "width=64"], ["lr=0.1"])
    ('width=64', 'lr=0.1')
    """
    keys = {setting.partition("=")[0] for setting in own}
    return (*(setting for setting in shared if setting.partition("=")[0] not in keys), *own)
