"""Whichever of several compressors makes the step shortest here: tried in the run itself, anew as the link changes.

That is for :func:`gradcomp.attach` and the DDP hook, whose exchange times its steps and changes compressors between
them (:mod:`gradcomp.tuner`, docs/AUTO.md). A compressor by itself knows no link. So where there is nobody who times
steps (``compress``, a vector in ``all_reduce``) it is the candidate that is expected to send least, which is also what
a run begins with: wrong on a fast link by milliseconds, where dense on a slow one is wrong by minutes.

Wire: the candidates' packets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradcomp import registry
from gradcomp.compressors.cast import BFloat16, NoCompression
from gradcomp.compressors.staged import Staged
from gradcomp.compressors.threshold import Threshold
from gradcomp.errors import ConfigError
from gradcomp.interfaces import Commit, Compressor, State
from gradcomp.options import check_flag, check_integer, check_number
from gradcomp.packet import Packet

__all__ = ["Auto"]

_DEFAULT_CANDIDATES = (NoCompression(), BFloat16(), Threshold())
_USUAL_NUMEL = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Auto(Compressor):
    """The fastest of its candidates, dense among them.

    Attributes:
        candidates: compressors (spec strings or configs), the most faithful first: of those that are equally fast the
            first is taken. What is lossy and keeps a residual may be chosen if it is here; saying ``auto`` agrees to
            that.
        per_bucket: whether mixtures are tried as well: for each bucket what is expected to make the step shortest,
            which is dense where backward hides it.
        every: after so many steps all is tried again. Sooner if step time or waiting change by a quarter.
        trial: so many steps of each candidate are timed in a row; one more, after the change, is not.
        margin: another one must be faster by that share to be changed to.
    """

    id: ClassVar[str] = "auto"
    in_step: ClassVar[bool] = True  # candidates may be, and all are told
    candidates: tuple[Compressor, ...] = _DEFAULT_CANDIDATES
    per_bucket: bool = True
    every: int = 1000
    trial: int = 4
    margin: float = 0.02

    def __post_init__(self) -> None:
        if not isinstance(self.candidates, (list, tuple)) or not self.candidates:
            raise ConfigError(
                f"auto: candidates={self.candidates!r} is not allowed; candidates must be a list of compressors"
            )
        object.__setattr__(self, "candidates", tuple(map(registry.compressor, self.candidates)))
        for number, inner in enumerate(self.candidates):
            why = _why_not(inner) or ("it is there twice" if inner in self.candidates[:number] else "")
            if why:
                raise ConfigError(f"auto: {inner.id!r} is not allowed among the candidates: {why}")
        check_flag("auto", "per_bucket", self.per_bucket)
        check_integer("auto", "every", self.every, at_least=10)
        check_integer("auto", "trial", self.trial, at_least=1, at_most=1000)
        check_number("auto", "margin", self.margin, at_least=0.0, below=1.0)
        object.__setattr__(self, "margin", float(self.margin))

    def config(self) -> dict[str, object]:
        return super().config() | {"candidates": [inner.config() for inner in self.candidates]}

    @property
    def least(self) -> Compressor:
        """The candidate that is expected to send least: what a run begins with."""
        return min(self.candidates, key=lambda inner: inner.typical_nbytes(_USUAL_NUMEL))

    # -- as any compressor: the candidate that sends least -------------------------------------------------------------

    @property
    def additive(self) -> tuple[str, ...]:
        return self.least.additive

    @property
    def for_sums(self) -> Compressor:
        return self.least.for_sums

    def new_state(self, grad: Tensor) -> State:
        return self.least.new_state(grad)

    def seed_state(self, state: State, *, parameter: str, rank: int) -> None:
        self.least.seed_state(state, parameter=parameter, rank=rank)

    def encode(self, grad: Tensor, state: State | None = None) -> Packet:
        return self.least.encode(grad, state)

    def encode_in_place(self, grad: Tensor, state: State) -> Packet:
        return self.least.encode_in_place(grad, state)

    def prepare(self, grad: Tensor, state: State) -> tuple[Packet, Commit]:
        return self.least.prepare(grad, state)

    def commit(self, grad: Tensor, packet: Packet, state: State) -> None:
        self.least.commit(grad, packet, state)

    def pass_over(self, state: State) -> None:
        self.least.pass_over(state)

    def at(self, state: State) -> Compressor:
        return self.least.at(state)

    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        self.least.decode_add(packet, out, scale)

    def decode_sum(self, packets: Sequence[Packet], out: Tensor, scale: float) -> None:
        self.least.decode_sum(packets, out, scale)

    def aggregate(self, total: Tensor) -> None:
        self.least.aggregate(total)

    def max_nbytes(self, numel: int) -> int:
        return max(inner.max_nbytes(numel) for inner in self.candidates)

    def typical_nbytes(self, numel: int) -> int:
        return self.least.typical_nbytes(numel)

    def stats(self, packet: Packet, state: State | None = None) -> dict[str, float]:
        return self.least.stats(packet, state)


def _why_not(inner: Compressor) -> str:
    """Why a compressor cannot be changed to and from in mid-run; empty if it can."""
    if isinstance(inner, Auto):
        return "its own candidates belong there"
    if isinstance(inner, Staged):
        return "its schedule would begin anew each time it is tried"
    if not inner.conserves:
        return (
            "what it holds back is not all there is to keep (momentum, or a residual that is clipped), "
            "and a change would lose the rest"
        )
    return ""
