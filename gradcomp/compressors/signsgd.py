"""Sign compression: one bit an element, with error feedback or with a majority vote.

``feedback``: S. P. Karimireddy, Q. Rebjock, S. Stich, M. Jaggi, "Error feedback fixes SignSGD and other gradient
compression schemes", ICML 2019, in blocks as in S. Zheng, Z. Huang, J. Kwok, "Communication-efficient distributed
blockwise momentum SGD with error-feedback", NeurIPS 2019. With ``acc = grad + residual``, cut into blocks of ``block``
elements: each element is decoded as the mean of its block's ``|acc|``, negative where acc is, and
``residual = acc - decoded``.

``majority``: J. Bernstein, Y. Wang, K. Azizzadenesheli, A. Anandkumar, "signSGD: compressed optimisation for non-convex
problems", ICML 2018; with J. Zhao, "signSGD with majority vote is communication efficient and fault tolerant", ICLR
2019. Each rank sends the sign of its gradient, without residual, and the gradient becomes ``scale`` times the sign of
the sum: +-scale, or 0 for a tie. An element that is exactly 0 has no vote.

Wire: a BITS packet; for each block float32 -mean and +mean. ``majority``: one block, -1 and +1; if any element is 0, a
CODES packet of 2 bits an element and scalar 1 instead, so that weights whose gradient is always 0 stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcomp import kernels
from gradcomp.compressors import check_block, exchange_residual, flat_gradient
from gradcomp.compressors.onebit import add_bits_packet, bits_packet_nbytes, encode_bits_packet
from gradcomp.errors import ConfigError, PacketError
from gradcomp.interfaces import Commit, Compressor, State
from gradcomp.lanes import short_tensor
from gradcomp.options import check_choice, check_number
from gradcomp.packet import HEADER_NBYTES, MAX_BLOCK, Kind, Packet

__all__ = ["SignSGD"]

_DEFAULT_BLOCK = 1024
_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True, kw_only=True)
class SignSGD(Compressor):
    """Send the sign of every element.

    With ``majority`` all elements of the gradient that the optimizer sees have the same magnitude, ``scale``, whatever
    they had before, the number of ranks and whether their mean or their sum was asked for. A learning rate must be set
    for that: SGD moves every weight by ``lr * scale`` each step, so begin where Adam would, at 1e-4 to 1e-3 with
    scale 1, and leave clipping by norm off.

    State: ``feedback``: ``residual`` (float32, flat). ``majority``: nothing.

    Attributes:
        variant: ``feedback``, whose decoded gradients have the size of the gradients, or ``majority``.
        block: ``feedback``: elements that share a scale, a multiple of 8; 1024 if not given.
        scale: ``majority``: the magnitude of every element of the result; 1.0 if not given.
    """

    id: ClassVar[str] = "signsgd"
    variant: str = "feedback"
    block: int | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        check_choice("signsgd", "variant", self.variant, ("feedback", "majority"))
        other, owner = ("scale", "majority") if self._feedback else ("block", "feedback")
        if getattr(self, other) is not None:
            raise ConfigError(f"signsgd: {other}={getattr(self, other)!r} is not allowed; it is for variant={owner}")
        if self._feedback:
            block = _DEFAULT_BLOCK if self.block is None else self.block
            check_block("signsgd", "block", block)
            object.__setattr__(self, "block", block)
        else:
            scale = 1.0 if self.scale is None else self.scale
            check_number("signsgd", "scale", scale, at_least=_FLOAT32.tiny, at_most=_FLOAT32.max)
            object.__setattr__(self, "scale", float(scale))

    @property
    def _feedback(self) -> bool:
        return self.variant == "feedback"

    @property
    def _block(self) -> int:
        return self.block or MAX_BLOCK

    def new_state(self, grad: Tensor) -> State:
        return super().new_state(grad) if self._feedback else {}

    def encode(self, grad: Tensor, state: State | None = None) -> Packet:
        if not self._feedback:
            return _votes(flat_gradient(grad))
        return encode_bits_packet(grad, None if state is None else state["residual"], self._block, symmetric=True)

    def encode_in_place(self, grad: Tensor, state: State) -> Packet:
        if not self._feedback:
            return self.encode(grad)
        return encode_bits_packet(grad, state["residual"], self._block, symmetric=True, update=True)

    def prepare(self, grad: Tensor, state: State) -> tuple[Packet, Commit]:
        left = flat_gradient(grad)
        if not self._feedback or left.dtype != torch.float32:
            return super().prepare(grad, state)
        # The sum does not mind which is which, and what is left goes where the second lies.
        packet = encode_bits_packet(state["residual"], left, self._block, symmetric=True, update=True)
        return packet, lambda: exchange_residual(state, left)

    def commit(self, grad: Tensor, packet: Packet, state: State) -> None:
        if self._feedback:
            add_bits_packet(packet, state["residual"], self._block, -1.0, addend=flat_gradient(grad))

    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        if self._feedback or packet.kind != Kind.CODES:
            add_bits_packet(packet, out, self._block, scale)
            return
        packet.require(Kind.CODES)
        if packet.bits != 2 or packet.block or packet.scalar != 1.0:
            raise PacketError(
                f"packet has codes of {packet.bits} bits, blocks of {packet.block}, scalar {packet.scalar}; votes have "
                "2 bits, no blocks, scalar 1"
            )
        one = torch.ones(1, device=out.device)
        kernels.add_codes(out, one, packet.payload, 2, 0, scale)

    def aggregate(self, total: Tensor) -> None:
        if self.scale is not None:
            total.sign_().mul_(self.scale)

    def max_nbytes(self, numel: int) -> int:
        bits = bits_packet_nbytes(numel, self._block)
        if self._feedback:
            return bits
        return max(bits, HEADER_NBYTES + -(-numel // 4))

    def typical_nbytes(self, numel: int) -> int:
        return bits_packet_nbytes(numel, self._block)


def _votes(flat: Tensor) -> Packet:
    found = kernels.pack_signs(flat)
    numel = flat.numel()
    if isinstance(found, float):
        return Packet.nonfinite(found, numel, flat.device)
    bits, zeros = found
    if not zeros:
        scales = short_tensor([-1.0, 1.0] * -(-numel // MAX_BLOCK), flat.device, torch.float32)
        return Packet(kind=Kind.BITS, numel=numel, payload=torch.cat([scales.view(torch.uint8), bits]), block=MAX_BLOCK)
    payload = kernels.pack_votes(flat)
    return Packet(kind=Kind.CODES, numel=numel, payload=payload, bits=2, scalar=1.0, _checked=True)
