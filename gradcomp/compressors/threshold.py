"""Threshold compression: what passes +-tau is sent as +-tau, the rest waits in the residual.

N. Strom, "Scalable distributed DNN training using commodity GPU cloud computing", Interspeech 2015.

With ``acc = grad + residual``: elements with ``|acc| > tau`` are sent as ``sign(acc) * tau``, and
``residual = acc - sent``. ``tau`` is fixed, or follows the share of elements that is to be sent: each tensor then has a
tau of its own, in its state: the quantile that ``|acc|`` is expected to have at the next step.

Wire: a SIGNS packet. float32 ``tau`` in the header; the payload is the signed index set: below a density of 1/8 about
log2(1 / density) + 2.5 bits for each element sent (12.5 at 0.1 %), above that 1 bit for every element of the tensor and
1 more for each element sent.
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
from gradcomp.options import check_number
from gradcomp.packet import HEADER_NBYTES, Coding, Kind, Packet

__all__ = ["Threshold"]

_DEFAULT_DENSITY = 1e-3
# What acc will be is guessed as the residual plus this much of the gradient just seen. The residual holds most of that
# gradient already, so 1 counts noise twice and finds tau too high; a gradient that stays the same wants 1. In between,
# densities came out within a factor of 2 of what was asked for noise, alone or around a steady gradient, and of 5 for a
# gradient that hardly changes. Raising tau after a step with too many elements and lowering it after one with too few
# does worse, swinging by a factor of 10 and more: what waits in the residual piles up just below tau, so a small step
# of tau lets a flood through.
_WEIGHT_OF_NEXT = 0.7
_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True, kw_only=True)
class Threshold(Compressor):
    """Send the elements that pass a threshold, as that threshold with their sign.

    State: ``residual`` (float32, flat); with ``density`` also ``tau`` (float32, 0-dim, on the CPU; NaN until known).

    Attributes:
        tau: the threshold, in units of the gradient; fixed. Larger: less traffic, more waits in the residual.
        density: share of elements to send at most, about, instead of ``tau``; 0.001 if neither is given. Larger: more
            traffic. Fewer are sent where a higher threshold carries more.
    """

    id: ClassVar[str] = "threshold"
    tau: float | None = None
    density: float | None = None

    def __post_init__(self) -> None:
        if self.tau is not None and self.density is not None:
            raise ConfigError(
                f"threshold: give tau or density, not both; got tau={self.tau!r} and density={self.density!r}"
            )
        if self.tau is not None:
            check_number("threshold", "tau", self.tau, at_least=_FLOAT32.tiny, at_most=_FLOAT32.max)
            object.__setattr__(self, "tau", float(self.tau))  # 1 and 1.0 are the same config
            return
        density = _DEFAULT_DENSITY if self.density is None else self.density
        check_number("threshold", "density", density, above=0.0, at_most=1.0)
        object.__setattr__(self, "density", float(density))

    def new_state(self, grad: Tensor) -> State:
        state = super().new_state(grad)
        if self.density is not None:
            state["tau"] = torch.tensor(math.nan, dtype=torch.float32)
        return state

    def encode(self, grad: Tensor, state: State | None = None) -> Packet:
        flat, residual = flat_gradient(grad), None if state is None else state["residual"]
        tau = self._tau(flat, state)
        # No finite element passes the largest number of all.
        found = kernels.encode_signs(flat, residual, tau or _FLOAT32.max)
        if isinstance(found, float):
            return Packet.nonfinite(found, flat.numel(), flat.device)
        return Packet.coded_signs(*found, flat.numel(), tau)

    def encode_in_place(self, grad: Tensor, state: State) -> Packet:
        packet, next_tau = self._encode_leaving(flat_gradient(grad), state, state["residual"])
        _learn(next_tau, packet, state)
        return packet

    def prepare(self, grad: Tensor, state: State) -> tuple[Packet, Commit]:
        left = flat_gradient(grad)
        if left.dtype != torch.float32:
            return super().prepare(grad, state)
        packet, next_tau = self._encode_leaving(left, state, left)

        def commit() -> Tensor:
            _learn(next_tau, packet, state)
            return exchange_residual(state, left)

        return packet, commit

    def commit(self, grad: Tensor, packet: Packet, state: State) -> None:
        super().commit(grad, packet, state)
        if self.density is not None:
            tau = kernels.sample_threshold(flat_gradient(grad), state["residual"], self.density, _WEIGHT_OF_NEXT)
            _learn(tau, packet, state)

    def _tau(self, flat: Tensor, state: State | None) -> float:
        """The threshold of this step; 0 if every element of the sample is: there is nothing to go by yet."""
        if self.density is None:
            return self.tau or 0.0
        if state is not None:
            tau = state["tau"].item()
            if tau > 0.0:
                return float(tau)
        return kernels.sample_threshold(flat, None if state is None else state["residual"], self.density)

    def _encode_leaving(self, flat: Tensor, state: State, left: Tensor) -> tuple[Packet, float | None]:
        """Encode and write to ``left`` what is left; also the threshold of the next step, if there is a new one."""
        tau, residual = self._tau(flat, state), state["residual"]
        limit = tau or _FLOAT32.max  # no finite element passes the largest of all
        found: tuple[Tensor, int] | tuple[Tensor, int, float] | float
        if self.density is None:
            found = kernels.encode_signs(flat, residual, limit, left=left)
        else:
            found = kernels.encode_signs_sampled(flat, residual, limit, self.density, _WEIGHT_OF_NEXT, left=left)
        if isinstance(found, float):
            return Packet.nonfinite(found, flat.numel(), flat.device), None
        packet = Packet.coded_signs(found[0], found[1], flat.numel(), tau)
        return packet, None if len(found) == 2 else found[2]

    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        packet.require(Kind.SIGNS)
        packet.add_signs(out, float(torch.tensor(packet.scalar) * scale))

    def decode_sum(self, packets: Sequence[Packet], out: Tensor, scale: float) -> None:
        for packet in packets:
            packet.require(Kind.SIGNS)
        Packet.sum_sets(packets, out, scale)

    def max_nbytes(self, numel: int) -> int:
        return HEADER_NBYTES + indices.max_coded_nbytes(numel, numel, Coding.MAP, signed=True)

    def typical_nbytes(self, numel: int) -> int:
        # What a fixed tau lets through depends on the gradient; we expect it to be chosen for as much as the default.
        count = math.ceil((self.density or _DEFAULT_DENSITY) * numel)
        coding = indices.choose(count, numel, signed=True)
        return HEADER_NBYTES + indices.max_coded_nbytes(count, numel, coding, signed=True)

    def stats(self, packet: Packet, state: State | None = None) -> dict[str, float]:
        """``tau``: the threshold of this packet; ``density``: the share of elements that passed it."""
        return {"tau": packet.scalar, "density": packet.count / max(packet.numel, 1)}


def _learn(tau: float | None, packet: Packet, state: State) -> None:
    """Go on with the threshold found for the next step, if one was looked for; 0 says that there was nothing to see."""
    if tau is not None:
        state["tau"].fill_(tau or packet.scalar or math.nan)
