"""Where gradients lie and where their sums are put: in ``p.grad``, or in views of buffers that somebody else owns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from gradcomp.ownership import Ownership

__all__ = ["Gradients", "ParameterGradients", "ViewedGradients"]


class Gradients(ABC):
    """The gradients of some parameters, by position in the tensor table."""

    @abstractmethod
    def get(self, position: int) -> Tensor | None:
        """The gradient; None if there is none in this step."""

    @abstractmethod
    def get_or_make(self, position: int) -> Tensor:
        """The gradient; a new one, of no particular values, where there is none."""

    @abstractmethod
    def replace(self, position: int, memory: Tensor) -> None:
        """Let ``memory`` be the gradient; called only where :meth:`may_use_up` said yes."""

    @abstractmethod
    def may_use_up(self, position: int) -> bool:
        """Whether the gradient's memory is nobody else's (gradcomp.ownership)."""

    @abstractmethod
    def end_step(self) -> None:
        """The sums are in place."""


class ParameterGradients(Gradients):
    """``p.grad``; what a frozen parameter still has from before it was frozen is no gradient.

    Args:
        tensors: the parameters.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._ownership = Ownership(tensors)

    def get(self, position: int) -> Tensor | None:
        tensor = self._tensors[position]
        return tensor.grad if tensor.requires_grad else None

    def get_or_make(self, position: int) -> Tensor:
        tensor = self._tensors[position]
        if tensor.grad is None:
            tensor.grad = torch.empty_like(tensor)
        return tensor.grad

    def replace(self, position: int, memory: Tensor) -> None:
        tensor = self._tensors[position]
        tensor.grad = memory.view(tensor.shape)

    def may_use_up(self, position: int) -> bool:
        return self._ownership.may_use_up(position)

    def end_step(self) -> None:
        self._ownership.end_step()


class ViewedGradients(Gradients):
    """Views that are handed in anew for each step, such as those of DistributedDataParallel's buckets."""

    def __init__(self) -> None:
        self._views: dict[int, Tensor] = {}

    def put(self, position: int, view: Tensor) -> None:
        """This is the gradient in this step; its sum is to be written there."""
        self._views[position] = view

    def get(self, position: int) -> Tensor | None:
        return self._views.get(position)

    def get_or_make(self, position: int) -> Tensor:
        return self._views[position]

    def replace(self, position: int, memory: Tensor) -> None:
        raise RuntimeError("a view of somebody else's buffer cannot be replaced")

    def may_use_up(self, position: int) -> bool:
        return False

    def end_step(self) -> None:
        self._views.clear()
