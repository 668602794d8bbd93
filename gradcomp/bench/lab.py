"""A cluster of network namespaces on this machine: hosts of their own, on one switch, with links as slow as asked for.

Each host has one interface, ``eth0``; what it sends and what it receives are both shaped to the rate. It takes root and
iproute2's ``ip`` and ``tc``. Hosts share this machine's cores, and the switch adds no delay. After a pause a link lets
a short burst through at full speed: see ``burst_bytes``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from gradcomp.errors import ConfigError, WorkerFailed
from gradcomp.options import check_integer
from gradcomp.transports.pacing import parse_rate

__all__ = ["MAX_HOSTS", "Lab"]

MAX_HOSTS = 64
_NETWORK = "10.78.0"
_MASTER_PORT = 29511
# What an idle link lets through at full speed: two ticks of the shaper, but no less than one full segment. More would
# carry a whole compressed step for free.
_BURST_S, _LEAST_BURST_BYTES, _MOST_BURST_BYTES = 4e-3, 64 << 10, 512 << 10
_COMMAND_TIMEOUT_S = 20.0


class Lab:
    """Hosts that are there for as long as the context is entered.

    Args:
        hosts: how many, up to 64.
        rate: of each host's link, both ways, such as ``100mbit`` or ``10gbit``; None: not shaped.
        burst_bytes: what an idle link lets through before its rate holds; None: what the link carries in 4 ms, but from
            64 to 512 KiB.

    Raises:
        ConfigError: an argument out of range, or this machine or user makes no network namespaces.
    """

    def __init__(self, hosts: int, rate: str | None = None, *, burst_bytes: int | None = None) -> None:
        check_integer("lab", "hosts", hosts, at_least=1, at_most=MAX_HOSTS)
        if burst_bytes is not None:  # below, no full segment would pass
            check_integer("lab", "burst_bytes", burst_bytes, at_least=_LEAST_BURST_BYTES, at_most=1 << 30)
        parse_rate("lab", rate)
        check_privileges()
        self.hosts, self._burst_bytes = hosts, burst_bytes
        self.rate: str | None = None
        self._first_rate = rate
        prefix = f"gc{os.getpid()}"
        self._switch = f"{prefix}switch"
        self._names = [f"{prefix}host{i}" for i in range(hosts)]

    def __enter__(self) -> Lab:
        with contextlib.ExitStack() as stack:
            stack.callback(self._remove)
            stack.enter_context(_ended_by_sigterm())
            self._build()
            self._undo = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _build(self) -> None:
        _command("ip", "netns", "add", self._switch)
        _command("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _command("ip", "-n", self._switch, "link", "set", "bridge", "up")
        for i, name in enumerate(self._names):
            _command("ip", "netns", "add", name)
            _command(
                *("ip", "link", "add", f"port{i}", "netns", self._switch),
                *("type", "veth", "peer", "name", "eth0", "netns", name),
            )
            _command("ip", "-n", self._switch, "link", "set", f"port{i}", "master", "bridge", "up")
            _command("ip", "-n", name, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
            _command("ip", "-n", name, "link", "set", "eth0", "up")
            _command("ip", "-n", name, "link", "set", "lo", "up")
        self.set_rate(self._first_rate)

    def _remove(self) -> None:
        for name in (*self._names, self._switch):
            with contextlib.suppress(ConfigError):
                _command("ip", "netns", "del", name)

    def address(self, host: int) -> str:
        """The IP address of a host."""
        return f"{_NETWORK}.{host + 1}"

    def set_rate(self, rate: str | None) -> None:
        """Shape every link to another rate, or not at all (None), also while something runs."""
        bits_per_s = parse_rate("lab", rate)
        ends = [(name, "eth0") for name in self._names] + [(self._switch, f"port{i}") for i in range(self.hosts)]
        for name, device in ends:
            if bits_per_s is not None:
                usual = round(min(max(bits_per_s / 8 * _BURST_S, _LEAST_BURST_BYTES), _MOST_BURST_BYTES))
                burst = usual if self._burst_bytes is None else self._burst_bytes
                shape = ("tbf", "rate", f"{bits_per_s:.0f}bit", "burst", str(burst), "latency", "50ms")
                _command("tc", "-n", name, "qdisc", "replace", "dev", device, "root", *shape)
            elif self.rate is not None:
                _command("tc", "-n", name, "qdisc", "del", "dev", device, "root")
        self.rate = rate

    def start(
        self,
        host: int,
        command: Sequence[str],
        *,
        stdout: int,
        stderr: int,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a command in one host.

        Args:
            stdout, stderr: file descriptors.
            environment: beside this process's own.
        """
        return subprocess.Popen(
            ["ip", "netns", "exec", self._names[host], *command],
            env=os.environ | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )

    def run(
        self,
        command: Sequence[str],
        *,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
        listener: Callable[[str], None] | None = None,
    ) -> list[str]:
        """Run a command in all hosts at once, as ranks: RANK, WORLD_SIZE and MASTER_* are set as torchrun sets them.

        Args:
            timeout_s: for all of it.
            environment: beside this process's own.
            listener: called with each line that rank 0 writes to standard output, soon after it did.

        Returns:
            What each wrote to standard output.

        Raises:
            WorkerFailed: a rank failed, or was not done in time; with the end of what it wrote to standard error. All
                have been ended.
        """
        with tempfile.TemporaryDirectory(prefix="gradcomp-lab-") as folder:
            outs = [Path(folder) / f"out{rank}" for rank in range(self.hosts)]
            errs = [Path(folder) / f"err{rank}" for rank in range(self.hosts)]
            processes: list[subprocess.Popen[bytes]] = []
            try:
                for rank, (out, err) in enumerate(zip(outs, errs, strict=True)):
                    with out.open("wb") as o, err.open("wb") as e:
                        mine = self._as_rank(rank) | dict(environment or {})
                        processes.append(
                            self.start(rank, command, stdout=o.fileno(), stderr=e.fileno(), environment=mine)
                        )
                heard = _Lines(outs[0], listener) if listener is not None else None
                failed = _wait_for(processes, timeout_s, heard)
            finally:
                for process in processes:
                    process.kill()
                    process.wait(_COMMAND_TIMEOUT_S)
            if failed is not None:
                rank, why = failed
                written = "\n".join(errs[rank].read_text(errors="replace").splitlines()[-30:])
                raise WorkerFailed(f"{' '.join(command)}: rank {rank} {why}\n{written}")
            return [out.read_text(errors="replace") for out in outs]

    def _as_rank(self, rank: int) -> dict[str, str]:
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.hosts),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(_MASTER_PORT),
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }


def check_privileges() -> None:
    """Raise ConfigError, saying what is missing, if there can be no lab here."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise ConfigError("hosts as network namespaces need root; run it as root, or in a privileged container")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise ConfigError(f"hosts as network namespaces need the command {tool!r}: install iproute2")


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """In here SIGTERM raises SystemExit, so that nothing is left behind; but not if the program has its own ideas."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Lines:
    """Hands on the lines of a file that is still being written."""

    def __init__(self, path: Path, listener: Callable[[str], None]) -> None:
        self._path, self._listener, self._at = path, listener, 0

    def look(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._at)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._at += len(whole + newline)
        for line in whole.decode(errors="replace").splitlines():
            self._listener(line)


def _wait_for(
    processes: Sequence[subprocess.Popen[bytes]], timeout_s: float, heard: _Lines | None
) -> tuple[int, str] | None:
    """Wait for all; the first that failed, or is not done in time, and how."""
    end = time.monotonic() + timeout_s
    running = dict(enumerate(processes))
    while running:
        for rank, process in list(running.items()):
            status = process.poll()
            if status is not None:
                del running[rank]
                if status != 0:
                    return rank, f"ended with status {status}"
        if heard is not None:
            heard.look()
        if running and time.monotonic() > end:
            return next(iter(running)), f"was not done within {timeout_s:g} s"
        time.sleep(0.02)
    return None


def _command(*words: str) -> None:
    try:
        subprocess.run(words, check=True, capture_output=True, timeout=_COMMAND_TIMEOUT_S, text=True)
    except subprocess.CalledProcessError as error:
        raise ConfigError(
            f"this machine makes no network namespaces: {' '.join(words)}: {error.stderr.strip()}"
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"this machine makes no network namespaces: {' '.join(words)}: {error}") from None
