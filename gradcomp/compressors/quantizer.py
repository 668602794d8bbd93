"""What the dense quantizers share: a code of a few bits for every element, error feedback, one kernel each way.

Wire: packets of kind LEVELS, CODES or FLOAT8: the parameters of each block in float32, then the codes, lowest bits
first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcomp import kernels
from gradcomp.compressors import exchange_residual, flat_gradient
from gradcomp.errors import PacketError
from gradcomp.interfaces import Commit, Compressor, State
from gradcomp.options import check_flag
from gradcomp.packet import HEADER_NBYTES, Kind, Packet

__all__ = ["Quantizer", "add_coded"]


def add_coded(packet: Packet, out: Tensor, scale: float, addend: Tensor | None = None) -> None:
    """``out = (out + addend) + scale * decoded`` for a checked packet of kind LEVELS, CODES or FLOAT8.

    Args:
        addend: flat, of any floating-point dtype.
    """
    per_block = 2 if packet.kind == Kind.LEVELS else 1
    nbytes = 4 * per_block * -(-packet.numel // packet.block) if packet.block else 0
    parameters, codes = packet.payload[:nbytes].view(torch.float32), packet.payload[nbytes:]
    if packet.kind == Kind.LEVELS:
        kernels.add_levels(out, parameters.view(-1, 2), codes, packet.bits, packet.block, scale, addend)
    elif packet.kind == Kind.FLOAT8:
        kernels.add_float8(out, parameters, codes, packet.block, scale, addend)
    else:
        if not packet.block:
            parameters = torch.full((1,), packet.scalar, dtype=torch.float32, device=packet.device)
        kernels.add_codes(out, parameters, codes, packet.bits, packet.block, scale, addend)


@dataclass(frozen=True, kw_only=True)
class Quantizer(Compressor, ABC):
    """A code for every element. A subclass says what its packets' headers hold, and which kernel encodes.

    State: ``residual`` (float32, flat) with ``feedback``, else nothing.

    Attributes:
        feedback: keep what was not sent in a residual and add it to the next gradient. Without it a step forgets
            its rounding errors, and needs a pass and 4 bytes an element less.
    """

    kind: ClassVar[Kind]
    feedback: bool = True

    def __post_init__(self) -> None:
        check_flag(self.id, "feedback", self.feedback)

    @abstractmethod
    def _header(self) -> tuple[int, int, float]:
        """``bits``, ``block`` and ``scalar`` of every packet."""

    @abstractmethod
    def _quantize(self, grad: Tensor, residual: Tensor | None, update: bool) -> Tensor | float:
        """The kernel: the payload, or a float if grad + residual is not finite."""

    def new_state(self, grad: Tensor) -> State:
        return super().new_state(grad) if self.feedback else {}

    def encode(self, grad: Tensor, state: State | None = None) -> Packet:
        return self._packet(grad, None if state is None else state.get("residual"), update=False)

    def encode_in_place(self, grad: Tensor, state: State) -> Packet:
        residual = state.get("residual")
        return self._packet(grad, residual, update=residual is not None)

    def prepare(self, grad: Tensor, state: State) -> tuple[Packet, Commit]:
        left = flat_gradient(grad)
        if not self.feedback or left.dtype != torch.float32:
            return super().prepare(grad, state)
        # The sum does not mind which is which, and what is left goes where the second lies.
        packet = self._packet(state["residual"], left, update=True)
        return packet, lambda: exchange_residual(state, left)

    def commit(self, grad: Tensor, packet: Packet, state: State) -> None:
        if "residual" in state:
            self._require(packet)
            add_coded(packet, state["residual"], -1.0, flat_gradient(grad))

    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        self._require(packet)
        add_coded(packet, out, scale)

    def max_nbytes(self, numel: int) -> int:
        bits, block, _ = self._header()
        per_block = 8 if self.kind is Kind.LEVELS else 4
        return HEADER_NBYTES + (per_block * -(-numel // block) if block else 0) + -(-numel * bits // 8)

    def _packet(self, grad: Tensor, residual: Tensor | None, *, update: bool) -> Packet:
        flat = flat_gradient(grad)
        payload = self._quantize(flat, residual, update)
        if isinstance(payload, float):
            return Packet.nonfinite(payload, flat.numel(), flat.device)
        bits, block, scalar = self._header()
        return Packet(
            kind=self.kind,
            numel=flat.numel(),
            payload=payload,
            bits=bits,
            block=block,
            scalar=scalar,
            _checked=True,
        )

    def _require(self, packet: Packet) -> None:
        packet.require(self.kind)
        bits, block, _ = self._header()
        if (packet.bits, packet.block) != (bits, block):
            raise PacketError(
                f"packet has codes of {packet.bits} bits and blocks of {packet.block}; "
                f"this compressor's have {bits} bits and blocks of {block}"
            )
