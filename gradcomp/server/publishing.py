"""One shared stream of changes: what all workers' copies are, and the changes that lead there.

The server compresses the difference between its parameters and what it has published, and decodes its own bytes like
every worker. The difference that is left is next time's: nothing is lost, and nothing has to be kept for each worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradcomp.errors import ConfigError, StateError
from gradcomp.interfaces import Buffer, Compressor, State
from gradcomp.message import Message
from gradcomp.packet import Packet
from gradcomp.server import changes
from gradcomp.server.table import ShardTable

__all__ = ["Publisher"]


class Publisher:
    """Published values and the latest changes of them, at most as many as weigh as much as the values themselves.

    Args:
        values: float32, flat: published number 0. Copied.

    Raises:
        ConfigError: a pull compressor that takes something away for good, or whose packets are not added up.
    """

    def __init__(self, table: ShardTable, values: Tensor) -> None:
        for row in table.rows:
            check_pull(row.pull, row.name)
        self.number = 0
        self.version = 0  # updates in the published values
        self.drained = True  # whether they are the parameters themselves
        self.values = values.clone()
        self._table = table
        self._exact = all(changes.carries_values(row) for row in table.rows)
        self._rows = changes.rows_of(table, self.values)
        self._scratch = torch.empty(max((row.numel for row in table.rows), default=0), dtype=torch.float32)
        self._states: list[State] = []
        for row in table.rows:
            state = row.pull.new_state(self._scratch[: row.numel].view(row.shape))
            row.pull.seed_state(state, parameter=f"{row.name} {row.start}:{row.stop} pull", rank=0)
            self._states.append(state)
        self._ring: deque[tuple[int, list[Buffer]]] = deque()
        self._ring_nbytes = 0
        self._snapshot: bytes | None = None

    def publish(self, values: Tensor, version: int) -> None:
        """Compress what ``values`` differ in from what is published, and publish that.

        Args:
            version: number of updates in ``values``.
        """
        rows = changes.rows_of(self._table, values)
        again = version == self.version
        change = Message(tuple(self._encode(i, rows[i]) for i in range(len(rows))), (True,) * len(rows))
        changes.add(self._table, self._rows, change)
        self.number += 1
        self.version = version
        # Looked at only where nothing else has happened: it costs a reading of both.
        self.drained = self._exact or (again and torch.equal(self.values, values))
        self._snapshot = None
        parts = changes.framed(change)
        self._keep(sum(len(part) for part in parts), parts)

    def _encode(self, i: int, values: Tensor) -> Packet:
        """What is new of a row. What was left over is in the compressor's residual already.

        Compressors that foresee their next step look at the two apart. Their sum is the true difference each time, so
        that roundings do not add up.
        """
        row, state = self._table.rows[i], self._states[i]
        if changes.carries_values(row):
            return row.pull.encode(values)
        difference = torch.sub(values, self._rows[i], out=self._scratch[: row.numel])
        if "residual" in state:
            difference.sub_(state["residual"])
        return row.pull.compress(difference.view(row.shape), state)

    def _keep(self, nbytes: int, parts: list[Buffer]) -> None:
        self._ring.append((nbytes, parts))
        self._ring_nbytes += nbytes
        while self._ring_nbytes > 4 * self.values.numel():
            self._ring_nbytes -= self._ring.popleft()[0]

    def since(self, have: int) -> list[Buffer] | None:
        """The changes after published number ``have``, as the body of a reply; None if not all are kept."""
        missing = self.number - have
        if have < 0 or not 0 <= missing <= len(self._ring):
            return None
        kept = list(self._ring)[len(self._ring) - missing :]
        return [part for _, parts in kept for part in parts]

    def snapshot(self) -> bytes:
        """All published values."""
        if self._snapshot is None:
            self._snapshot = self.values.numpy().tobytes()
        return self._snapshot

    @property
    def ring_nbytes(self) -> int:
        """Bytes of the changes that are kept."""
        return self._ring_nbytes

    def state_dict(self) -> dict[str, Any]:
        """Copies of all there is."""
        ring = [torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8) for _, parts in self._ring]
        states = [{field: tensor.detach().clone() for field, tensor in state.items()} for state in self._states]
        return {
            "number": self.number,
            "version": self.version,
            "drained": self.drained,
            "values": self.values.clone(),
            "states": states,
            "ring": ring,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            StateError: of another table.
        """
        self.number, self.version = int(state["number"]), int(state["version"])
        self.drained = bool(state["drained"])
        if state["values"].shape != self.values.shape or len(state["states"]) != len(self._states):
            raise StateError("state of what is published is of another table")
        self.values.copy_(state["values"])
        for row, own, saved in zip(self._table.rows, self._states, state["states"], strict=True):
            if {k: (v.shape, v.dtype) for k, v in own.items()} != {k: (v.shape, v.dtype) for k, v in saved.items()}:
                raise StateError(f"state of {row.name}[{row.start}:{row.stop}] is not its pull compressor's")
            own |= {field: tensor.detach().clone() for field, tensor in saved.items()}
        self._ring.clear()
        self._ring_nbytes, self._snapshot = 0, None
        for change in state["ring"]:
            self._keep(change.numel(), [change.numpy().tobytes()])


def check_pull(compressor: Compressor, name: str) -> None:
    """Raise ConfigError unless changes can go through ``compressor``: what it holds back must come later."""
    total = torch.tensor([0.25])
    compressor.aggregate(total)
    if not compressor.conserves or total.item() != 0.25:
        raise ConfigError(
            f"{name}: pull={compressor!r} is not allowed; pull must be a compressor that loses nothing for good "
            "(no momentum, no clipping, no votes)"
        )
