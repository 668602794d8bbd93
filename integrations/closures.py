"""Closures: optimizers that compute the gradients themselves, as often as they like, within one step.

L-BFGS (J. Nocedal, "Updating quasi-Newton matrices with limited storage", 1980; ``torch.optim.LBFGS``) asks the closure
for loss and gradients at several points, and by what it gets it decides where to look next and when to stop. So all
ranks must get the same: gradients they get inside ``backward()``, the loss as the mean over ranks (or the sum, as the
gradients are). It compares gradients with each other, too, and the loss with the gradient's slope: what a compressor
keeps from one point and adds at another spoils that, and it does not converge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from gradcomp.engine import GradientExchange
from gradcomp.errors import ConfigError
from gradcomp.rules import Choice, Rules

__all__ = ["check_line_search", "refuse_closure", "share_loss"]

Closure = Callable[[], Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]


def check_line_search(choice: Choice) -> None:
    """Raise ConfigError unless L-BFGS can work with these compressors: the casts and the linear ones."""
    codecs = [rule.compressor for rule in choice.rules] + [choice.default] if isinstance(choice, Rules) else [choice]
    for codec in codecs:
        if not codec.stateless and not codec.linear:
            raise ConfigError(
                f"compressor {codec.id!r} is not for {LBFGS.__name__}, which compares gradients at several points "
                "within a step: use a cast (none, fp16, bf16) or a linear compressor (powersgd, randomk)"
            )


def share_loss(sync: GradientExchange, reduction: str) -> Callable[[Optimizer, Any, Any], Call | None]:
    """A step pre-hook for L-BFGS: what the closure returns is the same on all ranks.

    Args:
        reduction: the gradients': ``"mean"`` or ``"sum"``.
    """
    factor = sync.world_size if reduction == "sum" else 1

    def shared(closure: Closure) -> Closure:
        def evaluate() -> Any:
            loss = closure()
            mean = sync.average(torch.as_tensor(loss)) * factor
            return mean.to(loss.device, loss.dtype) if isinstance(loss, Tensor) else float(mean)

        return evaluate

    def before_step(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if len(args) > 1 and args[1] is not None:
            return (args[0], shared(args[1]), *args[2:]), kwargs
        if kwargs.get("closure") is not None:
            return args, kwargs | {"closure": shared(kwargs["closure"])}
        return None  # the optimizer's own error

    return before_step


def refuse_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ConfigError if ``step()`` was given a closure: it would compute the gradients after their exchange."""
    if any(argument is not None for argument in (*args[1:2], kwargs.get("closure"))):
        raise ConfigError(
            'attach: when="step" exchanges gradients before optimizer.step(), and the closure given to it would then '
            'compute them anew, of this rank alone; use when="backward"'
        )
