"""Training with a parameter server: ``optimizer.step()`` pushes gradients and pulls what the server made of them.

The server owns the parameters and runs an optimizer of the same class and options; whatever options are now, such as a
learning rate that a schedule changes, go with each push. So that the user's own optimizer does nothing, gradients are
hidden from it, for ``torch.optim`` passes over parameters that have none. Only with ``async:n_fetch=n`` it does work,
in the steps between two pulls, on the local copy, as in Downpour SGD (J. Dean et al., "Large scale distributed deep
networks", NeurIPS 2012).
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradcomp import registry
from gradcomp.bucket import DenseRule
from gradcomp.compressors.cast import NoCompression
from gradcomp.errors import ConfigError, StateError, TransportError
from gradcomp.exchanges.server import Server
from gradcomp.integrations.closures import refuse_closure
from gradcomp.integrations.served_gradients import ServedGradients
from gradcomp.integrations.served_links import ServedLinks, new_incarnation
from gradcomp.integrations.served_shard import ServedShard
from gradcomp.lanes import on
from gradcomp.options import check_choice
from gradcomp.registry import Spec
from gradcomp.rules import Choice
from gradcomp.server import optimizers
from gradcomp.server.links import Links
from gradcomp.server.modes import Async, Sync
from gradcomp.server.table import cut
from gradcomp.session import Session
from gradcomp.states import unpack
from gradcomp.telemetry import StepRecord, Totals
from gradcomp.tuner import names_auto
from gradcomp.vectors import Vectors

__all__ = ["Served"]

_STATE_FORMAT = 1
_MAX_AVERAGED_BYTES = 8 << 20

logger = logging.getLogger("gradcomp")


class Served(Session):
    """One worker of a parameter server. Made by :func:`gradcomp.attach` for ``exchange="server:..."``.

    Args:
        named: names and parameters, in the same order on every worker.
        compressor: of gradients; changes go through the exchange's ``pull``.
        dense: which parameters go uncompressed, both ways.

    Attributes:
        mode: the server's.
        worker: this worker's name.
        nonfinite_in_a_row: how many pushes, up to the last one, held NaN or Inf.

    Raises:
        ConfigError: an optimizer that a server does not run, or an option out of range.
        HandshakeError: this worker does not run what the server runs; names the field.
        TransportTimeout: a shard is not there.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        named: Sequence[tuple[str, Tensor]],
        *,
        exchange: Server,
        compressor: Choice,
        dense: Callable[[str, Tensor], bool] | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_choice("attach", "reduction", reduction, ("mean", "sum"))
        if names_auto(compressor):
            raise ConfigError(
                "attach: compressor 'auto' is not allowed with a parameter server: it times steps that all ranks take "
                "together, and here each worker takes its own"
            )
        self.exchange_kind, self.compressor = exchange, compressor
        self._optimizer = optimizer
        self.mode = exchange.chosen_mode
        fetching = self.mode if isinstance(self.mode, Async) else Async()
        self._n_push, self._n_fetch = fetching.n_push, fetching.n_fetch
        self._rank = int(os.environ.get("RANK", "0"))
        self._workers = exchange.workers or int(os.environ.get("WORLD_SIZE", "1"))
        self.worker = exchange.worker or _default_name()
        groups = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        tables = cut(
            named,
            groups={name: groups[id(p)] for name, p in named},
            push=compressor,
            pull=exchange.chosen_pull,
            dense=DenseRule() if dense is None else dense,
            shards=len(exchange.addresses),
        )
        self._named, self._device = list(named), named[0][1].device
        parameters = dict(named)
        with torch.no_grad():
            self._shards = [ServedShard(i, table, parameters) for i, table in enumerate(tables)]
        self._gradients = ServedGradients(named, self._shards, keep_sums=self._n_push > 1, rank=self._rank)
        description, incarnation = optimizers.describe(optimizer), new_incarnation()
        connect: Callable[..., Links] = registry.links_class()
        self._links = ServedLinks(
            connect(
                exchange.addresses,
                worker=self.worker,
                incarnation=incarnation,
                timeout_s=exchange.timeout_s,
                max_message_bytes=_longest(self._shards),
                rate=exchange.rate,
            ),
            self._shards,
            worker=self.worker,
            incarnation=incarnation,
            mode=self.mode,
            workers=self._workers,
            reduction=reduction,
            optimizer=description,
            take_back=self._gradients.take_back,
            timeout_s=exchange.timeout_s,
            retry=exchange.retry,
        )
        self._step = 0
        self._totals = Totals(lambda: self._gradients.store.residual_norms())
        self.nonfinite_in_a_row = 0
        self._closed = False
        self._hidden: list[tuple[Tensor, Tensor]] = []
        try:
            with on(self._device):
                self._links.join()
            # The round that is open is not over.
            self._step = max(shard.clock for shard in self._shards) - isinstance(self.mode, Sync)
            self._take_over()
        except BaseException:
            self.close()
            raise

    # -- what users call -----------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._workers

    @property
    def step(self) -> int:
        """Steps this worker has taken in the run, in former lives too; in mode ``sync``, rounds that are over."""
        return self._step

    @property
    def version(self) -> int:
        """Updates that the parameters have had, by whichever worker; of several shards the least."""
        return min(shard.version for shard in self._shards)

    def exchange(self) -> None:
        """Push the gradients there are and pull what changed, as the mode says. Called before ``optimizer.step()``.

        Raises:
            GradientError: a sparse gradient.
            TransportError: a server is gone, or did not answer in time.
        """
        if not self._syncing:
            return
        self._running()
        record = StepRecord()
        with torch.no_grad(), on(self._device), record.held_up():
            self._gradients.add()
            self._step += 1
            pushes, pulls = self._step % self._n_push == 0, self._step % self._n_fetch == 0
            encoded = None
            if pushes:
                with record.timed("compress_s"):
                    encoded = self._gradients.encode(record)
                record.packet_bytes = sum(message.packet_bytes for message in encoded.messages)
            delayed = self.exchange_kind.delay > 0
            if delayed or pushes or pulls:
                self._settle(record, write=not delayed)
            if encoded is not None:
                self._links.push(encoded.messages, optimizers.numbers(self._optimizer), steps=self._step, pull=pulls)
            elif pulls:
                self._links.pull()
            if not delayed and pulls:
                self._settle(record)
            if delayed:
                self._take_over()
        nonfinite = encoded is not None and not encoded.finite
        if nonfinite and not self._totals.nonfinite_steps:
            logger.warning(
                "worker %s: step %d has a gradient with NaN or Inf; it is not applied, nor are others like it "
                "(stats()['nonfinite_steps'])",
                self.worker,
                self._step,
            )
        gradient_bytes = 4 * sum(shard.table.numel for shard in self._shards)
        self._totals.add(record, gradient_bytes=gradient_bytes if pushes else 0, nonfinite=nonfinite)
        if encoded is not None:
            self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if nonfinite else 0

    def pull(self) -> None:
        """Bring the parameters up to date now: for evaluation at the end, say.

        Raises:
            TransportError: a server is gone, or did not answer in time.
        """
        self._running()
        with torch.no_grad():
            self._settle(StepRecord())
            self._links.pull()
            self._settle(StepRecord())

    def stats(self) -> dict[str, Any]:
        """What was sent and how long it took.

        Returns:
            As :meth:`gradcomp.GradientExchange.stats` where it means the same: ``steps``, ``nonfinite_steps``,
            ``bytes_sent``, ``bytes_received``, ``packet_bytes``, ``gradient_bytes``, ``ratio``; of the last step
            ``density``, ``tau``, ``compress_ms``, ``wait_ms``, ``decompress_ms``, ``exposed_ms``, ``parameters``;
            ``residual_norm``.
            Also ``pull_ratio``, ``pulled_bytes`` and ``value_bytes`` (of what came in), ``version`` (updates in the
            parameters), ``staleness`` (number of pushes by their staleness), ``late`` and ``nonfinite`` (pushes that
            came back, or were not applied); of several shards each counts for itself.
        """
        counts, totals = self._links.counts, self._totals.as_dict()
        del totals["hidden_fraction"]  # nobody measures what a delayed settlement hides
        return totals | {
            "pulled_bytes": counts.pulled_bytes,
            "value_bytes": counts.value_bytes,
            "pull_ratio": counts.value_bytes / counts.pulled_bytes if counts.pulled_bytes else 0.0,
            "version": self.version,
            "staleness": {staleness: n for staleness, n in sorted(counts.staleness.items()) if n},
            "late": counts.late,
            "nonfinite": counts.nonfinite,
            **self._links.traffic,
        }

    def average(self, tensor: Tensor) -> Tensor:
        """The mean over the workers that are there; all must call it equally often, and wait for each other."""
        self._running()
        mine = tensor.detach().to("cpu", torch.float32).contiguous()
        if mine.numel() * 4 > _MAX_AVERAGED_BYTES:
            raise ConfigError(f"average: {mine.numel()} elements are too many; at most 8 MiB of float32")
        return self.all_reduce(mine, reduction="mean")

    def all_reduce(self, tensors: Vectors, *, reduction: str = "sum", compressor: Spec = "none") -> Vectors:
        """Add up vectors over the workers that are there, on the first shard; all must call it equally often.

        Args:
            tensors: one or several, of any shape and floating-point type; together no larger than the model.
            reduction: ``"sum"`` or ``"mean"``, the sum divided by the number of workers that are in it.
            compressor: ``none``.

        Returns:
            A float32 tensor for each, of its shape and on its device, bit-identical on all workers.
        """
        check_choice("all_reduce", "reduction", reduction, ("sum", "mean"))
        if not isinstance(registry.compressor(compressor), NoCompression):
            raise ConfigError(f"all_reduce: compressor={compressor!r} is not allowed with a server; it must be none")
        self._running()
        given = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        parts = [tensor.detach().to("cpu", torch.float32).reshape(-1) for tensor in given]
        total, terms = self._links.add(torch.cat(parts) if parts else torch.empty(0))
        if reduction == "mean":
            total = total / terms
        sums = torch.split(total, [part.numel() for part in parts])
        results = [part.view(t.shape).to(t.device) for part, t in zip(sums, given, strict=True)]
        return results[0] if isinstance(tensors, Tensor) else results

    def wait(self) -> None:
        """Take in what is on its way, with ``delay=1``."""
        self._running()
        with torch.no_grad():
            self._settle(StepRecord())

    def state_dict(self) -> dict[str, object]:
        """This worker's residuals, what it has not pushed yet, and its clock. Parameters are the server's to keep."""
        shapes = {name: list(p.shape) for name, p in self._named}
        return self._about() | {
            "step": self._step,
            "parameters": shapes,
            "states": self._gradients.store.save(),
            "sums": {name: sums.clone() for name, sums in self._gradients.sums.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Restore what :meth:`state_dict` gave. The clock stays what the server says, unless it knows less.

        Raises:
            StateError: it is from another compressor or model; nothing changes.
        """
        step, states = unpack(state_dict, self._about())
        sums = state_dict.get("sums")
        numels = self._gradients.numels
        if not isinstance(sums, Mapping) or not all(
            isinstance(t, Tensor) and name in numels and t.shape == (numels[name],) for name, t in sums.items()
        ):
            raise StateError("state dict has sums that do not fit this model")
        self._gradients.store.load(states, self._gradients.named_pieces(), numels)
        self._gradients.sums = {name: t.clone() for name, t in sums.items()}
        self._step = max(self._step, step)

    def _about(self) -> dict[str, object]:
        return {
            "format": _STATE_FORMAT,
            "exchange": "server",
            "shards": len(self._shards),
            "compressor": json.dumps(self.compressor.config(), sort_keys=True),
        }

    def close(self) -> None:
        """Leave the run, so that nobody waits for this worker. Bounded; may be called twice."""
        if not self._closed:
            self._closed = True
            self._links.leave()

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def hook_up(self) -> None:
        """Have the optimizer's ``step()`` push and pull."""
        self.add_handle(self._optimizer.register_step_pre_hook(self._before_step))
        self.add_handle(self._optimizer.register_step_post_hook(self._after_step))

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_closure(args, kwargs)
        if getattr(optimizer, "grad_scale", None) is not None:
            raise ConfigError(
                "attach: a fused optimizer with a GradScaler hands over gradients that are still multiplied by its "
                "scale: make the optimizer with fused=False, or use bfloat16 and no scaler"
            )
        self._after_step(optimizer, args, kwargs)
        if not self._syncing:
            return
        self.exchange()
        if self._step % self._n_fetch == 0:
            for _, parameter in self._named:
                if parameter.grad is not None:
                    self._hidden.append((parameter, parameter.grad))
                    parameter.grad = None

    def _after_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give back the gradients that were hidden from the optimizer."""
        for parameter, grad in self._hidden:
            if parameter.grad is None:
                parameter.grad = grad
        self._hidden.clear()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _settle(self, record: StepRecord, *, write: bool = True) -> None:
        """Take in what is on its way."""
        with on(self._device), record.timed("wait_s"):
            came = self._links.settle()  # which reads what came in
        if came and write:
            with record.timed("decompress_s"):
                self._take_over()

    def _take_over(self) -> None:
        with torch.no_grad():
            for shard in self._shards:
                shard.write_parameters()

    def _running(self) -> None:
        if self._closed:
            raise TransportError("this worker has left its parameter server")


def _default_name() -> str:
    rank = os.environ.get("RANK")
    return rank if rank is not None else f"{socket.gethostname()}-{os.getpid()}-{new_incarnation() & 0xFFFFFF:x}"


def _longest(shards: Sequence[ServedShard]) -> int:
    """More than any message to or from a shard: a ring of changes weighs no more than all values, head and all."""
    return max((1 << 20) + 16 * shard.table.numel + 512 * len(shard.table.rows) for shard in shards)
