"""Random-k: k elements chosen at random, the same ones on all ranks, so that only values travel.

S. U. Stich, J.-B. Cordonnier, M. Jaggi, "Sparsified SGD with memory", NeurIPS 2018.

The choice depends on (seed, parameter, step) alone: the numel elements are cut into k stretches, stretch j from
``floor(j numel / k)`` to the next, and of each one element is taken, number ``floor(word_j * length / 2^32)`` of it,
where word_j is the j-th 32-bit word of Philox4x32-10 under (key, step). So the choice is without repetition and in
order, each element has its stretch's share of being chosen, about k / numel, and it costs k integers, on any device.

With ``acc = grad + residual``: the chosen are sent as they are, and ``residual = acc`` with zeros there. Or,
``unbiased``: the chosen elements of the gradient are sent multiplied by the length of their stretch, which is numel / k
rounded up or down, and nothing is kept. The mean over choices is then the gradient, exactly; a product beyond float32's
range is sent as the largest of it.

Linear: at the same step all ranks choose the same elements, and values add up.

Wire: a SEEDED packet. u64 key, u64 step; then k float32. Whoever has it can decode it: 4 bytes an element sent.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from gradcomp import randomness
from gradcomp.compressors import flat_gradient, float_accumulated, is_finite
from gradcomp.errors import ConfigError
from gradcomp.interfaces import LinearCompressor, State
from gradcomp.kernels.random import philox
from gradcomp.kernels.reference_chunks import nonfinite_value
from gradcomp.lanes import short_tensor, uses
from gradcomp.options import check_flag, check_integer, check_number
from gradcomp.packet import HEADER_NBYTES, Kind, Packet

__all__ = ["RandomK"]

_DEFAULT_RATIO = 1e-2
_HEAD_NBYTES = 16
_LONGEST_STRETCH = 1 << 31  # so that word times length is an int64


@dataclass(frozen=True, kw_only=True)
class RandomK(LinearCompressor):
    """Send k random elements. Linear, in one round.

    State: ``residual`` (float32, flat) unless ``unbiased``; ``random`` (int64 [key, step], on the CPU), the same on all
    ranks.

    Attributes:
        ratio: share of a tensor's elements to send, at least one; 0.01 if neither is given. Larger: more traffic.
        k: elements of every tensor to send, instead of ``ratio``.
        unbiased: scale up what is sent instead of keeping the rest.
        seed: of the choice.
    """

    id: ClassVar[str] = "randomk"
    in_step: ClassVar[bool] = True
    ratio: float | None = None
    k: int | None = None
    unbiased: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_flag("randomk", "unbiased", self.unbiased)
        check_integer("randomk", "seed", self.seed, at_least=0)
        if self.ratio is not None and self.k is not None:
            raise ConfigError(f"randomk: give ratio or k, not both; got ratio={self.ratio!r} and k={self.k!r}")
        if self.k is not None:
            check_integer("randomk", "k", self.k, at_least=1)
            return
        ratio = _DEFAULT_RATIO if self.ratio is None else self.ratio
        check_number("randomk", "ratio", ratio, above=0.0, at_most=1.0)
        object.__setattr__(self, "ratio", float(ratio))

    def new_state(self, grad: Tensor) -> State:
        state = {} if self.unbiased else super().new_state(grad)
        return state | {"random": randomness.new_stream(self.seed)}

    def seed_state(self, state: State, *, parameter: str, rank: int) -> None:
        randomness.seed_stream(state, self.seed, parameter)

    def rounds(self, grad: Tensor, state: State | None = None) -> Generator[Tensor, Tensor, tuple[Packet, Packet]]:
        flat = flat_gradient(grad)
        numel = flat.numel()
        residual = None if state is None else state.get("residual")
        key, step = randomness.stream(state, self.seed)
        index, length = _choose(key, step, numel, self._count(numel), flat.device)
        values = flat[index].to(torch.float32)
        if residual is not None:
            values += residual[index]
        if self.unbiased:
            most = torch.finfo(torch.float32).max
            values = (values * length).clamp_(-most, most)
        if not is_finite(flat, residual):
            # Wherever it was, all ranks must see it; and it says itself whether it is NaN or Inf.
            values.fill_(nonfinite_value(float_accumulated(flat, residual)))
        total = yield values
        if value := nonfinite_value(total):
            packet = Packet.nonfinite(value, numel, flat.device)
            return packet, packet
        return _seeded(key, step, values, numel), _seeded(key, step, total, numel)

    def commit(self, grad: Tensor, packet: Packet, state: State) -> None:
        super().commit(grad, packet, state)
        randomness.advance(state)

    def pass_over(self, state: State) -> None:
        randomness.advance(state)

    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        packet.require(Kind.SEEDED)
        key, step = (word % (1 << 64) for word in packet.payload[:_HEAD_NBYTES].view(torch.int64).tolist())
        index, _ = _choose(key, step, packet.numel, packet.count, out.device)
        out[index] += packet.payload[_HEAD_NBYTES:].view(torch.float32) * scale

    def max_nbytes(self, numel: int) -> int:
        return HEADER_NBYTES + _HEAD_NBYTES + 4 * self._count(numel)

    def stats(self, packet: Packet, state: State | None = None) -> dict[str, float]:
        """``density``: the share of elements that was sent."""
        return {"density": packet.count / max(packet.numel, 1)}

    def _count(self, numel: int) -> int:
        least = max(1, -(-numel // _LONGEST_STRETCH))
        wanted = math.ceil((self.ratio or _DEFAULT_RATIO) * numel) if self.k is None else self.k
        return min(max(least, wanted), numel)


def _choose(key: int, step: int, numel: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices (int64, strictly increasing) of ``count`` of ``numel`` elements, and the lengths of their stretches.

    Nobody may write to them.
    """
    index, length, made = _choice(key, step, numel, count, device)
    if made is not None:  # by whichever stream came first
        torch.cuda.current_stream(device).wait_event(made)
        uses(index, length)
    return index, length


# The packets of all ranks name the same choice, and each decodes it.
@lru_cache(maxsize=4)
def _choice(
    key: int, step: int, numel: int, count: int, device: torch.device
) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
    """As :func:`_choose`, and on CUDA when they are there."""
    words = philox(key, step, 0, -(-count // 4), device).view(-1)[:count]
    # floor(j numel / count) without a product that could overflow.
    base, rest = divmod(numel, max(count, 1))
    j = torch.arange(count + 1, device=device)
    ends = j * base + (j * rest).div(max(count, 1), rounding_mode="floor")
    length = ends.diff()
    index = ends[:-1] + ((words * length) >> 32)
    return index, length, torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _seeded(key: int, step: int, values: Tensor, numel: int) -> Packet:
    words = [word - (1 << 64) if word >> 63 else word for word in (key, step)]
    head = short_tensor(words, values.device)
    payload = torch.cat([head.view(torch.uint8), values.view(torch.uint8)])
    return Packet(kind=Kind.SEEDED, numel=numel, payload=payload, count=len(values))
