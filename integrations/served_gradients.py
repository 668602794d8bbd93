"""What a worker pushes: its gradients, compressed shard by shard, and what it holds back of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gradcomp import kernels
from gradcomp.bucket import Piece
from gradcomp.gradients import check_gradient
from gradcomp.integrations.served_shard import ServedShard
from gradcomp.message import Message
from gradcomp.packet import Packet
from gradcomp.states import Loose, StateStore
from gradcomp.telemetry import StepRecord

__all__ = ["Encoded", "ServedGradients"]


@dataclass(frozen=True)
class Encoded:
    """A gradient ready to be pushed.

    Attributes:
        messages: one a shard.
        finite: if not, the messages say so, and nothing else has changed.
    """

    messages: list[Message]
    finite: bool


class ServedGradients:
    """Compresses the gradients of ``named``, and adds them up over the steps between two pushes.

    Args:
        keep_sums: whether there is more than one step between two pushes.
        rank: random numbers of compressors differ by it.

    Attributes:
        store: residuals, by parameter and range.
        sums: of the gradients since the last push, by name, flat float32; empty unless ``keep_sums``.
    """

    def __init__(
        self, named: Sequence[tuple[str, Tensor]], shards: Sequence[ServedShard], *, keep_sums: bool, rank: int
    ) -> None:
        self._named = dict(named)
        self._shards = shards
        self._keep_sums = keep_sums
        self.numels = {name: tensor.numel() for name, tensor in named}
        self.store = StateStore(rank)
        self.sums: dict[str, Tensor] = {}

    def add(self) -> None:
        """A step is over: check its gradients, and add them up if they are not pushed at once.

        Raises:
            GradientError: a sparse gradient, or one of a strange type.
        """
        for name, parameter in self._named.items():
            grad = self._gradient(parameter)
            check_gradient(name, grad)
            if grad is None or not self._keep_sums:
                continue
            flat = grad.detach().reshape(-1)
            if name in self.sums:
                self.sums[name] += flat
            else:
                self.sums[name] = flat.to(torch.float32, copy=True)

    def named_pieces(self) -> dict[tuple[str, str], Piece]:
        """The pieces that have state, as :class:`StateStore` names them."""
        return {
            (row.name, f"{row.start}:{row.stop}"): piece
            for shard in self._shards
            for row, piece in zip(shard.table.rows, shard.pieces, strict=True)
            if not piece.codec.stateless
        }

    def encode(self, record: StepRecord) -> Encoded:
        """Compress all there is, what is held back included; residuals change if all of it is finite."""
        waited: list[str] = []
        grads = {name: flat for name in self._named if (flat := self._flat(name, waited)) is not None}
        commits: list[Callable[[], object]] = []
        messages = [self._message(shard, grads, commits, record) for shard in self._shards]
        self.sums.clear()
        broken = next((p for m in messages for p in m.packets if p is not None and p.is_nonfinite), None)
        if broken is not None or not all(_is_finite(grads[name]) for name in self._sent_plain(grads)):
            value = math.nan if broken is None else broken.scalar
            return Encoded([_nonfinite(message, shard, value) for message, shard in self._by_shard(messages)], False)
        for commit in commits:
            commit()
        self.store.drop_waiting(waited)
        return Encoded(messages, True)

    def take_back(self, shard: ServedShard, message: Message) -> None:
        """What was encoded is not applied: it goes with the next gradient."""
        loose = Loose(self.numels, next(iter(self._named.values())).device)
        for row, piece, packet in zip(shard.table.rows, shard.pieces, message.packets, strict=True):
            if packet is None or packet.is_nonfinite:
                continue
            held = self.store.waiting(row.name)
            if held is not None:
                loose.add(row.name, f"0:{held.numel()}", {"residual": held})
                self.store.drop_waiting([row.name])
            decoded = piece.codec.decompress(packet)
            if _is_finite(decoded):  # what overflowed on its way, as with fp16, is of no use
                loose.add(row.name, f"{row.start}:{row.stop}", {"residual": decoded})
        self.store.settle(loose, self.named_pieces())

    def _by_shard(self, messages: Sequence[Message]) -> list[tuple[Message, ServedShard]]:
        return list(zip(messages, self._shards, strict=True))

    def _gradient(self, parameter: Tensor) -> Tensor | None:
        return parameter.grad if parameter.requires_grad else None

    def _flat(self, name: str, waited: list[str]) -> Tensor | None:
        """All that is to be pushed of a parameter, but for residuals; flat."""
        grad = self.sums.get(name) if self._keep_sums else self._gradient(self._named[name])
        if grad is None:
            return None
        flat = grad.detach().reshape(-1)
        held = self.store.waiting(name)
        if held is not None:
            waited.append(name)
            flat = flat.to(torch.float32) + held
        return flat

    def _message(
        self,
        shard: ServedShard,
        grads: dict[str, Tensor],
        commits: list[Callable[[], object]],
        record: StepRecord,
    ) -> Message:
        packets: list[Packet | None] = []
        for row, piece in zip(shard.table.rows, shard.pieces, strict=True):
            if row.name not in grads:
                packets.append(None)
                continue
            grad = grads[row.name][row.start : row.stop].view(row.shape)
            if piece.codec.stateless:
                packets.append(piece.codec.encode(grad))
                continue
            state = self.store.get(row.name, piece, "gradient", grad)
            packet = piece.codec.encode(grad, state)
            commits.append(partial(piece.codec.commit, grad, packet, state))
            packets.append(packet)
            record.note(row.name, row.numel, piece.codec.stats(packet, state))
        return Message(tuple(packets), tuple(packet is not None for packet in packets))

    def _sent_plain(self, grads: dict[str, Tensor]) -> list[str]:
        """Parameters whose compressors do not say themselves whether all is finite."""
        plain = {row.name for s in self._shards for row in s.table.rows if row.push.stateless}
        return [name for name in grads if name in plain]


def _is_finite(flat: Tensor) -> bool:
    return kernels.all_finite(flat) if flat.dtype == torch.float32 else bool(flat.isfinite().all())


def _nonfinite(message: Message, shard: ServedShard, value: float) -> Message:
    """So that all shards know, and none applies its part."""
    packets = [
        None if packet is None else Packet.nonfinite(value, piece.numel, packet.device)
        for packet, piece in zip(message.packets, shard.pieces, strict=True)
    ]
    return Message(tuple(packets), message.present)
