"""The one line a training script adds: compressed gradient exchange behind an optimizer that exists."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import Optimizer

from gradcomp import registry
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
    transport: Spec | Transport = "zmq",
    exchange: Spec | Exchange = "auto",
    model: nn.Module | None = None,
    reduction: str = "mean",
    when: str = "backward",
    bucket_bytes: int = 25 << 20,
    digest_every: int = 100,
    dense: Callable[[str, Tensor], bool] | None = None,
) -> GradientExchange:
    """Exchange the gradients of all of an optimizer's parameters between ranks; the training loop stays as it is.

    Call it on every rank, after the optimizer is made. Parameters (and the model's buffers) start as rank 0's.

    Args:
        optimizer: any ``torch.optim`` optimizer with dense float32, float16 or bfloat16 parameters.
        compressor: a spec string, config dict or Compressor; ``gradcomp.available_compressors()`` lists them. Or
            :class:`gradcomp.Rules` for each parameter's, their config, or ``"@FILE"``, a JSON file that holds it.
        transport: likewise; rank, world size and rendezvous come from torchrun's environment, one rank without it.
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

    Returns:
        The :class:`gradcomp.GradientExchange`: ``no_sync()``, ``stats()``, ``state_dict()``, ``detach()``, ``close()``.

    Raises:
        ConfigError: an unknown id or option, a value out of range, or nothing to exchange.
        HandshakeError: the ranks do not agree; names the field.
        TransportTimeout, PeerLost: a rank did not come, or left.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    sync = GradientExchange(
        _named(optimizer, model, parameters),
        compressor=choose(compressor),
        transport=registry.transport(transport),
        exchange=registry.exchange(exchange),
        buffers=_others(model, parameters),
        reduction=reduction,
        when=when,
        bucket_bytes=bucket_bytes,
        digest_every=digest_every,
        dense=dense,
    )
    if when == "step":
        sync.add_handle(optimizer.register_step_pre_hook(lambda *_: sync.exchange()))
    return sync


def _named(optimizer: Optimizer, model: nn.Module | None, parameters: list[Tensor]) -> list[tuple[str, Tensor]]:
    """Names and parameters; the model's order of registration where there is a model, else the optimizer's."""
    if model is None:
        return [
            (f"group{g}.{i}", p)
            for g, group in enumerate(optimizer.param_groups)
            for i, p in enumerate(group["params"])
            if p.requires_grad
        ]
    wanted = {id(p) for p in parameters}
    named: list[tuple[str, Tensor]] = [(name, p) for name, p in model.named_parameters() if id(p) in wanted]
    if len(named) != len(wanted):
        raise ConfigError(
            f"the optimizer has {len(wanted)} parameters, {len(named)} of them in model={type(model).__name__}; "
            "pass the model that holds all of them, or none"
        )
    return named


def _others(model: nn.Module | None, parameters: list[Tensor]) -> list[Tensor]:
    """What else must start equal: buffers, and parameters the optimizer does not train."""
    if model is None:
        return []
    trained = {id(p) for p in parameters}
    return [*(p for p in model.parameters() if id(p) not in trained), *model.buffers()]
