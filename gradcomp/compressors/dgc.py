"""Deep gradient compression: about the k largest elements, found through a sample, with momentum corrected.

Y. Lin, S. Han, H. Mao, Y. Wang, W. J. Dally, "Deep gradient compression: reducing the communication bandwidth for
distributed training", ICLR 2018.

With u the velocity, v the residual and g the gradient, clipped first if ``clip`` is given (local gradient clipping)::

    u = momentum * u + g;  v = v + u          (momentum correction; with nesterov u = momentum * (u + g), v = v + u + g)
    send where |v| passes the threshold;  v = 0 there, and u = 0 there (momentum factor masking)

The threshold is the one that k elements would pass, estimated from a sample; if more than 1.25 k pass it, the k largest
of those are sent (hierarchical selection). In a warm-up k falls exponentially, from a quarter of the elements.

With ``momentum=0`` that is plain error feedback, v = v + g, and nothing is lost. With momentum the optimizer must have
none of its own (``SGD(momentum=0)``): it would be applied twice. What then holds is: v after + sent = v before + u.

Wire: a VALUES packet. The values in float32, then the unsigned index set: about 6 bytes for each element sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gradcomp import kernels, residual
from gradcomp.compressors import exchange_residual, flat_gradient
from gradcomp.compressors.topk import TopK
from gradcomp.errors import ConfigError
from gradcomp.interfaces import Commit, Compressor, State
from gradcomp.kernels.reference_chunks import chunks
from gradcomp.options import check_flag, check_integer, check_number
from gradcomp.packet import Packet

__all__ = ["DeepGradientCompression"]

_DEFAULT_RATIO = 1e-3
_WARM_UP_START = 0.25
_FAR_MORE = 1.25  # times k: if more pass, the k largest of them are looked for
_VALUES = TopK(k=1)  # reads VALUES packets of any size


@dataclass(frozen=True, kw_only=True)
class DeepGradientCompression(Compressor):
    """Send about the k largest elements, with momentum corrected for those that wait.

    State: ``residual`` (float32, flat); with momentum also ``momentum`` (float32, flat: the velocity), with a warm-up
    ``step`` (int64, 0-dim, on the CPU).

    Attributes:
        ratio: share of a tensor's elements to send, at least one; 0.001 if neither is given. Larger: more traffic.
        k: elements of every tensor to send, instead of ``ratio``.
        momentum: of the velocity, 0.9 in the paper; the optimizer must then have none. 0: plain error feedback.
        nesterov: Nesterov's momentum.
        masking: stop the velocity of what was sent; only with momentum.
        clip: the largest norm that one rank's gradient of a tensor may have, longer ones are scaled down to it; 0: any.
            A compressor knows neither the other tensors nor how many ranks there are: where the paper clips the sum of
            N ranks' gradients to a norm c, give c / sqrt(N), and a tensor's share of it.
        warmup_steps: steps in which the share falls from 0.25 to its own; 0: none.
    """

    id: ClassVar[str] = "dgc"
    ratio: float | None = None
    k: int | None = None
    momentum: float = 0.0
    nesterov: bool = False
    masking: bool = True
    clip: float = 0.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.ratio is not None and self.k is not None:
            raise ConfigError(f"dgc: give ratio or k, not both; got ratio={self.ratio!r} and k={self.k!r}")
        if self.k is None:
            ratio = _DEFAULT_RATIO if self.ratio is None else self.ratio
            check_number("dgc", "ratio", ratio, above=0.0, at_most=1.0)
            object.__setattr__(self, "ratio", float(ratio))
        else:
            check_integer("dgc", "k", self.k, at_least=1)
        check_number("dgc", "momentum", self.momentum, at_least=0.0)
        if self.momentum >= 1.0:
            raise ConfigError(f"dgc: momentum={self.momentum!r} is not allowed; momentum must be < 1")
        check_flag("dgc", "nesterov", self.nesterov)
        check_flag("dgc", "masking", self.masking)
        if self.nesterov and not self.momentum:
            raise ConfigError("dgc: nesterov=True needs momentum; got momentum=0")
        check_number("dgc", "clip", self.clip, at_least=0.0)
        check_integer("dgc", "warmup_steps", self.warmup_steps, at_least=0)
        object.__setattr__(self, "momentum", float(self.momentum))
        object.__setattr__(self, "clip", float(self.clip))

    @property
    def conserves(self) -> bool:
        return not self.momentum and not self.clip

    @property
    def additive(self) -> tuple[str, ...]:
        return ("residual", "momentum")

    @property
    def for_sums(self) -> Compressor:
        return self if self.conserves else replace(self, momentum=0.0, nesterov=False, clip=0.0)

    def new_state(self, grad: Tensor) -> State:
        state = super().new_state(grad)
        if self.momentum:
            state["momentum"] = torch.zeros_like(state["residual"])
        if self.warmup_steps:
            state["step"] = torch.zeros((), dtype=torch.int64)
        return state

    def encode(self, grad: Tensor, state: State | None = None) -> Packet:
        return self._encode(grad, state)

    def encode_in_place(self, grad: Tensor, state: State) -> Packet:
        if self.momentum:
            return super().encode_in_place(grad, state)
        packet = self._encode(grad, state, state["residual"])
        if self.warmup_steps and not packet.is_nonfinite:
            state["step"] += 1
        return packet

    def prepare(self, grad: Tensor, state: State) -> tuple[Packet, Commit]:
        left = flat_gradient(grad)
        if self.momentum or left.dtype != torch.float32:
            return super().prepare(grad, state)

        def commit() -> Tensor:
            if self.warmup_steps:
                state["step"] += 1
            return exchange_residual(state, left)

        return self._encode(grad, state, left), commit

    def _encode(self, grad: Tensor, state: State | None, left: Tensor | None = None) -> Packet:
        flat = self._clipped(flat_gradient(grad))
        numel = flat.numel()
        count = max(1, self._count(numel, int(state["step"]) if state is not None and self.warmup_steps else 0))
        held = None if state is None else state["residual"]
        if state is not None and self.momentum:
            flat = self._advance(state["momentum"], flat, torch.empty_like(state["momentum"]))
        density = count / numel if numel else 1.0
        found = kernels.encode_above_sampled(flat, held, density, int(_FAR_MORE * count), count, left=left)
        if isinstance(found, float):
            return Packet.nonfinite(found, numel, flat.device)
        return Packet.coded_values(*found, numel)

    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        _VALUES.decode_add(packet, out, scale)

    def decode_sum(self, packets: Sequence[Packet], out: Tensor, scale: float) -> None:
        _VALUES.decode_sum(packets, out, scale)

    def commit(self, grad: Tensor, packet: Packet, state: State) -> None:
        flat = self._clipped(flat_gradient(grad))
        if self.momentum:
            velocity = state["momentum"]
            for part in chunks(flat.numel(), flat.device):
                state["residual"][part] += self._advance(velocity[part], flat[part], velocity[part])
            if self.masking:
                residual.mask_momentum(velocity, packet.index_set[0])
        else:
            state["residual"].add_(flat)
        self.decompress_add(packet, state["residual"], -1.0)
        if self.warmup_steps:
            state["step"] += 1

    def max_nbytes(self, numel: int) -> int:
        most = max(self._count(numel, 0), self._count(numel, self.warmup_steps))
        return TopK(k=max(1, int(_FAR_MORE * most))).max_nbytes(numel)

    def typical_nbytes(self, numel: int) -> int:
        return TopK(k=max(1, self._count(numel, self.warmup_steps))).max_nbytes(numel)

    def stats(self, packet: Packet, state: State | None = None) -> dict[str, float]:
        """``density``: the share of elements that was sent."""
        return _VALUES.stats(packet)

    def _count(self, numel: int, step: int) -> int:
        """k for a tensor, at a step of the warm-up."""
        ratio = min(self.k / max(numel, 1), 1.0) if self.k is not None else self.ratio or _DEFAULT_RATIO
        if step < self.warmup_steps and ratio < _WARM_UP_START:
            shares = residual.warm_up_shares(_WARM_UP_START, ratio)
            ratio = shares[residual.warm_up_rung(step, self.warmup_steps, len(shares))]
        elif self.k is not None:
            return min(self.k, numel)
        return min(max(1, math.ceil(ratio * numel)), numel)

    def _clipped(self, flat: Tensor) -> Tensor:
        scale = residual.clip_scale(flat, self.clip) if self.clip else 1.0
        return flat if scale == 1.0 else flat.to(torch.float32) * scale

    def _advance(self, velocity: Tensor, grad: Tensor, out: Tensor) -> Tensor:
        return residual.advance_momentum(velocity, grad, self.momentum, nesterov=self.nesterov, out=out)
