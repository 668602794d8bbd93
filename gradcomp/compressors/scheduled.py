"""A schedule of compressors: one after the other, by step. What stages share is in :mod:`gradcomp.compressors.staged`.

Wire: the packets of the stages' compressors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from gradcomp import registry
from gradcomp.compressors.cast import NoCompression
from gradcomp.compressors.staged import Staged
from gradcomp.compressors.topk import TopK
from gradcomp.errors import ConfigError
from gradcomp.interfaces import Compressor
from gradcomp.options import check_integer

__all__ = ["Scheduled"]

_DEFAULT_STAGES = ((100, NoCompression()),)


@dataclass(frozen=True, kw_only=True)
class Scheduled(Staged):
    """Use one compressor after the other, by step, carrying the residual over.

    Attributes:
        stages: pairs of a step and a compressor (a spec string or a config), which is used before that step.
        then: the compressor from the last of these steps on.
    """

    id: ClassVar[str] = "scheduled"
    stages: tuple[tuple[int, Compressor], ...] = _DEFAULT_STAGES
    then: Compressor = TopK()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        object.__setattr__(self, "then", registry.compressor(self.then))
        stages: list[tuple[int, Compressor]] = []
        if not isinstance(self.stages, (list, tuple)):
            raise ConfigError(f"scheduled: stages={self.stages!r} is not allowed; stages must be a list")
        for pair in self.stages:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise ConfigError(f'scheduled: stages has {pair!r}; a stage is [step, "compressor"]')
            until, inner = pair
            check_integer("scheduled", "stages", until, at_least=stages[-1][0] + 1 if stages else 1)
            stages.append((until, registry.compressor(inner)))
        object.__setattr__(self, "stages", tuple(stages))
        for compressor in self.compressors():
            if compressor.factored:
                raise ConfigError(
                    f"scheduled: compressor {compressor.id!r} is not allowed as a stage: products are not known there; "
                    "set_compressor() changes to it in mid-run"
                )

    def config(self) -> dict[str, object]:
        stages = [[until, inner.config()] for until, inner in self.stages]
        return {"id": self.id, "stages": stages, "then": self.then.config()}

    @property
    def for_sums(self) -> Compressor:
        stages = tuple((until, inner.for_sums) for until, inner in self.stages)
        return replace(self, stages=stages, then=self.then.for_sums)

    def compressors(self) -> Sequence[Compressor]:
        return (*(inner for _, inner in self.stages), self.then)

    def stage(self, step: int) -> int:
        return sum(step >= until for until, _ in self.stages)
