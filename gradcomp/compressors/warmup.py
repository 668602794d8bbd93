"""A warm-up for any compressor with a ratio or density: it begins with many elements and falls to its own share.

Y. Lin, S. Han, H. Mao, Y. Wang, W. J. Dally, "Deep gradient compression", ICLR 2018: in the first epochs, while weights
change fast, a quarter of the gradient is sent, then less, exponentially. Here the share falls from ``start`` to the
compressor's own within ``steps`` steps, in equal stages, from each to the next by at most a half. The compressor keeps
one state throughout.

Wire: the compressor's packets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from gradcomp import registry
from gradcomp.compressors.staged import Staged
from gradcomp.compressors.topk import TopK
from gradcomp.errors import ConfigError
from gradcomp.interfaces import Compressor
from gradcomp.options import check_integer, check_number
from gradcomp.residual import warm_up_rung, warm_up_shares

__all__ = ["Warmup"]


@dataclass(frozen=True, kw_only=True)
class Warmup(Staged):
    """Send a larger share of the gradient in the first steps.

    Attributes:
        compressor: any with a ``ratio`` or ``density``: where the warm-up ends.
        steps: how long it takes.
        start: the share it begins with.
    """

    id: ClassVar[str] = "warmup"
    one_state: ClassVar[bool] = True
    compressor: Compressor = TopK()  # noqa: RUF009 (frozen)
    steps: int = 400
    start: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "compressor", registry.compressor(self.compressor))
        check_integer("warmup", "steps", self.steps, at_least=1)
        field = _share_field(self.compressor)
        if field is None:
            raise ConfigError(
                f"warmup: compressor={self.compressor!r} is not allowed; it must have a ratio or a density"
            )
        check_number("warmup", "start", self.start, above=getattr(self.compressor, field), at_most=1.0)
        object.__setattr__(self, "start", float(self.start))

    def config(self) -> dict[str, object]:
        return {"id": self.id, "compressor": self.compressor.config(), "steps": self.steps, "start": self.start}

    @property
    def for_sums(self) -> Compressor:
        return dataclasses.replace(self, compressor=self.compressor.for_sums)

    def compressors(self) -> Sequence[Compressor]:
        return _rungs(self.compressor, self.start)

    def stage(self, step: int) -> int:
        return warm_up_rung(step, self.steps, len(self.compressors()))


def _share_field(compressor: Compressor) -> str | None:
    return next((field for field in ("ratio", "density") if getattr(compressor, field, None) is not None), None)


@cache
def _rungs(compressor: Compressor, start: float) -> tuple[Compressor, ...]:
    field = _share_field(compressor) or "ratio"
    *shares, _ = warm_up_shares(start, getattr(compressor, field))
    changed = [dataclasses.replace(compressor, **{field: share}) for share in shares]  # type: ignore[type-var]
    return (*changed, compressor)
