"""Cutting a message into chunks: big parts are sent where they lie, small neighbours are joined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import zmq

from gradcomp.interfaces import Buffer
from gradcomp.transports.frames import digest_payload

__all__ = ["Chunk", "Outgoing", "cut"]

# Up to here a copy is cheaper than another frame.
_JOIN_BYTES = 128 << 10


def cut(parts: Sequence[memoryview], limit: int) -> Iterator[Buffer]:
    """The concatenation of ``parts`` in chunks of at most ``limit`` bytes; an empty message is one empty chunk.

    >>> [bytes(chunk) for chunk in cut([memoryview(part) for part in (b"ab", b"c", b"defg")], 5)]
    [b'abcde', b'fg']
    """
    join_limit = min(limit, _JOIN_BYTES)
    joining: list[memoryview] = []
    joined_bytes = 0
    nothing_yet = True
    for part in parts:
        view = part
        while len(view):
            if not joining and len(view) >= join_limit:
                nothing_yet = False
                yield view[:limit]
                view = view[limit:]
                continue
            piece = view[: join_limit - joined_bytes]
            joining.append(piece)
            joined_bytes += len(piece)
            view = view[len(piece) :]
            if joined_bytes == join_limit:
                nothing_yet = False
                yield _join(joining)
                joining, joined_bytes = [], 0
    if joining or nothing_yet:
        yield _join(joining)


def _join(pieces: list[memoryview]) -> Buffer:
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Chunk:
    """A chunk ready to be sent, to one peer or to several."""

    __slots__ = ("digest", "frame", "length")

    def __init__(self, payload: Buffer) -> None:
        self.length = len(payload)
        self.digest = digest_payload(payload)
        # pyzmq copies what is below its threshold: cheaper than keeping track of the buffer.
        self.frame = zmq.Frame(payload)


class Outgoing:
    """A message, cut and digested while it is sent, by the thread that owns the sockets; shared by its receivers.

    Raises:
        TypeError: a part is not a contiguous buffer.
    """

    def __init__(self, parts: Sequence[Buffer], limit: int) -> None:
        self._parts = tuple(parts)
        views = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
        self.total = sum(len(view) for view in views)
        self._more = cut(views, limit)
        self._chunks: list[Chunk] = []

    def chunk(self, number: int) -> Chunk:
        """Chunk ``number``; a message has at least one, and no receiver asks for more than there are."""
        while number >= len(self._chunks):
            self._chunks.append(Chunk(next(self._more)))
        return self._chunks[number]

    def same_as(self, parts: Sequence[Buffer]) -> bool:
        """Whether this is the same message, made of the very same objects."""
        return len(parts) == len(self._parts) and all(a is b for a, b in zip(parts, self._parts, strict=True))
