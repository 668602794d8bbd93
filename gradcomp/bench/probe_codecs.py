"""What compressors cost on this machine, in core time, on gradients of the network that is to be trained.

Each is timed on a small and on a large tensor; the line through both is its cost. All ranks measure at once: where
they share a machine, they share its memory as well.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from gradcomp import kernels
from gradcomp.bench.meeting import Meeting
from gradcomp.bench.probe_model import Clock, Workload
from gradcomp.forecast import CodecCost
from gradcomp.interfaces import Compressor
from gradcomp.packet import HEADER_NBYTES, Kind, Packet
from gradcomp.registry import format_spec

__all__ = ["Samples", "probe_codec", "probe_codecs", "take_samples"]

_REPEATS = 7
_WARM_UP = 8  # thresholds find their level
_STEPS = 4  # gradients of so many steps in a row
_SMALL = 64  # rows and columns, at most
_MOST_ELEMENTS = 8 << 20

Samples = tuple[list[Tensor], list[Tensor]]  # a small matrix's gradients, and a large one's


def take_samples(workload: Workload) -> Samples:
    """Gradients of the largest matrix of some steps, and a corner of each."""
    largest = max((p for _, p in workload.named_parameters), key=lambda p: (p.dim() > 1, p.numel()))
    large: list[Tensor] = []
    for _ in range(_STEPS):
        workload.backward()
        if largest.grad is not None:
            rows = max(1, min(len(largest), _MOST_ELEMENTS * len(largest) // largest.numel())) if largest.dim() else 1
            large.append(largest.grad.detach().reshape(len(largest) if largest.dim() else 1, -1)[:rows].float().clone())
        workload.optimizer.step()
        workload.optimizer.zero_grad()
    return [grad[:_SMALL, :_SMALL].contiguous() for grad in large], large


def probe_codecs(codecs: Iterable[Compressor], samples: Samples, meeting: Meeting) -> dict[str, CodecCost]:
    """By spec string; the same compressors on all ranks."""
    costs = {}
    for codec in codecs:
        meeting.begin()
        costs[format_spec(codec)] = probe_codec(codec, samples)
    return costs


def probe_codec(codec: Compressor, samples: Samples) -> CodecCost:
    """Time one compressor."""
    small, large = (_Timed(codec, grads) for grads in samples)
    span = max(large.numel - small.numel, 1)

    def line(least_s: float, most_s: float) -> tuple[float, float]:
        each_s = max(most_s - least_s, 0.0) / span if large.numel > small.numel else 0.0
        return max(least_s - each_s * small.numel, 0.0), each_s

    encode_s, encode_s_per_element = line(small.encode_s, large.encode_s)
    decode_s, decode_s_per_element = line(small.decode_s, large.decode_s)
    values = max(large.packet.nbytes - HEADER_NBYTES, 0)
    of_sides = large.packet.kind == Kind.FACTORS
    return CodecCost(
        encode_s=encode_s,
        encode_s_per_element=encode_s_per_element,
        commit_s_per_element=large.commit_s / large.numel,
        part_commit_s_per_element=large.part_commit_s / large.numel,
        decode_s=decode_s,
        decode_s_per_element=decode_s_per_element,
        clear_s_per_element=large.clear_s / large.numel,
        packet_bytes=HEADER_NBYTES,
        bytes_per_element=0.0 if of_sides else values / large.numel,
        bytes_per_side=values / sum(large.shape) if of_sides else 0.0,
        rounds=_rounds(codec, samples[0][0]),
    )


class _Timed:
    """One compressor on one tensor; medians, in seconds of one core."""

    def __init__(self, codec: Compressor, grads: Sequence[Tensor]) -> None:
        self.numel, self.shape = grads[0].numel(), tuple(grads[0].shape)
        self.packet = codec.encode(grads[0])
        self._clock = Clock(grads[0].device)
        state = {} if codec.stateless else codec.new_state(grads[0])
        if not codec.stateless:
            codec.seed_state(state, parameter="weight", rank=0)
        times: dict[str, list[float]] = {"encode": [], "commit": [], "part": [], "decode": [], "clear": []}
        out = torch.zeros(self.numel, device=grads[0].device)
        for turn in range(_WARM_UP + _REPEATS):
            grad = grads[turn % len(grads)]
            if codec.stateless:
                encode_s = self._seconds(lambda g=grad: self._keep(codec.encode(g)))  # type: ignore[misc]
                commit_s = part_s = 0.0
            else:
                encode_s, commit_s, part_s = self._with_state(codec, grad, state)
            data = memoryview(bytearray(self.packet.to_bytes()))
            decoder = codec.at(state) if codec.in_step else codec
            clear_s = self._seconds(lambda: kernels.clear(out))
            decode_s = self._seconds(
                lambda d=data, c=decoder: c.decompress_add(
                    Packet.from_bytes(d, numel=self.numel, device=out.device), out
                )  # type: ignore[misc]
            )
            if turn >= _WARM_UP:
                for name, took_s in zip(times, (encode_s, commit_s, part_s, decode_s, clear_s), strict=True):
                    times[name].append(took_s)
        self.encode_s, self.commit_s, self.part_commit_s, self.decode_s, self.clear_s = (
            statistics.median(row) for row in times.values()
        )

    def _keep(self, packet: Packet) -> None:
        self.packet = packet

    def _seconds(self, call: Callable[[], object]) -> float:
        start_s = self._clock()
        call()
        return self._clock() - start_s

    def _with_state(self, codec: Compressor, grad: Tensor, state: dict[str, Tensor]) -> tuple[float, float, float]:
        """Of a whole tensor, whose memory may become the residual; and of a part, whose memory may not."""
        mine = grad.clone()
        start_s = self._clock()
        packet, commit = codec.prepare(mine, state)
        middle_s = self._clock()
        commit()
        end_s = self._clock()
        packet = codec.encode(grad, state)
        codec.commit(grad, packet, state)
        both_s = self._clock() - end_s
        self.packet = packet
        return middle_s - start_s, end_s - middle_s, max(both_s - (middle_s - start_s), 0.0)


def _rounds(codec: Compressor, grad: Tensor) -> int:
    """All-reduces that it takes."""
    if not codec.linear:
        return 1
    count = 0

    def counted() -> object:
        nonlocal count
        rounds = codec.rounds(grad)
        try:
            part = next(rounds)
            while True:
                count += 1
                part = rounds.send(part)
        except StopIteration as end:
            return end.value

    counted()
    return max(count, 1)
