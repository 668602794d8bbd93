"""Parameter servers on this machine for as long as a run takes: ``gradcomp train --servers N``, and examples."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from queue import Empty, Queue

from gradcomp.errors import WorkerFailed
from gradcomp.options import check_integer

__all__ = ["local_servers", "servers_for_all"]

_START_S = 60.0
_STOP_S = 10.0
_KEY = "gradcomp-servers"
_LISTENS = re.compile(r"listens on (\S+:\d+)")


@contextlib.contextmanager
def local_servers(count: int, arguments: Sequence[str] = ()) -> Iterator[list[str]]:
    """Run ``count`` processes of ``gradcomp server`` on free ports of the loopback, and end them afterwards.

    They also end by themselves once all workers came and are gone.

    Args:
        arguments: further ones of ``gradcomp server``.

    Yields:
        Their addresses.

    Raises:
        ConfigError: ``count`` is not an integer in 1..64.
        WorkerFailed: a server did not start; says why.
    """
    check_integer("train", "servers", count, at_least=1, at_most=64)
    command = [sys.executable, "-m", "gradcomp", "server", "--exit-when-done", "--quiet", *arguments]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(_running(command)) for _ in range(count)]
        yield [server.address(number) for number, server in enumerate(servers)]


@contextlib.contextmanager
def _running(command: Sequence[str]) -> Iterator[_Server]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    server = _Server(process)
    try:
        yield server
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        server.close()


class _Server:
    """A process, and what it says. Its errors are shown once it has failed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._said: Queue[str] = Queue()
        self._errors: deque[str] = deque(maxlen=20)
        self._threads = [
            threading.Thread(target=target, daemon=True, name="gradcomp-local-server")
            for target in (self._read, self._read_errors)
        ]
        for thread in self._threads:
            thread.start()

    def address(self, number: int) -> str:
        """Where it listens.

        Raises:
            WorkerFailed: it does not.
        """
        try:
            said = self._said.get(timeout=_START_S)
        except Empty:
            raise WorkerFailed(f"server {number} was not there within {_START_S:g} s") from None
        found = _LISTENS.search(said)
        if found is None:
            self._process.wait(_STOP_S)
            raise WorkerFailed(f"server {number} did not start\n{''.join(self._errors)}".rstrip())
        return found[1]

    def close(self) -> None:
        """After its end."""
        for thread, pipe in zip(self._threads, (self._process.stdout, self._process.stderr), strict=True):
            thread.join(_STOP_S)
            if pipe is not None:
                pipe.close()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._said.put(line)
        self._said.put("")

    def _read_errors(self) -> None:
        for line in self._process.stderr or ():
            self._errors.append(line)


@contextlib.contextmanager
def servers_for_all(count: int, arguments: Sequence[str] = ()) -> Iterator[list[str]]:
    """As :func:`local_servers`, under torchrun on one machine: rank 0 runs them, until all ranks are done with them.

    Raises:
        ConfigError, WorkerFailed: as :func:`local_servers`, on rank 0; other ranks hear of nothing, and time out.
    """
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(iter(rendezvous("env://")))
    with contextlib.ExitStack() as stack:
        if rank == 0:
            store.set(_KEY, ",".join(stack.enter_context(local_servers(count, arguments))))
        yield store.get(_KEY).decode().split(",")
        store.set(f"{_KEY}/{rank}", "done")
        if rank == 0:
            store.wait([f"{_KEY}/{other}" for other in range(world_size)])
