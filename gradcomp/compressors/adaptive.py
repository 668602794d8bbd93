"""Adaptive threshold: a threshold that moves slowly until neither too few nor too many elements pass it.

Eclipse Deeplearning4j, "Distributed training: gradient sharing" (AdaptiveThresholdAlgorithm and
ResidualClippingPostProcessor), on the compression of N. Strom, "Scalable distributed DNN training using commodity GPU
cloud computing", Interspeech 2015.

With ``acc = grad + residual``: elements with ``|acc| > tau`` are sent as ``sign(acc) * tau``, and
``residual = acc - sent``. After a step in which the share ``d`` of the elements was sent::

    tau = decay * tau  if d < min_density,    tau = tau / decay  if d > max_density,    else tau stays

and every ``clip_every`` steps the residual is clipped to ``+-clip * tau``, with the tau of that step: it would take
``clip`` steps to send what is left. What is cut off is lost, for it is too old to be of use.

Wire: a SIGNS packet, as of ``threshold``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcomp.compressors.threshold import Threshold
from gradcomp.errors import ConfigError
from gradcomp.interfaces import Compressor, State
from gradcomp.options import check_integer, check_number
from gradcomp.packet import Packet
from gradcomp.residual import clip_residual

__all__ = ["AdaptiveThreshold"]

_FLOAT32 = torch.finfo(torch.float32)
_ANY = Threshold(tau=1.0)  # packets say themselves what their threshold was


@dataclass(frozen=True, kw_only=True)
class AdaptiveThreshold(Compressor):
    """Send what passes a threshold that adapts to the share sent, as Deeplearning4j does.

    State: ``residual`` (float32, flat), ``tau`` (float32, 0-dim, on the CPU; NaN until known); with clipping also
    ``step`` (int64, 0-dim, on the CPU). The defaults are Deeplearning4j's, but for two things. It clips by 5 every 5
    steps. And it begins with 1e-4, which suits the updates it compresses; gradients are larger, and until a threshold
    that is too small has grown, which takes 20 steps a doubling, little is sent of each element although many pass.

    Attributes:
        tau: the first threshold, in units of the gradient; None: the one that ``max_density`` of the first gradient
            passes. Too small: much traffic and slow training at first.
        min_density: a smaller share of elements sent lowers the threshold.
        max_density: a larger share raises it.
        decay: the factor by which it moves at a step; the default doubles or halves it in 20 steps.
        clip: the residual is clipped to so many thresholds, 5 in Deeplearning4j; 0: never, and nothing is lost.
        clip_every: steps between clippings.
    """

    id: ClassVar[str] = "adaptive"
    tau: float | None = None
    min_density: float = 1e-4
    max_density: float = 1e-2
    decay: float = 0.5 ** (1 / 20)
    clip: float = 0.0
    clip_every: int = 5

    def __post_init__(self) -> None:
        if self.tau is not None:
            check_number("adaptive", "tau", self.tau, at_least=_FLOAT32.tiny, at_most=_FLOAT32.max)
            object.__setattr__(self, "tau", float(self.tau))
        check_number("adaptive", "min_density", self.min_density, above=0.0, at_most=1.0)
        check_number("adaptive", "max_density", self.max_density, above=0.0, at_most=1.0)
        if self.min_density > self.max_density:
            raise ConfigError(
                f"adaptive: min_density={self.min_density!r} is not allowed; min_density must be "
                f"<= max_density={self.max_density!r}"
            )
        check_number("adaptive", "decay", self.decay, at_least=0.5)
        if self.decay >= 1.0:
            raise ConfigError(f"adaptive: decay={self.decay!r} is not allowed; decay must be >= 0.5 and < 1")
        check_number("adaptive", "clip", self.clip, at_least=0.0)
        if 0.0 < self.clip < 1.0:
            raise ConfigError(f"adaptive: clip={self.clip!r} is not allowed; clip must be 0 or >= 1")
        check_integer("adaptive", "clip_every", self.clip_every, at_least=1)
        for field in ("min_density", "max_density", "decay", "clip"):
            object.__setattr__(self, field, float(getattr(self, field)))

    @property
    def conserves(self) -> bool:
        return not self.clip

    def new_state(self, grad: Tensor) -> State:
        tau = math.nan if self.tau is None else self.tau
        state = super().new_state(grad) | {"tau": torch.tensor(tau, dtype=torch.float32)}
        if self.clip:
            state["step"] = torch.zeros((), dtype=torch.int64)
        return state

    def encode(self, grad: Tensor, state: State | None = None) -> Packet:
        return self._now(state).encode(grad, state)

    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        _ANY.decode_add(packet, out, scale)

    def decode_sum(self, packets: Sequence[Packet], out: Tensor, scale: float) -> None:
        _ANY.decode_sum(packets, out, scale)

    def commit(self, grad: Tensor, packet: Packet, state: State) -> None:
        super().commit(grad, packet, state)
        self._learn(packet, state)

    def encode_in_place(self, grad: Tensor, state: State) -> Packet:
        now = self._now(state)
        if now.tau is None:
            return super().encode_in_place(grad, state)
        packet = now.encode_in_place(grad, state)
        if not packet.is_nonfinite:
            self._learn(packet, state)
        return packet

    def max_nbytes(self, numel: int) -> int:
        return _ANY.max_nbytes(numel)

    def typical_nbytes(self, numel: int) -> int:
        # Falling gradients are followed from above and growing ones from below: expect the middle.
        middle = Threshold(density=math.sqrt(self.min_density * self.max_density))
        return min(middle.typical_nbytes(numel), self.max_nbytes(numel))

    def stats(self, packet: Packet, state: State | None = None) -> dict[str, float]:
        """``tau``: the threshold of this packet; ``density``: the share of elements that passed it."""
        return _ANY.stats(packet)

    def _now(self, state: State | None) -> Threshold:
        """What compresses at this step: with the threshold there is, or one found in the gradient."""
        tau = (self.tau or math.nan) if state is None else float(state["tau"])
        return Threshold(tau=tau) if tau > 0.0 else Threshold(density=self.max_density)

    def _learn(self, packet: Packet, state: State) -> None:
        tau = packet.scalar
        density = packet.count / max(packet.numel, 1)
        if tau and density < self.min_density:
            tau *= self.decay
        elif tau and density > self.max_density:
            tau = min(tau / self.decay, _FLOAT32.max)
        # Zero for a gradient of zeros: nothing to go by yet.
        state["tau"].fill_(max(tau, _FLOAT32.tiny) if tau else math.nan)
        if self.clip:
            step = int(state["step"])
            if step and step % self.clip_every == 0:
                clip_residual(state["residual"], self.clip * packet.scalar)
            state["step"].fill_(step + 1)
