"""How ranks find each other: each publishes a small record in torch's TCPStore and reads everybody else's."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta

import msgpack
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from gradcomp.errors import HandshakeError, TransportError, TransportTimeout

__all__ = ["Meeting", "Record", "run_name"]

PROTOCOL = 1
_MAX_RECORD_BYTES = 1024
_IDENTITY_BYTES = 16
_POLL_S = (0.005, 0.1)
_LINGER_S = 2.0

# Kept for the life of the process: the host's store serves the other ranks, and whoever connects after us.
_stores: dict[tuple[int, str, int, bool], TCPStore] = {}
_counts: dict[tuple[int, str, int, str, int], int] = {}
_lock = threading.Lock()


def _linger(store: TCPStore, key: str, readers: int) -> None:
    """At exit of the process that hosts the store: let the others read what they came for, for a moment."""
    deadline = time.monotonic() + _LINGER_S
    try:
        while store.add(key, 0) < readers and time.monotonic() < deadline:
            time.sleep(0.02)
    except RuntimeError:
        pass


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a rank tells the others about itself.

    Attributes:
        endpoint: ZeroMQ address of the socket it receives on.
        identity: 16 bytes, random but for the rank: the ZeroMQ routing id of everything it sends.
        incarnation: random, below 2**32; in the header of everything it sends.
        host: names the machine it runs on.
    """

    protocol: int = PROTOCOL
    rank: int
    world_size: int
    endpoint: str
    identity: bytes
    incarnation: int
    host: str

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb(asdict(self))
        return packed

    @staticmethod
    def unpack(data: bytes, *, rank: int, peer: int) -> Record:
        """The record ``peer`` published, checked."""
        try:
            if len(data) > _MAX_RECORD_BYTES:
                raise ValueError(f"{len(data)} bytes")
            found = msgpack.unpackb(data, strict_map_key=True, max_array_len=0, max_map_len=16, max_ext_len=0)
            theirs = found["protocol"]
            if theirs != PROTOCOL:
                raise HandshakeError(
                    f"rank {rank} and rank {peer} differ in protocol: {PROTOCOL} here, {theirs!r} there",
                    field="protocol",
                    peer=peer,
                )
            record = Record(**found)
            for name, kind in _RECORD_TYPES.items():
                if type(getattr(record, name)) is not kind:
                    raise ValueError(f"{name} is not {kind.__name__}")
            if record.rank != peer or len(record.identity) != _IDENTITY_BYTES or not 0 <= record.incarnation < 1 << 32:
                raise ValueError("values out of range")
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise TransportError(f"rank {rank}: what rank {peer} published is not a record: {error}") from None
        return record


_RECORD_TYPES: Mapping[str, type] = {
    "rank": int,
    "world_size": int,
    "endpoint": str,
    "identity": bytes,
    "incarnation": int,
    "host": str,
}


def run_name(option: str | None) -> str:
    """The run's name: the option, else torchrun's run id; followed by torchrun's restart count."""
    name = option or os.environ.get("TORCHELASTIC_RUN_ID", "run")
    return f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


class Meeting:
    """One connect of one rank.

    Args:
        master: host and port of the store. Under torchrun its agent hosts it, else rank 0 does.
        run: name of the run; runs with other names may share the store.
        hosting: whether this process hosts the store if torchrun does not; None: rank 0 does.

    Attributes:
        epoch: how many times this rank met the others of this run before.

    Raises:
        TransportTimeout: the store did not answer before ``deadline``.
        TransportError: it cannot be hosted here.
    """

    def __init__(
        self,
        master: tuple[str, int],
        run: str,
        rank: int,
        world_size: int,
        deadline: float,
        *,
        hosting: bool | None = None,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._deadline = deadline
        self._where = f"{master[0]}:{master[1]}"
        key = (os.getpid(), *master, run, rank)
        with _lock:
            self.epoch = _counts.get(key, 0)
            _counts[key] = self.epoch + 1
        self._prefix = f"gradcomp/{run}/{self.epoch}"
        first = rank == 0 if hosting is None else hosting
        self._hosting = first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._key = (os.getpid(), *master, self._hosting)
        self._store = self._open()

    def _open(self) -> TCPStore:
        _, host, port, _ = key = self._key
        with _lock:
            if key in _stores:
                return _stores[key]
        try:
            # multi_tenant: init_process_group may host its store at the same port in this process.
            store = TCPStore(
                host,
                port,
                None,
                is_master=self._hosting,
                timeout=timedelta(seconds=max(1.0, self._deadline - time.monotonic())),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            if self._hosting:
                raise TransportError(f"rank 0: cannot host the rendezvous at {self._where}: {reason}") from None
            raise TransportTimeout(
                f"rank {self._rank}: no rendezvous at {self._where}; rank 0 (or torchrun) never came: {reason}"
            ) from None
        with _lock:
            return _stores.setdefault(key, store)

    def exchange(self, record: Record) -> dict[int, Record]:
        """Publish ``record`` and read the other ranks' records.

        Raises:
            HandshakeError: a rank was started with another world size or speaks another protocol.
            TransportTimeout: names the ranks that did not come.
        """
        missing = [peer for peer in range(self._world_size) if peer != self._rank]
        found: dict[int, Record] = {}
        pause_s = _POLL_S[0]
        readers = f"{self._prefix}/done"
        if self._hosting:
            atexit.register(_linger, self._store, readers, self._world_size)
        try:
            self._store.set(f"{self._prefix}/{self._rank}", record.pack().hex())
            while missing:
                for peer in list(missing):
                    key = f"{self._prefix}/{peer}"
                    if self._store.check([key]):
                        found[peer] = self._read(peer, bytes.fromhex(self._store.get(key).decode()))
                        missing.remove(peer)
                        pause_s = _POLL_S[0]
                if missing and time.monotonic() > self._deadline:
                    names = ", ".join(map(str, missing))
                    raise TransportTimeout(f"rank {self._rank}: rank {names} never came to {self._where}")
                if missing:
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, _POLL_S[1])
            self._store.add(readers, 1)
        except TransportError:
            self._store.add(readers, 1)
            raise
        except (RuntimeError, ValueError) as error:
            with _lock:
                _stores.pop(self._key, None)
            reason = str(error).partition("\n")[0]
            raise TransportError(f"rank {self._rank}: lost the rendezvous at {self._where}: {reason}") from error
        return found

    def store(self, timeout_s: float) -> PrefixStore:
        """Another connection to the store, for more of this meeting; whoever waits in it keeps nobody else waiting."""
        _, host, port, _ = self._key
        store = TCPStore(
            host, port, None, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
        )
        return PrefixStore(self._prefix, store)

    def _read(self, peer: int, data: bytes) -> Record:
        record = Record.unpack(data, rank=self._rank, peer=peer)
        if record.world_size != self._world_size:
            raise HandshakeError(
                f"rank {self._rank} and rank {peer} differ in world_size: "
                f"{self._world_size} here, {record.world_size} there",
                field="world_size",
                peer=peer,
            )
        return record
