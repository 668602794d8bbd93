"""What schedules share: several compressors, one after the other, with one residual through all of them.

The state is the residual, shared by all stages, a step counter, and whatever else each stage's compressor remembers. A
stage without error feedback of its own (``none``, ``fp16``) sends gradient + residual, and what its packet lost stays
in the residual: so nothing is lost where one stage ends and another begins.

Steps are those in which any rank had a gradient for the tensor, so that all ranks are in the same stage. Packets are
decoded by that stage's compressor, which refuses those of others as far as it can tell. Where the step is not known (a
packet by itself) it is the first of the compressors that takes it, the last stage's before the earlier ones': these
tell their packets apart by what the header says.

A schedule is linear in all its stages or not at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from gradcomp.compressors import flat_gradient
from gradcomp.errors import PacketError
from gradcomp.interfaces import Compressor, State
from gradcomp.kernels.reference_chunks import nonfinite_value
from gradcomp.packet import Packet

__all__ = ["Staged"]


@dataclass(frozen=True, kw_only=True)
class Staged(Compressor, ABC):
    """What schedules share. Subclasses say which compressors there are and which is whose turn.

    State: ``residual``, ``step`` (int64, 0-dim, on the CPU), and the stages' other fields, named ``"0.tau"``, ...

    Attributes:
        one_state: whether the stages are one compressor with other options, so that one state serves all.
    """

    in_step: ClassVar[bool] = True
    one_state: ClassVar[bool] = False

    @abstractmethod
    def compressors(self) -> Sequence[Compressor]:
        """The stages' compressors, in order."""

    @abstractmethod
    def stage(self, step: int) -> int:
        """Which of them it is at ``step``."""

    @property
    def conserves(self) -> bool:
        return all(inner.conserves for inner in self.compressors() if _has_residual(inner))

    @property
    def linear(self) -> bool:
        return all(inner.linear for inner in self.compressors())

    def new_state(self, grad: Tensor) -> State:
        state = super().new_state(grad) | {"step": torch.zeros((), dtype=torch.int64)}
        for number, inner in enumerate(self.compressors()):
            fields = {} if inner.stateless or (number and self.one_state) else inner.new_state(grad)
            state |= {f"{number}.{name}": tensor for name, tensor in fields.items() if name != "residual"}
        return state

    def seed_state(self, state: State, *, parameter: str, rank: int) -> None:
        for number, inner in enumerate(self.compressors()):
            if not (number and self.one_state):
                own = self._own(number, state)
                inner.seed_state(own, parameter=f"{parameter} stage {number}", rank=rank)
                self._keep(number, own, state)

    def encode(self, grad: Tensor, state: State | None = None) -> Packet:
        number = self._number(state)
        inner = self.compressors()[number]
        if state is None:
            return inner.encode(grad)
        own = self._own(number, state)
        if _has_residual(inner):
            return inner.encode(grad, own)
        return _finite_or_not(inner, inner.encode(_accumulated(grad, state), own))

    def rounds(self, grad: Tensor, state: State | None = None) -> Generator[Tensor, Tensor, tuple[Packet, Packet]]:
        number = self._number(state)
        inner = self.compressors()[number]
        if state is None:
            return (yield from inner.rounds(grad))
        own_state = self._own(number, state)
        if _has_residual(inner):
            return (yield from inner.rounds(grad, own_state))
        whole = _accumulated(grad, state)
        own, total = yield from inner.rounds(whole, own_state)
        if inner.stateless:
            own = inner.encode(whole)  # what the residual needs, and such rounds need not say
        return _finite_or_not(inner, own), _finite_or_not(inner, total)

    def commit(self, grad: Tensor, packet: Packet, state: State) -> None:
        self.commit_sum(grad, packet, packet, state)

    def commit_sum(self, grad: Tensor, own: Packet, total: Packet, state: State) -> None:
        if own.is_nonfinite:
            return
        number = self._number(state)
        inner, own_state = self.compressors()[number], self._own(number, state)
        if _has_residual(inner):
            inner.commit_sum(grad, own, total, own_state)
        else:
            if own_state:
                inner.commit_sum(_accumulated(grad, state), own, total, own_state)
            super().commit(flat_gradient(grad), own, state)
        self._keep(number, own_state, state)
        state["step"] += 1

    def pass_over(self, state: State) -> None:
        number = self._number(state)
        own = self._own(number, state)
        self.compressors()[number].pass_over(own)
        self._keep(number, own, state)
        state["step"] += 1

    def at(self, state: State) -> Compressor:
        number = self._number(state)
        return self.compressors()[number].at(self._own(number, state))

    def encode_in_place(self, grad: Tensor, state: State) -> Packet:
        number = self._number(state)
        inner, own = self.compressors()[number], self._own(number, state)
        if not _has_residual(inner):
            return super().encode_in_place(grad, state)
        packet = inner.encode_in_place(grad, own)
        if not packet.is_nonfinite:
            self._keep(number, own, state)
            state["step"] += 1
        return packet

    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        reasons = []
        for inner in dict.fromkeys(reversed(self.compressors())):
            refusal = _decode_or_refuse(inner, packet, out, scale)
            if refusal is None:
                return
            reasons.append(f"{inner.id}: {refusal}")
        raise PacketError(f"no stage of this schedule takes the packet; {'; '.join(reasons)}")

    def max_nbytes(self, numel: int) -> int:
        return max(inner.max_nbytes(numel) for inner in self.compressors())

    def typical_nbytes(self, numel: int) -> int:
        return self.compressors()[-1].typical_nbytes(numel)  # most of the run

    def stats(self, packet: Packet, state: State | None = None) -> dict[str, float]:
        """What the stage's compressor says; nothing without a state, for then the stage is not known."""
        if state is None:
            return {}
        number = self._number(state)
        return self.compressors()[number].stats(packet, self._own(number, state))

    def _number(self, state: State | None) -> int:
        return self.stage(0 if state is None else int(state["step"]))

    def _own(self, number: int, state: State) -> State:
        """A stage's own state: the same tensors, under the names its compressor knows."""
        if self.compressors()[number].stateless:
            return {}
        prefix = f"{0 if self.one_state else number}."
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        return own | {"residual": state["residual"]} if _has_residual(self.compressors()[number]) else own

    def _keep(self, number: int, own: State, state: State) -> None:
        """Take over what a compressor put in the place of its tensors instead of changing them."""
        prefix = f"{0 if self.one_state else number}."
        state |= {name if name == "residual" else prefix + name: tensor for name, tensor in own.items()}


@cache
def _has_residual(compressor: Compressor) -> bool:
    """Whether a compressor does its own error feedback."""
    return "residual" in compressor.new_state(torch.zeros(1))


def _accumulated(grad: Tensor, state: State) -> Tensor:
    return (state["residual"] + flat_gradient(grad)).view(grad.shape)


def _finite_or_not(compressor: Compressor, packet: Packet) -> Packet:
    """A stateless compressor lets NaN and Inf pass, and fp16 makes Inf of what is too large: the residual must not."""
    bad = 0.0 if packet.is_nonfinite else nonfinite_value(compressor.decompress(packet))
    return Packet.nonfinite(bad, packet.numel, packet.device) if bad else packet


def _decode_or_refuse(compressor: Compressor, packet: Packet, out: Tensor, scale: float) -> PacketError | None:
    """Decode, or say why not: ``out`` is then unchanged."""
    try:
        compressor.decode_add(packet, out, scale)
    except PacketError as error:
        return error
    return None
