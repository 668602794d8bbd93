"""The parameters of one shard, their optimizer, and what is published of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradcomp import kernels
from gradcomp.errors import PacketError, StateError
from gradcomp.message import Message
from gradcomp.packet import Kind
from gradcomp.server import changes
from gradcomp.server.messages import Options
from gradcomp.server.optimizers import Description, ShardOptimizer
from gradcomp.server.publishing import Publisher
from gradcomp.server.table import ShardTable

__all__ = ["Shard", "Update"]

_CPU = torch.device("cpu")
_ALWAYS_FINITE = (Kind.SIGNS, Kind.VALUES)  # checked when they were parsed


@dataclass(frozen=True)
class Update:
    """One step of the optimizer.

    Attributes:
        parts: gradients and what each is multiplied by; they are added up in this order.
        options: numbers of each parameter group.
        rate: what learning rates are multiplied by.
    """

    parts: Sequence[tuple[Message, float]]
    options: Options
    rate: float = 1.0


class Shard:
    """Parameters, optimizer and published values.

    Args:
        values: float32, flat, all rows one after the other. Copied.

    Raises:
        ConfigError: an optimizer or pull compressor that is not allowed.
    """

    def __init__(self, table: ShardTable, optimizer: Description, values: Tensor) -> None:
        self.table = table
        self.version = 0
        self.values = values.clone()
        self.published = Publisher(table, values)
        self._pieces = table.pieces()
        # Zero between two updates, but for what try_out left there.
        self._gradient = torch.zeros_like(self.values)
        self._tried: Message | None = None
        self._rows = changes.rows_of(table, self._gradient)
        rows = changes.rows_of(table, self.values)
        self._optimizer = ShardOptimizer(optimizer, rows, [row.group for row in table.rows])

    def parse(self, body: memoryview) -> Message:
        """A pushed gradient, checked.

        Raises:
            PacketError: malformed.
        """
        message = Message.parse(body, self._pieces, len(self._pieces), _CPU)
        if message.present != tuple(packet is not None for packet in message.packets):
            raise PacketError("message has a packet for a parameter that has no gradient, or none for one that has")
        return message

    def try_out(self, message: Message) -> bool:
        """Decode a gradient; returns whether it is finite. The next update, if it is of this one alone, goes faster.

        Raises:
            PacketError: a packet is not its row's compressor's.
        """
        if any(packet is not None and packet.is_nonfinite for packet in message.packets):
            return False
        self._clear()
        self._tried = message
        try:
            self._decode(((message, 1.0),))
        except PacketError:
            self._clear()
            raise
        for packet, row in zip(message.packets, self._rows, strict=True):
            if packet is not None and packet.kind not in _ALWAYS_FINITE and not kernels.all_finite(row):
                return False
        return True

    def update(self, update: Update) -> bool:
        """One step; returns whether it was made: not if the sum of several gradients, or a step's options, overflow."""
        parts = update.parts
        alone = len(parts) == 1 and parts[0][1] == 1.0
        if not (alone and self._tried is parts[0][0]):
            self._clear()
            self._decode(parts)
        finite = alone or kernels.all_finite(self._gradient)
        if finite:
            present = [any(message.present[i] for message, _ in parts) for i in range(len(self._rows))]
            gradients = [g if here else None for g, here in zip(self._rows, present, strict=True)]
            finite = self._optimizer.step(gradients, update.options, update.rate)
            self.version += 1  # some rows may have changed, even so
        self._tried = parts[0][0]
        self._clear()
        return finite

    def publish(self) -> None:
        """Publish what has changed since."""
        self.published.publish(self.values, self.version)

    def _decode(self, parts: Sequence[tuple[Message, float]]) -> None:
        for i, (row, into) in enumerate(zip(self.table.rows, self._rows, strict=True)):
            packets = [(message.packets[i], scale) for message, scale in parts]
            for packet, scale in packets:
                if packet is not None:
                    row.push.decompress_add(packet, into, scale)
            if any(packet is not None for packet, _ in packets):
                row.push.aggregate(into)

    def _clear(self) -> None:
        if self._tried is not None:
            kernels.clear(self._gradient)
            self._tried = None

    def state_dict(self) -> dict[str, Any]:
        """Copies of all there is."""
        return {
            "version": self.version,
            "values": self.values.clone(),
            "published": self.published.state_dict(),
            **self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            StateError: of another table or optimizer.
        """
        if state["values"].shape != self.values.shape:
            raise StateError(f"state has {state['values'].numel()} elements, this shard {self.values.numel()}")
        self.version = int(state["version"])
        self.values.copy_(state["values"])
        self.published.load_state_dict(state["published"])
        self._optimizer.load_state_dict(state)
