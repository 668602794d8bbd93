"""One-bit compression: a sign for every element and two scales for every block.

F. Seide, H. Fu, J. Droppo, G. Li, D. Yu, "1-bit stochastic gradient descent and its application to data-parallel
distributed training of speech DNNs", Interspeech 2014.

With ``acc = grad + residual``, cut into blocks of ``block`` elements: a negative element is decoded as the mean of its
block's negative elements, any other as the mean of the others, and ``residual = acc - decoded``. Two scales and not
one: with one, an element whose gradient is always 0 would be moved at every step.

Wire: a BITS packet. For each block float32 mean of the negatives, float32 mean of the others (0 where there are none);
then a bit for each element, 1 if it is negative, eight to a byte, lowest bits first. With blocks of 1024 that is 1.06
bits an element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcomp import kernels
from gradcomp.compressors import check_block, exchange_residual, flat_gradient
from gradcomp.errors import PacketError
from gradcomp.interfaces import Commit, Compressor, State
from gradcomp.packet import HEADER_NBYTES, Kind, Packet

__all__ = ["OneBit", "add_bits_packet", "bits_packet_nbytes", "encode_bits_packet"]


@dataclass(frozen=True, kw_only=True)
class OneBit(Compressor):
    """Send one bit an element, and the means that the two values of the bit stand for.

    State: ``residual`` (float32, flat).

    Attributes:
        block: elements that share two scales; a multiple of 8. Larger: fewer bytes, coarser scales.
    """

    id: ClassVar[str] = "onebit"
    block: int = 1024

    def __post_init__(self) -> None:
        check_block("onebit", "block", self.block)

    def encode(self, grad: Tensor, state: State | None = None) -> Packet:
        return encode_bits_packet(grad, None if state is None else state["residual"], self.block)

    def encode_in_place(self, grad: Tensor, state: State) -> Packet:
        return encode_bits_packet(grad, state["residual"], self.block, update=True)

    def prepare(self, grad: Tensor, state: State) -> tuple[Packet, Commit]:
        left = flat_gradient(grad)
        if left.dtype != torch.float32:
            return super().prepare(grad, state)
        # The sum does not mind which is which, and what is left goes where the second lies.
        packet = encode_bits_packet(state["residual"], left, self.block, update=True)
        return packet, lambda: exchange_residual(state, left)

    def commit(self, grad: Tensor, packet: Packet, state: State) -> None:
        add_bits_packet(packet, state["residual"], self.block, -1.0, addend=flat_gradient(grad))

    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        add_bits_packet(packet, out, self.block, scale)

    def max_nbytes(self, numel: int) -> int:
        return bits_packet_nbytes(numel, self.block)


def encode_bits_packet(
    grad: Tensor, residual: Tensor | None, block: int, *, symmetric: bool = False, update: bool = False
) -> Packet:
    """The BITS packet of ``grad`` plus ``residual``; see :func:`gradcomp.kernels.reference.encode_bits`."""
    flat = flat_gradient(grad)
    found = kernels.encode_bits(flat, residual, block, symmetric=symmetric, update=update)
    if isinstance(found, float):
        return Packet.nonfinite(found, flat.numel(), flat.device)
    return Packet(kind=Kind.BITS, numel=flat.numel(), payload=found, block=block, _checked=True)


def add_bits_packet(packet: Packet, out: Tensor, block: int, scale: float, addend: Tensor | None = None) -> None:
    """``out``, plus ``addend`` if given, plus ``scale`` times what a BITS packet with such blocks decodes to.

    Raises:
        PacketError: another kind of packet, or other blocks.
    """
    packet.require(Kind.BITS)
    if packet.block != block:
        raise PacketError(f"packet has blocks of {packet.block}; this compressor's have {block}")
    scales_nbytes = 8 * -(-packet.numel // block)
    scales = packet.payload[:scales_nbytes].view(torch.float32).view(-1, 2) * scale
    kernels.add_bits(out, scales, packet.payload[scales_nbytes:], block, addend)


def bits_packet_nbytes(numel: int, block: int) -> int:
    """Bytes of a BITS packet."""
    return HEADER_NBYTES + 8 * -(-numel // block) + -(-numel // 8)
