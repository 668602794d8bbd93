"""The one line a training script adds: compressed gradient exchange behind an optimizer that exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from gradcomp import registry
from gradcomp.buffers import BufferPolicy
from gradcomp.engine import GradientExchange
from gradcomp.errors import ConfigError
from gradcomp.interfaces import Exchange, Transport
from gradcomp.registry import Spec
from gradcomp.rules import Choice, choose

__all__ = ["attach"]


def attach(
    optimizer: Optimizer,
    *,
    compressor: Spec | Choice = "threshold",
    transport: Spec | Transport | None = None,
    exchange: Spec | Exchange = "auto",
    model: nn.Module | None = None,
    reduction: str = "mean",
    when: str = "backward",
    bucket_bytes: int = 25 << 20,
    digest_every: int = 100,
    dense: Callable[[str, Tensor], bool] | None = None,
    scaler: GradScaler | None = None,
    buffers: str = "alone",
) -> GradientExchange:
    """Exchange the gradients of all of an optimizer's parameters between ranks; the training loop stays as it is.

    Call it on every rank, after the optimizer is made. Parameters (and the model's buffers) start as rank 0's.

    Args:
        optimizer: any ``torch.optim`` optimizer with dense float32, float16 or bfloat16 parameters.
        compressor: a spec string, config dict or Compressor; ``gradcomp.available_compressors()`` lists them. Or
            :class:`gradcomp.Rules` for each parameter's, their config, or ``"@FILE"``, a JSON file that holds it.
        transport: likewise; rank, world size and rendezvous come from torchrun's environment, one rank without it.
            None: ``zmq``, or what the exchange brings.
        exchange: likewise.
        model: gives parameters their names in messages and checkpoints, and buffers to start from rank 0's. Without it
            parameters are called ``group0.0``, ``group0.1``, ... and buffers are left alone.
        reduction: ``"mean"`` or ``"sum"`` over ranks.
        when: ``"backward"``: the exchange starts as gradients become ready and is over when ``backward()`` returns, so
            clipping, schedulers and logging see what they would see with DistributedDataParallel; ``"step"``: it
            runs before each ``optimizer.step()``.
        bucket_bytes: gradients are exchanged in buckets of at most so many bytes of float32. Smaller ones start
            earlier, larger ones cost fewer messages.
        digest_every: every so many steps all replicas are compared bit for bit; 0 never.
        dense: ``dense(name, parameter)`` is true for parameters that go uncompressed; default
            ``gradcomp.DenseRule()``: fewer than 2 dimensions or than 1024 elements. Not asked about what a rule names.
        scaler: the ``torch.amp.GradScaler`` that scales the loss, if one does: its scale is divided out before
            compression and multiplied back, so that thresholds and residuals are in units of the gradient.
        buffers: what becomes of the model's buffers (BatchNorm's running statistics) after each step: ``"alone"``,
            each rank keeps its own; ``"broadcast"``, rank 0's, as with DistributedDataParallel; ``"average"``, the mean
            over ranks; the last two also every so many steps, ``"average:every=10"``.

    Returns:
        The :class:`gradcomp.GradientExchange`: ``no_sync()``, ``stats()``, ``state_dict()``, ``detach()``, ``close()``.

    Raises:
        ConfigError: an unknown id or option, a value out of range, or nothing to exchange.
        HandshakeError: the ranks do not agree; names the field.
        TransportTimeout, PeerLost: a rank did not come, or left.
    """
    if scaler is not None and when == "step":
        raise ConfigError(
            "attach: when='step' is not allowed with a scaler: where a rank sees Inf, GradScaler skips the step and "
            "its hooks with it, and the others would wait for that rank; use when='backward'"
        )
    policy = BufferPolicy.of(buffers)
    if policy.policy != "alone" and model is None:
        raise ConfigError(f"attach: buffers={buffers!r} needs model=, whose buffers are meant")
    others = _others(model, optimizer)
    kind = registry.exchange(exchange)
    sync = GradientExchange(
        _named(optimizer, model),
        compressor=choose(compressor),
        transport=kind.transport(transport),
        exchange=kind,
        buffers=others,
        synced=[] if model is None else list(model.buffers()),
        buffer_policy=policy,
        later=[p for p in others if isinstance(p, nn.Parameter)],
        reduction=reduction,
        when=when,
        bucket_bytes=bucket_bytes,
        digest_every=digest_every,
        dense=dense,
        loss_scale=None if scaler is None else scaler.get_scale,
    )
    if when == "step":
        sync.add_handle(optimizer.register_step_pre_hook(lambda *_: sync.exchange()))
    sync.add_handle(_FollowGroups(optimizer, lambda: sync.set_parameters(_named(optimizer, model))))
    return sync


class _FollowGroups:
    """Calls back after each ``optimizer.add_param_group``, until it is removed: torch has no hook for that."""

    def __init__(self, optimizer: Optimizer, changed: Callable[[], None]) -> None:
        self._optimizer = optimizer
        original = optimizer.add_param_group

        def add_param_group(param_group: dict[str, Any]) -> None:
            original(param_group)
            changed()

        optimizer.add_param_group = add_param_group  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the optimizer its own method back."""
        vars(self._optimizer).pop("add_param_group", None)


def _named(optimizer: Optimizer, model: nn.Module | None) -> list[tuple[str, Tensor]]:
    """Names and parameters; the model's order of registration where there is a model, else the optimizer's."""
    groups = [[p for p in group["params"] if p.is_floating_point()] for group in optimizer.param_groups]
    if not any(p.requires_grad for group in groups for p in group):
        raise ConfigError("the optimizer has no parameters that require a gradient: there is nothing to exchange")
    if model is None:
        return [(f"group{g}.{i}", p) for g, group in enumerate(groups) for i, p in enumerate(group)]
    wanted = {id(p) for group in groups for p in group}
    named: list[tuple[str, Tensor]] = [(name, p) for name, p in model.named_parameters() if id(p) in wanted]
    if len(named) != len(wanted):
        raise ConfigError(
            f"the optimizer has {len(wanted)} parameters, {len(named)} of them in model={type(model).__name__}; "
            "pass the model that holds all of them, or none"
        )
    return named


def _others(model: nn.Module | None, optimizer: Optimizer) -> list[Tensor]:
    """What else must start equal: buffers, and parameters the optimizer does not train."""
    if model is None:
        return []
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [*(p for p in model.parameters() if id(p) not in trained), *model.buffers()]
