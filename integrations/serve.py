"""``gradcomp server``: one shard of a parameter server as a process."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from gradcomp import registry
from gradcomp.errors import TransportError, WorkerFailed
from gradcomp.integrations.report import size
from gradcomp.integrations.server_state import ServerState
from gradcomp.options import check_integer, check_number
from gradcomp.server.protocol import Look, Status
from gradcomp.server.service import Service

__all__ = ["Loop", "ServeOptions", "look", "serve"]

_OWNER = "server"
_TURN_S = 0.1
_PROGRESS_S = 30.0
_STATUS_BYTES = 64 << 20
# Beyond what values need as float32: the worst that a compressor makes of them, and what is beside them.
_BYTES_PER_ELEMENT = 9
_HEAD_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """See ``gradcomp server --help``."""

    bind: str = "127.0.0.1:0"
    state: str | None = None
    checkpoint_updates: int | None = None
    checkpoint_s: float = 30.0
    fsync: bool = False
    lease_s: float = 10.0
    max_elements: int = 1 << 28
    threads: int = 1
    rate: str | None = None
    insecure: bool = False
    exit_when_done: bool = False
    quiet: bool = False

    def check(self) -> None:
        """Raise ConfigError unless all values are allowed; the address is checked where it is bound."""
        if self.checkpoint_updates is not None:
            check_integer(_OWNER, "checkpoint_updates", self.checkpoint_updates, at_least=1)
        check_number(_OWNER, "checkpoint_s", self.checkpoint_s, at_least=0.1)
        check_number(_OWNER, "lease_s", self.lease_s, at_least=0.1, at_most=86400)
        check_integer(_OWNER, "max_elements", self.max_elements, at_least=1, at_most=1 << 34)
        check_integer(_OWNER, "threads", self.threads, at_least=1, at_most=1024)

    @property
    def max_message_bytes(self) -> int:
        """No request is longer: a gradient, however badly compressed, or all values."""
        return _HEAD_BYTES + _BYTES_PER_ELEMENT * self.max_elements


class Loop(Protocol):
    """What brings requests: :class:`gradcomp.transports.server_loop.ServerLoop`."""

    address: str
    bytes_sent: int
    bytes_received: int

    def turn(self, timeout_s: float) -> None:
        """Wait for requests, handle and answer them."""

    def close(self) -> None:
        """Stop listening."""


def serve(options: ServeOptions, make_loop: Callable[[Service, Callable[[], None]], Loop]) -> int:
    """Serve until a signal, or until all workers are done; prints the address on one line when it listens.

    Args:
        make_loop: from the service, and what is to be called before replies are sent.

    Returns:
        0 when it was done or ended by SIGTERM.

    Raises:
        ConfigError: an option that is not allowed.
        StateError: what is in the folder cannot be gone on from.
        TransportError: cannot listen.
        WorkerFailed: the last checkpoint could not be written.
        KeyboardInterrupt: ended by SIGINT.
    """
    options.check()
    _log_to_stderr()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(options.threads)
        signals = stack.enter_context(_signals())
        state = None
        if options.state is not None:
            state = ServerState(
                Path(options.state),
                durable=options.fsync,
                every_updates=options.checkpoint_updates,
                every_s=options.checkpoint_s,
            )
            stack.callback(state.close)
        service = Service(
            journal=None if state is None else state.journal,
            lease_s=options.lease_s,
            max_numel=options.max_elements,
        )
        if state is not None:
            _recover(state, service)
        # Only now: who finds the port open must find the state there, too.
        loop = make_loop(service, _nothing if state is None else state.sync)
        stack.callback(loop.close)
        print(f"gradcomp server listens on {loop.address}", flush=True)
        progress = _Progress(service, loop, quiet=options.quiet)
        done_looked_s = time.monotonic()
        while not signals:
            loop.turn(_TURN_S)
            now = time.monotonic()
            if state is not None:
                state.tick(service, now)
            progress.tick(now)
            if options.exit_when_done and now >= done_looked_s + _TURN_S:
                done_looked_s = now
                if service.status().get("done"):
                    break
        if not signals:
            _linger(loop)
        saved = state is None or state.save(service, time.monotonic())
        progress.say("done" if not signals else f"ended by {signal.Signals(signals[0]).name}")
        if not saved:
            raise WorkerFailed("server: the last checkpoint could not be written; see above")
        if signals and signals[0] == signal.SIGINT:
            raise KeyboardInterrupt
    return 0


def look(address: str, *, timeout_s: float = 5.0) -> dict[str, Any]:
    """The status of the server there.

    Raises:
        ConfigError: not an address.
        TransportTimeout: nobody answers.
    """
    links = registry.links_class()(
        [address],
        worker="status",
        incarnation=secrets.randbits(32),
        timeout_s=timeout_s,
        max_message_bytes=_STATUS_BYTES,
    )
    try:
        asked = links.ask(0, Look(number=0, worker="", incarnation=0))
        links.wait([asked])
    finally:
        links.close()
    reply = asked.replies[0]
    if not isinstance(reply, Status) or not isinstance(reply.body, memoryview):
        raise TransportError(f"server: {address} answers a Look with {type(reply).__name__}")
    found: dict[str, Any] = json.loads(bytes(reply.body))
    return found


def _nothing() -> None:
    """Nothing is to be waited for before replies."""


def _linger(loop: Loop) -> None:
    """The last worker's goodbye is still to be answered; should that get lost, it asks again."""
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        loop.turn(_TURN_S)


def _recover(state: ServerState, service: Service) -> None:
    found = state.recover(service)
    if found.checkpoint is None and not found.entries:
        return
    begin = "no checkpoint" if found.checkpoint is None else f"checkpoint {found.checkpoint}"
    torn = f", {found.torn_bytes} bytes of a torn one cut" if found.torn_bytes else ""
    print(
        f"gradcomp server resumes at update {service.version}: {begin}, {found.entries} entries of the journal{torn}, "
        f"{found.seconds:.2f} s",
        flush=True,
    )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT so far; the handlers that were there come back."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _log_to_stderr() -> None:
    """Warnings go where errors go, unless somebody has said where they go."""
    found = logging.getLogger("gradcomp")
    if not found.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("gradcomp server: %(message)s"))
        found.addHandler(handler)


class _Progress:
    """A line now and then, and one at the end."""

    def __init__(self, service: Service, loop: Loop, *, quiet: bool) -> None:
        self._service, self._loop, self._quiet = service, loop, quiet
        self._began_s = self._said_s = time.monotonic()
        self._version = service.version

    def tick(self, now: float) -> None:
        if now >= self._said_s + _PROGRESS_S:
            self._said_s = now
            if not self._quiet and self._service.version != self._version:
                self._version = self._service.version
                self.say("goes on")

    def say(self, what: str) -> None:
        status = self._service.status()
        counted = ", ".join(
            f"{status[key]} {name}"
            for key, name in (
                ("live", "workers"),
                ("late", "late"),
                ("nonfinite", "non-finite"),
                ("refused", "refused"),
            )
            if status.get(key)
        )
        print(
            f"gradcomp server {what}: update {self._service.version} after {time.monotonic() - self._began_s:.0f} s, "
            f"{size(self._loop.bytes_received)} in, {size(self._loop.bytes_sent)} out{', ' * bool(counted)}{counted}",
            flush=True,
        )
