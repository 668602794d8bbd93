"""Autograd hooks: the exchange starts as gradients become ready, and is over when ``backward()`` returns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

__all__ = ["BackwardHooks", "Handle", "after_gradient", "running"]


class Handle(Protocol):
    """Something that can be taken off again."""

    def remove(self) -> None: ...


class BackwardHooks:
    """Hooks on parameters.

    Args:
        tensors: the parameters; those that are frozen now may be unfrozen later.
        active: whether this backward pass is to be exchanged; called with the position of a parameter that has its
            gradient, before anything else is.
        ready: called with the position of a parameter whose gradient is complete.
        finish: called when a backward pass that reached any of the parameters is over.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        *,
        active: Callable[[int], bool],
        ready: Callable[[int], None],
        finish: Callable[[], None],
    ) -> None:
        self._active, self._ready, self._finish = active, ready, finish
        self._in_backward = False
        self._handles = [after_gradient(tensor, self._on_gradient(position)) for position, tensor in enumerate(tensors)]

    def remove(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()

    def _on_gradient(self, position: int) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            if not self._active(position):
                return
            if not self._in_backward:
                self._in_backward = True
                self._call_at_the_end()
            self._ready(position)

        return hook

    def _call_at_the_end(self) -> None:
        """Have :meth:`_end_of_backward` run when backward is over, whatever parameters it did not reach."""
        outer = _outer_node()
        if outer is None:
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
            return
        # This is a backward pass inside another one's node, such as a reentrant checkpoint's, and ends before that
        # one does. What comes after the node belongs to the outer pass: it is asked from there.
        following = next(node for node, _ in outer.next_functions if node is not None)

        def ask(_: object) -> None:
            handle.remove()
            self._call_at_the_end()

        handle = following.register_prehook(ask)

    def _end_of_backward(self) -> None:
        self._in_backward = False
        self._finish()


def after_gradient(tensor: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``hook`` when a gradient is complete. Also on a frozen parameter, which torch refuses; it may thaw."""
    frozen = not tensor.requires_grad
    try:
        tensor.requires_grad_(True)
        handle: RemovableHandle = tensor.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    finally:
        if frozen:
            tensor.requires_grad_(False)
    return handle


def _outer_node() -> Node | None:
    """The node of the outermost backward pass that this one runs inside of; None if this is the outermost."""
    nodes: list[Node] = list(running(BackwardCFunction.apply))
    return nodes[-1] if nodes else None


def running(method: Callable[..., Any]) -> Iterator[Any]:
    """Whose ``method``, one written in Python, is being run by the callers of this; the innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is method.__code__:
            yield frame.f_locals["self"]
        frame = frame.f_back
