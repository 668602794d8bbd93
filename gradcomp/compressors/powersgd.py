"""PowerSGD: a matrix as the product of two thin ones, found by one step of power iteration.

T. Vogels, S. P. Karimireddy, M. Jaggi, "PowerSGD: practical low-rank gradient compression for distributed
optimization", NeurIPS 2019.

A gradient is seen as a matrix of shape (shape[0], the rest), ``M = grad + residual``, m by n. With the n by r matrix Q
of the step before (at first a random one, the same on all ranks):

    P = M Q, added up over ranks;  P^ = P with orthonormal columns;  Q = M^T P^, added up over ranks;  decoded: P^ Q^T

The two sums are all the ranks send, r (m + n) floats, and as M enters linearly, decoding gives the projection of the
sum of all ranks' M. ``residual = M - P^ Q^T`` with this rank's own Q, from before the second sum: what a rank sent and
what it keeps add up to what it had. The authors' code subtracts the mean over ranks instead. The residuals have the
same sum either way, and nothing else of them enters a later step; but what sets ranks apart then stays in them for good
and grows. Q is scaled to unit columns before it is used again, so that P does not overflow or vanish; a column of zeros
(the sum had a lower rank than r) is drawn anew, or it would stay one.

Where ``r (m + n)`` floats are not fewer than ``m n``, vectors among them, the matrix itself is sent: DENSE_F32. One
whose products overflow float32 is treated as one that is not finite.

For the first ``dense_steps`` steps the matrix itself is sent, too, in one round, and nothing is kept: early gradients
change too fast to be followed by factors (the paper's code warms up like that, and ``start_powerSGD_iter`` of torch's
hook is the same). Steps are those that were committed on any rank; a step that was not finite is none.

With an exchange that sends packets, each rank sends the factors of its own M: more bytes from three ranks on, and a sum
of rank N r. Replicas stay identical: P^ and decoded products are added up in a fixed order (kernels.reference_factors).

Wire: a FACTORS packet. u64 n, u64 r; then float32 P^ (r rows of m) and Q (r rows of n).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gradcomp import kernels, randomness
from gradcomp.compressors import (
    FACTORS_HEAD_NBYTES,
    add_dense,
    flat_gradient,
    float_accumulated,
    pack_factors,
    read_factors,
)
from gradcomp.errors import PacketError
from gradcomp.interfaces import Compressor, LinearCompressor, State
from gradcomp.kernels.random import philox
from gradcomp.kernels.reference_chunks import nonfinite_value
from gradcomp.options import check_integer
from gradcomp.packet import HEADER_NBYTES, Kind, Packet

__all__ = ["PowerSGD"]


@dataclass(frozen=True, kw_only=True)
class PowerSGD(LinearCompressor):
    """Send a low-rank approximation of each matrix. Linear, in two rounds.

    State: ``residual`` (float32, flat); where factors are sent, or will be, also ``q`` (float32 [r, n]) and ``random``
    (int64 [key, step], on the CPU), the same on all ranks.

    Attributes:
        rank: columns of P and Q. Larger: more traffic and more work, smaller residual.
        dense_steps: so many steps of a tensor are sent as they are before factors are (torch's start_powerSGD_iter).
            Larger: a safer start, and more traffic in it.
        seed: of the first Q.
    """

    id: ClassVar[str] = "powersgd"
    in_step: ClassVar[bool] = True
    rank: int = 2
    dense_steps: int = 0
    seed: int = 0
    # The only kind that is decoded; None: both. Where the step is known, packets of the other stage are refused.
    _only: Kind | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_integer("powersgd", "rank", self.rank, at_least=1, at_most=1 << 16)
        check_integer("powersgd", "dense_steps", self.dense_steps, at_least=0)
        check_integer("powersgd", "seed", self.seed, at_least=0)

    def new_state(self, grad: Tensor) -> State:
        state = super().new_state(grad)
        rank, _, columns = self._layout(grad)
        if rank:
            state["random"] = randomness.new_stream(self.seed)
            state["q"] = _draw(randomness.stream(state, self.seed), rank, columns, grad.device)
        return state

    def seed_state(self, state: State, *, parameter: str, rank: int) -> None:
        if "q" in state:
            randomness.seed_stream(state, self.seed, parameter)
            rows, columns = state["q"].shape
            state["q"] = _draw(randomness.stream(state, self.seed), rows, columns, state["q"].device)

    def rounds(self, grad: Tensor, state: State | None = None) -> Generator[Tensor, Tensor, tuple[Packet, Packet]]:
        flat = flat_gradient(grad)
        residual = None if state is None else state["residual"]
        rank, rows, columns = self._layout(grad)
        if not rank or self._is_dense(state):
            own = float_accumulated(flat, residual)
            total = yield own
            if not kernels.all_finite(total):
                return _both_nonfinite(total, flat)
            return Packet.dense(own), Packet.dense(total)
        q = _draw(randomness.stream(None, self.seed), rank, columns, flat.device) if state is None else state["q"]
        p = yield kernels.project(flat, residual, q).reshape(-1)
        if not kernels.all_finite(p):
            return _both_nonfinite(p, flat)
        basis = kernels.orthonormal(p.view(rank, rows))
        own_q = kernels.combine(flat, residual, basis)
        total_q = yield own_q.view(-1)
        if not kernels.all_finite(total_q):
            return _both_nonfinite(total_q, flat)
        packet = pack_factors(basis, own_q)
        alone = total_q.data_ptr() == own_q.data_ptr()
        return packet, packet if alone else pack_factors(basis, total_q.view(rank, columns))

    def commit(self, grad: Tensor, packet: Packet, state: State) -> None:
        self.commit_sum(grad, packet, packet, state)

    def commit_sum(self, grad: Tensor, own: Packet, total: Packet, state: State) -> None:
        self._add(own, state["residual"], -1.0, flat_gradient(grad))
        self.pass_over(state)
        if total.kind == Kind.FACTORS:
            _, q = read_factors(total)
            length = kernels.norms(q).unsqueeze(1)
            unit = (q / length).to(torch.float32)
            fresh = _draw(randomness.stream(state, self.seed), len(q), q.shape[1], q.device)
            state["q"] = torch.where(length > 0, unit, fresh)

    def pass_over(self, state: State) -> None:
        if "random" in state:
            randomness.advance(state)

    def at(self, state: State) -> Compressor:
        codec = copy.copy(self)
        sends_factors = "q" in state and not self._is_dense(state)
        object.__setattr__(codec, "_only", Kind.FACTORS if sends_factors else Kind.DENSE_F32)
        return codec

    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        if self._only is not None:
            packet.require(self._only)
        self._add(packet, out, scale)

    def _add(self, packet: Packet, out: Tensor, scale: float, addend: Tensor | None = None) -> None:
        if packet.kind == Kind.DENSE_F32:
            add_dense(packet, out, scale, addend)
            return
        packet.require(Kind.FACTORS)
        left, right = read_factors(packet)
        if len(left) > self.rank:
            raise PacketError(f"packet has factors of rank {len(left)}; this compressor's have at most {self.rank}")
        kernels.add_factors(out, left, right, scale, addend)

    def max_nbytes(self, numel: int) -> int:
        return HEADER_NBYTES + 4 * numel

    def typical_nbytes(self, numel: int) -> int:
        side = math.isqrt(numel)  # the shape is not known here: of a square matrix
        return min(HEADER_NBYTES + FACTORS_HEAD_NBYTES + 8 * self.rank * side, self.max_nbytes(numel))

    def stats(self, packet: Packet, state: State | None = None) -> dict[str, float]:
        """``density``: floats sent per element."""
        return {"density": packet.payload.numel() / max(4 * packet.numel, 1)}

    def _is_dense(self, state: State | None) -> bool:
        """Whether these are the first steps; without a state there are none."""
        return state is not None and "random" in state and int(state["random"][1]) < self.dense_steps

    def _layout(self, grad: Tensor) -> tuple[int, int, int]:
        """Rank, rows and columns; rank 0 where the matrix itself is no larger than its factors."""
        rows = grad.shape[0] if grad.dim() else 1
        columns = grad.numel() // max(rows, 1)
        rank = min(self.rank, rows, columns)
        smaller = FACTORS_HEAD_NBYTES + 4 * rank * (rows + columns) < 4 * grad.numel()
        return (rank if smaller else 0), rows, columns


def _draw(stream: tuple[int, int], rank: int, columns: int, device: torch.device) -> Tensor:
    """float32 [rank, columns], uniform in -1..1, multiples of 2^-23: the same bits everywhere."""
    words = philox(*stream, 0, -(-rank * columns // 4), device).view(-1)[: rank * columns]
    return ((words >> 8).to(torch.float32) * 2.0**-23 - 1.0).view(rank, columns)


def _both_nonfinite(total: Tensor, flat: Tensor) -> tuple[Packet, Packet]:
    packet = Packet.nonfinite(nonfinite_value(total), flat.numel(), flat.device)
    return packet, packet
