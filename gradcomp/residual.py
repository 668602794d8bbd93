"""Pieces of error feedback that compressors share: small functions on tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradcomp.kernels.reference_chunks import chunks

__all__ = ["advance_momentum", "clip_residual", "clip_scale", "mask_momentum", "warm_up_rung", "warm_up_shares"]


def clip_residual(residual: Tensor, limit: float) -> None:
    """Clip every element to +-``limit``, in place. What is cut off is lost."""
    limit = min(limit, torch.finfo(torch.float32).max)
    residual.clamp_(-limit, limit)


def clip_scale(grad: Tensor, limit: float) -> float:
    """What to multiply ``grad`` with so that its Euclidean norm is at most ``limit``: 1 if it is, or is not finite.

    Squares are summed in float64: those of finite float32 values may not be finite float32.
    """
    squares = 0.0
    for part in chunks(grad.numel(), grad.device):
        squares += float(grad[part].to(torch.float64).square().sum())
    if not limit * limit < squares < math.inf:
        return 1.0
    # Rounded to float32, so that a sum in another order, on another thread, gives the same.
    return float(torch.tensor(limit / math.sqrt(squares), dtype=torch.float32))


def advance_momentum(velocity: Tensor, grad: Tensor, momentum: float, *, nesterov: bool, out: Tensor) -> Tensor:
    """Momentum correction: velocity = momentum * velocity + grad; with Nesterov momentum * (velocity + grad).

    Args:
        velocity: float32.
        out: where the new velocity goes; may be ``velocity``.

    Returns:
        What the residual gets in place of the gradient: the new velocity (``out`` itself); with Nesterov plus ``grad``.
    """
    if nesterov:
        return torch.add(velocity, grad, out=out).mul_(momentum) + grad
    return torch.mul(velocity, momentum, out=out).add_(grad)


def mask_momentum(velocity: Tensor, index: Tensor) -> None:
    """Momentum factor masking: what was sent stops moving, in place, lest it go on in a direction that is stale."""
    velocity[index] = 0.0


def warm_up_shares(start: float, end: float) -> tuple[float, ...]:
    """The shares of elements that a warm-up sends, one after the other: falling exponentially, at most to the half.

    >>> [round(share, 4) for share in warm_up_shares(0.25, 0.01)]
    [0.25, 0.1313, 0.069, 0.0362, 0.019, 0.01]
    """
    rungs = max(0, math.ceil(math.log2(start / end)))
    return (*(start * (end / start) ** (rung / rungs) for rung in range(rungs)), end)


def warm_up_rung(step: int, steps: int, count: int) -> int:
    """Which of ``count`` shares is sent at ``step``: the last from ``steps`` on, before that each other as long."""
    return count - 1 if step >= steps else step * (count - 1) // steps
