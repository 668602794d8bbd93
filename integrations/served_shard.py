"""One shard of a parameter server as a worker sees it: what it has of it, and where both of them are."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

from gradcomp.bucket import Piece
from gradcomp.errors import PacketError
from gradcomp.server import changes
from gradcomp.server.protocol import Changed, Welcome, whole
from gradcomp.server.table import Row, ShardTable

__all__ = ["ServedShard"]


class ServedShard:
    """Published values, which every worker that has the same changes has to the same bits, and counters.

    Args:
        index: its number, in the order of the addresses.
        parameters: by name.

    Attributes:
        pieces: of its rows, with the compressors of gradients.
        rows: the published values of each row, flat float32, where the parameters lie.
        run: drawn by the server when it was set up; None before the first Welcome.
        sequence: of the last push.
        clock: steps taken; in rounds, the round to push for.
        version: updates in the published values.
        used: updates in the parameters, which gradients are computed from.
        have: number of the last published change that is in them.
        behind: whether there were later ones when this worker was let in.
    """

    def __init__(self, index: int, table: ShardTable, parameters: dict[str, Tensor]) -> None:
        self.index = index
        self.table = table
        self.pieces: list[Piece] = table.pieces()
        self.run: int | None = None
        self.sequence = 0
        self.clock = 0
        self.version = self.used = 0
        self.have = -1
        self.behind = False
        self._values = torch.cat([_flat(row, parameters[row.name]) for row in table.rows] or [torch.empty(0)])
        self.rows = changes.rows_of(table, self._values)
        self._parameters = [_flat_view(row, parameters[row.name]) for row in table.rows]

    @property
    def value_bytes(self) -> bytes:
        """The published values, row after row, float32."""
        return self._values.cpu().numpy().tobytes()

    def digest(self) -> bytes:
        """Of the published values: XXH3-128."""
        return xxhash.xxh3_128_digest(self.value_bytes)

    def welcome(self, reply: Welcome) -> None:
        """Take over where the server says this worker is."""
        self.run, self.clock, self.have = reply.run, reply.clock, reply.have
        self.version = reply.version if reply.have == reply.published else 0
        self.behind = reply.have < reply.published

    def take(self, reply: Changed) -> int:
        """Bring the published values up to date.

        Returns:
            Bytes of packets, or of all values.

        Raises:
            PacketError: not what this worker needs, or malformed.
        """
        body = whole(reply.body)
        if reply.full:
            self._replace(body)
            packet_bytes = len(body)
        else:
            if reply.have != self.have:
                raise PacketError(f"changes after number {reply.have} came, to a worker that has {self.have}")
            packet_bytes = 0
            for change in changes.read(self.table, body, self._values.device):
                changes.add(self.table, self.rows, change)
                packet_bytes += change.packet_bytes
        self.have, self.version = reply.published, reply.version
        return packet_bytes

    def _replace(self, body: memoryview) -> None:
        if len(body) != 4 * self._values.numel():
            raise PacketError(f"values of {len(body)} bytes; this shard has {4 * self._values.numel()}")
        if len(body):
            # A copy: the message's memory need not be writable, nor begin at a multiple of 4.
            self._values.copy_(torch.frombuffer(bytearray(body), dtype=torch.float32))

    def write_parameters(self) -> None:
        """Make the parameters equal to the published values, in their own type."""
        self.used = self.version
        for row, values, (parameter, flat) in zip(self.table.rows, self.rows, self._parameters, strict=True):
            if flat is not None:
                flat.copy_(values)
            else:
                # Not contiguous, as with channels_last: by way of the whole.
                whole = parameter.contiguous().view(-1)
                whole[row.start : row.stop] = values.to(whole.dtype)
                parameter.copy_(whole.view(parameter.shape))


def _flat(row: Row, parameter: Tensor) -> Tensor:
    return parameter.detach().reshape(-1)[row.start : row.stop].to(torch.float32)


def _flat_view(row: Row, parameter: Tensor) -> tuple[Tensor, Tensor | None]:
    own = parameter.detach()
    return own, own.view(-1)[row.start : row.stop] if own.is_contiguous() else None
