"""A message: the packets of some pieces, from one rank. docs/FORMAT.md is the specification."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from gradcomp.bucket import Piece
from gradcomp.errors import PacketError
from gradcomp.interfaces import Buffer
from gradcomp.lanes import joins, page_locked, to_device, to_host
from gradcomp.packet import HEADER_NBYTES, Packet

__all__ = ["Head", "Message", "max_message_bytes", "on_any_rank", "together"]

_COUNTS = struct.Struct("<II")
_LENGTH = struct.Struct("<Q")
_ALIGN = 8


@dataclass(frozen=True)
class Message:
    """The packets of some pieces, from one rank.

    Attributes:
        packets: one a piece; None where the sender had no gradient.
        present: for each of the bucket's parameters, whether the sender had a gradient.
    """

    packets: tuple[Packet | None, ...]
    present: tuple[bool, ...]

    @cached_property
    def buffers(self) -> list[Buffer]:
        """The message's bytes, in parts that may be sent without a copy; the same parts whoever they are sent to."""
        device = next((packet.device for packet in self.packets if packet is not None), None)
        if device is not None and joins(device):
            return self._joined_buffers(to_host(self.payload(device)))
        parts: list[Buffer] = [self._lengths()]
        for packet in self.packets:
            if packet is not None:
                parts += packet.buffers()
                if packet.nbytes % _ALIGN:
                    parts.append(bytes(-packet.nbytes % _ALIGN))
        return parts

    @cached_property
    def head(self) -> list[Buffer]:
        """All but the packets' payloads: what goes by way of the host where payloads go from device to device."""
        return [self._lengths(), b"".join(packet.header() for packet in self.packets if packet is not None)]

    def payload(self, device: torch.device) -> Tensor:
        """The payloads of all packets as one, uint8, each padded to a multiple of 8 bytes."""
        padding = torch.zeros(_ALIGN, dtype=torch.uint8, device=device)
        parts = [padding[:0]]
        for packet in self.packets:
            if packet is not None:
                parts += [packet.payload, padding[: -packet.payload.numel() % _ALIGN]]
        return torch.cat(parts)

    def _joined_buffers(self, payload: Tensor) -> list[Buffer]:
        """As :attr:`buffers`, which read all payloads out of one tensor on the CPU: from a device that is one copy."""
        parts: list[Buffer] = [self._lengths()]
        data, at = payload.numpy().data, 0
        for packet in self.packets:
            if packet is not None:
                stop = at + _padded(packet.payload.numel())
                parts += [packet.header(), data[at:stop]] if stop > at else [packet.header()]
                at = stop
        return parts

    def _lengths(self) -> bytes:
        head = _COUNTS.pack(len(self.packets), len(self.present)) + _bitmap(self.present)
        sizes = [0 if packet is None else packet.nbytes for packet in self.packets]
        return head + bytes(-len(head) % _ALIGN) + b"".join(_LENGTH.pack(size) for size in sizes)

    @property
    def packet_bytes(self) -> int:
        """Bytes of the packets, without the message's own head."""
        return sum(packet.nbytes for packet in self.packets if packet is not None)

    @classmethod
    def parse(cls, data: memoryview, pieces: Sequence[Piece], parameters: int, device: torch.device) -> Message:
        """The message in ``data``, which must hold ``pieces`` of a bucket of so many ``parameters``.

        Packets are checked on the CPU; to CUDA all of them go in one copy, which is not waited for.

        Raises:
            PacketError: anything malformed, before anything it asks for is allocated.
        """
        present, sizes, start = _parse_lengths(data, pieces, parameters)
        if any(size > len(data) for size in sizes) or start + sum(map(_padded, sizes)) != len(data):
            raise PacketError(f"message of {len(data)} bytes does not hold packets of {sizes} bytes")
        data = data[start:]
        host = page_locked(data) if joins(device) else None
        if host is not None:
            data = host.numpy().data
        packets: list[Packet | None] = []
        at = 0
        for piece, size in zip(pieces, sizes, strict=True):
            where = "cpu" if host is not None else device
            packet = Packet.from_bytes(data[at : at + size], numel=piece.numel, device=where) if size else None
            packets.append(packet)
            if any(data[at + size : at + _padded(size)]):
                raise PacketError("message has bytes set in its padding")
            at += _padded(size)
        message = cls(tuple(packets), present)
        return message if host is None else message._moved(to_device(host, device))

    def _moved(self, data: Tensor) -> Message:
        """This message with its payloads in ``data``, uint8: the bytes of all packets, as they follow each other."""
        packets: list[Packet | None] = []
        at = 0
        for packet in self.packets:
            if packet is None:
                packets.append(None)
                continue
            packets.append(packet.moved(data[at + HEADER_NBYTES : at + packet.nbytes]))
            at += _padded(packet.nbytes)
        return Message(tuple(packets), self.present)


@dataclass(frozen=True)
class Head:
    """A message whose payloads are still on their way.

    Attributes:
        headers: the packets' headers; None where the sender had no gradient.
        payload_nbytes: bytes of each packet's payload.
    """

    headers: tuple[bytes | None, ...]
    payload_nbytes: tuple[int, ...]
    numels: tuple[int, ...]
    present: tuple[bool, ...]

    @classmethod
    def parse(cls, data: memoryview, pieces: Sequence[Piece], parameters: int) -> Head:
        """What :attr:`Message.head` wrote.

        Raises:
            PacketError: anything malformed.
        """
        present, sizes, at = _parse_lengths(data, pieces, parameters)
        given = sum(size > 0 for size in sizes)
        if any(0 < size < HEADER_NBYTES for size in sizes) or at + HEADER_NBYTES * given != len(data):
            raise PacketError(f"head of {len(data)} bytes does not hold the headers of packets of {sizes} bytes")
        headers: list[bytes | None] = []
        for size in sizes:
            headers.append(bytes(data[at : at + HEADER_NBYTES]) if size else None)
            at += HEADER_NBYTES if size else 0
        lengths = tuple(max(size - HEADER_NBYTES, 0) for size in sizes)
        return cls(tuple(headers), lengths, tuple(piece.numel for piece in pieces), present)

    def empty_payload(self, device: torch.device) -> Tensor:
        """Memory for :meth:`Message.payload`. Its size is bounded by what the pieces' compressors may send."""
        return torch.empty(sum(map(_padded, self.payload_nbytes)), dtype=torch.uint8, device=device)

    def message(self, payload: Tensor) -> Message:
        """The whole message, once its payload is here.

        Raises:
            PacketError: a packet is malformed.
        """
        packets: list[Packet | None] = []
        at = 0
        for header, nbytes, numel in zip(self.headers, self.payload_nbytes, self.numels, strict=True):
            part = payload[at : at + nbytes]
            packets.append(None if header is None else Packet.from_parts(header, part, numel=numel))
            at += _padded(nbytes)
        return Message(tuple(packets), self.present)


def _parse_lengths(
    data: memoryview, pieces: Sequence[Piece], parameters: int
) -> tuple[tuple[bool, ...], list[int], int]:
    """Who is present, the packets' sizes, none over its bound, and where in ``data`` that ends."""
    bits = (parameters + 7) // 8
    lengths_at = _COUNTS.size + bits + -(_COUNTS.size + bits) % _ALIGN
    packets_at = lengths_at + _LENGTH.size * len(pieces)
    if len(data) < packets_at:
        raise PacketError(f"message of {len(data)} bytes is shorter than its head of {packets_at}")
    counts = _COUNTS.unpack_from(data)
    if counts != (len(pieces), parameters):
        raise PacketError(f"message holds {counts} pieces and parameters, expected {(len(pieces), parameters)}")
    bitmap = int.from_bytes(data[_COUNTS.size : lengths_at], "little")
    if bitmap >> parameters:
        raise PacketError("message has bits set in its padding")
    present = tuple(bitmap >> i & 1 == 1 for i in range(parameters))
    sizes = list(struct.unpack_from(f"<{len(pieces)}Q", data, lengths_at))
    for piece, size in zip(pieces, sizes, strict=True):
        if size > piece.codec.max_nbytes(piece.numel):
            raise PacketError(f"packet of {size} bytes for {piece.numel} elements is over the most there can be")
    return present, sizes, packets_at


def _bitmap(flags: Sequence[bool]) -> bytes:
    packed = bytearray((len(flags) + 7) // 8)
    for i, flag in enumerate(flags):
        packed[i // 8] |= flag << (i % 8)
    return bytes(packed)


def _padded(size: int) -> int:
    return size + -size % _ALIGN


def max_message_bytes(pieces: Sequence[Piece], parameters: int) -> int:
    """The longest message that can hold these pieces; or what is added up of them, with a float a parameter."""
    head = _COUNTS.size + 4 * parameters + _ALIGN + _LENGTH.size * len(pieces)
    return head + sum(_padded(piece.codec.max_nbytes(piece.numel)) for piece in pieces)


def on_any_rank(messages: Sequence[Message]) -> tuple[bool, ...]:
    """For each of the bucket's parameters, whether any sender had a gradient."""
    return tuple(any(flags) for flags in zip(*(message.present for message in messages), strict=True))


def together(outgoing: Iterable[tuple[int, Message]]) -> Iterator[tuple[list[int], Message]]:
    """Peers and messages, in order: who gets the same message one after the other gets it at once.

    Not if messages are still to be made, as an iterator's are: each is to be on its way while the next one is made.
    """
    if isinstance(outgoing, Sequence):
        for _, same in groupby(outgoing, key=lambda pair: id(pair[1])):
            pairs = list(same)
            yield [peer for peer, _ in pairs], pairs[0][1]
    else:
        yield from (([peer], message) for peer, message in outgoing)
