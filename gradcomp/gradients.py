"""Where gradients lie and where their sums are put: in ``p.grad``, or in views of buffers that somebody else owns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from gradcomp.errors import GradientError
from gradcomp.ownership import Ownership
from gradcomp.products import Product, Products

__all__ = ["Gradients", "HeldGradients", "ParameterGradients", "ViewedGradients", "check_gradient"]


class Gradients(ABC):
    """The gradients of some parameters, by position in the tensor table."""

    def hold(self, positions: Sequence[int]) -> None:
        """The gradients of these are complete, and their exchange begins."""
        return

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


class _WatchedGradients(Gradients):
    """Base of those that know their parameters.

    Args:
        tensors: the parameters.
        products: what knows of products.
    """

    def __init__(self, tensors: Sequence[Tensor], products: Products) -> None:
        self._tensors, self._products = tensors, products

    def watch(self, positions: Sequence[int]) -> None:
        self._products.watch([self._tensors[position] for position in positions])

    def product(self, position: int, grad: Tensor, start: int, stop: int) -> Product | None:
        return self._products.take(self._tensors[position], grad, start, stop)


class ParameterGradients(_WatchedGradients):
    """``p.grad``; what a frozen parameter still has from before it was frozen is no gradient."""

    def __init__(self, tensors: Sequence[Tensor], products: Products) -> None:
        super().__init__(tensors, products)
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
        self._products.clear()


class ViewedGradients(_WatchedGradients):
    """Views that are handed in anew for each step, such as those of DistributedDataParallel's buckets."""

    def __init__(self, tensors: Sequence[Tensor], products: Products) -> None:
        super().__init__(tensors, products)
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
        self._products.clear()


class HeldGradients(_WatchedGradients):
    """Gradients of a backward pass that are exchanged while ``p.grad`` is the training loop's again."""

    def __init__(self, tensors: Sequence[Tensor], products: Products) -> None:
        super().__init__(tensors, products)
        self._ownership = Ownership(tensors)
        self._given: dict[int, tuple[Tensor, int]] = {}  # what backward left in p.grad, and its version
        self._sums: dict[int, Tensor] = {}
        self._usable: set[int] = set()
        self._dropped: set[int] = set()

    def hold(self, positions: Sequence[int]) -> None:
        for position in positions:
            tensor = self._tensors[position]
            grad = tensor.grad if tensor.requires_grad else None
            if grad is None:
                continue
            if grad.layout == torch.strided and self._ownership.may_use_up(position):
                self._usable.add(position)
            self._given[position] = grad, grad._version
            # The same memory with a version of its own: what the exchange writes is no change of anybody else's.
            self._sums[position] = grad.data

    def get(self, position: int) -> Tensor | None:
        return self._sums.get(position)

    def get_or_make(self, position: int) -> Tensor:
        if position not in self._sums:
            self._sums[position] = torch.empty_like(self._tensors[position])
        return self._sums[position]

    def replace(self, position: int, memory: Tensor) -> None:
        self._sums[position] = memory.view(self._tensors[position].shape)

    def may_use_up(self, position: int) -> bool:
        return position in self._usable

    def take(self) -> None:
        """Clear ``p.grad``: from now on it belongs to the next backward pass. Where it was cleared, so is the sum.

        Raises:
            GradientError: it was changed since backward.
        """
        self._look()
        self._ownership.end_step()
        for position in self._given:
            self._tensors[position].grad = None

    def give_back(self) -> None:
        """All sums are here: put them in ``p.grad``, unless it was cleared since backward, and forget them.

        Raises:
            GradientError: it was changed.
        """
        self._look()
        for tensor, total in self.sums(range(len(self._tensors))):
            if tensor.grad is None or tensor.grad.data_ptr() != total.data_ptr():
                tensor.grad = total
        self._ownership.end_step()

    def _look(self) -> None:
        """What became of ``p.grad`` since backward."""
        for position, (grad, version) in self._given.items():
            found = self._tensors[position].grad
            if found is None:
                self._dropped.add(position)
            elif found is not grad or grad._version != version:
                raise GradientError(
                    f"the gradient of a parameter of shape {tuple(grad.shape)} was changed between backward() and "
                    "optimizer.step(), while it was being exchanged: with overlap='forward' it is this rank's alone "
                    "until then. Call sync.wait() after backward() to change it (to clip it, say), or use "
                    "overlap='backward'"
                )
        if self._given and len(self._dropped) == len(self._given):
            self._dropped.update(range(len(self._tensors)))  # zero_grad(): also where only other ranks had one

    def sums(self, positions: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Those of these parameters that have a sum, with it."""
        return [(self._tensors[p], self._sums[p]) for p in positions if p in self._sums and p not in self._dropped]

    def release(self, positions: Sequence[int]) -> None:
        """Forget the sums of these."""
        for position in positions:
            self._sums.pop(position, None)
            self._given.pop(position, None)

    def end_step(self) -> None:
        for held in (self._given, self._sums, self._usable, self._dropped):
            held.clear()
        self._products.clear()


def check_gradient(name: str, grad: Tensor | None) -> None:
    """Raise GradientError for a gradient that cannot be exchanged: sparse, or of a strange type."""
    if grad is None:
        return
    if grad.layout != torch.strided:
        raise GradientError(
            f"parameter {name!r} has a {grad.layout} gradient; only dense (strided) gradients can "
            "be exchanged: use sparse=False in the embedding"
        )
    if grad.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise GradientError(f"parameter {name!r} has a {grad.dtype} gradient")
