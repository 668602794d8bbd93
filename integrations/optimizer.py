"""The one line a training script adds: compressed gradient exchange behind an optimizer that exists."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, Optimizer

from gradcomp import registry
from gradcomp.buffers import BufferPolicy
from gradcomp.engine import GradientExchange
from gradcomp.errors import ConfigError
from gradcomp.exchanges.server import Server
from gradcomp.hooks import running
from gradcomp.integrations.closures import check_line_search, refuse_closure, share_loss
from gradcomp.integrations.forward import ForwardOverlap, check_forward
from gradcomp.integrations.served import Served
from gradcomp.interfaces import Compressor, Exchange, Transport
from gradcomp.products import Products
from gradcomp.registry import Spec
from gradcomp.rules import Choice, choose
from gradcomp.session import Session

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
    overlap: str = "backward",
    bucket_bytes: int = 25 << 20,
    digest_every: int = 100,
    dense: Callable[[str, Tensor], bool] | None = None,
    scaler: GradScaler | None = None,
    buffers: str = "alone",
) -> Session:
    """Exchange the gradients of all of an optimizer's parameters between ranks; the training loop stays as it is.

    Call it on every rank, after the optimizer is made. Parameters (and the model's buffers) start as rank 0's.

    Args:
        optimizer: any ``torch.optim`` optimizer with dense float32, float16 or bfloat16 parameters. ``LBFGS`` goes with
            ``none``, ``fp16``, ``bf16`` and linear compressors; what its closure returns becomes the same on all ranks.
        compressor: a spec string, config dict or Compressor; ``gradcomp.available_compressors()`` lists them. Or
            :class:`gradcomp.Rules` for each parameter's, their config, or ``"@FILE"``, a JSON file that holds it.
            ``"auto"``: the one with which steps are shortest, tried in the run, and again as the link changes.
        transport: likewise; rank, world size and rendezvous come from torchrun's environment, one rank without it.
            None: ``zmq``, or what the exchange brings.
        exchange: likewise. ``"server:addresses=HOST:PORT"``: through a parameter server (gradcomp.exchanges.server),
            which owns the parameters and runs the optimizer; ``optimizer.step()`` pushes and pulls. It takes no
            transport, and of the options below model, reduction, dense and scaler.
        model: gives parameters their names in messages and checkpoints, and buffers to start from rank 0's. Without it
            parameters are called ``group0.0``, ``group0.1``, ... and buffers are left alone. Any of its parameters may
            be added in mid-run (``optimizer.add_param_group``); without it, about as much again as there is at first,
            or 256k elements.
        reduction: ``"mean"`` or ``"sum"`` over ranks.
        when: ``"backward"``: the exchange starts as gradients become ready and is over when ``backward()`` returns, so
            clipping, schedulers and logging see what they would see with DistributedDataParallel; ``"step"``: it
            runs before each ``optimizer.step()``, which then takes no closure.
        overlap: ``"backward"``: as ``when`` says; ``"forward"``: gradients of the layers that forward needs first go
            first, ``backward()`` and ``optimizer.step()`` return at once, and each module of the next forward pass
            waits for its own parameters. The results are the same bits. It needs ``model`` and an optimizer of
            ``torch.optim``; between ``backward()`` and ``optimizer.step()`` gradients must be left alone, and
            whoever reads parameters by themselves calls ``sync.wait()`` first. Best with small buckets.
        bucket_bytes: gradients are exchanged in buckets of at most so many bytes of float32, or one larger tensor and
            the small ones just before it. Smaller buckets start earlier, larger ones cost fewer messages.
        digest_every: every so many steps all replicas are compared bit for bit; 0 never.
        dense: ``dense(name, parameter)`` is true for parameters that go uncompressed; default
            ``gradcomp.DenseRule()``: fewer than 2 dimensions or than 1024 elements. Not asked about what a rule names.
        scaler: the ``torch.amp.GradScaler`` that scales the loss, if one does: its scale is divided out before
            compression and multiplied back, so that thresholds and residuals are in units of the gradient.
        buffers: what becomes of the model's buffers (BatchNorm's running statistics) after each step: ``"alone"``,
            each rank keeps its own; ``"broadcast"``, rank 0's, as with DistributedDataParallel; ``"average"``, the mean
            over ranks; the last two also every so many steps, ``"average:every=10"``.

    Returns:
        The :class:`gradcomp.GradientExchange`, or with a server its :class:`gradcomp.session.Session`: ``no_sync()``,
        ``stats()``, ``state_dict()``, ``detach()``, ``close()``.

    Raises:
        ConfigError: an unknown id or option, a value out of range, or nothing to exchange.
        HandshakeError: the ranks do not agree; names the field.
        TransportTimeout, PeerLost: a rank did not come, or left.
    """
    kind = registry.exchange(exchange)
    if isinstance(kind, Server):
        unusual = {"transport": transport is not None, "when": when != "backward", "buffers": buffers != "alone"}
        unusual |= {"overlap": overlap != "backward"}
        unusual |= {"bucket_bytes": bucket_bytes != 25 << 20, "digest_every": digest_every not in (0, 100)}
        for option, given in unusual.items():
            if given:
                raise ConfigError(f"attach: {option} is not allowed with exchange {kind.id!r}: {_NOT_SERVED[option]}")
        return _serve(
            Served(
                optimizer,
                _named(optimizer, model),
                exchange=kind,
                compressor=choose(compressor),
                dense=dense,
                reduction=reduction,
            ),
            optimizer,
        )
    if scaler is not None and when == "step":
        raise ConfigError(
            "attach: when='step' is not allowed with a scaler: where a rank sees Inf, GradScaler skips the step and "
            "its hooks with it, and the others would wait for that rank; use when='backward'"
        )
    policy = BufferPolicy.of(buffers)
    if policy.policy != "alone" and model is None:
        raise ConfigError(f"attach: buffers={buffers!r} needs model=, whose buffers are meant")
    others = _others(model, optimizer)
    line_search = isinstance(optimizer, LBFGS)
    if line_search and when == "step":
        raise ConfigError(
            'attach: when="step" is not allowed with LBFGS, which computes gradients anew within a step; '
            'when must be "backward"'
        )
    named = _named(optimizer, model)
    carrier = kind.transport(transport)
    if overlap == "forward":
        check_forward(optimizer, model, when=when, scaled=scaler is not None, levels=carrier.levels is not None)
    sync = GradientExchange(
        named,
        compressor=choose(compressor),
        transport=carrier,
        exchange=kind,
        buffers=others,
        synced=[] if model is None else list(model.buffers()),
        buffer_policy=policy,
        later=[p for _, p in named] if model is None else [p for p in others if isinstance(p, nn.Parameter)],
        reduction=reduction,
        when=when,
        overlap=overlap,
        bucket_bytes=bucket_bytes,
        digest_every=digest_every,
        dense=dense,
        loss_scale=None if scaler is None else scaler.get_scale,
        accept=check_line_search if line_search else None,
        products=None if model is None else Products(model),
    )
    if line_search:
        sync.add_handle(optimizer.register_step_pre_hook(share_loss(sync, reduction)))

    def before_step(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_closure(args, kwargs)
        sync.exchange()

    if when == "step":
        sync.add_handle(optimizer.register_step_pre_hook(before_step))
    elif overlap == "forward" and model is not None:
        sync.add_handle(ForwardOverlap(sync, optimizer, model, _WatchSteps(sync, scaler)))
    else:
        sync.add_handle(optimizer.register_step_pre_hook(_WatchSteps(sync, scaler)))
    sync.add_handle(_FollowGroups(optimizer, lambda: sync.set_parameters(_named(optimizer, model))))
    return sync


_NOT_SERVED = {
    "transport": "workers talk to servers, whose addresses it holds, and not to each other",
    "when": "gradients are pushed in optimizer.step()",
    "overlap": "parameters change in optimizer.step(); the option delay=1 hides the network",
    "buffers": "a server keeps parameters; each worker's buffers are its own",
    "bucket_bytes": "each shard gets one message a step",
    "digest_every": "replicas follow the server, and may be at different updates",
}


def _serve(served: Served, optimizer: Optimizer) -> Served:
    def refuse() -> None:
        raise ConfigError("add_param_group: a parameter server keeps the parameters that it was set up with")

    served.hook_up()
    served.add_handle(_FollowGroups(optimizer, refuse))
    return served


class _WatchSteps:
    """Says, before an optimizer step, what is most likely a mistake; each once."""

    def __init__(self, sync: GradientExchange, scaler: GradScaler | None) -> None:
        self._sync, self._scaler = sync, scaler
        self._seen_step = sync.step
        self._looked_for_scaler = self._warned = False

    def __call__(self, _: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # A closure, as LBFGS wants one, calls backward only after this.
        closure = kwargs.get("closure") or any(map(callable, args))
        without = self._sync.step == self._seen_step and not closure
        self._seen_step = self._sync.step
        if without and self._sync.world_size > 1 and not self._warned:
            self._warned = True
            logging.getLogger("gradcomp").warning(
                "rank %d: optimizer.step() without an exchange since the step before: no backward pass reached a "
                "parameter, or all were inside no_sync(). Other ranks wait for this one unless they did the same; "
                "sync.exchange() takes part without a gradient",
                self._sync.rank,
            )
        if not self._looked_for_scaler:
            self._looked_for_scaler = True
            # Nothing else on an optimizer tells that there is one.
            used = next(running(GradScaler.step), None)
            plain = isinstance(self._sync.compressor, Compressor) and self._sync.compressor.stateless
            if used is not None and used is not self._scaler and not plain:
                logging.getLogger("gradcomp").warning(
                    "gradients are multiplied by a GradScaler that attach() was not given: thresholds and residuals "
                    "are in units that change with its scale; pass attach(..., scaler=scaler)"
                )


class _FollowGroups:
    """Calls back after each ``optimizer.add_param_group``, until it is removed: torch has no hook for that."""

    def __init__(self, optimizer: Optimizer, changed: Callable[[], None]) -> None:
        self._optimizer = optimizer
        original = optimizer.add_param_group

        def add_param_group(param_group: dict[str, Any]) -> None:
            original(param_group)
            try:
                changed()
            except BaseException:
                # A group that is not exchanged would drift apart on the ranks.
                optimizer.param_groups.pop()
                raise

        optimizer.add_param_group = add_param_group  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the optimizer its own method back."""
        vars(self._optimizer).pop("add_param_group", None)


def _named(optimizer: Optimizer, model: nn.Module | None) -> list[tuple[str, Tensor]]:
    """Names and parameters; the model's order of registration where there is a model, else the optimizer's."""
    # Integers have no gradients. Complex numbers do, and are refused by name.
    groups = [
        [p for p in group["params"] if p.is_floating_point() or p.is_complex()] for group in optimizer.param_groups
    ]
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
