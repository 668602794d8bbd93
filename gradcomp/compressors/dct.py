"""Chunked DCT: each tile of a matrix as the few largest coefficients of its cosine transform.

B. Peng, J. Quesnelle, D. P. Kingma, "DeMo: decoupled momentum optimization", 2024 (arXiv:2411.19870).

A gradient is seen as a matrix of shape (shape[0], the rest), a convolution's weights as (out, in * height * width), a
vector as one row. ``M = grad + residual`` is cut into tiles of at most ``chunk`` by ``chunk``, all of one size, padded
with zeros at the lower and right edge (at most a row or column a tile: gradcomp.tiles). Each tile's orthonormal DCT-II
is a product with a basis from both sides; its ``k`` coefficients of largest magnitude are sent. ``residual = M -
decoded``: what DeMo takes out of its momentum, without the momentum, the decay and the sign.

Decoded is the sum over coefficients of ``value * basis row * basis row``, added up in the order sent with no operation
fused, and the bases come from IEEE operations alone: the same bits on every machine, which a matrix product would not
promise (kernels.reference_dct).

Where coefficients would take as many bytes as the matrix, the matrix itself is sent: DENSE_F32. One whose transform
overflows float32 is treated as one that is not finite.

Wire: a SPECTRUM packet. u64 columns of the matrix, u32 chunk, u32 k (at most a tile's elements); float32 values, k a
tile; u16 indices within the tile, likewise: 6 bytes a coefficient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcomp import kernels
from gradcomp.compressors import add_dense, flat_gradient, float_accumulated, is_finite
from gradcomp.errors import PacketError
from gradcomp.interfaces import Compressor, State
from gradcomp.kernels.reference_chunks import nonfinite_value
from gradcomp.lanes import short_tensor
from gradcomp.options import check_integer
from gradcomp.packet import HEADER_NBYTES, Kind, Packet
from gradcomp.tiles import Tiling

__all__ = ["DCT"]

_HEAD_NBYTES = 16
_COEFFICIENT_NBYTES = 6


@dataclass(frozen=True, kw_only=True)
class DCT(Compressor):
    """Send the k largest DCT coefficients of each tile.

    State: ``residual`` (float32, flat).

    Attributes:
        chunk: rows and columns of a tile, at most. Larger: more of the structure in fewer coefficients, slower.
        k: coefficients of each tile to send. Larger: more traffic, smaller residual.
    """

    id: ClassVar[str] = "dct"
    chunk: int = 64
    k: int = 32

    def __post_init__(self) -> None:
        check_integer("dct", "chunk", self.chunk, at_least=8, at_most=256)
        check_integer("dct", "k", self.k, at_least=1, at_most=1 << 16)

    def encode(self, grad: Tensor, state: State | None = None) -> Packet:
        flat = flat_gradient(grad)
        numel = flat.numel()
        residual = None if state is None else state["residual"]
        rows = grad.shape[0] if grad.dim() > 1 else 1
        tiling = Tiling.of(max(rows, 1), numel // max(rows, 1) or 1, self.chunk)
        kept = min(self.k, tiling.tile_numel)
        if _HEAD_NBYTES + _COEFFICIENT_NBYTES * tiling.tiles * kept >= 4 * numel:
            dense = float_accumulated(flat, residual)
            value = nonfinite_value(dense)
            return Packet.nonfinite(value, numel, flat.device) if value else Packet.dense(dense)
        if not is_finite(flat, residual):
            return Packet.nonfinite(nonfinite_value(float_accumulated(flat, residual)), numel, flat.device)
        values, index = kernels.largest_coefficients(flat, residual, tiling, kept)
        if value := nonfinite_value(values):
            return Packet.nonfinite(value, numel, flat.device)
        head = short_tensor([tiling.columns, self.chunk | kept << 32], flat.device)
        halves = (index - (index >> 15 << 16)).to(torch.int16)  # the bits of the u16: a cast need not wrap
        payload = torch.cat([part.view(-1).view(torch.uint8) for part in (head, values, halves)])
        return Packet(kind=Kind.SPECTRUM, numel=numel, payload=payload, count=index.numel())

    def commit(self, grad: Tensor, packet: Packet, state: State) -> None:
        self._add(packet, state["residual"], -1.0, flat_gradient(grad))

    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        self._add(packet, out, scale)

    def _add(self, packet: Packet, out: Tensor, scale: float, addend: Tensor | None = None) -> None:
        if packet.kind == Kind.DENSE_F32:
            add_dense(packet, out, scale, addend)
            return
        packet.require(Kind.SPECTRUM)
        columns = int(packet.payload[:8].view(torch.int64))
        chunk, kept = packet.payload[8:_HEAD_NBYTES].view(torch.int32).tolist()
        if chunk != self.chunk or kept > self.k:
            raise PacketError(
                f"packet has {kept} coefficients of tiles of {chunk}; this compressor's have at most {self.k} of "
                f"{self.chunk}"
            )
        split = _HEAD_NBYTES + 4 * packet.count
        values = packet.payload[_HEAD_NBYTES:split].view(torch.float32).view(-1, kept)
        index = packet.payload[split:].view(torch.int16).view(-1, kept)
        kernels.add_spectrum(out, values, index, Tiling.of(packet.numel // columns, columns, chunk), scale, addend)

    def max_nbytes(self, numel: int) -> int:
        return HEADER_NBYTES + 4 * numel

    def typical_nbytes(self, numel: int) -> int:
        tiles = -(-numel // self.chunk**2)  # the shape is not known here: of a matrix with whole tiles
        kept = min(self.k, self.chunk**2)
        return min(HEADER_NBYTES + _HEAD_NBYTES + _COEFFICIENT_NBYTES * tiles * kept, self.max_nbytes(numel))

    def stats(self, packet: Packet, state: State | None = None) -> dict[str, float]:
        """``density``: coefficients sent per element."""
        sent = packet.count if packet.kind == Kind.SPECTRUM else packet.numel
        return {"density": sent / max(packet.numel, 1)}
