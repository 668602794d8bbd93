"""The engine: from a parameter's gradient hook to the reduced gradient in ``p.grad``, overlapped with backward."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradcomp import handshake, replicas
from gradcomp.bucket import Bucket, DenseRule, Piece, max_message_bytes, plan_buckets, tensor_table
from gradcomp.driver import Driver
from gradcomp.errors import ConfigError, GradientError, StateError
from gradcomp.interfaces import Compressor, Exchange, Slot, Transport
from gradcomp.options import check_choice, check_integer
from gradcomp.states import StateStore
from gradcomp.telemetry import StepRecord, Totals
from gradcomp.version import WIRE_VERSION, __version__
from gradcomp.work import BucketWork

__all__ = ["GradientExchange"]

_STATE_FORMAT = 1
_AVERAGE_BUCKET = 0xFFFF_FFFD


class GradientExchange:
    """Exchanges the gradients of some parameters between ranks, compressed. Made by :func:`gradcomp.attach`.

    Every rank ends each step with bit-identical gradients: it applies the decoded packets of all ranks, its own
    included, in rank order. Used from one training thread.

    Args:
        named_parameters: name and parameter, in the same order on every rank.
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
        compressor: Compressor,
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
        self.compressor, self.transport, self.exchange_kind = compressor, transport, exchange
        self._reduction, self._when, self._digest_every = reduction, when, digest_every
        self._table = tensor_table(named_parameters, compressor, DenseRule() if dense is None else dense)
        self._buckets = plan_buckets(self._table, bucket_bytes)
        self._pieces = [exchange.cut(bucket.units, transport.world_size) for bucket in self._buckets]
        self._bucket_of = {position: bucket for bucket in self._buckets for position in bucket.parameters}
        self._gradient_bytes = 4 * sum(row.numel for row in self._table)
        self._has_state = any(not row.codec.stateless for row in self._table)
        self._store = StateStore(transport.rank)
        self._totals = Totals()
        self._step = 0
        self._turn = 0  # numbers messages; unlike the step it never goes back, not even when a state is loaded
        self._syncing = True
        self._closed = False
        self._handles: list[RemovableHandle] = []
        self._lock = threading.Lock()
        self._start_step()

        longest, all_together = self._message_bounds(buffers)
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
            backward hid), ``parameters`` (the same by name). Now: ``residual_norm``.
        """
        return self._totals.as_dict() | {
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
        mine = tensor.detach().to("cpu", torch.float32).contiguous()
        if mine.numel() * 4 > replicas.BROADCAST_CHUNK_BYTES:
            raise ConfigError(f"average: {mine.numel()} elements are too many; at most 8 MiB of float32")
        slot = Slot(self._next_turn(), _AVERAGE_BUCKET, 0)
        everyone = self.transport.all_gather(slot, mine.numpy().tobytes())
        rows = [torch.frombuffer(bytearray(row), dtype=torch.float32) if len(row) else mine for row in everyone]
        return torch.stack([row.view(mine.shape) for row in rows]).mean(0)

    def state_dict(self) -> dict[str, object]:
        """Residuals and all else that must last, of this rank: a plain dict of tensors, strings and numbers.

        Save one a rank; with model, optimizer and random state it restores a run bit for bit.
        """
        return {
            "format": _STATE_FORMAT,
            "rank": self.rank,
            "world_size": self.world_size,
            "step": self._step,
            "compressor": json.dumps(self.compressor.config(), sort_keys=True),
            "states": self._store.save(),
        }

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Restore what :meth:`state_dict` gave, on the same rank of as many ranks. Nothing changes if it is refused.

        Raises:
            StateError: it is from another rank, world size, compressor or model.
        """
        expected = {
            "format": _STATE_FORMAT,
            "rank": self.rank,
            "world_size": self.world_size,
            "compressor": json.dumps(self.compressor.config(), sort_keys=True),
        }
        for field, value in expected.items():
            if state_dict.get(field) != value:
                raise StateError(f"state dict has {field}={state_dict.get(field)!r}; this run has {value!r}")
        step, states = state_dict.get("step"), state_dict.get("states")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise StateError(f"state dict has step={step!r}; it must be an integer >= 0")
        if not isinstance(states, Mapping):
            raise StateError(f"state dict has states={type(states).__name__}; it must be a dict")
        spans: dict[str, set[str]] = {}
        for bucket, pieces in zip(self._buckets, self._pieces, strict=True):
            for piece in pieces:
                if not piece.codec.stateless:
                    name = self._names[bucket.units[piece.unit].parameters[0]]
                    spans.setdefault(name, set()).add(f"{piece.start}:{piece.stop}")
        self._store.load(states, spans)
        self._step = step

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
            "compressor": json.dumps(self.compressor.config(), sort_keys=True),
            "tensors": handshake.digest_tensors([row.describe() for row in self._table]),
            "exchange": json.dumps(self.exchange_kind.config(), sort_keys=True),
            "reduction": self._reduction,
            "when": self._when,
            "bucket_bytes": bucket_bytes,
            "digest_every": self._digest_every,
        }

    def _message_bounds(self, buffers: Sequence[Tensor]) -> tuple[int, int]:
        """The longest message there can be, and how much a rank can send another in a step or a broadcast, in bytes."""
        lengths = [
            max_message_bytes(pieces, len(bucket.parameters))
            for bucket, pieces in zip(self._buckets, self._pieces, strict=True)
        ]
        sizes = [tensor.numel() * tensor.element_size() for tensor in [*self._tensors, *buffers]]
        # Broadcast chunks, averages and digests share the connection. What has no flat view is broadcast whole.
        others = max(replicas.BROADCAST_CHUNK_BYTES, 16 * len(self._table), *sizes)
        return max(*lengths, others), max(2 * sum(lengths), sum(sizes)) + others

    # -- one step ------------------------------------------------------------------------------------------------------

    def _start_step(self) -> None:
        self._waiting = {bucket.index: set(bucket.parameters) for bucket in self._buckets}
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
        waiting = self._waiting[self._bucket_of[position].index]
        if position not in waiting:
            raise GradientError(
                f"parameter {self._names[position]!r} got a second gradient before the first was exchanged; "
                "was a backward pass interrupted?"
            )
        waiting.discard(position)
        # Every rank submits every bucket in the same order, ready ones waiting for those before them.
        while len(self._works) < len(self._buckets) and not self._waiting[len(self._works)]:
            self._submit(self._buckets[len(self._works)])

    def _end_of_backward(self) -> None:
        with self._abort_on_error():
            self._finish()

    def _finish(self) -> None:
        for bucket in self._buckets[len(self._works) :]:
            self._submit(bucket)
        with self._record.timed("wait_s"):
            self._driver.drain()
        nonfinite = any(work.nonfinite for work in self._works)
        with torch.no_grad():
            for work in self._works:
                work.finish(commit=not nonfinite)
        self._step += 1
        self._next_turn()
        self._totals.add(self._record, gradient_bytes=self._gradient_bytes, nonfinite=nonfinite)
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
            self._check_gradient(position)
        if self._tensors[bucket.parameters[0]].is_cuda:
            # The exchange thread reads on a stream of its own: what backward queued must have been computed.
            torch.cuda.current_stream(self._tensors[bucket.parameters[0]].device).synchronize()
        pieces: Sequence[Piece] = self._pieces[bucket.index]
        work = BucketWork(
            bucket=bucket,
            pieces=pieces,
            table=self._table,
            tensors=self._tensors,
            store=self._store,
            transport=self.transport,
            record=self._record,
            step=self._turn,
            scale=1.0 / self.world_size if self._reduction == "mean" else 1.0,
            watch_dense=self._has_state,
        )
        self._works.append(work)
        self._driver.submit(self.exchange_kind.run(work), self._record)

    def _check_gradient(self, position: int) -> None:
        grad = self._tensors[position].grad
        if grad is None:
            return
        if grad.layout != torch.strided:
            raise GradientError(
                f"parameter {self._names[position]!r} has a {grad.layout} gradient; only dense (strided) gradients can "
                "be exchanged: use sparse=False in the embedding"
            )
        if grad.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise GradientError(f"parameter {self._names[position]!r} has a {grad.dtype} gradient")

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
