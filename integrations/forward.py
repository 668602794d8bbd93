"""``attach(..., overlap="forward")``: the next forward pass begins while gradients are still on their way.

``optimizer.step()`` then only notes that it is due, and the options it is due with. Each module's forward waits for its
own parameters' buckets, and steps them by the same optimizer before it uses them. The bits are those of the plain
order, because what ``torch.optim``'s optimizers do to a parameter depends on nothing but that parameter's gradient,
state and group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from gradcomp.engine import GradientExchange
from gradcomp.errors import ConfigError
from gradcomp.hooks import Handle

__all__ = ["ForwardOverlap", "check_forward"]

StepHook = Callable[[Optimizer, Any, Any], object]


def check_forward(optimizer: Optimizer, model: nn.Module | None, *, when: str, scaled: bool, levels: bool) -> None:
    """Raise ConfigError unless ``overlap="forward"`` can be had.

    Args:
        scaled: whether a GradScaler scales the loss.
        levels: whether ranks are a hierarchy.
    """
    why = ""
    if model is None:
        why = "without model=, whose modules must wait for their parameters"
    elif any(isinstance(getattr(module, "_orig_mod", None), nn.Module) for module in model.modules()):
        why = "with a model that torch.compile() made: compiled code calls no module's hooks"
    elif when != "backward":
        why = f"with when={when!r}, which waits for the exchange before each step"
    elif scaled:
        why = "with a scaler, which must see all gradients before it lets the optimizer step"
    elif levels:
        why = "with hosts as levels (exchange hierarchical)"
    elif isinstance(optimizer, LBFGS) or not type(optimizer).step.__module__.startswith("torch.optim."):
        why = (
            f"with {type(optimizer).__name__}: parameters are stepped a few at a time, which comes to the same only "
            "for optimizers that step each by itself; of torch.optim's all but LBFGS do, of others it is not known"
        )
    if why:
        raise ConfigError(f"attach: overlap='forward' is not allowed {why}; use overlap='backward'")


class ForwardOverlap:
    """The hooks of ``overlap="forward"``, until it is removed.

    Args:
        before_step: a step hook that looks at the user's own calls of ``optimizer.step()``.
    """

    def __init__(self, sync: GradientExchange, optimizer: Optimizer, model: nn.Module, before_step: StepHook) -> None:
        self._ahead = sync.ahead
        self._optimizer = optimizer
        self._before_step = before_step
        self._stepping = False
        self._options: list[dict[str, Any]] = []
        self._called: set[nn.Module] = set()
        self._own: dict[nn.Module, list[Tensor]] = {}
        self._handles: list[Handle] = [
            optimizer.register_step_pre_hook(self._on_step),
            optimizer.register_state_dict_pre_hook(self._land_all),
            optimizer.register_load_state_dict_pre_hook(self._land_all),
        ]
        for module in model.modules():
            self._handles += [
                module.register_forward_pre_hook(self._on_forward),
                module.register_state_dict_pre_hook(self._land_all),  # type: ignore[no-untyped-call]
                module.register_load_state_dict_pre_hook(self._land_all),  # type: ignore[no-untyped-call]
            ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _land_all(self, *_: object) -> None:
        self._ahead.land()

    # -- forward -------------------------------------------------------------------------------------------------------

    def _on_forward(self, module: nn.Module, _: object) -> None:
        if module not in self._called:
            self._called.add(module)
            self._own.clear()
        self._ahead.late = frozenset()
        if not self._ahead.is_flying:
            return
        if self._ahead.is_promised:
            self._ahead.land(self._parameters_of(module))
        elif torch.is_grad_enabled():
            # A second pass before the optimizer steps: gradients will be added to what this one exchanges.
            self._ahead.land()

    def _parameters_of(self, module: nn.Module) -> list[Tensor]:
        """What ``module`` may use by itself: its own parameters, and those of modules inside that are never called.

        Such as MultiheadAttention's projection, whose weight is only looked up. Without gradients everything inside:
        there are shortcuts for evaluation that call no module inside.
        """
        if not torch.is_grad_enabled():
            return list(module.parameters())
        if module not in self._own:
            self._own[module] = list(self._uncalled(module))
        return self._own[module]

    def _uncalled(self, module: nn.Module) -> Iterator[Tensor]:
        yield from module.parameters(recurse=False)
        for child in module.children():
            if child not in self._called:
                yield from self._uncalled(child)

    # -- the optimizer -------------------------------------------------------------------------------------------------

    def _on_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._stepping:
            return
        if any(argument is not None for argument in (*args[1:2], kwargs.get("closure"))):
            raise ConfigError(
                "attach: with overlap='forward' optimizer.step() takes no closure, which would compute gradients anew "
                "while some are on their way; use overlap='backward'"
            )
        self._before_step(optimizer, args, kwargs)
        if self._ahead.is_flying and not self._ahead.is_promised:
            # Schedulers change them right after this.
            self._options = [_options_of(group) for group in optimizer.param_groups]
        self._ahead.promise(self._step_some)

    def _step_some(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Step these parameters as the step that is due would have, and no others."""
        if gradients:
            with self._as_it_was_due({id(p) for p, _ in gradients}), _gradients(gradients):
                self._optimizer.step()

    @contextmanager
    def _as_it_was_due(self, chosen: set[int]) -> Iterator[None]:
        groups = self._optimizer.param_groups
        now = [dict(group) for group in groups]
        self._stepping = True
        try:
            # A group that was added since has no parameter in flight.
            for group, options in zip(groups, self._options, strict=False):
                group.update(options)
            for group in groups:
                group["params"] = [p for p in group["params"] if id(p) in chosen]
            yield
        finally:
            self._stepping = False
            for group, before in zip(groups, now, strict=True):
                group.update(before)


def _options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options as they are: schedulers change a learning rate that is a tensor in place."""
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in group.items() if name != "params"
    }


@contextmanager
def _gradients(gradients: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """In here these are ``p.grad``, which may hold gradients of a later backward pass."""
    later = [p.grad for p, _ in gradients]
    try:
        for p, grad in gradients:
            p.grad = grad
        yield
    finally:
        for (p, _), its_own in zip(gradients, later, strict=True):
            p.grad = its_own
