"""The engine: from a parameter's gradient hook to the reduced gradient in ``p.grad``, overlapped with backward."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradcomp import redistribute, replicas
from gradcomp.bucket import Bucket, DenseRule
from gradcomp.driver import Driver
from gradcomp.errors import ConfigError, GradcompError, GradientError
from gradcomp.interfaces import Exchange, Transport
from gradcomp.options import check_choice, check_integer
from gradcomp.ownership import Ownership
from gradcomp.plan import Plan, message_bounds
from gradcomp.registry import Spec
from gradcomp.rules import Choice, choose
from gradcomp.states import StateStore, unpack
from gradcomp.telemetry import StepRecord, Totals
from gradcomp.version import WIRE_VERSION, __version__
from gradcomp.work import BucketWork, check_gradient

__all__ = ["GradientExchange"]

_STATE_FORMAT = 1


class GradientExchange:
    """Exchanges the gradients of some parameters between ranks, compressed. Made by :func:`gradcomp.attach`.

    Every rank ends each step with bit-identical gradients: it applies the decoded packets of all ranks, its own
    included, in rank order. Used from one training thread.

    Args:
        named_parameters: name and parameter, in the same order on every rank.
        compressor: a Compressor, or Rules for each parameter's.
        buffers: further tensors that start as rank 0's (BatchNorm's running statistics, frozen parameters).
        reduction: ``"mean"`` or ``"sum"`` over ranks.
        when: ``"backward"``: exchanged inside ``backward()``, overlapped with it; ``"step"``: when :meth:`exchange`
            is called.
        bucket_bytes: gradients are exchanged in buckets of at most so many bytes of float32.
        digest_every: every so many steps replicas are compared; 0 never.
        dense: which parameters go uncompressed; called with name and parameter.

    Raises:
        ConfigError: no parameters, or an option out of range.
        HandshakeError, TransportTimeout, PeerLost: meeting the other ranks failed.
    """

    def __init__(
        self,
        named_parameters: Sequence[tuple[str, Tensor]],
        *,
        compressor: Choice,
        transport: Transport,
        exchange: Exchange,
        buffers: Sequence[Tensor] = (),
        reduction: str = "mean",
        when: str = "backward",
        bucket_bytes: int = 25 << 20,
        digest_every: int = 100,
        dense: Callable[[str, Tensor], bool] | None = None,
    ) -> None:
        check_choice("attach", "reduction", reduction, ("mean", "sum"))
        check_choice("attach", "when", when, ("backward", "step"))
        check_integer("attach", "bucket_bytes", bucket_bytes, at_least=4)
        check_integer("attach", "digest_every", digest_every, at_least=0)
        if not named_parameters:
            raise ConfigError("the optimizer has no parameters that require a gradient: there is nothing to exchange")
        self._names = [name for name, _ in named_parameters]
        self._tensors = [tensor for _, tensor in named_parameters]
        if len({tensor.device for tensor in self._tensors}) > 1:
            raise ConfigError("parameters lie on several devices; one process exchanges the gradients of one device")
        self.transport, self.exchange_kind = transport, exchange
        self._reduction, self._when, self._digest_every = reduction, when, digest_every
        self._bucket_bytes = bucket_bytes
        self._dense = DenseRule() if dense is None else dense
        self._plan = self._make_plan(compressor)
        self._numels = {row.name: row.numel for row in self._plan.table}
        self._store = StateStore(transport.rank)
        self._ownership = Ownership(self._tensors)
        self._totals = Totals()
        self._step = 0
        self._turn = 0  # numbers messages; unlike the step it never goes back, not even when a state is loaded
        self._syncing = True
        self._closed = False
        self._handles: list[RemovableHandle] = []
        self._lock = threading.Lock()
        self._start_step()

        self._most_bytes = self._plan.most_bytes(exchange, transport.world_size)
        longest, all_together = message_bounds(self._most_bytes, [*self._tensors, *buffers])
        # Another rank can be a whole step ahead of this one, or a whole broadcast.
        transport.connect(self._hello(bucket_bytes), max_message_bytes=longest, max_unclaimed_bytes=2 * all_together)
        self._driver = Driver(transport)
        try:
            if transport.world_size > 1:
                replicas.broadcast(transport, [*self._tensors, *buffers])
            if when == "backward":
                for position, tensor in enumerate(self._tensors):
                    hook = tensor.register_post_accumulate_grad_hook(self._hook(position))  # type: ignore[no-untyped-call]
                    self.add_handle(hook)
        except BaseException:
            self.close()
            raise

    # -- what users call -----------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.transport.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.transport.world_size

    @property
    def compressor(self) -> Choice:
        """What compresses now: a Compressor, or Rules."""
        return self._plan.compressor

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of backward passes in here stay local and add up, as with DDP's; the next one exchanges the sum."""
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before

    def exchange(self) -> None:
        """Exchange all gradients now and wait for them. What ``when="step"`` calls before each optimizer step.

        Raises:
            GradientError: a sparse gradient.
            TransportError: a rank is gone, or nothing came in time.
        """
        if not self._syncing:
            return
        with self._abort_on_error():
            self._finish()

    def stats(self) -> dict[str, Any]:
        """What was sent and how long it took.

        Returns:
            Totals since the start: ``steps``, ``nonfinite_steps``, ``bytes_sent`` and ``bytes_received`` (all that
            this rank put on and took off the wire), ``packet_bytes`` (its own packets, once), ``gradient_bytes`` (the
            same gradients as float32), ``ratio`` (gradient_bytes / packet_bytes). Of the last step: ``density`` (share
            of compressed elements that was sent), ``tau`` (mean over tensors), ``compress_ms``, ``wait_ms``
            (training thread waiting), ``decompress_ms``, ``hidden_fraction`` (share of the time on the wire that
            backward hid), ``parameters`` (the same by name). Now: ``residual_norm``, and ``compressors``: each
            parameter's, as a spec string, by name.
        """
        return self._totals.as_dict() | {
            "compressors": dict(self._plan.specs),
            "bytes_sent": self.transport.bytes_sent,
            "bytes_received": self.transport.bytes_received,
            "residual_norm": self._store.residual_norm(),
        }

    def average(self, tensor: Tensor) -> Tensor:
        """The mean of a small tensor over ranks, dense; all ranks must call it. For metrics.

        Args:
            tensor: any shape, at most 8 MiB as float32.

        Returns:
            float32, same shape, on the CPU; bit-identical on all ranks.
        """
        return replicas.average(self.transport, self._next_turn(), tensor)

    def state_dict(self) -> dict[str, object]:
        """Residuals and all else that must last, of this rank: a plain dict of tensors, strings and numbers.

        Save one a rank; with model, optimizer and random state it restores a run bit for bit.
        """
        shapes = {row.name: list(row.shape) for row in self._plan.table}
        return self._about() | {"step": self._step, "parameters": shapes, "states": self._store.save()}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Restore what :meth:`state_dict` gave, on the same rank of as many ranks. Nothing changes if it is refused.

        Raises:
            StateError: it is from another rank, world size, compressor or model.
        """
        step, states = unpack(state_dict, self._about())
        self._store.load(states, self._plan.named_pieces(), self._numels)
        self._step = step

    def load_state_dicts(self, state_dicts: Iterable[Mapping[str, object]]) -> None:
        """Restore what :meth:`state_dict` gave on all old ranks, be they as many or not: see gradcomp.redistribute.

        All ranks must call it. If one refuses (StateError), all do (HandshakeError), and nothing changes on any.
        """
        self._step, self._store = redistribute.restore_together(
            state_dicts, self._plan, self._about(), self.transport, self._next_turn(), self._tensors[0].device
        )

    def _about(self) -> dict[str, object]:
        return {
            "format": _STATE_FORMAT,
            "rank": self.rank,
            "world_size": self.world_size,
            "compressor": json.dumps(self.compressor.config(), sort_keys=True),
        }

    def set_compressor(self, compressor: Spec | Choice) -> None:
        """Compress differently from the next step on. All ranks must call it, between the same two steps.

        Nothing that is held back is lost: residuals are cut to the new compressor's pieces, or wait for the next
        gradient if it keeps none. What else a compressor remembered (a momentum, say) is dropped where it changes.

        Args:
            compressor: as for :func:`gradcomp.attach`, rules included.

        Raises:
            ConfigError: an unknown id or option, or a compressor that may send more than was agreed at the start:
                what the first compressor may send, or float32.
            HandshakeError: the ranks do not agree; names the field. Nothing has changed then, on any rank.
        """
        if self._works:
            raise ConfigError("set_compressor: a step is under way; call it between steps")
        problem: GradcompError | None = None
        agreed: dict[str, str | int | bytes] = {"step": self._step}
        try:
            plan = self._make_plan(choose(compressor))
            for most, allowed in zip(plan.message_bytes(), self._most_bytes, strict=True):
                if most > allowed:
                    raise ConfigError(f"set_compressor: a message could have {most} bytes; {allowed} were agreed on")
            store = self._store.recut(
                self._plan.named_pieces(), plan.named_pieces(), self._numels, self._tensors[0].device
            )
            agreed |= plan.describe()
        except GradcompError as error:
            # The others must hear of it, or they would wait for this rank.
            problem = error
            agreed["compressor"] = f"refused on rank {self.rank}: {error}"[:1000]
        replicas.check_agreed(self.transport, self._next_turn(), agreed, problem)
        self._plan, self._store = plan, store
        self._start_step()

    def add_handle(self, handle: RemovableHandle) -> None:
        """Keep a hook's handle, to be removed by :meth:`detach`."""
        self._handles.append(handle)

    def detach(self) -> None:
        """Take the hooks off and leave: training goes on locally."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.close()

    def close(self) -> None:
        """Leave the other ranks. Bounded; may be called twice. A later exchange raises TransportError."""
        if not self._closed:
            self._closed = True
            self._driver.stop()
            self.transport.close()

    def __enter__(self) -> GradientExchange:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # -- meeting -------------------------------------------------------------------------------------------------------

    def _hello(self, bucket_bytes: int) -> dict[str, str | int | bytes]:
        return {
            "version": __version__,
            "wire": WIRE_VERSION,
            "world_size": self.world_size,
            **self._plan.describe(),
            "exchange": json.dumps(self.exchange_kind.config(), sort_keys=True),
            "reduction": self._reduction,
            "when": self._when,
            "bucket_bytes": bucket_bytes,
            "digest_every": self._digest_every,
        }

    def _make_plan(self, compressor: Choice) -> Plan:
        return Plan.make(
            list(zip(self._names, self._tensors, strict=True)),
            compressor,
            dense=self._dense,
            exchange=self.exchange_kind,
            world_size=self.world_size,
            bucket_bytes=self._bucket_bytes,
        )

    # -- one step ------------------------------------------------------------------------------------------------------

    def _start_step(self) -> None:
        self._waiting = {bucket.index: set(bucket.parameters) for bucket in self._plan.buckets}
        self._works: list[BucketWork] = []
        self._record = StepRecord()
        self._in_backward = False

    def _hook(self, position: int) -> Callable[[Tensor], None]:
        def on_gradient(_: Tensor) -> None:
            if self._syncing:
                with self._abort_on_error(), self._lock:
                    self._on_gradient(position)

        return on_gradient

    def _on_gradient(self, position: int) -> None:
        if not self._in_backward:
            self._in_backward = True
            # Runs when this backward pass is over, whatever parameters it did not reach.
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
        waiting = self._waiting[self._plan.bucket_of[position].index]
        if position not in waiting:
            raise GradientError(
                f"parameter {self._names[position]!r} got a second gradient before the first was exchanged; "
                "was a backward pass interrupted?"
            )
        waiting.discard(position)
        # Every rank submits every bucket in the same order, ready ones waiting for those before them.
        while len(self._works) < len(self._plan.buckets) and not self._waiting[len(self._works)]:
            self._submit(self._plan.buckets[len(self._works)])

    def _end_of_backward(self) -> None:
        with self._abort_on_error():
            self._finish()

    def _finish(self) -> None:
        for bucket in self._plan.buckets[len(self._works) :]:
            self._submit(bucket)
        with self._record.timed("wait_s"):
            self._driver.drain()
        nonfinite = any(work.nonfinite for work in self._works)
        with torch.no_grad():
            for work in self._works:
                work.finish(commit=not nonfinite)
        self._step += 1
        self._next_turn()
        self._ownership.end_step()
        self._totals.add(self._record, gradient_bytes=self._plan.gradient_bytes, nonfinite=nonfinite)
        self._start_step()
        if self._digest_every and self._step % self._digest_every == 0:
            self.check_replicas()

    def check_replicas(self) -> None:
        """Compare the parameters of all ranks; all must call it at the same step. Runs every ``digest_every`` steps.

        Raises:
            ReplicaMismatch: names the first parameter that differs.
        """
        replicas.check_equal(self.transport, self._next_turn(), self._step, self._names, self._tensors)

    def _submit(self, bucket: Bucket) -> None:
        for position in bucket.parameters:
            check_gradient(self._names[position], self._tensors[position].grad)
        if self._tensors[bucket.parameters[0]].is_cuda:
            # The exchange thread reads on a stream of its own: what backward queued must have been computed.
            torch.cuda.current_stream(self._tensors[bucket.parameters[0]].device).synchronize()
        work = BucketWork(
            bucket=bucket,
            ownership=self._ownership,
            pieces=self._plan.pieces[bucket.index],
            table=self._plan.table,
            tensors=self._tensors,
            store=self._store,
            transport=self.transport,
            record=self._record,
            step=self._turn,
            scale=1.0 / self.world_size if self._reduction == "mean" else 1.0,
            watch_dense=self._plan.has_state or self._store.holds_waiting,
        )
        self._works.append(work)
        self._driver.submit(self.exchange_kind.run(work), self._record)

    @contextmanager
    def _abort_on_error(self) -> Iterator[None]:
        """A step that fails here leaves the run, so that the other ranks hear of it at once instead of waiting."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn
