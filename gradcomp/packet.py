"""The packet: one compressed tensor, in memory and as bytes. docs/FORMAT.md is the specification.

A packet is a 32-byte header and a payload. Every packet has exactly one encoding; :meth:`Packet.from_bytes` checks
all of it, header and content, so that what it returns can be decoded without looking again.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gradcomp import indices, kernels
from gradcomp.errors import PacketError
from gradcomp.indices import Coding
from gradcomp.interfaces import Buffer
from gradcomp.kernels import native, triton
from gradcomp.kinds import MAX_BLOCK, Kind, check, name_of
from gradcomp.lanes import to_device, to_host

__all__ = ["HEADER_NBYTES", "MAX_BLOCK", "Coding", "Kind", "Packet"]

_HEADER = struct.Struct("<2s4B2sQQIf")  # magic, version, kind, coding, bits, zeros, count, numel, block, scalar
HEADER_NBYTES = _HEADER.size
_MAGIC, _VERSION = b"GC", 1
_CANONICAL_NAN = struct.pack("<I", 0x7FC00000)
_CODINGS = tuple(Coding)  # by number


@dataclass(frozen=True, eq=False, kw_only=True)
class Packet:
    """One compressed tensor. Equal if its bytes are.

    Attributes:
        kind: a :class:`Kind`, or 128..255 for a plug-in's own.
        numel: elements of the tensor it stands for.
        payload: uint8, flat, on any device, owned by the packet: nobody writes to it.
        count: elements named by the index set of SIGNS and VALUES; else 0.
        coding: how that set is written.
        scalar: SIGNS: the magnitude; NONFINITE: NaN or +-Inf; else 0. Rounded to float32.
        bits: bits of a code, for the kinds that hold codes; else 0.
        block: elements that share their scales, for the kinds that have blocks; else 0.
    """

    kind: int
    numel: int
    payload: Tensor
    count: int = 0
    coding: Coding = Coding.NONE
    bits: int = 0
    scalar: float = 0.0
    block: int = 0
    # The decoded index set, where it is known, and whether the content was checked; so that neither is done twice.
    _index_set: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    _checked: bool = field(default=False, repr=False)
    # The numbers that a FACTORS payload begins with, where they are known: a device would have to be waited for.
    _head: tuple[int, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        payload = self.payload
        if payload.dtype != torch.uint8 or payload.dim() != 1 or not payload.is_contiguous():
            raise ValueError(
                f"payload must be flat contiguous uint8; got {payload.dtype}, shape {tuple(payload.shape)}"
            )
        if payload.data_ptr() % 4:  # it is going to be viewed as float32 or int32
            object.__setattr__(self, "payload", payload.clone())
        object.__setattr__(self, "scalar", struct.unpack("<f", struct.pack("<f", self.scalar))[0])

    @classmethod
    def nonfinite(cls, value: float, numel: int, device: torch.device | str = "cpu") -> Packet:
        """The packet of a gradient that holds NaN or Inf; it decodes to ``value`` everywhere.

        Raises:
            ValueError: ``value`` is finite.
        """
        if math.isfinite(value):
            raise ValueError(f"value must be NaN or infinite; got {value!r}")
        payload = torch.empty(0, dtype=torch.uint8, device=device)
        scalar = math.nan if math.isnan(value) else value  # NaN has a sign bit too; the header's has not
        return cls(kind=Kind.NONFINITE, numel=numel, payload=payload, scalar=scalar)

    @classmethod
    def coded_signs(cls, payload: Tensor, count: int, numel: int, magnitude: float) -> Packet:
        """SIGNS: a payload that a kernel has written, which names ``count`` elements."""
        coding = indices.choose(count, numel, signed=True)
        return cls(
            kind=Kind.SIGNS,
            numel=numel,
            payload=payload,
            count=count,
            coding=coding,
            scalar=magnitude,
            _checked=True,
        )

    @classmethod
    def coded_values(cls, payload: Tensor, count: int, numel: int) -> Packet:
        """VALUES: a payload that a kernel has written, with ``count`` values."""
        coding = indices.choose(count, numel, signed=False)
        return cls(kind=Kind.VALUES, numel=numel, payload=payload, count=count, coding=coding, _checked=True)

    @classmethod
    def dense(cls, values: Tensor) -> Packet:
        """DENSE_F32: ``values`` (flat float32) as they are; their memory becomes the packet's."""
        payload = values.contiguous().view(torch.uint8)
        return cls(kind=Kind.DENSE_F32, numel=values.numel(), payload=payload, _checked=True)

    @classmethod
    def signs(cls, index: Tensor, negative: Tensor, numel: int, magnitude: float) -> Packet:
        """SIGNS: elements ``index`` (int64, strictly increasing) are ``magnitude``, negated where ``negative``."""
        count = len(index)
        coding = indices.choose(count, numel, signed=True)
        return cls(
            kind=Kind.SIGNS,
            numel=numel,
            payload=indices.encode(index, negative, numel, coding),
            count=count,
            coding=coding,
            scalar=magnitude,
            _index_set=None if coding is Coding.MAP else (index, negative),  # a map is decoded without indices
            _checked=True,
        )

    @classmethod
    def values(cls, index: Tensor, values: Tensor, numel: int) -> Packet:
        """VALUES: elements ``index`` (int64, strictly increasing) are ``values`` (float32, finite)."""
        count = len(index)
        coding = indices.choose(count, numel, signed=False)
        coded = indices.encode(index, None, numel, coding)
        return cls(
            kind=Kind.VALUES,
            numel=numel,
            payload=torch.cat([values.contiguous().view(torch.uint8), coded]),
            count=count,
            coding=coding,
            _index_set=(index, torch.zeros_like(index, dtype=torch.bool)),
            _checked=True,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of :meth:`to_bytes`."""
        return HEADER_NBYTES + self.payload.numel()

    @property
    def device(self) -> torch.device:
        """Where the payload lies."""
        return self.payload.device

    @property
    def is_nonfinite(self) -> bool:
        """Whether this says that the gradient held NaN or Inf."""
        return self.kind == Kind.NONFINITE

    @property
    def index_set(self) -> tuple[Tensor, Tensor]:
        """Indices (int64) and signs (bool; all False for VALUES) of SIGNS or VALUES, checked.

        Raises:
            PacketError: the payload does not hold such a set.
        """
        if self._index_set is None:
            signed = self.kind == Kind.SIGNS
            coded = self.payload if signed else self.payload[4 * self.count :]
            found = indices.decode(coded, self.count, self.numel, self.coding, signed=signed, checked=self._checked)
            object.__setattr__(self, "_index_set", found)
            return found
        return self._index_set

    @property
    def needs_index_set(self) -> bool:
        """Whether SIGNS or VALUES are added by way of :attr:`index_set`: where no kernel reads the payload itself."""
        if native.takes(self.payload) or triton.takes(self.payload):
            return False
        return not (self.kind == Kind.SIGNS and self.coding is Coding.MAP)

    def add_signs(self, out: Tensor, magnitude: float) -> None:
        """``out`` plus ``magnitude`` where this SIGNS packet says +, minus it where it says -; the rest stays as it is.

        Args:
            out: flat float32, ``numel`` elements, on the packet's device.

        Raises:
            PacketError: the payload does not hold a signed set; ``out`` is then unchanged.
        """
        index_set = self.index_set if self.needs_index_set else None
        kernels.add_signs(out, self.payload, self.count, self.coding, magnitude, index_set, checked=self._checked)

    def add_values(self, out: Tensor, scale: float) -> None:
        """``out`` plus ``scale`` times the values of this VALUES packet; as :meth:`add_signs`."""
        values = self.payload[: 4 * self.count].view(torch.float32)
        coded = self.payload[4 * self.count :]
        index_set = self.index_set if self.needs_index_set else None
        kernels.add_values(out, coded, self.count, self.coding, values, scale, index_set, checked=self._checked)

    @classmethod
    def sum_sets(cls, packets: Sequence[Packet], out: Tensor, scale: float) -> None:
        """``out`` becomes the sum of SIGNS and VALUES packets times ``scale``, as if added one by one to zeros."""
        if native.takes(out):
            coded = [(p.payload, p.count, p.coding, p.scalar if p.kind == Kind.SIGNS else None) for p in packets]
            kernels.sum_sets(out, coded, scale)
            return
        kernels.clear(out)
        for packet in packets:
            if packet.kind == Kind.SIGNS:
                packet.add_signs(out, float(torch.tensor(packet.scalar) * scale))
            else:
                packet.add_values(out, scale)

    def require(self, kind: int) -> None:
        """Raise PacketError unless this is a well-formed packet of that kind: what ``decode_add`` calls first."""
        if self.kind != kind:
            raise PacketError(f"packet kind is {name_of(self.kind)}; expected {name_of(kind)}")
        if not self._checked:
            check(self)
            object.__setattr__(self, "_checked", True)

    def header(self) -> bytes:
        """The 32 bytes that stand before the payload."""
        packed = _HEADER.pack(
            _MAGIC,
            _VERSION,
            self.kind,
            self.coding,
            self.bits,
            bytes(2),
            self.count,
            self.numel,
            self.block,
            self.scalar,
        )
        return packed[:-4] + _CANONICAL_NAN if math.isnan(self.scalar) else packed

    def buffers(self) -> list[Buffer]:
        """Header and payload; a CPU payload is not copied, so it must not change until it is sent."""
        if not self.payload.numel():
            return [self.header()]
        return [self.header(), to_host(self.payload).numpy().data]

    def to_bytes(self) -> bytes:
        """The whole packet; :meth:`from_bytes` reads it back."""
        return b"".join(self.buffers())

    @classmethod
    def from_bytes(cls, buffer: Buffer, *, numel: int, device: torch.device | str = "cpu") -> Packet:
        """Read and check a packet.

        Args:
            buffer: the whole packet. If it can be written to, the payload may go on using its memory, which must then
                stay as it is; read-only memory is copied.
            numel: what the packet must stand for; the one in the header is compared with it and never used.
            device: where the payload is to lie.

        Raises:
            PacketError: anything that :meth:`to_bytes` could not have written for such a tensor.
        """
        view = memoryview(buffer).cast("B")
        if len(view) < HEADER_NBYTES:
            raise PacketError(f"packet of {len(view)} bytes is shorter than its {HEADER_NBYTES}-byte header")
        packet = cls.from_parts(view[:HEADER_NBYTES], _as_tensor(view[HEADER_NBYTES:]), numel=numel)
        return packet if torch.device(device).type == "cpu" else packet.to(device)

    @classmethod
    def from_parts(cls, header: Buffer, payload: Tensor, *, numel: int) -> Packet:
        """As :meth:`from_bytes`, from the 32 bytes of the header and a payload that may be on any device."""
        magic, version, kind, coding, bits, zeros, count, its_numel, block, scalar = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise PacketError(f"packet starts with {magic!r}, not {_MAGIC!r}")
        if version != _VERSION:
            raise PacketError(f"packet format is version {version}; this build reads version {_VERSION}")
        if its_numel != numel:
            raise PacketError(f"packet is for {its_numel} elements; the tensor has {numel}")
        if zeros != bytes(2) or coding >= len(_CODINGS):
            raise PacketError(f"packet header: coding {coding}, reserved bytes {zeros!r}")
        # All other fields have one encoding each.
        if math.isnan(scalar) and bytes(header[-4:]) != _CANONICAL_NAN:
            raise PacketError("packet header is not in canonical form")
        packet = cls(
            kind=kind,
            numel=numel,
            payload=payload,
            count=count,
            coding=_CODINGS[coding],
            bits=bits,
            scalar=scalar,
            block=block,
        )
        packet.require(kind)
        return packet

    def to(self, device: torch.device | str) -> Packet:
        """This packet on another device."""
        return self.moved(to_device(self.payload, device))

    def moved(self, payload: Tensor) -> Packet:
        """This packet with the same payload in other memory."""
        found = replace(self, payload=payload, _index_set=None)
        if self._index_set is not None and found.needs_index_set:
            index, negative = self._index_set
            object.__setattr__(found, "_index_set", (index.to(payload.device), negative.to(payload.device)))
        return found

    def __eq__(self, other: object) -> bool:
        return self.to_bytes() == other.to_bytes() if isinstance(other, Packet) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.to_bytes())


def _as_tensor(view: memoryview) -> Tensor:
    """The bytes as uint8, sharing memory where that can be written to: torch warns of memory that cannot."""
    if not len(view):
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)
