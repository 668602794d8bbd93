"""The packet: one compressed tensor, in memory and as bytes. docs/FORMAT.md is the specification.

A packet is a 32-byte header and a payload. Every packet has exactly one encoding; :meth:`Packet.from_bytes` checks
all of it, header and content, so that what it returns can be decoded without looking again.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from gradcomp import indices
from gradcomp.errors import PacketError
from gradcomp.indices import Coding
from gradcomp.interfaces import Buffer

__all__ = ["HEADER_NBYTES", "MAX_BLOCK", "Coding", "Kind", "Packet"]

_HEADER = struct.Struct("<2s3B3sQQIf")  # magic, version, kind, coding, zeros, count, numel, block, scalar
HEADER_NBYTES = _HEADER.size
_MAGIC, _VERSION = b"GC", 1
MAX_BLOCK = 1 << 30
_FIRST_PRIVATE = 128
_CANONICAL_NAN = struct.pack("<I", 0x7FC00000)


class Kind(IntEnum):
    """What a payload holds. 128 to 255 belong to plug-ins, which check their payloads themselves."""

    DENSE_F32 = 1
    DENSE_F16 = 2
    DENSE_BF16 = 3
    SIGNS = 4  # a signed index set; every element is +-scalar
    VALUES = 5  # float32 values, then an unsigned index set
    BITS = 6  # two float32 scales a block, then a sign bit an element
    NONFINITE = 7  # no payload: the gradient held NaN or Inf, and scalar says which


_DENSE_NBYTES = {Kind.DENSE_F32: 4, Kind.DENSE_F16: 2, Kind.DENSE_BF16: 2}


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
        block: BITS: elements that share two scales; else 0.
    """

    kind: int
    numel: int
    payload: Tensor
    count: int = 0
    coding: Coding = Coding.NONE
    scalar: float = 0.0
    block: int = 0
    # The decoded index set, and whether the content was checked; so that neither is done twice.
    _index_set: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    _checked: bool = field(default=False, repr=False)

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
        return cls(kind=Kind.NONFINITE, numel=numel, payload=payload, scalar=value)

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
            found = indices.decode(coded, self.count, self.numel, self.coding, signed=signed)
            object.__setattr__(self, "_index_set", found)
            return found
        return self._index_set

    def require(self, kind: int) -> None:
        """Raise PacketError unless this is a well-formed packet of that kind: what ``decode_add`` calls first."""
        if self.kind != kind:
            raise PacketError(f"packet kind is {_name(self.kind)}; expected {_name(kind)}")
        if not self._checked:
            self._check()

    def header(self) -> bytes:
        """The 32 bytes that stand before the payload."""
        packed = _HEADER.pack(
            _MAGIC, _VERSION, self.kind, self.coding, bytes(3), self.count, self.numel, self.block, self.scalar
        )
        return packed[:-4] + _CANONICAL_NAN if math.isnan(self.scalar) else packed

    def buffers(self) -> list[Buffer]:
        """Header and payload; a CPU payload is not copied, so it must not change until it is sent."""
        if not self.payload.numel():
            return [self.header()]
        return [self.header(), self.payload.cpu().numpy().data]

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
        magic, version, kind, coding, zeros, count, its_numel, block, scalar = _HEADER.unpack_from(view)
        if magic != _MAGIC:
            raise PacketError(f"packet starts with {magic!r}, not {_MAGIC!r}")
        if version != _VERSION:
            raise PacketError(f"packet format is version {version}; this build reads version {_VERSION}")
        if its_numel != numel:
            raise PacketError(f"packet is for {its_numel} elements; the tensor has {numel}")
        if zeros != bytes(3) or coding > max(Coding):
            raise PacketError(f"packet header: coding {coding}, reserved bytes {zeros!r}")
        packet = cls(
            kind=kind,
            numel=numel,
            payload=_as_tensor(view[HEADER_NBYTES:]),
            count=count,
            coding=Coding(coding),
            scalar=scalar,
            block=block,
        )
        # Catches a NaN with other bits and whatever else does not come back as it went in.
        if packet.header() != bytes(view[:HEADER_NBYTES]):
            raise PacketError("packet header is not in canonical form")
        packet._check()
        return packet if torch.device(device).type == "cpu" else packet.to(device)

    def to(self, device: torch.device | str) -> Packet:
        """This packet on another device."""
        index_set = self._index_set
        if index_set is not None:
            index, negative = index_set
            index_set = index.to(device), negative.to(device)
        return Packet(
            kind=self.kind,
            numel=self.numel,
            payload=self.payload.to(device),
            count=self.count,
            coding=self.coding,
            scalar=self.scalar,
            block=self.block,
            _index_set=index_set,
            _checked=self._checked,
        )

    def __eq__(self, other: object) -> bool:
        return self.to_bytes() == other.to_bytes() if isinstance(other, Packet) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def _check(self) -> None:
        """Raise PacketError unless fields and payload are what the kind allows."""
        kind, numel, size = self.kind, self.numel, self.payload.numel()
        if self.count > numel:
            raise PacketError(f"packet names {self.count} of {numel} elements")
        if kind >= _FIRST_PRIVATE:
            pass  # its own decode_add looks at the rest
        elif kind in _DENSE_NBYTES:
            self._expect_zero("count", "coding", "block", "scalar")
            self._expect_payload(_DENSE_NBYTES[Kind(kind)] * numel)
        elif kind == Kind.SIGNS:
            self._expect_zero("block")
            if not 0.0 <= self.scalar < math.inf or math.copysign(1.0, self.scalar) < 0:
                raise PacketError(f"packet magnitude is {self.scalar!r}; it must be finite and not negative")
            self._check_index_set(self.payload, signed=True)
        elif kind == Kind.VALUES:
            self._expect_zero("block", "scalar")
            if size < 4 * self.count:
                raise PacketError(f"packet payload of {size} bytes is too short for {self.count} values")
            self._expect_finite(4 * self.count)
            self._check_index_set(self.payload[4 * self.count :], signed=False)
        elif kind == Kind.BITS:
            self._expect_zero("count", "coding", "scalar")
            if self.block < 8 or self.block % 8 or self.block > MAX_BLOCK:
                raise PacketError(f"packet block is {self.block}; it must be a multiple of 8 in 8..{MAX_BLOCK}")
            scales_nbytes = 8 * -(-numel // self.block)
            self._expect_payload(scales_nbytes + -(-numel // 8))
            self._expect_finite(scales_nbytes)
            if numel % 8 and int(self.payload[-1]) >> numel % 8:
                raise PacketError("packet has a sign bit beyond its last element")
        elif kind == Kind.NONFINITE:
            self._expect_zero("count", "coding", "block")
            self._expect_payload(0)
            if math.isfinite(self.scalar):
                raise PacketError(f"packet says non-finite, but its value is {self.scalar!r}")
        else:
            raise PacketError(f"packet kind {kind} is not known")
        object.__setattr__(self, "_checked", True)

    def _expect_zero(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value or math.copysign(1.0, value) < 0:
                raise PacketError(f"packet kind {_name(self.kind)} does not use {name}; it is {value!r}, not 0")

    def _expect_payload(self, nbytes: int) -> None:
        if self.payload.numel() != nbytes:
            raise PacketError(f"packet payload is {self.payload.numel()} bytes; it must be {nbytes}")

    def _expect_finite(self, nbytes: int) -> None:
        if not bool(self.payload[:nbytes].view(torch.float32).isfinite().all()):
            raise PacketError("packet holds a value or scale that is not finite")

    def _check_index_set(self, coded: Tensor, *, signed: bool) -> None:
        expected = indices.choose(self.count, self.numel, signed=signed)
        if self.coding is not expected:
            raise PacketError(f"packet codes its index set as {self.coding.name}; it must be {expected.name}")
        if signed and self.coding is Coding.MAP:  # decoded without indices
            self._expect_payload(indices.max_coded_nbytes(self.count, self.numel, self.coding, signed=True))
            indices.check_map(coded, self.count, self.numel, signed=True)
        else:
            _ = self.index_set


def _name(kind: int) -> str:
    return Kind(kind).name if kind in set(Kind) else str(kind)


def _as_tensor(view: memoryview) -> Tensor:
    """The bytes as uint8, sharing memory where that can be written to: torch warns of memory that cannot."""
    if not len(view):
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)
