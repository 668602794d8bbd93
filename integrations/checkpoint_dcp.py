"""What an exchange remembers, for ``torch.distributed.checkpoint`` (DCP)::

    dcp.save({"model": model.state_dict(), "gradcomp": gradcomp.Checkpoint(sync)}, checkpoint_id=folder)
    dcp.load({"model": weights, "gradcomp": gradcomp.Checkpoint(sync, saved_in=folder)}, checkpoint_id=folder)

DCP takes tensors of the same name for copies of each other and saves one: so names begin with the rank. It pickles what
is not a tensor: so there are only tensors. For rank 1 of 4 they are

    rank1of4/about                                     uint8: JSON in UTF-8, with everything that is not a tensor
    rank1of4/PARAMETER/START:STOP/ROLE/FIELD           such as rank1of4/0.weight/0:4096/gradient/residual
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradcomp.engine import GradientExchange
from gradcomp.errors import StateError
from gradcomp.options import check_text
from gradcomp.redistribute import needed

__all__ = ["Checkpoint"]

_ABOUT = "about"
_LONGEST_ABOUT_BYTES = 64 << 20
_PREFIX = re.compile(r"rank(\d{1,9})of(\d{1,9})/")


class Checkpoint:
    """An exchange's state as DCP's ``Stateful``: hand it to ``dcp.save`` and ``dcp.load`` on every rank.

    Args:
        sync: whose residuals and so on are saved or restored.
        saved_in: to load: the folder, or a DCP ``StorageReader`` of it. DCP loads into tensors that are there already;
            how many, how large, and of how many ranks is found in there.
        key: what it is called in the dict that is handed to DCP.
    """

    def __init__(self, sync: GradientExchange, saved_in: object = None, *, key: str = "gradcomp") -> None:
        check_text("Checkpoint", "key", key)
        self._sync, self._saved_in, self._key = sync, saved_in, key

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's state; or, with ``saved_in``, empty tensors for what is to be loaded.

        Raises:
            StateError: there is no state of an exchange in there, or a rank's that is needed is missing.
        """
        if self._saved_in is not None:
            return self._empty(_read_metadata(self._saved_in))
        state_dict = self._sync.state_dict()
        prefix = _prefix(self._sync.rank, self._sync.world_size)
        flat = {prefix + path: tensor for path, tensor in _flatten(state_dict["states"]).items()}
        about = {field: value for field, value in state_dict.items() if field != "states"} | {"tensors": len(flat)}
        flat[prefix + _ABOUT] = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
        return flat

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the exchange, on as many ranks or on others; all ranks must call it.

        Raises:
            StateError: what was loaded does not fit. The exchange is as it was then.
            HandshakeError: it did not fit on another rank.
        """
        self._sync.load_state_dicts(_unflatten(state_dict))
        self._saved_in = None  # what comes next is a save

    def _empty(self, metadata: Mapping[str, Any]) -> dict[str, Tensor]:
        own = {
            name.removeprefix(f"{self._key}."): entry
            for name, entry in metadata.items()
            if name.startswith(f"{self._key}.")
        }
        sizes = {int(found[2]) for found in map(_PREFIX.match, own) if found}
        if len(sizes) != 1:
            raise StateError(
                f"the checkpoint holds states of {sorted(sizes) or 'no'} ranks under {self._key!r}; "
                "it must be those of one gradcomp.Checkpoint, saved under that key"
            )
        old_world_size = sizes.pop()
        empty: dict[str, Tensor] = {}
        for rank, whole in needed(self._sync.rank, self._sync.world_size, old_world_size).items():
            prefix = _prefix(rank, old_world_size)
            if prefix + _ABOUT not in own:
                raise StateError(f"the checkpoint holds no state of rank {rank} of {old_world_size}, which is needed")
            for name, entry in own.items():
                if name.startswith(prefix) and (whole or not name.endswith(("/residual", ".residual"))):
                    empty[name] = _empty_tensor(name, entry)
        return empty


def _prefix(rank: int, world_size: int) -> str:
    return f"rank{rank}of{world_size}/"


def _read_metadata(saved_in: object) -> Mapping[str, Any]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.storage import StorageReader

    reader = FileSystemReader(saved_in) if isinstance(saved_in, (str, os.PathLike)) else saved_in
    if not isinstance(reader, StorageReader):
        raise StateError(f"saved_in={saved_in!r} is not allowed; it must be a folder or a DCP StorageReader")
    try:
        found: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    except Exception as error:  # whatever the storage raises
        raise StateError(f"no DCP checkpoint can be read in {saved_in}: {type(error).__name__}: {error}") from error
    return found


def _empty_tensor(name: str, entry: Any) -> Tensor:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    if not isinstance(entry, TensorStorageMetadata):
        raise StateError(f"{name} in the checkpoint is not a tensor")
    if name.endswith("/" + _ABOUT) and entry.size.numel() > _LONGEST_ABOUT_BYTES:
        raise StateError(f"{name} in the checkpoint has {entry.size.numel()} bytes; at most {_LONGEST_ABOUT_BYTES}")
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _flatten(states: Any) -> dict[str, Tensor]:
    return {
        f"{name}/{span}/{role}/{field}": tensor
        for name, spans in states.items()
        for span, roles in spans.items()
        for role, fields in roles.items()
        for field, tensor in fields.items()
    }


def _unflatten(flat: Mapping[str, Any]) -> list[dict[str, object]]:
    """The state dicts of the ranks there are, in rank order."""
    by_rank: dict[tuple[int, int], dict[str, Any]] = {}
    for name, tensor in flat.items():
        found = _PREFIX.match(name)
        if found is None or not isinstance(tensor, Tensor):
            raise StateError(f"{name!r} in the checkpoint is not a tensor of a gradcomp.Checkpoint")
        by_rank.setdefault((int(found[2]), int(found[1])), {})[name[found.end() :]] = tensor
    return [_one(rank, tensors) for (_, rank), tensors in sorted(by_rank.items())]


def _one(rank: int, tensors: dict[str, Tensor]) -> dict[str, object]:
    try:
        about = json.loads(tensors.pop(_ABOUT).numpy().tobytes())
        count = about.pop("tensors")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise StateError(f"what the checkpoint says about rank {rank} is missing or damaged: {error!r}") from error
    states: dict[str, dict[str, dict[str, dict[str, Tensor]]]] = {}
    residuals = 0
    for path, tensor in tensors.items():
        parts = path.rsplit("/", 3)
        if len(parts) != 4:
            raise StateError(f"{path!r} of rank {rank} is no PARAMETER/START:STOP/ROLE/FIELD")
        name, span, role, field = parts
        residuals += field.endswith("residual")
        states.setdefault(name, {}).setdefault(span, {}).setdefault(role, {})[field] = tensor
    if len(tensors) != count and residuals:
        raise StateError(
            f"rank {rank} saved {count} tensors, {len(tensors)} of them were loaded; "
            "load with gradcomp.Checkpoint(sync, saved_in=FOLDER)"
        )
    return {**about, "states": states}
