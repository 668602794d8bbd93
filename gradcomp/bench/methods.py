"""Ways to train that benchmarks take steps of in turn: alone, with gradcomp, with DistributedDataParallel."""

# No "from __future__ import annotations": DDP looks at a hook's annotations, which must be types.
import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from gradcomp import registry
from gradcomp.bench.step_time import step
from gradcomp.interfaces import Transport
from gradcomp.registry import Spec
from gradcomp.session import Session

__all__ = ["STAGES", "TORCH_HOOKS", "Method", "transport_for", "with_usual"]

STAGES = ("hidden_fraction", "compress_ms", "wait_ms", "decompress_ms", "ratio")


def _bf16(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """torch's hook under another name: by its own, DDP refuses it without NCCL, although Gloo can do it."""
    return default_hooks.bf16_compress_hook(state, bucket)  # type: ignore[arg-type]


# torch's own, by what they send.
TORCH_HOOKS: dict[str, Callable[..., Any]] = {"fp16": default_hooks.fp16_compress_hook, "bf16": _bf16}


class Method:
    """A model of its own, trained one way.

    Args:
        model: a plain one, or a DistributedDataParallel with its hook.
        alone: take steps without DDP's exchange.

    Attributes:
        optimizer: the model's.
        sync: what was attached to it, or registered with the model's DDP, if anything was.
        times_s: of the steps that count.
        stats: of them, what the exchange said after each.
    """

    def __init__(self, name: str, model: nn.Module, *, alone: bool = False) -> None:
        self.name, self.model, self.alone = name, model, alone
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        self.sync: Session | None = None
        self.times_s: list[float] = []
        self.stats: list[dict[str, float]] = []

    def run(self, inputs: Tensor, targets: Tensor) -> None:
        """One step."""
        model = self.model
        context = model.no_sync() if self.alone and isinstance(model, DistributedDataParallel) else nullcontext()
        step(model, self.optimizer, inputs, targets, context)

    def note(self, seconds: float) -> None:
        """The step that was just taken counts."""
        self.times_s.append(seconds)
        if self.sync is not None:
            stats = self.sync.stats()
            self.stats.append({key: stats[key] for key in (*STAGES, "density", "gradient_bytes", "packet_bytes")})

    def stages(self) -> dict[str, float]:
        """Medians of what the exchange said; nothing where there is none."""
        return {key: statistics.median(row[key] for row in self.stats) for key in STAGES if self.stats}

    def close(self) -> None:
        """Leave the exchange."""
        if self.sync is not None:
            self.sync.close()


def transport_for(spec: Spec, name: str) -> Transport:
    """A transport for one of several methods in a process: over ZeroMQ, ranks meet as a run of this name."""
    return registry.transport(with_usual(spec, {"run": name}))


def with_usual(spec: Spec, usual: Mapping[str, object]) -> dict[str, object]:
    """A transport's config with those of the options that it has, unless the spec gives them."""
    if isinstance(spec, str):
        name, given = registry.parse_spec(spec)
        spec = {"id": name, **given}
    known = {field.name for field in fields(registry.transport_class(spec))}  # type: ignore[arg-type]
    return {key: value for key, value in usual.items() if key in known} | dict(spec)
