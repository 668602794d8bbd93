"""Over torch.distributed's process groups: ``gloo``, ``nccl``, and ``torch`` for any other backend.

Messages from host to host, which are all messages of ``gloo`` and the heads of ``nccl``'s, go over a Gloo group
(gradcomp.transports.group_courier). Sums go by the backend's all-reduce. With NCCL the packets themselves travel from
device to device: a rank learns from the head how many bytes come from whom, makes room for them, and all of a stage's
are one grouped operation on the current stream.

What the host waits for on that path: that a packet's size is known, for it must be told to the peers and comes from the
gradient's values (a fixed size would be the largest there can be, which is what compressing is to save); in an
all-reduce exchange, how many ranks have a gradient, which decides whether the optimizer sees one; and what a
compressor's own checks read. :meth:`~TorchTransport.swap_tensors` and :meth:`~TorchTransport.all_reduce` do not wait
for the device.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from gradcomp.errors import ConfigError, TransportError
from gradcomp.handshake import pack
from gradcomp.interfaces import MY_TURN, Buffer, Incoming, Part, Slot, Transport
from gradcomp.lanes import to_device, to_host
from gradcomp.options import check_choice, check_number
from gradcomp.transports.greeting import greet
from gradcomp.transports.group_collectives import PendingSum, swap_by_pairs, swap_on_stream
from gradcomp.transports.group_courier import Courier, Letter
from gradcomp.transports.group_frames import DATA, HELLO, NO_SLOT, Outgoing
from gradcomp.transports.group_frames import VERSION as FRAME_VERSION
from gradcomp.transports.group_making import (
    FromEnvironment,
    FromStore,
    Groups,
    Source,
    beside_or_given,
    break_off,
    parse_backends,
)
from gradcomp.transports.mailbox import Mailbox, check_address

__all__ = ["GlooTransport", "NcclTransport", "TorchTransport"]

T = TypeVar("T", bound="TorchTransport")

_PATIENCE_S = 10.0  # for peers that are there but do not read
_REFUSED_PATIENCE_S = 1.0
_UNCLAIMED_BYTES = 1 << 30


@dataclass(kw_only=True, eq=False)
class TorchTransport(Transport):
    """Any process group, with whatever backends it has.

    Groups of our own are made beside it, so that nothing interleaves with what else goes over it. A ProcessGroup object
    that torch.distributed does not know is used itself, and by nobody else until :meth:`close`. Nothing is encrypted.

    Counted in bytes_sent and bytes_received: messages and swapped tensors exactly; for an all-reduce what a ring
    carries, 2 (N - 1) / N of the values in either direction, whatever algorithm the backend takes.

    Attributes:
        group: a process group; None: torch.distributed's default group. Not to be had from a spec string.
        timeout_s: how long a blocking call may take, in seconds.
        payloads: ``"device"``: packets travel as tensors of the gradients' device, a stage at a time, in one order;
            ``"host"``: as parts of messages, through host memory, in any order; ``"auto"``: the former where the
            backend works on CUDA's memory, else the latter. The same on all ranks.
    """

    id: ClassVar[str] = "torch"
    # Which backend's groups to make; None: the same as the given group's.
    backend: ClassVar[str | None] = None
    adds_up = True

    group: Any = None
    timeout_s: float = 300.0
    payloads: str = "auto"

    def __post_init__(self) -> None:
        check_number(self.id, "timeout_s", self.timeout_s, above=0)
        check_choice(self.id, "payloads", self.payloads, ("auto", "device", "host"))
        if not dist.is_available():
            raise ConfigError(f"{self.id}: this torch was built without torch.distributed")
        self._source = self._find_source()
        self.rank, self.world_size = self._source.rank, self._source.size
        self._pid = os.getpid()
        self._mailbox = Mailbox(self.rank, self.timeout_s)
        self.arrival = self._mailbox.arrival
        self._groups: Groups | None = None
        self._courier: Courier | None = None
        self._backends = parse_backends(self.backend or self._source.backend)
        self._connected = self._closed = False
        self._max_message_bytes = 0
        self._last: Outgoing | None = None
        self._collective_bytes_sent = self._collective_bytes_received = 0
        self._pending: PendingSum | None = None
        self._queued: torch.cuda.Event | None = None

    @classmethod
    def world(cls: type[T], world_size: int, **options: Any) -> list[T]:
        """Transports for all ranks of a new world of threads of this process."""
        store = HashStore()
        return [cls(group=FromStore(store, rank, world_size), **options) for rank in range(world_size)]

    @classmethod
    def _option_names(cls) -> list[str]:
        return [name for name in super()._option_names() if name != "group"]

    @classmethod
    def for_part(cls, options: Mapping[str, object], part: Part) -> TorchTransport:
        """A group of these ranks, who meet at the run's master; there need be no other process group."""
        if cls.backend is None:
            raise ConfigError(f"{cls.id}: which backend is meant for some ranks of a run? Name gloo or nccl")
        return replace(cls.from_options(options), group=FromEnvironment(part))

    def _find_source(self) -> Source:
        group = self.group
        if isinstance(group, Source):
            return group
        if group is None and dist.is_initialized():
            group = dist.group.WORLD
        if group is None and self.backend is not None:
            return FromEnvironment()
        if group is None:
            raise ConfigError(
                f"{self.id}: the process group is not initialised: call torch.distributed.init_process_group first, "
                "give group=, or use gloo, nccl or zmq, which meet by themselves"
            )
        if not hasattr(group, "allreduce"):
            raise ConfigError(f"{self.id}: group={group!r} is not allowed; group must be a process group of this rank")
        return beside_or_given(group)

    def check_device(self, device: torch.device) -> None:
        if device.type not in self._backends and "cpu" not in self._backends:
            there = ", ".join(f"{backend} for {kind} tensors" for kind, backend in self._backends.items())
            raise ConfigError(
                f"{self.id}: the parameters are {device.type} tensors, and there is only {there}: "
                "move the model to its CUDA device before attaching, or use transport gloo or zmq"
            )

    def carries(self, device: torch.device) -> bool:
        if self.payloads == "auto":
            return self._on_device(device)
        return self.payloads == "device" and device.type in self._backends

    def _on_device(self, device: torch.device) -> bool:
        """Whether the backend works on ``device``'s memory and streams."""
        return device.type != "cpu" and self._backends.get(device.type, "gloo") != "gloo"

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
        self._check_process()
        self._connected = True
        self._max_message_bytes = max_message_bytes
        self._mailbox.max_unclaimed_bytes = max_unclaimed_bytes or max(_UNCLAIMED_BYTES, 4 * max_message_bytes)
        if self.backend is not None and not dist.is_backend_available(self.backend):
            raise ConfigError(f"{self.id}: this torch was built without it")
        if self.world_size == 1:
            return
        full_hello = {
            "transport": self.id,
            **hello,
            "frames": FRAME_VERSION,
            "payloads": self.payloads,
            "max_message_bytes": max_message_bytes,
        }
        packed = pack(full_hello)
        deadline = time.monotonic() + self.timeout_s
        try:
            self._groups = self._source.make(self.backend or self._source.backend, self.timeout_s)
            courier = Courier(
                self._groups.messages,
                self.rank,
                self.world_size,
                self._mailbox,
                max_message_bytes,
                first_needed_first=self.first_needed_first,
            )
            self._courier = courier
            # Also at exit: the peers learn that this rank leaves, and what it sent gets out.
            self._finalizer = weakref.finalize(self, courier.close, _PATIENCE_S)
            courier.post(list(courier.links), Letter(HELLO, NO_SLOT, Outgoing([packed])))
            greet(full_hello, courier.links, {peer: str(peer) for peer in courier.links}, self._mailbox, deadline)
        except BaseException:
            self._close(_REFUSED_PATIENCE_S)
            raise

    def close(self) -> None:
        self._close(_PATIENCE_S)

    def _close(self, patience_s: float) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._last = None
        self._mailbox.fail(TransportError(f"rank {self.rank}: the transport is closed"))
        if self._groups is None:
            return
        lost = False
        if self._courier is not None:
            self._courier.close(patience_s)
            self._finalizer.detach()
            lost = any(link.finished is None for link in self._courier.links.values())
        if self._pending is not None and not self._pending.finished:
            break_off(self._groups.collectives, (self.rank + 1) % self.world_size)
        self._groups.release(not self._device_is_done(patience_s) or lost)
        self._groups = self._pending = None

    def _device_is_done(self, patience_s: float) -> bool:
        """Whether what was queued on the device came to an end; waits for it."""
        deadline = time.monotonic() + patience_s
        while self._queued is not None and not self._queued.query():  # type: ignore[no-untyped-call]
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise TransportError(f"rank {self.rank}: a transport does not survive fork; make one in the child")

    def _check_connected(self) -> None:
        self._check_process()
        if self._closed:
            raise TransportError(f"rank {self.rank}: the transport is closed")
        if not self._connected:
            raise TransportError(f"rank {self.rank}: the transport is not connected")

    # -- messages ------------------------------------------------------------------------------------------------------

    @property
    def bytes_sent(self) -> int:  # type: ignore[override]
        return self._collective_bytes_sent + (0 if self._courier is None else self._courier.bytes_sent)

    @property
    def bytes_received(self) -> int:  # type: ignore[override]
        return self._collective_bytes_received + (0 if self._courier is None else self._courier.bytes_received)

    def send(self, peer: int, slot: Slot, parts: Sequence[Buffer]) -> None:
        self._check_connected()
        check_address(self, peer, slot)
        lost = self._mailbox.lost(peer)
        if lost is not None:
            raise lost.with_traceback(None)
        message = self._last
        if message is None or not message.same_as(parts):
            message = Outgoing(parts)
            if message.total > self._max_message_bytes:
                raise ValueError(f"message of {message.total} bytes; {self._max_message_bytes} were agreed on")
            self._last = message  # an all-gather sends the same parts to everybody
        if self._courier is not None:
            self._courier.post([peer], Letter(DATA, slot, message))

    def recv(self, peer: int, slot: Slot) -> Incoming:
        self._check_connected()
        check_address(self, peer, slot)
        return self._mailbox.claim(peer, slot)

    # -- collective operations: one thread, one order ------------------------------------------------------------------

    def all_reduce(self, slot: Slot, mine: Tensor, *, one_trip: bool) -> Generator[Sequence[Incoming], None, Tensor]:
        """The backend's own all-reduce, in one order on all ranks; ``one_trip`` is its business."""
        self._check_connected()
        if mine.dtype != torch.float32:
            raise ValueError(f"all_reduce adds up float32; got {mine.dtype}")
        if self._groups is None or self._courier is None:
            return mine
        yield MY_TURN
        self._check_connected()
        group, courier = self._groups.collectives, self._courier
        if self._on_device(mine.device):
            total = mine.detach().clone()
            group.allreduce([total]).wait()
            self._count_queued(mine.device)
        else:
            total = mine.detach().clone() if mine.device.type == "cpu" else to_host(mine.detach())
            self._pending = PendingSum(group, total, self._mailbox, courier)
            yield self._pending.parts(slot)
            total = to_device(total, mine.device)
        courier.finished += 1
        moved = 2 * (self.world_size - 1) * total.nbytes // self.world_size
        self._collective_bytes_sent += moved
        self._collective_bytes_received += moved
        return total

    def swap_tensors(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        self._check_connected()
        tensors = [*outgoing.values(), *incoming.values()]
        if not tensors or self._groups is None or self._courier is None:
            return
        if self._on_device(tensors[0].device):
            swap_on_stream(self._groups.collectives, self.world_size, outgoing, incoming)
            self._count_queued(tensors[0].device)
        else:
            swap_by_pairs(self._groups.collectives, outgoing, incoming, self._mailbox)
        self._courier.finished += 1
        self._collective_bytes_sent += sum(tensor.nbytes for tensor in outgoing.values())
        self._collective_bytes_received += sum(tensor.nbytes for tensor in incoming.values())

    def _count_queued(self, device: torch.device) -> None:
        """Remember where the device's queue ends, for :meth:`close`."""
        if device.type == "cuda":
            self._queued = self._queued or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._queued.record(torch.cuda.current_stream(device))


@dataclass(kw_only=True, eq=False)
class GlooTransport(TorchTransport):
    """Ranks on CPUs, over Gloo; gradients on other devices go through host memory. See :class:`TorchTransport`.

    Groups are made beside torch.distributed's default group, or beside ``group``; without either, ranks meet at
    MASTER_ADDR:MASTER_PORT as torchrun sets them, and are alone without these.
    """

    id: ClassVar[str] = "gloo"
    backend: ClassVar[str | None] = "gloo"


@dataclass(kw_only=True, eq=False)
class NcclTransport(TorchTransport):
    """Ranks on CUDA devices, one each: packets from device to device. Otherwise as :class:`GlooTransport`."""

    id: ClassVar[str] = "nccl"
    backend: ClassVar[str | None] = "nccl"
