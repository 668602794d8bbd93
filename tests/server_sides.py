"""Parameter-server services in this process: workers written by hand, and what becomes of their requests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from gradcomp import registry
from gradcomp.compressors.cast import NoCompression
from gradcomp.message import Message as Packets
from gradcomp.server import changes, hello, protocol
from gradcomp.server.journal import Journal
from gradcomp.server.messages import (
    Acked,
    Changed,
    Join,
    Message,
    Pull,
    Push,
    Reply,
    Request,
    Setup,
    Welcome,
)
from gradcomp.server.modes import mode
from gradcomp.server.optimizers import describe, numbers
from gradcomp.server.service import Service
from gradcomp.server.table import ShardTable, cut


class ListJournal(Journal):
    """Keeps entries as bytes, as a file would."""

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self.full = False

    def append(self, entry: Message) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.entries.append(b"".join(protocol.pack(entry)))

    def read(self) -> list[Message]:
        return [protocol.unpack(bytearray(entry)) for entry in self.entries]


def copied(message: Message) -> Message:
    """What comes out at the other end of a wire."""
    return protocol.unpack(bytearray(b"".join(protocol.pack(message))))


def named_parameters(seed: int = 0, shapes: Sequence[tuple[int, ...]] = ((40, 9), (7,), (3, 5, 2))) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


class Side:
    """One worker's side of one shard: its copy of the rows, and requests with the right numbers."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        name: str = "a",
        incarnation: int = 1,
        spec: str = "async",
        workers: int = 1,
        push: str = "none",
        pull: str = "none",
        shard: int = 0,
        shards: int = 1,
        reduction: str = "mean",
        dense: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.name, self.incarnation = name, incarnation
        self.tensors = {
            f"p{i}": p for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])
        }
        groups = [number for number, group in enumerate(optimizer.param_groups) for _ in group["params"]]
        self.table: ShardTable = cut(
            list(self.tensors.items()),
            groups=dict(zip(self.tensors, groups, strict=True)),
            push=registry.compressor(push),
            pull=registry.compressor(pull),
            dense=lambda _, tensor: dense and tensor.dim() < 2,
            shards=shards,
        )[shard]
        self.description = describe(optimizer)
        self.hello = hello.hello(
            table=self.table,
            optimizer=self.description,
            mode=mode(spec),
            workers=workers,
            reduction=reduction,
            shard=shard,
            shards=shards,
        )
        self.values = self.of_parameters()
        self.rows = changes.rows_of(self.table, self.values)
        self.states = [
            row.push.new_state(part.view(row.shape)) for row, part in zip(self.table.rows, self.rows, strict=True)
        ]
        self.number = self.sequence = self.clock = self.version = 0
        self.have = -1
        self.run = 0

    def of_parameters(self) -> Tensor:
        """The parameters' values, row after row."""
        rows = [self.tensors[row.name].detach().reshape(-1)[row.start : row.stop] for row in self.table.rows]
        return torch.cat(rows) if rows else torch.empty(0)

    def gradients(self) -> list[Tensor | None]:
        """The parameters' gradients, by row."""
        grads = [self.tensors[row.name].grad for row in self.table.rows]
        return [
            None if grad is None else grad.reshape(-1)[row.start : row.stop]
            for row, grad in zip(self.table.rows, grads, strict=True)
        ]

    @property
    def digest(self) -> bytes:
        return xxhash.xxh3_128_digest(self.values.numpy().tobytes())

    def join(self) -> Join:
        self.number += 1
        return Join(
            number=self.number, worker=self.name, incarnation=self.incarnation, hello=self.hello, digest=self.digest
        )

    def setup(self) -> Setup:
        self.number += 1
        return Setup(
            number=self.number,
            worker=self.name,
            incarnation=self.incarnation,
            hello=self.hello,
            digest=self.digest,
            table=self.table.pack(),
            optimizer=self.description.text(),
            body=self.values.numpy().tobytes(),
        )

    def body(self, gradients: Sequence[Tensor | None]) -> list[protocol.Buffer]:
        """Gradients by row, compressed with this worker's residuals."""
        packets = tuple(
            None if gradient is None else row.push.compress(gradient.detach().reshape(row.shape), state)
            for row, gradient, state in zip(self.table.rows, gradients, self.states, strict=True)
        )
        return Packets(packets, tuple(packet is not None for packet in packets)).buffers

    def push(self, gradients: Sequence[Tensor | None], *, pull: bool = True, clock: int | None = None) -> Push:
        self.number += 1
        self.sequence += 1
        self.clock = self.clock + 1 if clock is None else clock
        return Push(
            number=self.number,
            worker=self.name,
            incarnation=self.incarnation,
            sequence=self.sequence,
            clock=self.clock,
            version=self.version,
            options=numbers(self.optimizer),
            pull=pull,
            have=self.have,
            body=self.body(gradients),
        )

    def pull(self) -> Pull:
        self.number += 1
        return Pull(
            number=self.number, worker=self.name, incarnation=self.incarnation, clock=self.clock, have=self.have
        )

    def take(self, reply: Reply) -> None:
        """What a worker does with a reply."""
        if isinstance(reply, Welcome):
            self.have, self.clock, self.run, self.version = reply.have, reply.clock, reply.run, 0
            if self.hello["mode"] and '"sync"' in str(self.hello["mode"]):
                self.clock -= 1  # of the round that is open
        elif isinstance(reply, Changed):
            body = protocol.whole(reply.body)
            if reply.full:
                self.values.copy_(torch.frombuffer(bytearray(body), dtype=torch.float32))
            elif reply.have == self.have:
                for change in changes.read(self.table, body):
                    changes.add(self.table, self.rows, change)
            else:
                return
            self.have, self.version = reply.published, reply.version
            if '"sync"' in str(self.hello["mode"]):
                self.clock = reply.clock - 1


def ask(service: Service, request: Request, now: float = 0.0) -> list[Reply]:
    """Replies to the one that asks, through bytes both ways."""
    asked = copied(request)
    assert isinstance(asked, Request)
    sender = request.worker.encode()
    found = [reply for to, reply in service.handle(asked, sender, now) if to == sender]
    return [reply for reply in map(copied, found) if isinstance(reply, Reply)]


def admit(service: Service, side: Side, now: float = 0.0) -> Welcome:
    """Join, and set up if it must be."""
    (reply,) = ask(service, side.join(), now)
    if type(reply).__name__ == "Empty":
        (reply,) = ask(service, side.setup(), now)
    assert isinstance(reply, Welcome), reply
    side.take(reply)
    return reply


__all__ = ["Acked", "ListJournal", "NoCompression", "Side", "admit", "ask", "copied", "named_parameters"]
