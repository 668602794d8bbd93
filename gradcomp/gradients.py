"""Where gradients lie and where their sums are put: in ``p.grad``, or in views of buffers that somebody else owns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from gradcomp.ownership import Ownership
from gradcomp.products import Product, Products

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
    def watch(self, positions: Sequence[int]) -> None:
        """From now on find out what these gradients are products of, where that can be known."""

    @abstractmethod
    def product(self, position: int, grad: Tensor, start: int, stop: int) -> Product | None:
        """What flat elements ``start`` to ``stop`` of ``grad`` are a product of; None if unknown. Asked once."""

    @abstractmethod
    def end_step(self) -> None:
        """The sums are in place."""


class ParameterGradients(Gradients):
    """``p.grad``; what a frozen parameter still has from before it was frozen is no gradient.

    Args:
        tensors: the parameters.
        products: what knows of products.
    """

    def __init__(self, tensors: Sequence[Tensor], products: Products) -> None:
        self._tensors, self._products = tensors, products
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

    def watch(self, positions: Sequence[int]) -> None:
        self._products.watch([self._tensors[position] for position in positions])

    def product(self, position: int, grad: Tensor, start: int, stop: int) -> Product | None:
        return self._products.take(self._tensors[position], grad, start, stop)

    def end_step(self) -> None:
        self._ownership.end_step()
        self._products.clear()


class ViewedGradients(Gradients):
    """Views that are handed in anew for each step, such as those of DistributedDataParallel's buckets.

    Args:
        tensors: the parameters.
        products: what knows of products.
    """

    def __init__(self, tensors: Sequence[Tensor], products: Products) -> None:
        self._tensors, self._products = tensors, products
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

    def watch(self, positions: Sequence[int]) -> None:
        self._products.watch([self._tensors[position] for position in positions])

    def product(self, position: int, grad: Tensor, start: int, stop: int) -> Product | None:
        return self._products.take(self._tensors[position], grad, start, stop)

    def end_step(self) -> None:
        self._views.clear()
        self._products.clear()
