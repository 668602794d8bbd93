"""DistributedDataParallel with compressed gradients: one line after the model is wrapped.

    ddp_model = DistributedDataParallel(model)
    gradcomp.integrations.ddp.register(ddp_model, compressor="threshold:density=0.001")

DDP goes on deciding when gradients are ready and where they lie (no_sync, find_unused_parameters, static_graph, buffer
broadcasts: all as before); what it would have all-reduced goes through a :class:`gradcomp.GradientExchange` instead,
on the model's own process group or any transport.

DDP's buckets are only how gradients arrive: what is sent is cut by parameter name, so nothing is lost or mixed up when
DDP rebuilds its buckets after the first step.
"""

# No "from __future__ import annotations" here: DDP looks at the annotations of a hook, which must be types.
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from gradcomp import registry
from gradcomp.engine import GradientExchange
from gradcomp.errors import ConfigError
from gradcomp.gradients import ViewedGradients
from gradcomp.interfaces import Exchange, Transport
from gradcomp.products import Products
from gradcomp.registry import Spec
from gradcomp.rules import Choice, choose

__all__ = ["HookState", "comm_hook", "register"]


class HookState:
    """What :func:`comm_hook` needs to know of a model; ``ddp_model.register_comm_hook(state, comm_hook)``.

    Made on every rank; meets the other ranks at once.

    Args:
        ddp_model, compressor, transport, exchange, others: as for :func:`register`.

    Attributes:
        sync: the :class:`gradcomp.GradientExchange` behind the hook.
    """

    def __init__(
        self,
        ddp_model: DistributedDataParallel,
        compressor: Spec | Choice = "threshold",
        transport: Spec | Transport | None = None,
        *,
        exchange: Spec | Exchange = "auto",
        reduction: str = "mean",
        bucket_bytes: int = 25 << 20,
        digest_every: int = 100,
        dense: Callable[[str, Tensor], bool] | None = None,
        scaler: GradScaler | None = None,
    ) -> None:
        _check_model(ddp_model)
        ignored = ddp_model.parameters_to_ignore
        named = [(n, p) for n, p in ddp_model.module.named_parameters() if p.requires_grad and n not in ignored]
        self._positions = {id(p): position for position, (_, p) in enumerate(named)}
        products = Products(ddp_model.module)
        self._gradients = ViewedGradients([p for _, p in named], products)
        kind = registry.exchange(exchange)
        self._unfinished: list[tuple[torch.futures.Future[Tensor], Tensor]] = []
        self.sync = GradientExchange(
            named,
            compressor=choose(compressor),
            transport=_transport_for(ddp_model, kind, transport),
            exchange=kind,
            reduction=reduction,
            when="ddp",
            bucket_bytes=bucket_bytes,
            digest_every=digest_every,
            dense=dense,
            loss_scale=None if scaler is None else scaler.get_scale,
            gradients=self._gradients,
            products=products,
        )

    def take(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """Exchange one of DDP's buckets; the last one of a backward pass waits for all of them."""
        buffer = bucket.buffer()
        future: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[buffer.device] if buffer.device.type == "cuda" else None
        )
        if not self.sync.is_syncing:
            future.set_result(buffer)  # the gradient stays this rank's own, and the next backward adds to it
            return future
        self._unfinished.append((future, buffer))
        positions = []
        for parameter, view in zip(bucket.parameters(), bucket.gradients(), strict=True):
            position = self._positions[id(parameter)]
            self._gradients.put(position, view)
            positions.append(position)
        self.sync.ready(*positions)
        if bucket.is_last():
            # Residuals may change only once every rank's gradients are known to be finite, all of them: so no bucket is
            # done before the last one is. What fails is raised here, and comes out of backward() as it is.
            self.sync.exchange()
            for waiting, result in self._unfinished:
                waiting.set_result(result)
            self._unfinished.clear()
        return future


def comm_hook(state: HookState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """The hook itself, for ``ddp_model.register_comm_hook(HookState(ddp_model, ...), comm_hook)``.

    Returns:
        A Future with the bucket's buffer, once the mean over ranks lies in it.

    Raises:
        GradcompError: the exchange failed: a rank is gone, or nothing came from it in time.
    """
    return state.take(bucket)


def register(
    ddp_model: DistributedDataParallel,
    compressor: Spec | Choice = "threshold",
    transport: Spec | Transport | None = None,
    **options: Any,
) -> GradientExchange:
    """Compress the gradients of a model that is wrapped in DistributedDataParallel. Call it on every rank.

    Args:
        ddp_model: has no other communication hook.
        compressor: as for :func:`gradcomp.attach`.
        transport: what carries the packets; None: the model's own process group, whatever its backend.
        options: ``exchange``, ``reduction``, ``bucket_bytes``, ``digest_every``, ``dense``, ``scaler``, as for
            :func:`gradcomp.attach`.

    Returns:
        The :class:`gradcomp.GradientExchange`: ``stats()``, ``state_dict()``, ``average()``, ``close()``. To accumulate
        gradients, its ``no_sync()`` and the model's do the same. A model keeps its hook for good: after ``close()`` a
        backward pass raises TransportError.

    Raises:
        ConfigError: not a DistributedDataParallel, a model that has a hook already, or as :func:`gradcomp.attach`.
        HandshakeError, TransportTimeout, PeerLost: as :func:`gradcomp.attach`.
    """
    _check_model(ddp_model)
    made: list[HookState] = []
    try:
        ddp_model.register_comm_hook(made, _call_made)  # before anybody is met: DDP may refuse
    except RuntimeError as error:
        raise ConfigError(f"ddp: the model has a communication hook already; DDP allows one: {error}") from None
    made.append(HookState(ddp_model, compressor, transport, **options))
    return made[0].sync


def _call_made(made: list[HookState], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """:func:`comm_hook`, for a state that is made after the hook is registered."""
    if not made:
        raise ConfigError("ddp: registering the hook failed, and DDP keeps it all the same: wrap the model anew")
    return comm_hook(made[0], bucket)


def _check_model(ddp_model: object) -> None:
    if not isinstance(ddp_model, DistributedDataParallel):
        raise ConfigError(
            f"ddp: ddp_model is a {type(ddp_model).__name__}; it must be a DistributedDataParallel: "
            "for a plain model there is gradcomp.attach(optimizer, model=model)"
        )


def _transport_for(ddp_model: DistributedDataParallel, exchange: Exchange, given: Spec | Transport | None) -> Transport:
    """The transport, whose ranks must be the model's; usually over groups beside the model's own."""
    group = ddp_model.process_group
    backend = dist.get_backend(group)
    beside: Callable[..., Transport] = registry.transport_class(backend if backend in ("gloo", "nccl") else "torch")
    transport = exchange.transport(given, usual=beside(group=group))
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if (transport.rank, transport.world_size) != (rank, world_size):
        raise ConfigError(
            f"ddp: the transport is rank {transport.rank} of {transport.world_size}, the model's process group rank "
            f"{rank} of {world_size}; they must be the same"
        )
    return transport
