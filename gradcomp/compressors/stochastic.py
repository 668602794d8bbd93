"""What the stochastic quantizers share: where their random numbers come from, and the packets of scales and codes.

The numbers are drawn from (seed, parameter, rank, step): the same run gives the same packets, while ranks, parameters
and steps round independently of each other, so that their errors average out. See :mod:`gradcomp.randomness` for the
streams and :mod:`gradcomp.kernels.reference_stochastic` for what sixteen random bits an element are good for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcomp import randomness
from gradcomp.compressors import flat_gradient
from gradcomp.errors import PacketError
from gradcomp.interfaces import Compressor, State
from gradcomp.options import check_flag, check_integer
from gradcomp.packet import HEADER_NBYTES, Kind, Packet

__all__ = ["StochasticCompressor"]

_MOST_SEED = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class StochasticCompressor(Compressor, ABC):
    """A float32 scale a block and ``_bits`` bits an element, rounded at random.

    Attributes:
        seed: of the random numbers; parameters and ranks differ whatever it is.
        feedback: keep what rounding took away in a residual. What is sent is unbiased without.
    """

    kind: ClassVar[Kind]
    seed: int = 0
    feedback: bool = False

    def __post_init__(self) -> None:
        check_integer(self.id, "seed", self.seed, at_least=0, at_most=_MOST_SEED)
        check_flag(self.id, "feedback", self.feedback)

    @property
    @abstractmethod
    def _block(self) -> int: ...

    @property
    @abstractmethod
    def _bits(self) -> int: ...

    @abstractmethod
    def _encode(self, grad: Tensor, residual: Tensor | None, key: int, step: int, update: bool) -> Tensor | float: ...

    @abstractmethod
    def _add(self, out: Tensor, scales: Tensor, codes: Tensor, scale: float, addend: Tensor | None) -> None: ...

    def new_state(self, grad: Tensor) -> State:
        state = super().new_state(grad) if self.feedback else {}
        return state | {"random": randomness.new_stream(self.seed)}

    def seed_state(self, state: State, *, parameter: str, rank: int) -> None:
        randomness.seed_stream(state, self.seed, parameter, rank)

    def encode(self, grad: Tensor, state: State | None = None) -> Packet:
        return self._packet(grad, state, update=False)

    def encode_in_place(self, grad: Tensor, state: State) -> Packet:
        packet = self._packet(grad, state, update=True)
        if not packet.is_nonfinite:
            randomness.advance(state)
        return packet

    def commit(self, grad: Tensor, packet: Packet, state: State) -> None:
        if self.feedback:
            self._add_packet(packet, state["residual"], -1.0, flat_gradient(grad))
        randomness.advance(state)

    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        self._add_packet(packet, out, scale, None)

    def max_nbytes(self, numel: int) -> int:
        return HEADER_NBYTES + 4 * -(-numel // self._block) + -(-numel * self._bits // 8)

    def _packet(self, grad: Tensor, state: State | None, update: bool) -> Packet:
        flat = flat_gradient(grad)
        residual = None if state is None else state.get("residual")
        payload = self._encode(flat, residual, *randomness.stream(state, self.seed), update)
        if isinstance(payload, float):
            return Packet.nonfinite(payload, flat.numel(), flat.device)
        return Packet(
            kind=self.kind,
            numel=flat.numel(),
            payload=payload,
            bits=self._bits,
            block=self._block,
            _checked=True,
        )

    def _add_packet(self, packet: Packet, out: Tensor, scale: float, addend: Tensor | None) -> None:
        packet.require(self.kind)
        if (packet.block, packet.bits) != (self._block, self._bits):
            raise PacketError(
                f"packet has blocks of {packet.block} and codes of {packet.bits} bits; "
                f"this compressor's have {self._block} and {self._bits}"
            )
        scales_nbytes = 4 * -(-packet.numel // packet.block)
        scales = packet.payload[:scales_nbytes].view(torch.float32)
        self._add(out, scales, packet.payload[scales_nbytes:], scale, addend)
