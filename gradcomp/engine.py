"""GradientExchange: what users hold. How a step runs is in gradcomp.stepper, who starts one in gradcomp.hooks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from gradcomp import replicas, saving, vectors
from gradcomp.ahead import Ahead, or_leave
from gradcomp.bucket import DenseRule
from gradcomp.buffers import BufferPolicy
from gradcomp.changes import go_on_with
from gradcomp.errors import ConfigError
from gradcomp.gradients import Gradients, HeldGradients, ParameterGradients
from gradcomp.hooks import BackwardHooks
from gradcomp.interfaces import Exchange, Transport
from gradcomp.options import check_choice, check_integer
from gradcomp.plan import Planner, message_bounds
from gradcomp.products import Products
from gradcomp.registry import Spec
from gradcomp.rules import Choice, choose
from gradcomp.session import Session
from gradcomp.stepper import Stepper
from gradcomp.tuner import Tuner
from gradcomp.vectors import Vectors
from gradcomp.version import WIRE_VERSION, __version__

__all__ = ["GradientExchange"]


class GradientExchange(Session):
    """Exchanges the gradients of some parameters between ranks, compressed. Made by :func:`gradcomp.attach`.

    Every rank ends each step with bit-identical gradients: it applies the decoded packets of all ranks, its own
    included, in rank order. Used from one training thread.

    Args:
        named_parameters: name and parameter, in the same order on every rank. Frozen ones take part once they are not.
        compressor: a Compressor, or Rules for each parameter's.
        buffers: further tensors that start as rank 0's (BatchNorm's running statistics, frozen parameters).
        synced: those of them that ``buffer_policy`` is for.
        later: parameters that :meth:`set_parameters` may add: messages may be as long as they would then be.
        reduction: ``"mean"`` or ``"sum"`` over ranks.
        when: ``"backward"``: exchanged inside ``backward()``, overlapped with it; ``"step"``: when :meth:`exchange`
            is called; ``"ddp"``: by somebody who calls :meth:`ready` and :meth:`exchange`.
        overlap: ``"backward"``: an exchange is over when :meth:`exchange` returns; ``"forward"``: it is in flight then,
            and lands in :meth:`wait`, or bucket by bucket for somebody who asks :attr:`ahead` for that.
        bucket_bytes: gradients are exchanged in buckets of about so many bytes (see :func:`gradcomp.attach`).
        digest_every: every so many steps replicas are compared; 0 never.
        dense: which parameters go uncompressed; called with name and parameter.
        loss_scale: what gradients are multiples of (torch.amp.GradScaler's scale), asked once in each step.
        gradients: where they lie, if not in ``p.grad``.
        products: watches the linear layers, for ``factored`` compressors; None: these are refused.
        accept: raises ConfigError for compressors that will not do; asked about every one that is set.

    Attributes:
        ahead: the step in flight.

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
        synced: Sequence[Tensor] = (),
        buffer_policy: BufferPolicy | None = None,
        later: Sequence[Tensor] = (),
        reduction: str = "mean",
        when: str = "backward",
        overlap: str = "backward",
        bucket_bytes: int = 25 << 20,
        digest_every: int = 100,
        dense: Callable[[str, Tensor], bool] | None = None,
        loss_scale: Callable[[], float] | None = None,
        gradients: Gradients | None = None,
        products: Products | None = None,
        accept: Callable[[Choice], None] | None = None,
    ) -> None:
        super().__init__()
        check_choice("attach", "reduction", reduction, ("mean", "sum"))
        check_choice("attach", "when", when, ("backward", "step", "ddp"))
        check_choice("attach", "overlap", overlap, ("backward", "forward"))
        check_integer("attach", "bucket_bytes", bucket_bytes, at_least=4)
        check_integer("attach", "digest_every", digest_every, at_least=0)
        exchange = exchange.on(transport)
        self.transport, self.exchange_kind = transport, exchange
        self._reduction, self._when, self._digest_every = reduction, when, digest_every
        self._overlap = overlap
        ahead = overlap == "forward"
        self._planner = Planner(
            exchange=exchange,
            world_size=transport.parties,
            bucket_bytes=bucket_bytes,
            dense=DenseRule() if dense is None else dense,
            accept=accept,
            has_model=products is not None,
        )
        self._products = products or Products()
        self._loss_scale = loss_scale or (lambda: 1.0)
        self._synced, self._buffer_policy = list(synced), BufferPolicy() if buffer_policy is None else buffer_policy
        self._vector_turns = itertools.count()  # of their own: buckets of one step must share theirs
        self._closed = False
        tensors = [tensor for _, tensor in named_parameters]
        self._tuner = Tuner(compressor, self._planner)
        plan = self._tuner.first_plan(named_parameters)
        transport.check_device(tensors[0].device)
        self._stepper = Stepper(
            plan=plan,
            tensors=tensors,
            gradients=gradients or (HeldGradients if ahead else ParameterGradients)(tensors, self._products),
            transport=transport,
            exchange=exchange,
            scale=1.0 / transport.world_size if reduction == "mean" else 1.0,
            loss_scale=self._loss_scale,
            ahead=ahead,
        )
        self.ahead = Ahead(self._stepper, self._leave)
        everything = [*tensors, *buffers]
        most = self._tuner.most_bytes(plan, named_parameters, transport.parties)
        longest, all_together = message_bounds(most, everything, later)
        self._agreed = longest, all_together
        self._tuner.bind(self._stepper, transport, self._agreed, lambda choice: self._set("auto", lambda: choice))
        # Another rank can be a whole step ahead of this one, or a whole broadcast.
        transport.first_needed_first = ahead
        transport.connect(
            self._hello(),
            max_message_bytes=longest,
            max_unclaimed_bytes=2 * all_together,
        )
        self._stepper.start()
        try:
            if transport.world_size > 1:
                replicas.broadcast(transport, 0, everything)
            if when == "backward":
                self._hook_up()
        except BaseException:
            self.close()
            raise

    # -- what users call -----------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        return self.transport.rank

    @property
    def world_size(self) -> int:
        return self.transport.world_size

    @property
    def compressor(self) -> Choice:
        """What compresses now: a Compressor, or Rules; with ``auto`` what it has come to."""
        return self._stepper.plan.compressor

    @property
    def step(self) -> int:
        """Number of exchanges that are finished, or in flight (:meth:`wait`); part of a checkpoint."""
        return self._stepper.step

    def exchange(self) -> None:
        """Exchange all gradients now and wait for them. What ``when="step"`` calls before each optimizer step.

        Raises:
            GradientError: a sparse gradient.
            TransportError: a rank is gone, or nothing came in time.
        """
        if not self._syncing:
            return
        with or_leave(self._leave):
            if self._overlap == "forward":
                self._stepper.leave()
            else:
                self._stepper.finish()
            step = self._stepper.step
            if self._buffer_policy.is_due(step):
                self._buffer_policy.apply(self.transport, self._stepper.next_turn(), self._synced)
            if self._digest_every and step % self._digest_every == 0:
                self._compare()
            self._tuner.step_over()

    def ready(self, *positions: int) -> None:
        """These parameters, by their position among the named ones, have their gradients: for those who bring hooks."""
        with or_leave(self._leave):
            self._stepper.ready(positions)

    def wait(self) -> None:
        """With ``overlap="forward"``: finish the step that is in flight, if one is; with ``"backward"`` none ever is.

        After ``optimizer.step()``: to be called before parameters or the optimizer's state are read in another way than
        by modules' forward and ``state_dict()``. Between ``backward()`` and ``optimizer.step()`` it makes ``p.grad``
        the exchanged gradient, to be clipped, say. Raises as :meth:`exchange`.
        """
        self.ahead.land()

    @property
    def is_syncing(self) -> bool:
        """Whether gradients are to be exchanged: not inside :meth:`no_sync`."""
        return self._syncing

    def check_replicas(self) -> None:
        """Compare the parameters of all ranks; all must call it at the same step. Runs every ``digest_every`` steps.

        Raises:
            ReplicaMismatch: names the first parameter that differs.
        """
        self.wait()
        self._compare()

    def _compare(self) -> None:
        stepper = self._stepper
        replicas.check_equal(self.transport, stepper.next_turn(), stepper.step, stepper.named)

    def stats(self) -> dict[str, Any]:
        """What was sent and how long it took.

        Returns:
            Totals since the start: ``steps``, ``nonfinite_steps``, ``bytes_sent`` and ``bytes_received`` (all that
            this rank put on and took off the wire), ``packet_bytes`` (its own packets, once), ``gradient_bytes`` (the
            same gradients as float32), ``ratio`` (gradient_bytes / packet_bytes). Of the last step: ``density`` (share
            of compressed elements that was sent), ``tau`` (mean over tensors), ``compress_ms``, ``wait_ms``
            (training thread waiting), ``decompress_ms``, ``exposed_ms`` (training stood still: it waited, or put sums
            in place), ``hidden_fraction`` (share of the time on the wire that backward, or the next forward, hid),
            ``parameters`` (the same by name, and ``residual_norm``). Now: ``residual_norm`` (of all), and
            ``compressors``: each parameter's, as a spec string, by name. With hosts as levels (``hierarchical``) also
            ``bytes_sent_between`` and ``bytes_received_between``: what of all bytes crossed between hosts. With
            compressor ``auto``, ``auto``: what was tried and chosen, and why.
        """
        return self._stepper.totals.as_dict() | {
            "compressors": dict(self._stepper.plan.specs),
            **self.transport.traffic(),
            **self._tuner.stats(),
        }

    def average(self, tensor: Tensor) -> Tensor:
        """The mean of a small tensor over ranks, dense; all ranks must call it. For metrics.

        Args:
            tensor: any shape, at most 8 MiB as float32.

        Returns:
            float32, same shape, on the CPU; bit-identical on all ranks.
        """
        if tensor.requires_grad:  # a parameter
            self.wait()
        return replicas.average(self.transport, self._stepper.next_turn(), tensor)

    def all_reduce(self, tensors: Vectors, *, reduction: str = "sum", compressor: Spec = "none") -> Vectors:
        """Add up vectors of your own over ranks; all ranks must call it. See :func:`gradcomp.vectors.all_reduce`."""
        turn, settle = next(self._vector_turns), self._stepper.drain
        return vectors.all_reduce(self.transport, turn, tensors, reduction, compressor, settle=settle)

    def state_dict(self) -> dict[str, object]:
        """Residuals and all else that must last, of this rank: a plain dict of tensors, strings and numbers.

        Save one a rank; with model, optimizer and random state it restores a run bit for bit.
        """
        self.wait()
        return saving.save(self._stepper, self.transport, self._tuner)

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Restore what :meth:`state_dict` gave, on the same rank of as many ranks. Nothing changes if it is refused.

        Raises:
            StateError: it is from another rank, world size, compressor or model.
        """
        self.wait()
        saving.load(state_dict, self._stepper, self.transport, self._tuner)

    def load_state_dicts(self, state_dicts: Iterable[Mapping[str, object]]) -> None:
        """Restore what :meth:`state_dict` gave on all old ranks, be they as many or not: see gradcomp.redistribute.

        All ranks must call it. If one refuses (StateError), all do (HandshakeError), and nothing changes on any.
        """
        self.wait()
        saving.load_all(state_dicts, self._stepper, self.transport, self._tuner)

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
        self._set("set_compressor", lambda: self._tuner.fixed(choose(compressor)))
        self._tuner.stop()

    def _set(self, what: str, choice: Callable[[], Choice]) -> None:
        self.wait()
        self._change(what, self._stepper.named, choice)

    def set_parameters(self, named_parameters: Sequence[tuple[str, Tensor]]) -> None:
        """Exchange the gradients of these parameters from the next step on, the new ones starting as rank 0's.

        What ``optimizer.add_param_group`` calls on an optimizer that was attached. All ranks must call it, between the
        same two steps. Residuals of parameters that stay are kept; those of others are dropped.

        Raises:
            ConfigError: no parameters, several devices, or messages longer than were agreed on at the start.
            HandshakeError: as :meth:`set_compressor`.
        """
        if self._when == "ddp":
            raise ConfigError("set_parameters: DistributedDataParallel's parameters are those it was made with")
        self.wait()
        self._change("set_parameters", named_parameters, lambda: self.compressor)
        self._tuner.restart()
        replicas.broadcast(self.transport, self._stepper.next_turn(), self._stepper.tensors)

    def _change(self, what: str, named: Sequence[tuple[str, Tensor]], choice: Callable[[], Choice]) -> None:
        go_on_with(
            what,
            named,
            choice,
            stepper=self._stepper,
            planner=self._planner,
            transport=self.transport,
            products=self._products,
            agreed=self._agreed,
        )
        if self._when == "backward":
            self._hook_up()  # after those that watch products

    def detach(self) -> None:
        """Take the hooks off and leave: training goes on locally, from where a step in flight ends."""
        if not self._closed:
            self.wait()
        super().detach()

    def close(self) -> None:
        """Leave the other ranks, once no step is in flight. Bounded; may be called twice.

        A later exchange raises TransportError.
        """
        if not self._closed:
            self.wait()
        self._leave()

    def _leave(self) -> None:
        if not self._closed:
            self._closed = True
            self._products.remove()
            self._stepper.stop()
            self.transport.close()

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None:
            self._leave()  # an error: what is in flight is not waited for
        self.detach()

    # -- meeting -------------------------------------------------------------------------------------------------------

    def _hello(self) -> dict[str, str | int | bytes]:
        return {
            "version": __version__,
            "wire": WIRE_VERSION,
            "world_size": self.world_size,
            **self._stepper.plan.describe(),
            **self._tuner.hello(),
            "exchange": json.dumps(self.exchange_kind.config(), sort_keys=True),
            "reduction": self._reduction,
            "when": self._when,
            "overlap": self._overlap,
            "bucket_bytes": self._planner.bucket_bytes,
            "digest_every": self._digest_every,
            "loss_scale": repr(self._loss_scale()),
            "buffers": f"{self._buffer_policy.policy}:every={self._buffer_policy.every}",
        }

    # -- inside --------------------------------------------------------------------------------------------------------

    def _hook_up(self) -> None:
        for handle in [handle for handle in self._handles if isinstance(handle, BackwardHooks)]:
            handle.remove()
            self._handles.remove(handle)
        self.add_handle(
            BackwardHooks(
                self._stepper.tensors,
                active=lambda position: self.ahead.begin_backward(position) and self._syncing,
                ready=self.ready,
                finish=self.exchange,
            )
        )
