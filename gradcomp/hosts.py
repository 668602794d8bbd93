"""Gradients inside a host: added up by its leader, who exchanges the sum with other leaders and hands out the result.

What a member sends for a bucket is the gradients it has, joined flat, in float32 or bfloat16, and a byte a parameter
that says whether it has one. What comes back at the end of the step is the same for the result, in float32, and one
more byte: whether a rank, anywhere, saw a non-finite value. So all ranks put exactly the leader's values in place.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gradcomp.bucket import Bucket, Parameter
from gradcomp.errors import HandshakeError, PacketError, PeerLost, TransportError
from gradcomp.gradients import Gradients
from gradcomp.host_products import HostProducts
from gradcomp.interfaces import MY_TURN, Buffer, Incoming, Levels, Slot
from gradcomp.lanes import to_device, to_host, uses
from gradcomp.products import Handout, Product

__all__ = ["Host", "HostSums", "at_level"]

# Stages of a bucket's messages inside a host.
_UP, _DOWN = 0, 2


@contextmanager
def at_level(levels: Levels, which: str) -> Iterator[None]:
    """Say in a transport's error which level it is from, where ranks count from 0 again; name a lost peer by its rank.

    Args:
        which: ``"local"`` or ``"between"``.
    """
    size = levels.local.world_size
    first, stride = (levels.host * size, 1) if which == "local" else (0, size)
    inside, across = f"inside host {levels.host} (rank 0 is {first}): ", "between hosts (by host): "
    try:
        yield
    except TransportError as error:
        if not str(error).startswith((inside, across)):  # it may pass here more than once
            error.args = ((inside if which == "local" else across) + str(error),)
            if isinstance(error, (PeerLost, HandshakeError)) and error.peer >= 0:
                error.peer = first + stride * error.peer
        raise


class HostSums(Gradients):
    """What the ranks of a host have together: added up where the leader's own gradients lie.

    Where these are not float32, the sum is kept beside them; the step's result goes to its own place all the same.

    Args:
        own: the leader's.
        products: what sums are products of; None: what the leader's own gradients are, who is alone.
    """

    def __init__(self, own: Gradients, products: Mapping[int, Product] | None = None) -> None:
        self._own = own
        self._alone = products is None
        self._products = {p: Handout(product, product.numel) for p, product in (products or {}).items()}
        self._beside: dict[int, Tensor] = {}

    def add(self, position: int, part: Tensor) -> None:
        """Add another rank's gradient: flat, in logical order."""
        grad = self.get(position)
        if grad is None:
            self.put(position, part)
        elif grad.dtype == torch.float32:
            grad.detach().add_(part.view(grad.shape))
        else:
            self._beside[position] = grad.detach().float().add_(part.view(grad.shape))

    def put(self, position: int, part: Tensor) -> None:
        """Let this be the sum: flat, in logical order."""
        place = self._own.get_or_make(position)
        if place.dtype == torch.float32:
            place.detach().copy_(part.view(place.shape))
        else:
            self._beside[position] = part.to(torch.float32, copy=True).view(place.shape)

    def get(self, position: int) -> Tensor | None:
        return self._beside[position] if position in self._beside else self._own.get(position)

    def get_or_make(self, position: int) -> Tensor:
        return self._own.get_or_make(position)

    def replace(self, position: int, memory: Tensor) -> None:
        self._own.replace(position, memory)

    def watch(self, positions: Sequence[int]) -> None:
        self._own.watch(positions)

    def product(self, position: int, grad: Tensor, start: int, stop: int) -> Product | None:
        if self._alone:
            return self._own.product(position, grad, start, stop)
        handout = self._products.get(position)
        product = None if handout is None else handout.take(start, stop)
        uses(*(product or ()))  # it was made inside the host, where the next bucket's already are
        return product

    def may_use_up(self, position: int) -> bool:
        return position not in self._beside and self._own.may_use_up(position)

    def end_step(self) -> None:
        self._own.end_step()


class Host:
    """This rank's part in what happens inside its host.

    Args:
        table: the tensor table.
        own: this rank's gradients.
        device: where they lie.
    """

    def __init__(self, levels: Levels, table: Sequence[Parameter], own: Gradients, device: torch.device) -> None:
        self._local = levels.local
        self._dtype = levels.dtype
        self._table = table
        self._own = own
        self._device = device
        self._on_device = self._local.carries(device)
        self._leads = self._local.rank == 0
        self._members = range(1, self._local.world_size)
        self._products = HostProducts(self._local, table, own, device)

    def collect(self, turn: int, bucket: Bucket) -> Generator[Sequence[Incoming], None, HostSums | None]:
        """Bring a bucket's gradients together; yields what must be here, as an exchange does.

        Returns:
            On the leader the sums; None on members.
        """
        slot = Slot(turn, bucket.index, _UP)
        if not self._members:
            return HostSums(self._own)
        products = yield from self._products.collect(turn, bucket)
        if self._local.adds_up and self._dtype == torch.float32:
            return (yield from self._add_up(slot, bucket, products))
        if not self._leads:
            flags = self._flags(bucket)
            values = self._joined(bucket, self._dtype)
            self._send([0], slot, values, flags)
            if self._on_device:
                yield MY_TURN
                self._local.swap_tensors({0: values.view(torch.uint8)}, {})
            return None
        incoming = {peer: self._local.recv(peer, slot) for peer in self._members}
        yield list(incoming.values())
        found = {peer: self._parse(incoming.pop(peer), bucket, self._dtype, extra=0) for peer in self._members}
        if self._on_device:
            yield MY_TURN
            self._local.swap_tensors({}, {peer: values.view(torch.uint8) for peer, (values, _) in found.items()})
        sums = HostSums(self._own, products)
        for peer in self._members:  # in the order of ranks, so that runs repeat
            values, flags = found.pop(peer)
            for position, part in self._parts(bucket, values, flags):
                sums.add(position, part)
        return sums

    def share(self, turn: int, buckets: Sequence[Bucket], *, nonfinite: bool, timeout_s: float) -> bool:
        """The step's result, from the leader to the members; blocks on these.

        Args:
            nonfinite: on the leader, whether any rank saw a non-finite value.
            timeout_s: how long a member waits for its leader, who waits for other hosts in turn.

        Returns:
            The same, on every rank.
        """
        for bucket in buckets if self._members else ():
            slot = Slot(turn, bucket.index, _DOWN)
            if self._leads:
                values = self._joined(bucket, torch.float32)
                self._send(self._members, slot, values, self._flags(bucket) + bytes([nonfinite]))
                if self._on_device:
                    self._local.swap_tensors(dict.fromkeys(self._members, values.view(torch.uint8)), {})
                continue
            incoming = self._local.recv(0, slot)
            self._local.wait([incoming], timeout_s=timeout_s)
            values, flags = self._parse(incoming, bucket, torch.float32, extra=1)
            if self._on_device:
                self._local.swap_tensors({}, {0: values.view(torch.uint8)})
            nonfinite = bool(flags[-1])
            for position, part in self._parts(bucket, values, flags[:-1]):
                grad = self._own.get_or_make(position).detach()
                grad.copy_(part.view(grad.shape))
        return nonfinite

    def _add_up(
        self, slot: Slot, bucket: Bucket, products: Mapping[int, Product]
    ) -> Generator[Sequence[Incoming], None, HostSums | None]:
        """By the transport's own all-reduce: the gradients, and how many ranks have each."""
        sizes = [self._table[position].numel for position in bucket.parameters]
        mine = torch.zeros(sum(sizes) + len(sizes), dtype=torch.float32, device=self._device)
        for i, (position, part) in enumerate(
            zip(bucket.parameters, torch.split(mine[: sum(sizes)], sizes), strict=True)
        ):
            grad = self._own.get(position)
            if grad is not None:
                part.copy_(grad.detach().reshape(-1))
                mine[sum(sizes) + i] = 1
        total = yield from self._local.all_reduce(slot, mine, one_trip=False)
        if not self._leads:
            return None
        sums = HostSums(self._own, products)
        parts, ranks = torch.split(total[: sum(sizes)], sizes), total[sum(sizes) :].tolist()
        for position, part, count in zip(bucket.parameters, parts, ranks, strict=True):
            if count:
                sums.put(position, part)
        return sums

    # -- messages ------------------------------------------------------------------------------------------------------

    def _flags(self, bucket: Bucket) -> bytes:
        return bytes(self._own.get(position) is not None for position in bucket.parameters)

    def _joined(self, bucket: Bucket, dtype: torch.dtype) -> Tensor:
        """A copy of the gradients there are: they change before the transport need be done with it."""
        grads = [self._own.get(position) for position in bucket.parameters]
        flat = [grad.detach().reshape(-1).to(dtype) for grad in grads if grad is not None]
        return torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=self._device)

    def _send(self, peers: Sequence[int], slot: Slot, values: Tensor, flags: bytes) -> None:
        """All of it, or without the values where these go from device to device."""
        parts: list[Buffer] = [flags]
        if not self._on_device:
            parts.insert(0, to_host(values).view(torch.uint8).numpy().data)
        self._local.send_to_all(peers, slot, parts)

    def _parse(self, incoming: Incoming, bucket: Bucket, dtype: torch.dtype, *, extra: int) -> tuple[Tensor, bytes]:
        """Values and flags; memory for the values where these go from device to device.

        Raises:
            PacketError: not what :meth:`_send` sends.
        """
        data = incoming.result()
        count = len(bucket.parameters) + extra
        flags = bytes(data[-count:])
        nbytes = dtype.itemsize * sum(
            self._table[position].numel for position, flag in zip(bucket.parameters, flags, strict=False) if flag
        )
        if len(data) != (count if self._on_device else nbytes + count) or max(flags) > 1:
            raise PacketError(f"rank {incoming.peer} of the host sent {len(data)} bytes for bucket {bucket.index}")
        if self._on_device or not nbytes:
            return torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=self._device), flags
        values = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=torch.uint8)[:nbytes]
        if values.data_ptr() % dtype.itemsize:
            values = values.clone()  # a message may begin anywhere
        return to_device(values.view(dtype), self._device), flags

    def _parts(self, bucket: Bucket, values: Tensor, flags: bytes) -> Iterator[tuple[int, Tensor]]:
        present = [position for position, flag in zip(bucket.parameters, flags, strict=True) if flag]
        return zip(present, torch.split(values, [self._table[p].numel for p in present]), strict=True)
