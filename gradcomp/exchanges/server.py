"""A parameter server: workers push gradients to it, and pull what changed; they never meet each other."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NoReturn

from gradcomp.bucket import Piece, Unit
from gradcomp.errors import ConfigError
from gradcomp.interfaces import Exchange, Incoming, Transport, Work
from gradcomp.options import check_flag, check_integer, check_number, check_text
from gradcomp.registry import Spec
from gradcomp.rules import Choice, choose
from gradcomp.server import modes
from gradcomp.server.modes import Mode

__all__ = ["PULL", "Server"]

# What small tensors lose in 8 bits is in the next change; uncompressed they would be most of the bytes.
PULL: Mapping[str, object] = {
    "rules": [{"max_dim": 1, "compressor": "int8"}, {"max_numel": 1023, "compressor": "int8"}],
    "default": "threshold:density=0.005",
}


@dataclass(frozen=True, kw_only=True)
class Server(Exchange):
    """Gradients go to a server that owns the parameters and their optimizer, and compressed changes come back.

    For :func:`gradcomp.attach` and ``gradcomp worker``; whatever needs ranks that meet each other is refused.

    Attributes:
        addresses: ``"HOST:PORT"`` of each shard, in order; one text or a list.
        mode: when a gradient is applied and who waits for whom: ``sync``, ``async``, ``ssp``, ``softsync``
            (gradcomp.server.modes), as a spec string or config.
        pull: what compresses the changes of parameters that come back, a compressor or rules; must keep what it does
            not send. None: :data:`PULL`.
        worker: this worker's name; None: ``RANK`` under torchrun, else made of host and process.
        workers: how many workers the run is made for; None: ``WORLD_SIZE``, one without it.
        timeout_s: how long a server may stay away, or make this worker wait.
        retry: whether a server that is not there yet is waited for as long; else for two seconds.
        delay: 1: what changed is not waited for but taken in before the next push, so that the network works while the
            next gradient is computed; one step more of staleness. Not with ``sync``.
        rate: what this worker sends at most, ``"100mbit"``, as with zmq.
    """

    id: ClassVar[str] = "server"
    addresses: str | Sequence[str] = ()
    mode: Spec = "sync"
    pull: Spec | None = None
    worker: str | None = None
    workers: int | None = None
    timeout_s: float = 60.0
    retry: bool = True
    delay: int = 0
    rate: str | int | None = None

    def __post_init__(self) -> None:
        given = [self.addresses] if isinstance(self.addresses, str) else self.addresses
        if not isinstance(given, Sequence) or not given or not all(map(_is_address, given)):
            raise ConfigError(
                f"{self.id}: addresses={self.addresses!r} is not allowed; addresses must be HOST:PORT of each shard, "
                'such as "10.0.0.1:5000" or ["10.0.0.1:5000","10.0.0.2:5000"]'
            )
        object.__setattr__(self, "addresses", list(given))
        object.__setattr__(self, "mode", modes.mode(self.mode).config())
        object.__setattr__(self, "pull", choose(PULL if self.pull is None else self.pull).config())
        for name in ("worker", "rate"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), int):
                check_text(self.id, name, getattr(self, name))
        if self.workers is not None:
            check_integer(self.id, "workers", self.workers, at_least=1)
        check_number(self.id, "timeout_s", self.timeout_s, above=0.0)
        check_integer(self.id, "delay", self.delay, at_least=0, at_most=1)
        check_flag(self.id, "retry", self.retry)
        if self.delay and self.chosen_mode.id == "sync":
            raise ConfigError(f"{self.id}: delay=1 is not allowed with mode sync, whose rounds are waited for")

    @cached_property
    def chosen_mode(self) -> Mode:
        """The mode itself."""
        return modes.mode(self.mode)

    @cached_property
    def chosen_pull(self) -> Choice:
        """The compressor of what is pulled, or rules."""
        return choose(PULL if self.pull is None else self.pull)

    def transport(
        self, given: str | Mapping[str, object] | Transport | None, *, usual: str | Transport = "zmq"
    ) -> Transport:
        """There is none: workers do not meet."""
        self._refuse()

    def on(self, transport: Transport) -> Exchange:
        """As :meth:`transport`."""
        self._refuse()

    def cut(self, units: Sequence[Unit], world_size: int) -> list[Piece]:
        """As :meth:`transport`."""
        self._refuse()

    def run(self, work: Work) -> Generator[Sequence[Incoming], None, None]:
        """As :meth:`transport`."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            f"exchange {self.id!r} has no ranks that meet each other: use it with gradcomp.attach(optimizer, "
            "exchange=..., model=...) or gradcomp worker, where a server owns the parameters; give no transport"
        )


def _is_address(text: object) -> bool:
    if not isinstance(text, str):
        return False
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 1 << 16
