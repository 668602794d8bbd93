"""No compression, and compression by a cast: every element in 4 or 2 bytes.

The payload is the tensor, flat, little-endian, as float32, float16 or bfloat16. Nothing is remembered between steps.
NaN and Inf travel as they are, but that a cast makes all NaNs one.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcomp import kernels
from gradcomp.compressors import flat_gradient
from gradcomp.interfaces import Commit, Compressor, LinearCompressor, State
from gradcomp.packet import HEADER_NBYTES, Kind, Packet

__all__ = ["BFloat16", "Float16", "NoCompression"]


@dataclass(frozen=True, kw_only=True)
class _Cast(Compressor, ABC):
    stateless: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype]
    kind: ClassVar[Kind]

    def encode(self, grad: Tensor, state: State | None = None) -> Packet:
        flat = flat_gradient(grad)
        # Always a copy: the optimizer changes the gradient while the packet is still being sent.
        return Packet(kind=self.kind, numel=flat.numel(), payload=kernels.cast(flat, self.dtype), _checked=True)

    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        packet.require(self.kind)
        kernels.add_scaled(out, packet.payload.view(self.dtype), scale)

    def max_nbytes(self, numel: int) -> int:
        return HEADER_NBYTES + numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class NoCompression(_Cast, LinearCompressor):
    """float32 as it is: 4 bytes an element. float16 and bfloat16 gradients are widened, which loses nothing. Linear."""

    id: ClassVar[str] = "none"
    dtype: ClassVar[torch.dtype] = torch.float32
    kind: ClassVar[Kind] = Kind.DENSE_F32

    def prepare(self, grad: Tensor, state: State) -> tuple[Packet, Commit]:
        flat = flat_gradient(grad)
        # Nobody writes there any more: it can be sent from where it lies.
        return (Packet.dense(flat) if flat.dtype == self.dtype else self.encode(flat)), lambda: None

    def rounds(self, grad: Tensor, state: State | None = None) -> Generator[Tensor, Tensor, tuple[Packet, Packet]]:
        total = yield flat_gradient(grad).to(torch.float32)
        packet = Packet.dense(total)
        return packet, packet


@dataclass(frozen=True, kw_only=True)
class Float16(_Cast):
    """float16: 2 bytes an element, 11 significant bits, rounded to nearest even.

    A finite value of 65520 or more becomes Inf, and is seen as such by every rank, as after torch's own cast:
    clamping it would hide that the step is wrong. Below 6e-8 values become 0. ``bf16`` has float32's range.
    """

    id: ClassVar[str] = "fp16"
    dtype: ClassVar[torch.dtype] = torch.float16
    kind: ClassVar[Kind] = Kind.DENSE_F16


@dataclass(frozen=True, kw_only=True)
class BFloat16(_Cast):
    """bfloat16: 2 bytes an element, 8 significant bits, rounded to nearest even; the range of float32."""

    id: ClassVar[str] = "bf16"
    dtype: ClassVar[torch.dtype] = torch.bfloat16
    kind: ClassVar[Kind] = Kind.DENSE_BF16
