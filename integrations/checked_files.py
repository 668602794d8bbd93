"""Files of tensors, numbers and text: a crash leaves no half ones, and no damaged one is parsed.

A file is 512 bytes of JSON, filled up with blanks, and then what ``torch.save`` writes of plain dicts, lists, tensors,
strings and numbers. The JSON tells how many bytes follow, and their XXH3-128 digest: nothing is parsed that does not
have it. No pickled objects: what is not one of the above is refused by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
import xxhash

from gradcomp.errors import StateError

__all__ = ["Replacing", "check_about", "read_checked", "sync_folder", "write_checked"]

_HEAD_BYTES = 512
_PIECE_BYTES = 1 << 20


class _Digesting:
    """A file that is written to, and the digest of what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self.nbytes = file, xxhash.xxh3_128(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self.nbytes += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


class Replacing:
    """Write a file under another name; when all of it is on the disk it takes its own."""

    def __init__(self, path: Path) -> None:
        self._path, self._draft = path, path.with_name(path.name + ".tmp")

    def __enter__(self) -> IO[bytes]:
        self._file = self._draft.open("w+b")
        return self._file

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            try:
                if error is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            finally:
                self._file.close()
        except OSError:  # where the disk is full, closing fails, too
            self._draft.unlink(missing_ok=True)
            raise
        if error is not None:
            self._draft.unlink(missing_ok=True)
            return
        self._draft.replace(self._path)
        sync_folder(self._path.parent)


def sync_folder(folder: Path) -> None:
    """Make sure that names are on the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checked(path: Path, about: Mapping[str, object], content: Mapping[str, Any]) -> None:
    """Write ``content``, with ``about`` in the head.

    Raises:
        OSError: it could not be written; what was there before is still there.
    """
    with Replacing(path) as file:
        file.write(b" " * _HEAD_BYTES)
        body = _Digesting(file)
        try:
            torch.save(content, body)  # type: ignore[arg-type]
        except RuntimeError as error:  # what torch makes of an error of the file
            raise body.error or error from None
        file.seek(0)
        head = json.dumps(dict(about) | {"nbytes": body.nbytes, "xxh3_128": body.digest}).encode()
        file.write(head.ljust(_HEAD_BYTES - 1) + b"\n")


def read_checked(path: Path, expected: Mapping[str, object]) -> dict[str, Any]:
    """The content of a file whose head says what is ``expected``, all tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        StateError: it is damaged, or something else.
    """
    try:
        with path.open("rb") as file:
            about = _read_head(path, file)
            check_about(path, about, expected)
            if os.fstat(file.fileno()).st_size != _HEAD_BYTES + about["nbytes"]:
                raise StateError(f"{path} has {os.fstat(file.fileno()).st_size} bytes; it says {about['nbytes']} + 512")
            digest = xxhash.xxh3_128()
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
            if digest.hexdigest() != about["xxh3_128"]:
                raise StateError(f"{path} is damaged: its digest is {digest.hexdigest()}, not {about['xxh3_128']}")
            file.seek(_HEAD_BYTES)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise StateError(f"{path} holds no dict")
    return content


def _read_head(path: Path, file: IO[bytes]) -> dict[str, Any]:
    try:
        about = json.loads(file.read(_HEAD_BYTES))
    except ValueError as error:
        raise StateError(f"{path} does not begin with the head of a checkpoint: {error}") from error
    if not isinstance(about, dict) or not isinstance(about.get("nbytes"), int):
        raise StateError(f"{path} does not begin with the head of a checkpoint")
    return about


def check_about(path: Path, about: object, expected: Mapping[str, object]) -> None:
    """Raise StateError unless ``about`` is a dict that says what is ``expected``."""
    if not isinstance(about, dict):
        raise StateError(f"{path} is no part of a checkpoint")
    for field, value in expected.items():
        if about.get(field) != value:
            raise StateError(f"{path} has {field}={about.get(field)!r}; it must be {value!r}")
