"""Autograd hooks: the exchange starts as gradients become ready, and is over when ``backward()`` returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

__all__ = ["BackwardHooks", "Handle"]


class Handle(Protocol):
    """Something that can be taken off again."""

    def remove(self) -> None: ...


class BackwardHooks:
    """Hooks on parameters.

    Args:
        tensors: the parameters; those that are frozen now may be unfrozen later.
        active: whether this backward pass is to be exchanged.
        ready: called with the position of a parameter whose gradient is complete.
        finish: called when a backward pass that reached any of the parameters is over.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        *,
        active: Callable[[], bool],
        ready: Callable[[int], None],
        finish: Callable[[], None],
    ) -> None:
        self._active, self._ready, self._finish = active, ready, finish
        self._in_backward = False
        self._handles = [_hook(tensor, self._on_gradient(position)) for position, tensor in enumerate(tensors)]

    def remove(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()

    def _on_gradient(self, position: int) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            if not self._active():
                return
            if not self._in_backward:
                self._in_backward = True
                # Runs when this backward pass is over, whatever parameters it did not reach.
                torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
            self._ready(position)

        return hook

    def _end_of_backward(self) -> None:
        self._in_backward = False
        self._finish()


def _hook(tensor: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Also on a frozen parameter, which torch refuses: it may be unfrozen one day."""
    frozen = not tensor.requires_grad
    try:
        tensor.requires_grad_(True)
        handle: RemovableHandle = tensor.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    finally:
        if frozen:
            tensor.requires_grad_(False)
    return handle
