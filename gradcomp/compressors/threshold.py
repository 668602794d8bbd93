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
        return self._encode(flat_gradient(grad), state)[0]

    def encode_in_place(self, grad: Tensor, state: State) -> Packet:
        packet, next_tau = self._encode(flat_gradient(grad), state, state["residual"])
        _learn(next_tau, packet, state)
        return packet

    def prepare(self, grad: Tensor, state: State) -> tuple[Packet, Commit]:
        left = flat_gradient(grad)
        if left.dtype != torch.float32:
            return super().prepare(grad, state)
        packet, next_tau = self._encode(left, state, left)

        def commit() -> Tensor:
            _learn(next_tau, packet, state)
            return exchange_residual(state, left)

        return packet, commit

    def commit(self, grad: Tensor, packet: Packet, state: State) -> None:
        super().commit(grad, packet, state)
        if self.density is not None:
            # Here a GPU is waited for, once: the state's tau lies on the CPU, where the next step asks for it first.
            tau = kernels.sample_threshold(flat_gradient(grad), state["residual"], self.density, _WEIGHT_OF_NEXT)
            _learn(tau, packet, state)

    def _tau(self, state: State | None) -> float | None:
        """The threshold of this step, if one is known: it is fixed, or was found in the step before."""
        if self.density is None:
            return self.tau
        tau = math.nan if state is None else float(state["tau"])
        return tau if tau > 0.0 else None

    def _encode(self, flat: Tensor, state: State | None, left: Tensor | None = None) -> tuple[Packet, float | None]:
        """Encode, and write to ``left`` what is left; also the threshold of the next step, if there is a new one."""
        found = self._select(flat, state, left)
        if isinstance(found, float):
            return Packet.nonfinite(found, flat.numel(), flat.device), None
        payload, count, tau, next_tau = found
        return Packet.coded_signs(payload, count, flat.numel(), tau), next_tau

    def _select(
        self, flat: Tensor, state: State | None, left: Tensor | None
    ) -> tuple[Tensor, int, float, float | None] | float:
        """Payload, count, threshold and the next one from one kernel: so a GPU is waited for once, at its end."""
        tau, residual = self._tau(state), None if state is None else state["residual"]
        if tau is None:
            density = self.density or _DEFAULT_DENSITY
            return kernels.encode_signs_share(flat, residual, density, _WEIGHT_OF_NEXT, left=left)
        if self.density is None or residual is None or left is None:
            signs = kernels.encode_signs(flat, residual, tau, left=left)
            return signs if isinstance(signs, float) else (*signs, tau, None)
        sampled = kernels.encode_signs_sampled(flat, residual, tau, self.density, _WEIGHT_OF_NEXT, left=left)
        return sampled if isinstance(sampled, float) else (*sampled[:2], tau, sampled[2])

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
