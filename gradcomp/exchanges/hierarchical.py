"""Dense inside a host, compressed between hosts: gradients are added up where links are fast, and one rank crosses."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from gradcomp import registry
from gradcomp.bucket import Piece, Unit
from gradcomp.errors import ConfigError
from gradcomp.interfaces import Exchange, Incoming, Transport, Work
from gradcomp.options import check_choice, check_integer
from gradcomp.registry import Spec

__all__ = ["Hierarchical", "hierarchical"]


@dataclass(frozen=True, kw_only=True)
class Hierarchical(Exchange):
    """The first rank of each host, its leader, adds up the host's gradients; leaders exchange packets among themselves.

    So each host sends and compresses once, however many ranks it runs, and residuals are kept by leaders alone. Results
    go back to the other ranks in float32, so that all replicas stay bit-identical. Brings its own transport.

    Attributes:
        local: transport inside a host, as a spec string or config.
        between: transport between hosts, likewise.
        exchange: how packets meet between hosts, likewise.
        local_dtype: what gradients are sent as to their host's leader: ``"float32"`` or ``"bfloat16"``, half the bytes.
            They are added up in float32 either way.
        ranks_per_host: None: as torchrun's environment says.
    """

    id: ClassVar[str] = "hierarchical"
    local: Spec = "nccl"
    between: Spec = "zmq"
    exchange: Spec = "auto"
    local_dtype: str = "float32"
    ranks_per_host: int | None = None

    def __post_init__(self) -> None:
        check_choice(self.id, "local_dtype", self.local_dtype, ("float32", "bfloat16"))
        if self.ranks_per_host is not None:
            check_integer(self.id, "ranks_per_host", self.ranks_per_host, at_least=1)
        for name in ("local", "between", "exchange"):
            value = getattr(self, name)
            if not isinstance(value, (str, Mapping)):
                raise ConfigError(
                    f"{self.id}: {name}={value!r} is not allowed; {name} must be a spec string or a config"
                )
        if isinstance(self._between, Hierarchical):
            raise ConfigError(f"{self.id}: exchange={self.exchange!r} is not allowed: there are two levels, no more")

    @cached_property
    def _between(self) -> Exchange:
        return registry.exchange(self.exchange)

    def transport(
        self, given: str | Mapping[str, object] | Transport | None, *, usual: str | Transport = "zmq"
    ) -> Transport:
        """One of two levels. Whoever gives a transport can only mean the one between hosts, and it must be that.

        Raises:
            ConfigError: it is another one.
        """
        if isinstance(given, Transport) and given.levels is not None:
            theirs = given.config()
            if all(theirs.get(name) == getattr(self, name) for name in ("local", "between", "local_dtype")):
                return given
        if given is not None and given != self.between:
            shown = given.id if isinstance(given, Transport) else given
            raise ConfigError(
                f"transport={shown!r} is not allowed with exchange {self.id}, which brings local={self.local!r} and "
                f"between={self.between!r}: leave transport out, or change between"
            )
        options = {"local": self.local, "between": self.between, "local_dtype": self.local_dtype}
        return registry.transport({"id": self.id, "ranks_per_host": self.ranks_per_host, **options})

    def on(self, transport: Transport) -> Exchange:
        """With the exchange between hosts as it is run over the transport between them."""
        return replace(self, exchange=self._between.on(transport).config())

    def cut(self, units: Sequence[Unit], world_size: int) -> list[Piece]:
        """As the exchange between hosts cuts, for as many ranks as there are hosts."""
        return self._between.cut(units, world_size)

    def run(self, work: Work) -> Generator[Sequence[Incoming], None, None]:
        """As the exchange between hosts runs, among leaders."""
        return self._between.run(work)


def hierarchical(
    *,
    local: Spec = "nccl",
    between: Spec = "zmq",
    exchange: Spec = "auto",
    local_dtype: str = "float32",
    ranks_per_host: int | None = None,
) -> Hierarchical:
    """For ``attach(..., exchange=gradcomp.hierarchical(local="gloo"))``: see :class:`Hierarchical` for the options.

    Raises:
        ConfigError: an option that is not allowed.
    """
    return Hierarchical(
        local=local, between=between, exchange=exchange, local_dtype=local_dtype, ranks_per_host=ranks_per_host
    )
