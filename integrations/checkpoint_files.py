"""The files of a checkpoint: written so that a crash leaves no half ones, read so that no damaged one is parsed.

A rank's file is 512 bytes of JSON, filled up with blanks, and then what ``torch.save`` writes of plain dicts, lists,
tensors, strings and numbers. The JSON tells how many bytes follow, and their XXH3-128 digest: nothing is parsed that
does not have it. No pickled objects: what is not one of the above is refused by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
import xxhash

from gradcomp.errors import StateError

__all__ = ["delete_old", "numbers", "read_marker", "read_rank", "write_marker", "write_rank"]

FIELDS = ("gradcomp", "model", "optimizer", "extra", "random")
_FORMAT = "gradcomp checkpoint 1"
_HEAD_BYTES = 512
_MARKER = "complete.json"
_MOST_MARKER_BYTES = 1 << 16
_PIECE_BYTES = 1 << 20


class _Digesting:
    """A file that is written to, and the digest of what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self.nbytes = file, xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self.nbytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def write_rank(target: Path, content: Mapping[str, Any]) -> None:
    """Write what one rank saves: a dict with the keys ``FIELDS``.

    Raises:
        OSError: it could not be written; there is no file then.
    """
    target.mkdir(parents=True, exist_ok=True)
    state = content["gradcomp"]
    about = {"format": _FORMAT, "rank": state["rank"], "world_size": state["world_size"], "step": state["step"]}
    with _Replacing(target / f"rank-{state['rank']}.pt") as file:
        file.write(b" " * _HEAD_BYTES)
        body = _Digesting(file)
        torch.save(content, body)  # type: ignore[arg-type]
        file.seek(0)
        head = json.dumps(about | {"nbytes": body.nbytes, "xxh3_128": body.digest}).encode()
        file.write(head.ljust(_HEAD_BYTES - 1) + b"\n")


class _Replacing:
    """Write a file under another name; when all of it is on the disk it takes its own."""

    def __init__(self, path: Path) -> None:
        self._path, self._draft = path, path.with_name(path.name + ".tmp")

    def __enter__(self) -> IO[bytes]:
        self._file = self._draft.open("w+b")
        return self._file

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
        if error is None:
            self._draft.replace(self._path)
            _sync_folder(self._path.parent)
        else:
            self._draft.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make sure that names are on the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_marker(target: Path, world_size: int) -> None:
    """Mark a checkpoint as complete.

    Raises:
        StateError: a rank's file is not there.
        OSError: it could not be written.
    """
    for rank in range(world_size):
        if not (target / f"rank-{rank}.pt").is_file():
            raise StateError(f"rank 0 does not see {target / f'rank-{rank}.pt'}: all ranks must share the folder")
    with _Replacing(target / _MARKER) as file:
        file.write(json.dumps({"format": _FORMAT, "world_size": world_size}).encode())
    _sync_folder(target.parent)


def numbers(folder: Path, *, complete: bool = False) -> list[int]:
    """The checkpoints in a folder, or only the complete ones; ascending."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.isdecimal() and len(path.name) == 8 and path.is_dir()]
    return sorted(int(path.name) for path in found if not complete or (path / _MARKER).is_file())


def delete_old(folder: Path, keep: int) -> None:
    """Delete what is older than the newest ``keep`` complete checkpoints, and what was left by a crash."""
    complete = numbers(folder, complete=True)
    stay = set(complete[-keep:])
    for number in numbers(folder):
        if number not in stay and number < complete[-1]:
            old = folder / f"{number:08d}"
            (old / _MARKER).unlink(missing_ok=True)  # first: what is half deleted must not count
            shutil.rmtree(old, ignore_errors=True)


def read_marker(source: Path) -> int:
    """The number of ranks that saved a checkpoint.

    Raises:
        StateError: there is no marker, or it is damaged.
    """
    path = source / _MARKER
    try:
        with path.open("rb") as file:
            marker = json.loads(file.read(_MOST_MARKER_BYTES))
    except (OSError, ValueError) as error:
        raise StateError(f"{path} cannot be read: {error}") from error
    _check_about(path, marker, {"format": _FORMAT})
    world_size = marker.get("world_size")
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise StateError(f"{path} has world_size={world_size!r}; it must be an integer >= 1")
    return world_size


def read_rank(source: Path, rank: int, world_size: int) -> dict[str, Any]:
    """What a rank saved: a dict with the keys ``FIELDS``, all tensors on the CPU.

    Raises:
        StateError: the file is missing, damaged, or another rank's.
    """
    path = source / f"rank-{rank}.pt"
    try:
        with path.open("rb") as file:
            about = _read_head(path, file)
            _check_about(path, about, {"format": _FORMAT, "rank": rank, "world_size": world_size})
            if os.fstat(file.fileno()).st_size != _HEAD_BYTES + about["nbytes"]:
                raise StateError(f"{path} has {os.fstat(file.fileno()).st_size} bytes; it says {about['nbytes']} + 512")
            digest = xxhash.xxh3_128()
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
            if digest.hexdigest() != about["xxh3_128"]:
                raise StateError(f"{path} is damaged: its digest is {digest.hexdigest()}, not {about['xxh3_128']}")
            file.seek(_HEAD_BYTES)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise StateError(f"the file of rank {rank} of {world_size} is missing: {path}") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict) or content.keys() != {*FIELDS} or not isinstance(content["gradcomp"], dict):
        raise StateError(f"{path} is no checkpoint of a rank; it must hold {', '.join(FIELDS)}")
    return content


def _read_head(path: Path, file: IO[bytes]) -> dict[str, Any]:
    try:
        about = json.loads(file.read(_HEAD_BYTES))
    except ValueError as error:
        raise StateError(f"{path} does not begin with the head of a checkpoint: {error}") from error
    if not isinstance(about, dict) or not isinstance(about.get("nbytes"), int):
        raise StateError(f"{path} does not begin with the head of a checkpoint")
    return about


def _check_about(path: Path, about: object, expected: Mapping[str, object]) -> None:
    if not isinstance(about, dict):
        raise StateError(f"{path} is no part of a checkpoint")
    for field, value in expected.items():
        if about.get(field) != value:
            raise StateError(f"{path} has {field}={about.get(field)!r}; it must be {value!r}")
