"""When a pushed gradient is applied, and which worker may go on: the modes of a parameter server.

>>> mode("ssp:staleness=2")
Ssp(staleness_aware=False, staleness=2)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from gradcomp.errors import ConfigError
from gradcomp.options import Configured, check_flag, check_integer
from gradcomp.registry import Spec, parse_spec

__all__ = ["MODES", "Async", "Mode", "Softsync", "Ssp", "Sync", "mode"]


@dataclass(frozen=True, kw_only=True)
class Mode(Configured):
    """Base of the modes. Immutable."""


@dataclass(frozen=True, kw_only=True)
class Sync(Mode):
    """Rounds: one update of the mean of all workers' gradients, which all of them wait for.

    Attributes:
        backup: so many workers are not waited for (Chen et al. 2016): a gradient that comes after its round is closed
            is not applied; its worker takes it back into its residual.
    """

    id: ClassVar[str] = "sync"
    backup: int = 0

    def __post_init__(self) -> None:
        check_integer(self.id, "backup", self.backup, at_least=0)


@dataclass(frozen=True, kw_only=True)
class Stale(Mode):
    """Modes in which a gradient may be of parameters that have changed since.

    Attributes:
        staleness_aware: divide a gradient's learning rate by its staleness, the number of updates since the parameters
            it was computed from were read (Zhang et al. 2016).
    """

    staleness_aware: bool = False

    def __post_init__(self) -> None:
        check_flag(self.id, "staleness_aware", self.staleness_aware)


@dataclass(frozen=True, kw_only=True)
class Async(Stale):
    """Downpour SGD (Dean et al. 2012): each push is applied as it comes; nobody waits for anybody.

    Attributes:
        n_push: steps between two pushes; gradients in between add up.
        n_fetch: steps between two pulls; in between a worker's own optimizer moves its copy.
        warm_start: updates that one worker makes alone before the others are let in.
    """

    id: ClassVar[str] = "async"
    n_push: int = 1
    n_fetch: int = 1
    warm_start: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self.id, "n_push", self.n_push, at_least=1)
        check_integer(self.id, "n_fetch", self.n_fetch, at_least=1)
        check_integer(self.id, "warm_start", self.warm_start, at_least=0)


@dataclass(frozen=True, kw_only=True)
class Ssp(Stale):
    """Stale synchronous parallel (Ho et al. 2013; GeePS): each push is applied as it comes, but no worker runs more
    than so many clocks ahead of the slowest. A clock is one push.

    Attributes:
        staleness: that many clocks; 0: nobody is ahead of anybody.
    """

    id: ClassVar[str] = "ssp"
    staleness: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self.id, "staleness", self.staleness, at_least=0)


@dataclass(frozen=True, kw_only=True)
class Softsync(Stale):
    """n-softsync (Zhang et al. 2016): one update of the mean of every floor(workers / n) pushes, as they come.

    Attributes:
        n: 1: as many pushes as there are workers; the number of workers: each push by itself.
    """

    id: ClassVar[str] = "softsync"
    n: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self.id, "n", self.n, at_least=1)


MODES: Mapping[str, type[Mode]] = {kind.id: kind for kind in (Sync, Async, Ssp, Softsync)}


def mode(spec: Spec | Mode) -> Mode:
    """A mode from ``"ssp:staleness=3"``, a config or a Mode.

    Raises:
        ConfigError: unknown id or option, or a value out of range.
    """
    if isinstance(spec, Mode):
        return spec
    if isinstance(spec, str):
        name, options = parse_spec(spec)
    elif isinstance(spec, Mapping):
        options = dict(spec)
        name = str(options.pop("id", ""))
    else:
        raise ConfigError(f"server: mode={spec!r} is not allowed; mode must be a spec string or a config")
    if name not in MODES:
        raise ConfigError(f"server: mode={name!r} is not allowed; mode must be one of {', '.join(MODES)}")
    return MODES[name].from_options(options)
