"""Sufficient factors: what a linear layer's gradient is a product of, multiplied where it arrives.

T. Chilimbi, Y. Suzue, J. Apacible, K. Kalyanaraman, "Project Adam: building an efficient and scalable deep learning
training system", OSDI 2014 (section 3.3); P. Xie et al., "Lighter-communication distributed machine learning via
sufficient factor broadcasting", UAI 2016.

The gradient of the weight [m, n] of ``nn.Linear``, for a batch of r rows, is ``E^T A``: errors E [r, m], inputs A
[r, n]. Where ``r (m + n)`` floats are fewer than ``m n``, E and A are sent. It is the same gradient, to the rounding of
float32; nothing is kept between steps. All else goes as it is, DENSE_F32: other layers, larger batches, and gradients
that are not the product (clipped, of a weight that is used otherwise, too, not finite). ``stats()`` says which, and
gradcomp.products how that is known.

A packet does not depend on how many ranks there are, but each of them multiplies all ranks' factors: 2 r m n operations
a packet. Sums over ranks have no thin factors, so the second half of exchange ``two_shot`` is dense.

Wire: FACTORS, as of ``powersgd``: u64 n, u64 r; then float32 E (r rows of m) and A (r rows of n). Or DENSE_F32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcomp import kernels
from gradcomp.compressors import FACTORS_HEAD_NBYTES, add_dense, flat_gradient, pack_factors, read_factors
from gradcomp.interfaces import Compressor, State
from gradcomp.packet import HEADER_NBYTES, Kind, Packet
from gradcomp.products import Product, saves

__all__ = ["Factors"]

_USUAL_ROWS = 32  # of a batch: nothing is known of it where exchanges are planned


@dataclass(frozen=True, kw_only=True)
class Factors(Compressor):
    """Send a linear layer's inputs and errors instead of their product, where that is less. Exact, and stateless."""

    id: ClassVar[str] = "factors"
    stateless: ClassVar[bool] = True
    factored: ClassVar[bool] = True

    def encode(self, grad: Tensor, state: State | None = None) -> Packet:
        """The gradient as it is: what it is a product of is not known here."""
        return Packet.dense(kernels.cast(flat_gradient(grad), torch.float32).view(torch.float32))

    def encode_product(self, grad: Tensor, product: Product) -> Packet:
        errors, inputs = product
        if not saves(len(errors), errors.shape[1], inputs.shape[1]):
            return self.encode(grad)
        return pack_factors(errors, inputs)

    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        if packet.kind == Kind.DENSE_F32:
            add_dense(packet, out, scale)
            return
        packet.require(Kind.FACTORS)
        kernels.add_factors(out, *read_factors(packet), scale)

    def max_nbytes(self, numel: int) -> int:
        return HEADER_NBYTES + 4 * numel

    def typical_nbytes(self, numel: int) -> int:
        side = math.isqrt(numel)  # the shape is not known here: of a square matrix
        return min(HEADER_NBYTES + FACTORS_HEAD_NBYTES + 8 * _USUAL_ROWS * side, self.max_nbytes(numel))

    def stats(self, packet: Packet, state: State | None = None) -> dict[str, float]:
        """``rows`` of the factors, 0 if the gradient went as it is; ``density``: floats sent per element."""
        rows = len(read_factors(packet)[0]) if packet.kind == Kind.FACTORS else 0
        return {"rows": float(rows), "density": packet.payload.numel() / max(4 * packet.numel, 1)}
