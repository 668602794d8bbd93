"""What the sum of a host's gradients is a product of: the rows of all its ranks, brought together by its leader.

Before its gradients, a member sends for each of a bucket's parameters that goes through a ``factored`` compressor: i64,
the number of rows, -1 if its gradient is no known product, 0 if it has none; then float32 errors and inputs of each.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from gradcomp.bucket import Bucket, Parameter
from gradcomp.errors import PacketError
from gradcomp.gradients import Gradients
from gradcomp.interfaces import Incoming, Slot, Transport
from gradcomp.lanes import to_device, to_host
from gradcomp.products import Product, saves

__all__ = ["HostProducts"]

_STAGE = 4  # of a bucket's messages inside a host; see gradcomp.hosts for the others
_UNKNOWN = -1


class HostProducts:
    """This rank's part in it.

    Args:
        local: what carries messages inside the host.
        table: the tensor table.
        own: this rank's gradients.
        device: where they lie.
    """

    def __init__(self, local: Transport, table: Sequence[Parameter], own: Gradients, device: torch.device) -> None:
        self._local = local
        self._table = table
        self._own = own
        self._device = device

    def collect(self, turn: int, bucket: Bucket) -> Generator[Sequence[Incoming], None, dict[int, Product]]:
        """To be run before anything is added to the leader's gradients.

        Returns:
            By position, on the leader: what the sums are products of, where that is known of every rank's gradient and
            smaller than the sum.
        """
        positions = [position for position in bucket.parameters if self._table[position].codec.factored]
        if not positions:
            return {}
        mine = [self._product(position) for position in positions]
        slot = Slot(turn, bucket.index, _STAGE)
        if self._local.rank:
            self._send(slot, mine)
            return {}
        incoming = {peer: self._local.recv(peer, slot) for peer in range(1, self._local.world_size)}
        yield list(incoming.values())
        everyone = [mine, *(self._parse(incoming.pop(peer), positions) for peer in range(1, self._local.world_size))]
        stacked = (_stack(ranks) for ranks in zip(*everyone, strict=True))
        return {p: product for p, product in zip(positions, stacked, strict=True) if product is not None}

    def _product(self, position: int) -> Product | None:
        """Of this rank's gradient; of no rows, where it has none."""
        shape, grad = self._table[position].shape, self._own.get(position)
        if len(shape) != 2:
            return None
        if grad is None:
            return Product(*(torch.empty(0, side, device=self._device) for side in shape))
        return self._own.product(position, grad.detach(), 0, grad.numel())

    def _send(self, slot: Slot, products: Sequence[Product | None]) -> None:
        counts = [_UNKNOWN if product is None else len(product.errors) for product in products]
        parts = [torch.tensor(counts), *(part.reshape(-1) for product in products if product for part in product)]
        self._local.send(0, slot, [to_host(part).view(torch.uint8).numpy().data for part in parts if part.numel()])

    def _parse(self, incoming: Incoming, positions: Sequence[int]) -> list[Product | None]:
        """What :meth:`_send` sent.

        Raises:
            PacketError: it did not.
        """
        data = incoming.result()
        wrong = PacketError(f"rank {incoming.peer} of the host sent {len(data)} bytes for {len(positions)} products")
        if len(data) < 8 * len(positions):
            raise wrong
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        counts, rest = whole[: 8 * len(positions)].view(torch.int64).tolist(), whole[8 * len(positions) :]
        products: list[Product | None] = []
        for position, count in zip(positions, counts, strict=True):
            shape = self._table[position].shape
            if count == _UNKNOWN:
                products.append(None)
                continue
            if (
                len(shape) != 2
                or count < 0
                or (count and not saves(count, *shape))
                or len(rest) < 4 * count * sum(shape)
            ):
                raise wrong
            errors, inputs, rest = torch.split(
                rest, [4 * count * side for side in shape] + [len(rest) - 4 * count * sum(shape)]
            )
            products.append(Product(self._matrix(errors, shape[0]), self._matrix(inputs, shape[1])))
        if len(rest):
            raise wrong
        return products

    def _matrix(self, part: Tensor, columns: int) -> Tensor:
        return to_device(part.view(torch.float32), self._device).view(-1, columns)


def _stack(ranks: Sequence[Product | None]) -> Product | None:
    """All rows as one product, if that is known and smaller."""
    known = [product for product in ranks if product is not None]
    count = sum(len(product.errors) for product in known)
    rows, columns = (known[0].errors.shape[1], known[0].inputs.shape[1]) if known else (0, 0)
    if len(known) < len(ranks) or not count or not saves(count, rows, columns):
        return None
    return Product(*(torch.cat(parts) for parts in zip(*known, strict=True)))
