"""The files of a checkpoint: written so that a crash leaves no half ones, read so that no damaged one is parsed.

A rank's file is as :mod:`gradcomp.integrations.checked_files` writes it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradcomp.errors import StateError
from gradcomp.integrations.checked_files import Replacing, check_about, read_checked, sync_folder, write_checked

__all__ = ["delete_old", "numbers", "read_marker", "read_rank", "write_marker", "write_rank"]

FIELDS = ("gradcomp", "model", "optimizer", "extra", "random")
_FORMAT = "gradcomp checkpoint 1"
_MARKER = "complete.json"
_MOST_MARKER_BYTES = 1 << 16


def write_rank(target: Path, content: Mapping[str, Any]) -> None:
    """Write what one rank saves: a dict with the keys ``FIELDS``.

    Raises:
        OSError: it could not be written; there is no file then.
    """
    target.mkdir(parents=True, exist_ok=True)
    state = content["gradcomp"]
    about = {"format": _FORMAT, "rank": state["rank"], "world_size": state["world_size"], "step": state["step"]}
    write_checked(target / f"rank-{state['rank']}.pt", about, content)


def write_marker(target: Path, world_size: int) -> None:
    """Mark a checkpoint as complete.

    Raises:
        StateError: a rank's file is not there.
        OSError: it could not be written.
    """
    for rank in range(world_size):
        if not (target / f"rank-{rank}.pt").is_file():
            raise StateError(f"rank 0 does not see {target / f'rank-{rank}.pt'}: all ranks must share the folder")
    with Replacing(target / _MARKER) as file:
        file.write(json.dumps({"format": _FORMAT, "world_size": world_size}).encode())
    sync_folder(target.parent)


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
    check_about(path, marker, {"format": _FORMAT})
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
        content = read_checked(path, {"format": _FORMAT, "rank": rank, "world_size": world_size})
    except FileNotFoundError as error:
        raise StateError(f"the file of rank {rank} of {world_size} is missing: {path}") from error
    if content.keys() != {*FIELDS} or not isinstance(content["gradcomp"], dict):
        raise StateError(f"{path} is no checkpoint of a rank; it must hold {', '.join(FIELDS)}")
    return content
