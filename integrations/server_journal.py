"""A parameter server's journal in files: what it does is on its way to the disk before anybody hears that it was done.

A segment is a file of 32 bytes (see ``_HEAD``) and records. A record is the number of its bytes, their XXH3-64 seeded
with where it begins, and the bytes: an entry as :func:`gradcomp.server.protocol.pack` writes it. It is written with one
system call, so a process that is killed leaves at most its last record torn, and nobody was told of that one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import xxhash

from gradcomp.errors import PacketError, StateError
from gradcomp.interfaces import Buffer
from gradcomp.server.journal import Journal
from gradcomp.server.protocol import Message, pack, unpack

__all__ = ["FileJournal", "Segment"]

_MAGIC = b"GCMPJRNL"
_VERSION = 1
_FIELDS = struct.Struct("<8sIIQ")  # magic, version, flags, number
_CHECKSUM = struct.Struct("<Q")  # of the fields
_HEAD_BYTES = _FIELDS.size + _CHECKSUM.size
_RECORD = struct.Struct("<QQ")
_FOLLOWS = 1
_MOST_PARTS = 256  # in one system call; IOV_MAX is 1024
_LOOKED_AT_BYTES = 1 << 20


class FileJournal(Journal):
    """Appends to one segment after the other; :meth:`begin` begins one.

    After an append that failed nothing more is written to the segment, for a journal with a gap is none.

    Args:
        durable: write for the death of the machine, not only of the process: :meth:`sync` then waits for the disk.

    Attributes:
        whole: everything since the segment before this one was begun is in the journal.
        nbytes: of this segment.
    """

    def __init__(self, *, durable: bool = False) -> None:
        self.whole = True
        self.nbytes = 0
        self._durable = durable
        self._path = Path()
        self._descriptor: int | None = None
        self._unsynced = False

    def begin(self, path: Path, number: int, *, follows: bool) -> None:
        """Begin a segment.

        Args:
            follows: whether it goes on where the one before ends.

        Raises:
            OSError: it could not be made; nothing more is written until it can be.
        """
        self.close()
        self.whole = False
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        fields = _FIELDS.pack(_MAGIC, _VERSION, _FOLLOWS if follows else 0, number)
        try:
            _write(descriptor, [fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))])
            if self._durable:
                os.fsync(descriptor)
        except OSError:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        self._path, self._descriptor, self.nbytes, self.whole = path, descriptor, _HEAD_BYTES, True

    def append(self, entry: Message) -> None:
        if not self.whole or self._descriptor is None:
            raise OSError(errno.EIO, "an earlier entry is missing", str(self._path))
        parts = [memoryview(part).cast("B") for part in pack(entry) if memoryview(part).nbytes]
        nbytes = sum(len(part) for part in parts)
        checksum = xxhash.xxh3_64(seed=self.nbytes)
        for part in parts:
            checksum.update(part)
        try:
            _write(self._descriptor, [_RECORD.pack(nbytes, checksum.intdigest()), *parts])
        except OSError:
            self.whole = False
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.nbytes)
            raise
        self.nbytes += _RECORD.size + nbytes
        self._unsynced = True

    def sync(self) -> None:
        """With ``durable``, wait until all that was appended is on the disk.

        Raises:
            OSError: it is not.
        """
        if self._durable and self._unsynced and self._descriptor is not None:
            self._unsynced = False
            try:
                os.fdatasync(self._descriptor)
            except OSError:
                self.whole = False
                raise

    def close(self) -> None:
        """Close the segment; :meth:`begin` opens another one."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _write(descriptor: int, parts: list[Buffer]) -> None:
    """Write all of it: one system call, unless there are very many parts, or over 2 GiB of them."""
    if len(parts) > _MOST_PARTS:
        parts = [b"".join(parts)]
    views = [memoryview(part) for part in parts]
    while views:
        written = os.writev(descriptor, views)
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if views:
            views[0] = views[0][written:]


class Segment:
    """A segment that is there, to be read.

    Attributes:
        follows: whether it goes on where the one before ends.
        torn_bytes: what was cut off at the end, known once all entries were read.

    Raises:
        StateError: it is damaged at its beginning, or something else.
    """

    def __init__(self, path: Path, number: int) -> None:
        self._path = path
        self.torn_bytes = 0
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        # A process that was killed while it began the segment had put nothing into it.
        self._torn = len(head) < _HEAD_BYTES
        self.follows = False
        if self._torn:
            return
        magic, version, flags, found = _FIELDS.unpack_from(head)
        (checksum,) = _CHECKSUM.unpack_from(head, _FIELDS.size)
        if magic != _MAGIC or checksum != xxhash.xxh3_64_intdigest(head[: _FIELDS.size]) or found != number:
            raise StateError(f"{path} does not begin as segment {number} of a journal")
        if version != _VERSION:
            raise StateError(f"{path} has version {version} of the journal's format; this is version {_VERSION}")
        self.follows = bool(flags & _FOLLOWS)

    def entries(self) -> Iterator[Message]:
        """The entries, in order. A torn record at the end is left out.

        Raises:
            StateError: it is damaged before its end.
        """
        if self._torn:
            return
        with self._path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            at = _HEAD_BYTES
            while at < size:
                record = _read_record(file, at, size)
                if record is None:
                    self._check_torn(file, at, size)
                    self.torn_bytes = size - at
                    return
                try:
                    yield unpack(record)
                except PacketError as error:
                    raise StateError(
                        f"{self._path} holds at byte {at} what this version does not know: {error}"
                    ) from error
                at += _RECORD.size + len(record)

    def _check_torn(self, file: IO[bytes], at: int, size: int) -> None:
        """Tell a record that was being written from one that was damaged later: the first reaches beyond the end, or
        is of zeros, where the machine stopped."""
        file.seek(at)
        begin = file.read(_LOOKED_AT_BYTES)
        if len(begin) < _RECORD.size or not any(begin):
            return
        nbytes, _ = _RECORD.unpack_from(begin)
        if at + _RECORD.size + nbytes < size:
            raise StateError(
                f"{self._path} is damaged at byte {at} of {size}; to go on from there all the same, and lose what "
                f"was done after it, cut it: truncate -s {at} {self._path}"
            )


def _read_record(file: IO[bytes], at: int, size: int) -> bytes | None:
    """The record that begins there; None if it is not whole."""
    file.seek(at)
    head = file.read(_RECORD.size)
    if len(head) < _RECORD.size:
        return None
    nbytes, checksum = _RECORD.unpack(head)
    if nbytes > size - at - _RECORD.size:
        return None
    record = file.read(nbytes)
    return record if xxhash.xxh3_64_intdigest(record, at) == checksum else None
