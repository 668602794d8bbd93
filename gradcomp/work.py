"""One bucket's gradients on their way: compressed, sent, added up, and put back into ``p.grad``.

Nothing that lasts changes before the whole step is known to be finite on every rank: packets of compressors with state
are held back until :meth:`BucketWork.finish`, which commits the residuals (or leaves them alone) and only then
overwrites ``p.grad``. Stateless packets (``none``, ``fp16``) have nothing to take back: they are put in place as they
come.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gradcomp import kernels
from gradcomp.bucket import Bucket, Parameter, Piece
from gradcomp.gradients import Gradients
from gradcomp.interfaces import MY_TURN, Buffer, Commit, Compressor, Incoming, Slot, State, Transport, Work
from gradcomp.lanes import short_tensor
from gradcomp.memory import empty_floats
from gradcomp.message import Head, Message, on_any_rank, together
from gradcomp.packet import Packet
from gradcomp.rounds import Rounds, join
from gradcomp.states import StateStore
from gradcomp.telemetry import StepRecord
from gradcomp.verdict import Outlook

__all__ = ["BucketWork"]


class BucketWork(Work):
    """See :class:`gradcomp.interfaces.Work`. Made anew for each bucket and step.

    Args:
        gradients: where they lie; says which one's memory may become a residual, and be exchanged for the residual's.
        scale: what sums are multiplied by: 1, or 1 / world_size for the mean.
        loss_scale: gives what gradients are multiples of (torch.amp.GradScaler's); asked on the exchange's own lane.
            Compressors with state see them divided by it, or a threshold would mean nothing and a residual would
            change its unit.
        watch_dense: look for non-finite sums in stateless pieces too, for the sake of other pieces' residuals.
        outlook: is shown every packet that this rank makes.

    Attributes:
        over: whether the exchange is; what is left is :meth:`finish`.
    """

    def __init__(
        self,
        *,
        bucket: Bucket,
        pieces: Sequence[Piece],
        table: Sequence[Parameter],
        gradients: Gradients,
        device: torch.device,
        store: StateStore,
        transport: Transport,
        record: StepRecord,
        step: int,
        scale: float,
        loss_scale: Callable[[], float],
        watch_dense: bool,
        outlook: Outlook | None = None,
    ) -> None:
        self.rank = transport.rank
        self.world_size = transport.world_size
        self.pieces = pieces
        self.nonfinite = self.over = False
        self.bucket = bucket
        self._outlook = outlook
        self._table = table
        self._gradients = gradients
        self._store = store
        self._transport = transport
        self._record = record
        self._step = step
        self._scale = scale
        self._loss_scale = loss_scale
        self._watch_dense = watch_dense
        self._device = device
        self._present = tuple(gradients.get(p) is not None for p in bucket.parameters)
        self._joined: dict[int, Tensor] = {}
        self._waited: list[str] = []
        self._outs: dict[int, Tensor] = {}
        self._exchanged: set[int] = set()  # units whose sum is built where their residual was
        self._unencoded = {i: unit.numel for i, unit in enumerate(bucket.units)}
        self._undelivered = dict(self._unencoded)
        self._commits: list[Callable[[], object]] = []
        self._held: list[tuple[Piece, list[Packet | None], set[int]]] = []
        self._without_sum: set[Piece] = set()  # to be reduced here, had any of the ranks below had a gradient

    # -- what an exchange calls ----------------------------------------------------------------------------------------

    def encode(self, pieces: Sequence[Piece]) -> Message:
        """Compress this rank's gradient of ``pieces``; a parameter without gradient contributes nothing."""
        with self._record.timed("compress_s"):
            message = self._shown(pieces, Message(tuple(self._encode(piece) for piece in pieces), self._present))
        self._record.packet_bytes += message.packet_bytes
        return message

    def reduce(self, pieces: Sequence[Piece], messages: Sequence[Message]) -> Message:
        """Add up in the order given and compress again, with the residual of sums."""
        with self._record.timed("compress_s"):
            packets = [
                self._reduce(piece, [message.packets[i] for message in messages]) for i, piece in enumerate(pieces)
            ]
            return self._shown(pieces, Message(tuple(packets), on_any_rank(messages)))

    def deliver(self, pieces: Sequence[Piece], messages: Sequence[Message]) -> None:
        """Make the sum of ``messages`` the gradient: now if stateless, else in :meth:`finish`."""
        present = {p for p, given in zip(self.bucket.parameters, on_any_rank(messages), strict=True) if given}
        with self._record.timed("decompress_s"):
            for i, piece in enumerate(pieces):
                self._deliver(piece, [message.packets[i] for message in messages], present)
                self._keep_in_step(piece, present)

    def rounds(self, pieces: Sequence[Piece]) -> Generator[Tensor, Tensor, None]:
        """Rounds of all pieces as one, and then what :meth:`deliver` does, with the packets of the sums."""
        joined = join([self._count_present(), *(self._rounds(piece) for piece in pieces)])
        total: Tensor | None = None
        while True:
            with self._record.timed("compress_s"):
                try:
                    mine = next(joined) if total is None else joined.send(total)
                except StopIteration as end:
                    present, *results = end.value
                    break
            self._record.packet_bytes += 4 * mine.numel()
            total = yield mine
        with self._record.timed("decompress_s"):
            for piece, (packet, commit) in zip(pieces, results, strict=True):
                if commit is not None and not present.isdisjoint(self.bucket.units[piece.unit].parameters):
                    self._commits.append(commit)
                self._deliver(piece, [packet], present)

    def all_reduce(self, turn: int, mine: Tensor, *, one_trip: bool) -> Generator[Sequence[Incoming], None, Tensor]:
        """Sum over ranks; each round has two stages of its own."""
        return self._transport.all_reduce(self._slot(2 * turn), mine, one_trip=one_trip)

    def swap(
        self, stage: int, outgoing: Iterable[tuple[int, Message]], expected: Mapping[int, Sequence[Piece]]
    ) -> Generator[Sequence[Incoming], None, dict[int, Message]]:
        """One stage: what is expected is asked for first, so that nobody waits for us."""
        if self._transport.carries(self._device):
            return (yield from self._swap_on_device(stage, outgoing, expected))
        incoming = {peer: self.recv(peer, stage) for peer in expected}
        for peers, message in together(outgoing):
            self._transport.send_to_all(peers, self._slot(stage), message.buffers)
        yield list(incoming.values())
        return {peer: self.parse(pieces, incoming.pop(peer)) for peer, pieces in expected.items()}

    def _swap_on_device(
        self, stage: int, outgoing: Iterable[tuple[int, Message]], expected: Mapping[int, Sequence[Piece]]
    ) -> Generator[Sequence[Incoming], None, dict[int, Message]]:
        """Heads by way of the host, for they say how long the payloads are; payloads from device to device."""
        incoming = {peer: self.recv(peer, stage) for peer in expected}
        sending = {self.rank: torch.empty(0, dtype=torch.uint8, device=self._device)}  # so that a rank takes part
        last: tuple[Message, list[Buffer], Tensor] | None = None
        for peer, message in outgoing:
            if last is None or last[0] is not message:
                last = (message, message.head, message.payload(self._device))
            self._transport.send(peer, self._slot(stage), last[1])
            sending[peer] = last[2]
        yield list(incoming.values())
        heads = {peer: Head.parse(incoming.pop(peer).result(), expected[peer], len(self._present)) for peer in expected}
        arriving = {peer: head.empty_payload(self._device) for peer, head in heads.items()}
        yield MY_TURN
        self._transport.swap_tensors(sending, arriving)  # empty ones, too: all ranks must take part
        return {peer: heads[peer].message(payload) for peer, payload in arriving.items()}

    def send(self, peer: int, stage: int, message: Message) -> None:
        """Send; returns at once."""
        self._transport.send(peer, self._slot(stage), message.buffers)

    def recv(self, peer: int, stage: int) -> Incoming:
        """Ask for a message; returns at once."""
        return self._transport.recv(peer, self._slot(stage))

    def parse(self, pieces: Sequence[Piece], incoming: Incoming) -> Message:
        """Check and take apart what came in."""
        with self._record.timed("decompress_s"):
            return Message.parse(incoming.result(), pieces, len(self._present), self._device)

    # -- what the engine calls -----------------------------------------------------------------------------------------

    def finish(self, *, commit: bool) -> None:
        """Commit residuals, unless a rank saw a non-finite value anywhere, and put held gradients in place."""
        with self._record.timed("compress_s"):
            if commit:
                for commit_one in self._commits:
                    commit_one()
                self._store.drop_waiting(self._waited)
            self._commits.clear()
        with self._record.timed("decompress_s"):
            for piece, packets, present in self._held:
                self._apply(piece, packets, present)
            self._held.clear()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _shown(self, pieces: Sequence[Piece], message: Message) -> Message:
        if self._outlook is not None:
            self._outlook.add(pieces, message.packets)
        return message

    def _slot(self, stage: int) -> Slot:
        return Slot(self._step, self.bucket.index, stage)

    def _encode(self, piece: Piece) -> Packet | None:
        whole = self._gradient(piece.unit)
        if whole is None:
            return None
        grad = whole if piece.numel == whole.numel() else whole.view(-1)[piece.start : piece.stop].view(piece.shape)
        if piece.codec.stateless:
            packet = self._encode_stateless(piece, whole, grad)
            self._unencoded[piece.unit] -= piece.numel
            if self._unencoded[piece.unit] == 0:
                self._joined.pop(piece.unit, None)  # the packets have all of it now
            return packet
        state = self._store.get(self._name(piece), piece, "gradient", grad)
        ours = piece.unit in self._joined
        if grad is whole and (ours or self._gradients.may_use_up(self.bucket.units[piece.unit].parameters[0])):
            packet, commit = piece.codec.prepare(grad, state)
            self._commits.append(partial(self._commit_and_exchange, piece.unit, commit, ours))
        else:
            packet = piece.codec.encode(grad, state)
            self._commits.append(partial(piece.codec.commit, grad, packet, state))
        self._note(piece, piece.codec.stats(packet, state))
        return packet

    def _encode_stateless(self, piece: Piece, whole: Tensor, grad: Tensor) -> Packet:
        ours = piece.unit in self._joined
        if not piece.codec.factored:
            # What is not ours alone must be copied: the optimizer may change it while it is being sent.
            return piece.codec.prepare(grad, {})[0] if ours else piece.codec.encode(grad)
        position = self.bucket.units[piece.unit].parameters[0]
        product = None if ours else self._gradients.product(position, whole, piece.start, piece.stop)
        packet = piece.codec.encode(grad) if product is None else piece.codec.encode_product(grad, product)
        self._note(piece, piece.codec.stats(packet))
        return packet

    def _commit_and_exchange(self, index: int, commit: Commit, ours: bool) -> None:
        """The residual is where the gradient was; its old memory becomes the gradient's, unless that is kept anyway."""
        memory = commit()
        if memory is not None:
            self._outs[index] = memory
            if not ours:
                self._exchanged.add(index)

    def _rounds(self, piece: Piece) -> Rounds[tuple[Packet, Callable[[], None] | None]]:
        """One piece's part of :meth:`rounds`: the packet of the sum, and what commits it."""
        codec = piece.codec
        grad = self._gradient(piece.unit)
        if grad is None:
            # Others may have one: it adds its residual, and its state must not fall behind theirs.
            grad = torch.zeros(piece.shape, dtype=torch.float32, device=self._device)
        if codec.stateless:
            _, total = yield from codec.rounds(grad)
            self._joined.pop(piece.unit, None)
            return total, None
        state = self._store.get(self._name(piece), piece, "gradient", grad)
        own, total = yield from codec.rounds(grad, state)
        self._note(piece, codec.stats(own, state))
        return total, partial(codec.commit_sum, grad, own, total, state)

    def _count_present(self) -> Rounds[set[int]]:
        """The parameters that any rank has a gradient for: how many ranks do is one more sum."""
        ranks = yield short_tensor(self._present, self._device, torch.float32)
        return {p for p, count in zip(self.bucket.parameters, ranks.tolist(), strict=True) if count}

    def _note(self, piece: Piece, row: dict[str, float]) -> None:
        self._record.note(self._name(piece), piece.numel, row)

    def _deliver(self, piece: Piece, packets: list[Packet | None], present: set[int]) -> None:
        if piece.codec.stateless:
            self._apply(piece, packets, present)
        else:
            self.nonfinite |= any(packet is not None and packet.is_nonfinite for packet in packets)
            if any(packet is not None for packet in packets):
                piece = replace(piece, codec=self._decoder(piece))
            self._held.append((piece, packets, present))

    def _keep_in_step(self, piece: Piece, present: set[int]) -> None:
        """A rank without a gradient goes on to the next step with those that have one."""
        position = self.bucket.units[piece.unit].parameters[0]
        if not piece.codec.in_step or position not in present:
            return
        if self._gradients.get(position) is None:
            self._commits.append(partial(piece.codec.pass_over, self._state(piece)))
        if piece in self._without_sum:
            self._commits.append(partial(piece.codec.for_sums.pass_over, self._state(piece, "sum")))

    def _state(self, piece: Piece, role: str = "gradient") -> State:
        like = torch.empty(piece.shape, dtype=torch.float32, device=self._device)
        return self._store.get(self._name(piece), piece, role, like)

    def _decoder(self, piece: Piece) -> Compressor:
        """What decodes all ranks' packets of this step, which is not committed yet."""
        return piece.codec.at(self._state(piece)) if piece.codec.in_step else piece.codec

    def _reduce(self, piece: Piece, packets: Sequence[Packet | None]) -> Packet | None:
        given = [packet for packet in packets if packet is not None]
        if not given:
            self._without_sum.add(piece)
            return None
        broken = next((packet for packet in given if packet.is_nonfinite), None)
        if broken is not None:
            return broken
        total = torch.empty(piece.numel, dtype=torch.float32, device=self._device)
        codec = self._decoder(piece)
        codec.decompress_sum(given, total)
        codec.aggregate(total)
        total = total.view(piece.shape)
        if piece.codec.stateless:
            return piece.codec.prepare(total, {})[0]
        state = self._store.get(self._name(piece), piece, "sum", total)
        packet, commit = piece.codec.for_sums.prepare(total, state)
        self._commits.append(commit)
        return packet

    def _apply(self, piece: Piece, packets: Sequence[Packet | None], present: set[int]) -> None:
        out = self._out(piece.unit, present)
        if out is None:
            return
        part = out[piece.start : piece.stop]
        given = [packet for packet in packets if packet is not None]
        piece.codec.decompress_sum(given, part, self._scale)
        # The unit's: a schedule's packets are decoded by the compressor of its stage.
        stateless = self.bucket.units[piece.unit].codec.stateless
        if not any(packet.is_nonfinite for packet in given):
            piece.codec.aggregate(part)
        if not stateless and self._loss_scale() != 1.0:
            part *= self._loss_scale()
        if self._watch_dense and stateless and not kernels.all_finite(part):
            self.nonfinite = True
        self._undelivered[piece.unit] -= piece.numel
        if self._undelivered[piece.unit] == 0:
            self._put_back(piece.unit, out, present)

    def _gradient(self, index: int) -> Tensor | None:
        """A unit's gradient and what waits to go with it, contiguous and unit-shaped; None if it has no gradient."""
        unit = self.bucket.units[index]
        if index not in self._joined:
            waiting = [self._store.waiting(self._table[p].name) for p in unit.parameters]
            scale = self._loss_scale()
            scaled = scale != 1.0 and not unit.codec.stateless
            if len(unit.parameters) == 1 and waiting[0] is None and not scaled:
                grad = self._gradients.get(unit.parameters[0])
                return None if grad is None else grad.detach().contiguous()
            grads = [self._gradients.get(p) for p in unit.parameters]
            if all(grad is None for grad in grads):
                return None
            flat = empty_floats(unit.numel, self._device)
            sizes = [self._table[p].numel for p in unit.parameters]
            for p, part, grad, held in zip(unit.parameters, torch.split(flat, sizes), grads, waiting, strict=True):
                if grad is None:
                    part.zero_()
                    continue
                part.copy_(grad.detach().reshape(-1))
                if scaled:
                    part /= scale
                if held is not None:  # in units of the gradient, whatever the loss was multiplied by
                    part.add_(held.to(self._device), alpha=1.0 if scaled else scale)
                    self._waited.append(self._table[p].name)
            self._joined[index] = flat
        return self._joined[index].view(unit.shape)

    def _out(self, index: int, present: set[int]) -> Tensor | None:
        """Where a unit's sum is built, flat float32: where the gradient lies if it can be."""
        if index not in self._outs:
            unit = self.bucket.units[index]
            if present.isdisjoint(unit.parameters):
                return None
            grad = self._gradients.get(unit.parameters[0]) if len(unit.parameters) == 1 else None
            if grad is not None and grad.dtype == torch.float32 and grad.is_contiguous():
                self._outs[index] = grad.detach().view(-1)
            else:
                self._outs[index] = empty_floats(unit.numel, self._device)
        return self._outs[index]

    def _put_back(self, index: int, out: Tensor, present: set[int]) -> None:
        unit = self.bucket.units[index]
        parts = torch.split(out, [self._table[p].numel for p in unit.parameters])
        for position, part in zip(unit.parameters, parts, strict=True):
            if position not in present:
                continue  # no rank had a gradient: the optimizer must not see one
            grad = self._gradients.get_or_make(position)
            if index in self._exchanged:
                self._gradients.replace(position, part)
            elif part.data_ptr() != grad.data_ptr():
                grad.detach().copy_(part.view(grad.shape))
        del self._outs[index]

    def _name(self, piece: Piece) -> str:
        return self._table[self.bucket.units[piece.unit].parameters[0]].name
