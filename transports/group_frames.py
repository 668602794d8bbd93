"""What goes in front of every message that a process group carries from host to host.

A frame has always the same size, for both sides of a process group's transfer must know it before. It says how long the
message is and holds its first bytes; a message that does not fit has the rest in a transfer of its own. Frames travel
over connections the process group made, in order and checked by TCP; nothing here is encrypted or signed.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradcomp.errors import PacketError
from gradcomp.handshake import MAX_HELLO_BYTES
from gradcomp.interfaces import Buffer, Slot

__all__ = ["BYE", "CUT_OFF", "DATA", "FRAME_BYTES", "HELLO", "NO_SLOT", "VERSION", "Frame", "Outgoing"]

MAGIC = b"GCMG"
VERSION = 1
HELLO, DATA, BYE, CUT_OFF = 1, 2, 3, 4

# Large enough for the heads of most messages, small enough to cost nothing beside a round trip.
FRAME_BYTES = 4096
_HEADER = struct.Struct("<4sBBBBIQQ")
_INLINE_BYTES = FRAME_BYTES - _HEADER.size

NO_SLOT = Slot(0, 0, 0)


class Frame(NamedTuple):
    """A frame that came in, checked as far as it can be by itself.

    Attributes:
        kind: HELLO, DATA, BYE (I send no more), CUT_OFF (nor read any).
        slot: the message's; in a BYE, its step counts the collective operations that the sender finished.
        total: bytes of the whole message.
        start: its first bytes, all of them if there is no more.
    """

    kind: int
    slot: Slot
    total: int
    start: bytes

    @classmethod
    def unpack(cls, data: memoryview, max_message_bytes: int) -> Frame:
        """Read a frame.

        Raises:
            PacketError: another magic, version or kind, a message that is too long, bytes where there should be none.
        """
        magic, version, kind, stage, reserved, bucket, step, total = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise PacketError(f"frame magic {magic!r} is not {MAGIC!r}")
        if version != VERSION:
            raise PacketError(f"frame version {version}; this is version {VERSION}")
        if not HELLO <= kind <= CUT_OFF:
            raise PacketError(f"unknown frame kind {kind}")
        if reserved:
            raise PacketError(f"reserved byte is {reserved}, not 0")
        most = {HELLO: MAX_HELLO_BYTES, DATA: max_message_bytes}.get(kind, 0)
        if total > most:
            raise PacketError(f"message of {total} bytes, kind {kind}, is over {most}")
        return cls(kind, Slot(step, bucket, stage), total, bytes(data[_HEADER.size : _HEADER.size + total]))


class Outgoing:
    """A message, put together once by whichever thread sends it first; shared by its receivers.

    Raises:
        TypeError: a part is not a contiguous buffer.
    """

    def __init__(self, parts: Sequence[Buffer]) -> None:
        self._parts = tuple(parts)
        self._views = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
        self.total = sum(len(view) for view in self._views)
        self._lock = threading.Lock()
        self._whole: bytearray | None = None

    def tensors(self, kind: int, slot: Slot) -> list[Tensor]:
        """What is sent, in order: a frame, and the rest of the message if there is any."""
        with self._lock:
            if self._whole is None:
                self._whole = bytearray().join(self._views)
                self._views = []
        frame = bytearray(FRAME_BYTES)
        _HEADER.pack_into(frame, 0, MAGIC, VERSION, kind, slot.stage, 0, slot.bucket, slot.step, self.total)
        start = self._whole[:_INLINE_BYTES]
        frame[_HEADER.size : _HEADER.size + len(start)] = start
        tensors = [torch.frombuffer(frame, dtype=torch.uint8)]
        if self.total > _INLINE_BYTES:
            tensors.append(torch.frombuffer(self._whole, dtype=torch.uint8, offset=_INLINE_BYTES))
        return tensors

    def same_as(self, parts: Sequence[Buffer]) -> bool:
        """Whether this is the same message, made of the very same objects."""
        return len(parts) == len(self._parts) and all(a is b for a, b in zip(parts, self._parts, strict=True))
