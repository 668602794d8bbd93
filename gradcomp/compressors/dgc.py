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
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcomp import kernels, residual
from gradcomp.compressors import flat_gradient
from gradcomp.compressors.topk import TopK
from gradcomp.errors import ConfigError
from gradcomp.interfaces import Compressor, State
from gradcomp.kernels.reference_chunks import chunks, new_buffer
from gradcomp.options import check_flag, check_integer, check_number
from gradcomp.packet import Packet

__all__ = ["DeepGradientCompression"]

_DEFAULT_RATIO = 1e-3
_WARM_UP_START = 0.25
_FAR_MORE = 1.25  # times k: if more pass, the k largest of them are looked for
_SAMPLE = 1 << 16
_LARGEST = torch.finfo(torch.float32).max
_VALUES = TopK(k=1)  # reads VALUES packets of any size
_Found = tuple[Tensor, Tensor] | float  # indices and values, or what was found that is not finite


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

    def new_state(self, grad: Tensor) -> State:
        state = super().new_state(grad)
        if self.momentum:
            state["momentum"] = torch.zeros_like(state["residual"])
        if self.warmup_steps:
            state["step"] = torch.zeros((), dtype=torch.int64)
        return state

    def encode(self, grad: Tensor, state: State | None = None) -> Packet:
        flat = self._clipped(flat_gradient(grad))
        count = self._count(flat.numel(), int(state["step"]) if state is not None and self.warmup_steps else 0)
        if state is None or not self.momentum:
            found = _select(flat, None if state is None else state["residual"], count)
        else:
            found = self._select_corrected(flat, state["residual"], state["momentum"], count)
        if isinstance(found, float):
            return Packet.nonfinite(found, flat.numel(), flat.device)
        index, values = found
        if len(index) > int(_FAR_MORE * count):
            largest = kernels.select_largest(values, None, count)
            if not isinstance(largest, float):  # it is not: what is not finite was found before
                index, values = index[largest[0]], largest[1]
        return Packet.values(index, values, flat.numel())

    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        _VALUES.decode_add(packet, out, scale)

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

    def _select_corrected(self, flat: Tensor, held: Tensor, velocity: Tensor, count: int) -> _Found:
        """As :func:`_select` of residual + corrected gradient, which is formed a chunk at a time."""
        numel = flat.numel()
        stride = -(-numel // max(_SAMPLE, 8 * numel // max(count, 1))) | 1
        sample = velocity[::stride]
        step = self._advance(sample, flat[::stride], torch.empty_like(sample))
        tau = _threshold(step, held[::stride], count, numel)
        buffer = new_buffer(flat)
        index, values = [flat.new_empty(0, dtype=torch.int64)], [buffer[:0]]
        nonfinite = 0.0
        for part in chunks(numel, flat.device):
            step = self._advance(velocity[part], flat[part], buffer[: part.stop - part.start])
            found = kernels.select_threshold(step, held[part], tau)
            if isinstance(found, float):
                nonfinite += found
                continue
            index.append(found[0] + part.start)
            values.append(step[found[0]] + held[part][found[0]])
        return nonfinite or (torch.cat(index), torch.cat(values))


def _threshold(flat: Tensor, held: Tensor | None, count: int, numel: int) -> float:
    """What ``count`` of ``numel`` elements should pass, going by a sample."""
    largest = kernels.sample_largest(flat, held, count / numel if numel else 1.0)
    if not len(largest) or not bool(largest[0].isfinite()):
        return _LARGEST  # only what is not finite is going to be looked for
    return float(torch.nextafter(largest[-1], torch.zeros_like(largest[-1])))


def _select(flat: Tensor, held: Tensor | None, count: int) -> _Found:
    """Indices and values of what passes the threshold, or a float if something is not finite."""
    found = kernels.select_threshold(flat, held, _threshold(flat, held, count, flat.numel()))
    if isinstance(found, float):
        return found
    index = found[0]
    values = flat[index].to(torch.float32)
    return index, values if held is None else values + held[index]
