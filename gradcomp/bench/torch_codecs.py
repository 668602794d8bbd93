"""What comes nearest to some compressors in torch's own operations, with error feedback, as one would write it.

Positions are sent as int64 and signs as bytes, for that is what these operations give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["CODECS", "plain"]

# What encodes a gradient to tensors, keeping what was not sent; and what adds these to a matrix, which it returns.
Codec = tuple[Callable[[Tensor], Sequence[Tensor]], Callable[[Sequence[Tensor], Tensor], Tensor]]

_SHARE = 0.001
_RANK = 2


def _topk(like: Tensor) -> Codec:
    residual = torch.zeros_like(like).view(-1)
    k = max(1, int(_SHARE * like.numel()))

    def encode(grad: Tensor) -> Sequence[Tensor]:
        residual.add_(grad.view(-1))
        index = torch.topk(residual.abs(), k, sorted=False).indices
        values = residual[index]
        residual[index] = 0.0
        return values, index

    def decode_add(tensors: Sequence[Tensor], out: Tensor) -> Tensor:
        values, index = tensors
        out.view(-1).index_add_(0, index, values)
        return out

    return encode, decode_add


def _threshold(like: Tensor) -> Codec:
    """Everything as large as the k-th largest of the first gradient."""
    residual = torch.zeros_like(like).view(-1)
    tau = like.abs().view(-1).topk(max(1, int(_SHARE * like.numel()))).values.min()

    def encode(grad: Tensor) -> Sequence[Tensor]:
        residual.add_(grad.view(-1))
        index = (residual.abs() >= tau).nonzero().view(-1)
        negative = residual[index] < 0
        residual[index] -= torch.where(negative, -tau, tau)
        return index, negative

    def decode_add(tensors: Sequence[Tensor], out: Tensor) -> Tensor:
        index, negative = tensors
        out.view(-1).index_add_(0, index, torch.where(negative, -tau, tau))
        return out

    return encode, decode_add


def _powersgd(like: Tensor) -> Codec:
    """One power iteration, as torch's PowerSGD hook makes it of one matrix on one rank."""
    residual = torch.zeros_like(like)
    right = torch.randn(like.shape[1], min(_RANK, *like.shape), device=like.device)

    def encode(grad: Tensor) -> Sequence[Tensor]:
        nonlocal right
        residual.add_(grad)
        left = torch.linalg.qr(residual @ right).Q
        right = residual.t() @ left
        residual.addmm_(left, right.t(), alpha=-1.0)
        return left, right

    def decode_add(tensors: Sequence[Tensor], out: Tensor) -> Tensor:
        left, right = tensors
        return out.addmm_(left, right.t())

    return encode, decode_add


def plain(like: Tensor) -> Codec:
    """A copy, of what is sent as it is."""
    return lambda grad: (grad.clone(),), lambda tensors, out: out.add_(tensors[0])


CODECS: dict[str, Callable[[Tensor], Codec]] = {
    "torch.topk 0.1 %": _topk,
    "torch threshold 0.1 %": _threshold,
    "torch PowerSGD rank 2": _powersgd,
}
