"""Process groups of our own: beside the user's, or from torchrun's environment, or for threads of one process.

A transport never shares a communicator with anybody: another user's collectives (DDP's, say) would interleave with its
own in another order on every rank, and a wait that times out breaks all that goes over a Gloo group.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from gradcomp.errors import ConfigError, TransportError, TransportTimeout
from gradcomp.interfaces import Part
from gradcomp.transports import environment
from gradcomp.transports.rendezvous import Meeting, Record, run_name

__all__ = ["FromEnvironment", "FromStore", "Groups", "Source", "beside_or_given", "break_off", "parse_backends"]

_NEVER_SENT_TAG = 99

# How many transports were made beside a group of these ranks: the same on all of them.
_beside: defaultdict[tuple[int, ...], itertools.count[int]] = defaultdict(itertools.count)


@dataclass(frozen=True)
class Groups:
    """What one connection runs on.

    Attributes:
        messages: carries CPU tensors from rank to rank.
        collectives: for all-reduces, and tensors from device to device; may be the same group.
        release: gives back what was made. Its argument: whether something hangs in there, because a peer is gone.
    """

    messages: Any
    collectives: Any
    release: Callable[[bool], None]


class Source(ABC):
    """Where groups come from: :meth:`make` is called once, by all ranks together.

    Attributes:
        backend: what there is already: a name, or one for each type of device; see :func:`parse_backends`.
    """

    rank: int
    size: int
    backend: str = "gloo"

    @abstractmethod
    def make(self, backend: str, timeout_s: float) -> Groups:
        """Make them; blocks until all ranks do so, at most ``timeout_s``.

        Args:
            backend: of the collectives; messages go over Gloo whatever it is.

        Raises:
            TransportTimeout: a rank did not come; names those that did not where that can be known.
            TransportError: anything else the backend says.
        """


class Beside(Source):
    """Groups of the same ranks as a group that torch.distributed knows, made with ``dist.new_group``."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self.rank, self.size = group.rank(), group.size()
        self.backend = dist.get_backend_config(group)

    def make(self, backend: str, timeout_s: float) -> Groups:
        everyone = len(self._ranks) == dist.get_world_size()
        kinds = set(parse_backends(backend).values())
        backend = kinds.pop() if len(kinds) == 1 else backend
        made: list[Any] = []

        def new(kind: str) -> Any:
            group = dist.new_group(
                self._ranks,
                timeout=timedelta(seconds=timeout_s),
                backend=kind,
                # Ranks outside the group do not know of this transport.
                use_local_synchronization=not everyone,
            )
            made.append(group)
            return group

        def release(hangs: bool) -> None:
            for group in made:
                # An error: the user destroyed all groups before.
                with contextlib.suppress(ValueError, RuntimeError, AssertionError):
                    if hangs and backend != "gloo" and hasattr(group, "abort"):  # torch >= 2.7
                        group.abort()
                    dist.destroy_process_group(group)

        store = self._group.get_group_store() if hasattr(self._group, "get_group_store") else None  # torch >= 2.7
        with _Attendance(store, f"beside/{next(_beside[tuple(self._ranks)])}", self.rank, self.size, timeout_s):
            messages = new("gloo")
            return Groups(messages, new(backend), release)


class FromStore(Source):
    """Groups from a store that all ranks share; ranks may be threads of one process."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store = store
        self.rank, self.size = rank, size

    def make(self, backend: str, timeout_s: float) -> Groups:
        with _Attendance(self._store, "groups", self.rank, self.size, timeout_s):
            return _raw_groups(self._store, self.rank, self.size, backend, timeout_s)


class FromEnvironment(Source):
    """Groups from torchrun's environment: ranks meet at MASTER_ADDR:MASTER_PORT as for ``zmq``.

    Args:
        part: the ranks that are meant, if not all of them.
    """

    def __init__(self, part: Part | None = None) -> None:
        self._name = f"{run_name(None)}/groups"
        self._hosting: bool | None = None
        if part is None:
            self.rank, self.size = environment.rank(), environment.world_size()
        else:
            self.rank, self.size = part.rank, part.world_size
            self._name, self._hosting = f"{self._name}/{part.name}", part.run_rank == 0

    def make(self, backend: str, timeout_s: float) -> Groups:
        deadline = time.monotonic() + timeout_s
        meeting = Meeting(environment.master(None), self._name, self.rank, self.size, deadline, hosting=self._hosting)
        mine = Record(
            rank=self.rank,
            world_size=self.size,
            endpoint=backend,
            identity=struct.pack("<16s", str(self.rank).encode()),
            incarnation=0,
            host=socket.gethostname(),
        )
        for theirs in meeting.exchange(mine).values():
            if theirs.endpoint != backend:
                raise TransportError(
                    f"rank {self.rank} and rank {theirs.rank} differ in backend: "
                    f"{backend} here, {theirs.endpoint} there"
                )
        left_s = max(1.0, deadline - time.monotonic())
        store = meeting.store(left_s)
        with _Attendance(store, "groups", self.rank, self.size, left_s):
            return _raw_groups(store, self.rank, self.size, backend, left_s)


class Given(Source):
    """A group that torch.distributed does not know by name, given as it is and used for nothing else meanwhile."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = group.rank(), group.size()
        self.backend = str(group.name()).lower()

    def make(self, backend: str, timeout_s: float) -> Groups:
        if parse_backends(backend) != parse_backends(self.backend) or "cpu" not in parse_backends(backend):
            raise ConfigError(
                f"group is of {self.backend} and not known to torch.distributed, so no others can be made beside it; "
                f"it cannot carry both {backend} and what goes through host memory. Give one made by dist.new_group"
            )
        return Groups(self._group, self._group, _keep)


def _raw_groups(store: Any, rank: int, size: int, backend: str, timeout_s: float) -> Groups:
    patience = timedelta(seconds=timeout_s)
    messages = _backend("gloo")(PrefixStore("messages", store), rank, size, timeout=patience)
    collectives = _backend(backend)(PrefixStore("collectives", store), rank, size, timeout=patience)
    # Gloo's end when the last reference goes. NCCL's do not wait for what hangs when they are aborted.
    return Groups(messages, collectives, _keep if backend == "gloo" else lambda _: collectives.abort())


def _backend(name: str) -> Any:
    found = getattr(dist, {"gloo": "ProcessGroupGloo", "nccl": "ProcessGroupNCCL"}[name], None)
    if found is None:
        raise ConfigError(f"{name}: this torch was built without it")
    return found


def _keep(hangs: bool) -> None:
    """Nothing to give back."""


class _Attendance:
    """Who came to make a group: so that who did not can be named, and torch's errors become ours."""

    def __init__(self, store: Any, name: str, rank: int, size: int, timeout_s: float) -> None:
        self._store, self._rank, self._timeout_s = store, rank, timeout_s
        self._keys = {peer: f"gradcomp/{name}/came/{peer}" for peer in range(size)}

    def __enter__(self) -> None:
        if self._store is not None:
            self._store.set(self._keys[self._rank], "1")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, RuntimeError) or isinstance(error, TransportError):
            return
        reason = str(error).partition("\n")[0]
        missing = self._missing()
        if missing:
            names = ", ".join(map(str, missing))
            raise TransportTimeout(
                f"rank {self._rank}: rank {names} did not come to make a process group within {self._timeout_s:g} s"
            ) from error
        if "time" in reason.lower() and "out" in reason.lower():
            raise TransportTimeout(
                f"rank {self._rank}: no process group within {self._timeout_s:g} s; a rank did not come: {reason}"
            ) from error
        raise TransportError(f"rank {self._rank}: cannot make a process group: {reason}") from error

    def _missing(self) -> list[int]:
        if self._store is None:
            return []
        try:
            return [peer for peer, key in self._keys.items() if not self._store.check([key])]
        except RuntimeError:
            return []  # whoever hosted the store is gone, too


def beside_or_given(group: Any) -> Source:
    """Beside ``group`` if torch.distributed knows it, else the group itself."""
    try:
        return Beside(group)
    except (KeyError, ValueError, RuntimeError):
        return Given(group)


def parse_backends(text: str) -> dict[str, str]:
    """The backend for each type of device, from a backend's name or what ``dist.get_backend_config`` says.

    >>> parse_backends("cpu:gloo,cuda:nccl"), parse_backends("nccl"), parse_backends("gloo")
    ({'cpu': 'gloo', 'cuda': 'nccl'}, {'cuda': 'nccl'}, {'cpu': 'gloo'})
    """
    if ":" not in text:
        return {"cuda" if text == "nccl" else "cpu": text}
    return dict(part.split(":", 1) for part in text.split(","))


def break_off(group: Any, peer: int) -> None:
    """End all that waits in a Gloo group: a wait that times out breaks the whole group, and nothing else does."""
    with contextlib.suppress(RuntimeError):
        group.recv([torch.empty(1, dtype=torch.uint8)], peer, _NEVER_SENT_TAG).wait(timedelta(milliseconds=1))
