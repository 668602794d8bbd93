"""Two transports as one: ranks of a host among themselves, and one rank of each host, its leader, between hosts.

Only leaders use what is between hosts. What all ranks say to each other (:meth:`HierarchicalTransport.all_gather`) goes
from the members of a host to its leader, from leader to leader, and back; gradients are taken care of by
:mod:`gradcomp.hosts`.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NoReturn

import msgpack
import torch

from gradcomp.errors import ConfigError, HandshakeError, PacketError, TransportError, TransportTimeout
from gradcomp.hosts import at_level
from gradcomp.interfaces import Buffer, Incoming, Levels, Part, Slot, Transport
from gradcomp.options import check_choice, check_integer
from gradcomp.registry import Spec, transport_class, transport_for_part
from gradcomp.replicas import MEETING_BUCKET
from gradcomp.transports import environment

__all__ = ["HierarchicalTransport"]

_PATIENCE, _VERDICT = Slot(0, MEETING_BUCKET, 0), Slot(0, MEETING_BUCKET, 1)
_GRACE_S = 5.0  # for a leader to say what it waited for in vain
_MAX_VERDICT_BYTES = 1 << 16
_LENGTH = struct.Struct("<Q")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True, eq=False)
class HierarchicalTransport(Transport):
    """What exchange ``hierarchical`` runs on. Rank r is on host r // ranks_per_host; a host's first rank is its leader.

    Attributes:
        rank, world_size: of the whole run; from RANK and WORLD_SIZE unless given.
        local: transport inside a host, as a spec string or config.
        between: transport between hosts, likewise.
        ranks_per_host: None: LOCAL_WORLD_SIZE, as torchrun sets it.
        local_dtype: what gradients are sent as to their leader: ``"float32"`` or ``"bfloat16"``. They are added up in
            float32 either way.
    """

    id: ClassVar[str] = "hierarchical"

    rank: int = field(default_factory=environment.rank)
    world_size: int = field(default_factory=environment.world_size)
    local: Spec = "nccl"
    between: Spec = "zmq"
    ranks_per_host: int | None = None
    local_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_integer(self.id, "world_size", self.world_size, at_least=1)
        check_integer(self.id, "rank", self.rank, at_least=0, at_most=self.world_size - 1)
        check_choice(self.id, "local_dtype", self.local_dtype, tuple(_DTYPES))
        if self.ranks_per_host is not None:
            check_integer(self.id, "ranks_per_host", self.ranks_per_host, at_least=1)
        self._size = environment.ranks_per_host() if self.ranks_per_host is None else self.ranks_per_host
        if self.world_size % self._size:
            raise ConfigError(
                f"{self.id}: ranks_per_host={self._size} is not allowed; world_size={self.world_size} must be a "
                "multiple of it"
            )
        hosts, (self._host, local_rank) = self.world_size // self._size, divmod(self.rank, self._size)
        self._local = transport_for_part(
            self.local,
            Part(
                name=f"host{self._host}",
                rank=local_rank,
                world_size=self._size,
                run_rank=self.rank,
                one_host=True,
            ),
        )
        self._between: Transport | None = None
        if local_rank == 0:
            part = Part(name="leaders", rank=self._host, world_size=hosts, run_rank=self.rank, one_host=hosts == 1)
            self._between = transport_for_part(self.between, part)
        self.levels = Levels(
            local=self._local,
            between=self._between,
            host=self._host,
            hosts=hosts,
            dtype=_DTYPES[self.local_dtype],
        )
        self.adds_up = transport_class(self.between).adds_up  # where packets cross; members must know, too
        self.arrival = self._local.arrival
        self.timeout_s = self._local.timeout_s
        self._connected = self._closed = False

    def check_device(self, device: torch.device) -> None:
        self._local.check_device(device)
        if self._between is not None:
            self._between.check_device(device)

    # -- meeting -------------------------------------------------------------------------------------------------------

    def connect(
        self,
        hello: Mapping[str, str | int | bytes],
        *,
        max_message_bytes: int,
        max_unclaimed_bytes: int | None = None,
    ) -> None:
        if self._connected or self._closed:
            raise TransportError(f"rank {self.rank}: a transport connects once; make another one")
        self._connected = True
        assert self.levels is not None
        full_hello = {**hello, "hosts": f"{self.levels.hosts} of {self._size} ranks", "local_dtype": self.local_dtype}
        # What several ranks say to each other travels as one message.
        longest = max_message_bytes * self.world_size
        unclaimed = None if max_unclaimed_bytes is None else max(max_unclaimed_bytes, 2 * longest)
        try:
            try:
                with at_level(self.levels, "local"):
                    self._local.connect(full_hello, max_message_bytes=longest, max_unclaimed_bytes=unclaimed)
            except HandshakeError as error:
                self._refuse(full_hello, error, longest)
                raise
            if self._between is None:
                self._hear()
                return
            self.timeout_s = self._local.timeout_s + self._between.timeout_s
            self._tell(_PATIENCE, msgpack.packb(self._between.timeout_s))
            with at_level(self.levels, "between"):
                self._between.connect(full_hello, max_message_bytes=longest, max_unclaimed_bytes=unclaimed)
            self._tell(_VERDICT, b"")
        except BaseException as error:
            self._give_up(error)
            raise

    def _refuse(self, hello: dict[str, str | int | bytes], error: HandshakeError, longest: int) -> None:
        """Let the other hosts know that this one is not at one: by saying something else than they do."""
        if self._between is None:
            return
        different = b"" if isinstance(hello.get(error.field), bytes) else str(error)[:1000]
        with contextlib.suppress(TransportError):
            self._between.connect({**hello, error.field: different}, max_message_bytes=longest)

    def _give_up(self, error: BaseException) -> None:
        """Tell the members of this host why their leader leaves, and leave."""
        if self._between is not None:
            verdict = {
                "kind": type(error).__name__,
                "text": str(error)[:4000],
                "field": getattr(error, "field", ""),
                "peer": getattr(error, "peer", -1),
            }
            with contextlib.suppress(TransportError):  # it may be the members who failed
                self._tell(_VERDICT, msgpack.packb(verdict))
        self.close()

    def _tell(self, slot: Slot, text: bytes) -> None:
        for peer in range(1, self._local.world_size):
            self._local.send(peer, slot, [text])

    def _hear(self) -> None:
        """Wait until the leaders have met, too.

        Raises:
            TransportError: what this host's leader failed with.
        """
        asked = [self._local.recv(0, slot) for slot in (_PATIENCE, _VERDICT)]
        (patience,) = self._local.wait(asked[:1])
        patience_s = _unpack_control(patience)
        if not isinstance(patience_s, (int, float)) or not 0 < patience_s < 1e9:
            raise PacketError(f"rank {self.rank}: its host's leader says it waits for {patience_s!r} s")
        self.timeout_s = self._local.timeout_s + patience_s
        (verdict,) = self._local.wait(asked[1:], timeout_s=patience_s + _GRACE_S)
        if len(verdict):
            _raise(_unpack_control(verdict))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        # The members first: they must not wait for what is between hosts, which may hang.
        self._local.close()
        if self._between is not None:
            self._between.close()

    # -- messages ------------------------------------------------------------------------------------------------------

    @property
    def bytes_sent(self) -> int:  # type: ignore[override]
        return self._local.bytes_sent + (0 if self._between is None else self._between.bytes_sent)

    @property
    def bytes_received(self) -> int:  # type: ignore[override]
        return self._local.bytes_received + (0 if self._between is None else self._between.bytes_received)

    def traffic(self) -> dict[str, int]:
        """Both levels together, and what of it went between hosts."""
        return super().traffic() | {
            "bytes_sent_between": 0 if self._between is None else self._between.bytes_sent,
            "bytes_received_between": 0 if self._between is None else self._between.bytes_received,
        }

    def send(self, peer: int, slot: Slot, parts: Sequence[Buffer]) -> NoReturn:
        raise TransportError(f"rank {self.rank}: a hierarchy has no way from rank to rank; use levels or all_gather")

    def recv(self, peer: int, slot: Slot) -> Incoming:
        raise TransportError(f"rank {self.rank}: a hierarchy has no way from rank to rank; use levels or all_gather")

    def all_gather(self, slot: Slot, payload: Buffer) -> list[memoryview]:
        """Every rank's ``payload`` for ``slot``, in rank order: by way of the leaders."""
        assert self.levels is not None
        local, between = self._local, self._between
        if between is None:
            with at_level(self.levels, "local"):
                incoming = local.recv(0, slot)
                local.send(0, slot, [payload])
                (everything,) = local.wait([incoming], timeout_s=self.timeout_s)
            return _unpack(everything, self.world_size)
        members = range(1, local.world_size)
        with at_level(self.levels, "local"):
            mine = [memoryview(payload).cast("B"), *local.wait([local.recv(peer, slot) for peer in members])]
        with at_level(self.levels, "between"):
            rows = [row for host in between.all_gather(slot, _pack(mine)) for row in _unpack(host, self._size)]
        with at_level(self.levels, "local"):
            packed = [_pack(rows)] if members else []
            for peer in members:
                local.send(peer, slot, packed)
        return rows


def _pack(rows: Sequence[memoryview]) -> bytes:
    return b"".join([*(_LENGTH.pack(len(row)) for row in rows), *rows])


def _unpack(data: memoryview, count: int) -> list[memoryview]:
    at = _LENGTH.size * count
    if len(data) >= at:
        sizes = [_LENGTH.unpack_from(data, _LENGTH.size * i)[0] for i in range(count)]
        if at + sum(sizes) == len(data):
            rows = []
            for size in sizes:
                rows.append(data[at : at + size])
                at += size
            return rows
    raise PacketError(f"{len(data)} bytes do not hold what {count} ranks said")


def _unpack_control(data: memoryview) -> object:
    try:
        if len(data) > _MAX_VERDICT_BYTES:
            raise ValueError(f"{len(data)} bytes")
        return msgpack.unpackb(data, strict_map_key=True, max_array_len=0, max_map_len=8, max_ext_len=0)
    except Exception as error:  # msgpack raises many types, ValueError and its own among them
        raise PacketError(f"what a host's leader said is not msgpack within its limits: {error}") from None


def _raise(verdict: object) -> NoReturn:
    """The leader's error, here."""
    found = verdict if isinstance(verdict, dict) else {}
    text, about, peer = (found.get(key) for key in ("text", "field", "peer"))
    if not isinstance(text, str) or not isinstance(about, str) or not isinstance(peer, int):
        raise PacketError("what a host's leader said is not a verdict")
    if found.get("kind") == "HandshakeError":
        raise HandshakeError(text, field=about, peer=peer)
    raise (TransportTimeout if found.get("kind") == "TransportTimeout" else TransportError)(text)
