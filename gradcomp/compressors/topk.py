"""Top-k compression: the k elements of largest magnitude, with their values.

A. F. Aji, K. Heafield, "Sparse communication for distributed gradient descent", EMNLP 2017.

With ``acc = grad + residual``: the k elements with the largest ``|acc|`` are sent as they are, in float32; of equal
magnitudes the one with the lowest index goes first, on every device. ``residual = acc - sent`` is 0 where something was
sent. Elements that are exactly 0 are never sent, so a packet may hold fewer than k.

Wire: a VALUES packet. The values in float32, then the unsigned index set: about 5.4 bytes for each element sent at a
ratio of 0.1 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcomp import indices, kernels
from gradcomp.compressors import exchange_residual, flat_gradient
from gradcomp.errors import ConfigError
from gradcomp.interfaces import Commit, Compressor, State
from gradcomp.options import check_integer, check_number
from gradcomp.packet import HEADER_NBYTES, Kind, Packet

__all__ = ["TopK"]

_DEFAULT_RATIO = 1e-3


@dataclass(frozen=True, kw_only=True)
class TopK(Compressor):
    """Send the k largest elements.

    State: ``residual`` (float32, flat).

    Attributes:
        ratio: share of a tensor's elements to send, at least one; 0.001 if neither is given. Larger: more traffic.
        k: elements of every tensor to send, instead of ``ratio``.
    """

    id: ClassVar[str] = "topk"
    ratio: float | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None and self.k is not None:
            raise ConfigError(f"topk: give ratio or k, not both; got ratio={self.ratio!r} and k={self.k!r}")
        if self.k is not None:
            check_integer("topk", "k", self.k, at_least=1)
            return
        ratio = _DEFAULT_RATIO if self.ratio is None else self.ratio
        check_number("topk", "ratio", ratio, above=0.0, at_most=1.0)
        object.__setattr__(self, "ratio", float(ratio))

    def encode(self, grad: Tensor, state: State | None = None) -> Packet:
        return self._encode(flat_gradient(grad), state)

    def encode_in_place(self, grad: Tensor, state: State) -> Packet:
        return self._encode(flat_gradient(grad), state, state["residual"])

    def prepare(self, grad: Tensor, state: State) -> tuple[Packet, Commit]:
        left = flat_gradient(grad)
        if left.dtype != torch.float32:
            return super().prepare(grad, state)
        return self._encode(left, state, left), lambda: exchange_residual(state, left)

    def _encode(self, flat: Tensor, state: State | None, left: Tensor | None = None) -> Packet:
        residual = None if state is None else state["residual"]
        found = kernels.encode_largest(flat, residual, max(self._count(flat.numel()), 1), left=left)
        if isinstance(found, float):
            return Packet.nonfinite(found, flat.numel(), flat.device)
        return Packet.coded_values(*found, flat.numel())

    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        packet.require(Kind.VALUES)
        packet.add_values(out, scale)

    def decode_sum(self, packets: Sequence[Packet], out: Tensor, scale: float) -> None:
        for packet in packets:
            packet.require(Kind.VALUES)
        Packet.sum_sets(packets, out, scale)

    def max_nbytes(self, numel: int) -> int:
        count = self._count(numel)
        coding = indices.choose(count, numel, signed=False)
        # The size does not fall as the count grows: a packet of fewer elements is no longer.
        return HEADER_NBYTES + 4 * count + indices.max_coded_nbytes(count, numel, coding, signed=False)

    def stats(self, packet: Packet, state: State | None = None) -> dict[str, float]:
        """``density``: the share of elements that was sent."""
        return {"density": packet.count / max(packet.numel, 1)}

    def _count(self, numel: int) -> int:
        if self.k is not None:
            return min(self.k, numel)
        return min(max(1, math.ceil((self.ratio or _DEFAULT_RATIO) * numel)), numel)
