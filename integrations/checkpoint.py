"""Checkpoints in a folder that all ranks see, without a process group: one file a rank, for as many ranks or others.

    FOLDER/00000007/rank-0.pt ... rank-3.pt     what each rank saved
    FOLDER/00000007/complete.json               written last, by rank 0, when all ranks said that theirs is written

Every save goes into a new subfolder, so that a crash in the midst of one leaves those before it as they were; what has
no ``complete.json`` does not count. The files are those of :mod:`gradcomp.integrations.checkpoint_files`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradcomp.engine import GradientExchange
from gradcomp.errors import ConfigError, GradcompError, StateError
from gradcomp.integrations import checkpoint_files as files
from gradcomp.options import check_integer
from gradcomp.redistribute import needed
from gradcomp.session import Session

__all__ = ["LoadedCheckpoint", "load_checkpoint", "save_checkpoint"]

_PLAIN = (Tensor, nn.Parameter, str, int, float, bool, bytes, type(None))


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What :func:`load_checkpoint` found.

    Attributes:
        folder: the subfolder it was in.
        step: how many steps the exchange had made.
        world_size: the number of ranks that saved it.
        same_ranks: whether they are as many as now: then the run goes on bit for bit.
        extra: what this rank gave to :func:`save_checkpoint`; on another number of ranks what rank (this one modulo
            ``world_size``) gave.
    """

    folder: Path
    step: int
    world_size: int
    same_ranks: bool
    extra: Any


def save_checkpoint(
    folder: str | Path,
    sync: Session,
    *,
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    extra: object = None,
    keep: int = 2,
) -> Path:
    """Save a run; all ranks must call it, between the same two steps. torch's random state is saved with it.

    Args:
        folder: one that all ranks see; made if it is not there.
        model, optimizer: their state dicts are saved; on every rank, for they may differ (BatchNorm's statistics).
        extra: what else this rank wants back: dicts, lists, tuples, tensors, strings, numbers, None.
        keep: so many complete checkpoints stay, older ones are deleted.

    Returns:
        The new subfolder. On any rank, the checkpoint is complete then.

    Raises:
        ConfigError: ``keep`` is less than 1, or there is something that could not be loaded again, in ``extra``, say.
        StateError: it could not be written, here or on another rank. Earlier checkpoints are still there.
        TransportError: a rank is gone, or did not come in time.
    """
    check_integer("save_checkpoint", "keep", keep, at_least=1)
    sync = _of_ranks(sync)
    folder = Path(folder)
    number = 1 + _ask_rank_zero(sync, lambda: max(files.numbers(folder), default=0))
    target = folder / f"{number:08d}"
    content = {
        "gradcomp": sync.state_dict(),
        "model": None if model is None else model.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "extra": extra,
        "random": _random_states(),
    }
    _check_together(sync, lambda: _write(target, content))
    _check_together(sync, lambda: files.write_marker(target, sync.world_size) if sync.rank == 0 else None)
    if sync.rank == 0:
        files.delete_old(folder, keep)
    return target


def load_checkpoint(
    folder: str | Path,
    sync: Session,
    *,
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
) -> LoadedCheckpoint | None:
    """Restore the newest complete checkpoint, on as many ranks or on others; all ranks must call it.

    On as many ranks torch's random state is restored, too, and the run goes on bit for bit. On others residuals are
    dealt out so that their sum stays (:mod:`gradcomp.redistribute`).

    Args:
        folder: as for :func:`save_checkpoint`.
        model, optimizer: of which states are restored, if they were saved.

    Returns:
        What was found; None if there is no complete checkpoint.

    Raises:
        StateError: a file is missing or damaged, or does not fit model, optimizer or exchange; nothing has changed.
        HandshakeError: that was so on another rank.
        TransportError: a rank is gone, or did not come in time.
    """
    sync = _of_ranks(sync)
    folder = Path(folder)
    number = _ask_rank_zero(sync, lambda: max(files.numbers(folder, complete=True), default=0))
    if not number:
        return None
    source = folder / f"{number:08d}"
    kept: dict[str, Any] = {}

    def states() -> Iterator[Mapping[str, object]]:
        old_world_size = files.read_marker(source)
        for rank in needed(sync.rank, sync.world_size, old_world_size):
            content = files.read_rank(source, rank, old_world_size)
            state_dict = content.pop("gradcomp")
            if rank == sync.rank % old_world_size:
                _check_model(model, content["model"])
                _check_optimizer(optimizer, content["optimizer"])
                kept.update(content, world_size=old_world_size, step=state_dict["step"])
            yield state_dict

    sync.load_state_dicts(states())
    if model is not None:
        model.load_state_dict(kept["model"])
    if optimizer is not None:
        optimizer.load_state_dict(kept["optimizer"])
    same_ranks = kept["world_size"] == sync.world_size
    if same_ranks:
        _restore_random(kept["random"])
    return LoadedCheckpoint(source, kept["step"], kept["world_size"], same_ranks, kept["extra"])


# -- what ranks tell each other ----------------------------------------------------------------------------------------


def _of_ranks(sync: Session) -> GradientExchange:
    if not isinstance(sync, GradientExchange):
        raise ConfigError(
            "a parameter server keeps checkpoints of its own (gradcomp server --state); what a worker holds back is "
            "its state_dict(), to be saved wherever it likes"
        )
    return sync


def _tell_all(sync: GradientExchange, number: int) -> list[int]:
    """Every rank's number, by rank; each is less than 2^24 and waits for all others to tell theirs."""
    row = torch.zeros(sync.world_size)
    row[sync.rank] = number
    return [round(mean * sync.world_size) for mean in sync.average(row).tolist()]


def _ask_rank_zero(sync: GradientExchange, find: Callable[[], int]) -> int:
    """What rank 0 finds in the folder, a number >= 0, on every rank."""
    problem: OSError | None = None
    found = 0
    if sync.rank == 0:
        try:
            found = 1 + find()
        except OSError as error:
            problem = error
    answer = _tell_all(sync, found)[0]
    if not answer:
        raise StateError(f"rank 0 cannot look into the folder of checkpoints: {problem or 'its error says why'}")
    return answer - 1


def _check_together(sync: GradientExchange, act: Callable[[], None]) -> None:
    """Do something on every rank; if it fails on one, all raise."""
    problem: Exception | None = None
    try:
        act()
    except (OSError, RuntimeError, GradcompError) as error:
        problem = error
    failed = [rank for rank, number in enumerate(_tell_all(sync, int(problem is not None))) if number]
    if isinstance(problem, GradcompError):
        raise problem
    if problem is not None:
        raise StateError(f"rank {sync.rank} could not write its part of the checkpoint: {problem}") from problem
    if failed:
        raise StateError(f"rank {failed[0]} could not write its part of the checkpoint; its error says why")


# -- what is in them ---------------------------------------------------------------------------------------------------


def _write(target: Path, content: Mapping[str, Any]) -> None:
    for field, value in content.items():
        _check_plain(value, field)
    files.write_rank(target, content)


def _check_plain(value: object, where: str) -> None:
    """Raise ConfigError unless ``torch.load(weights_only=True)`` will take it."""
    if type(value) in (dict, OrderedDict) and isinstance(value, Mapping):
        for key, inner in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(inner, f"{where}[{key!r}]")
    elif type(value) in (list, tuple) and isinstance(value, Sequence):
        for position, inner in enumerate(value):
            _check_plain(inner, f"{where}[{position}]")
    elif type(value) not in _PLAIN:
        raise ConfigError(
            f"save_checkpoint: {where} is {type(value).__name__}; there may be dicts, lists, tuples, tensors, strings, "
            "numbers and None"
        )


def _check_model(model: nn.Module | None, saved: object) -> None:
    if model is None:
        return
    if not isinstance(saved, Mapping):
        raise StateError("the checkpoint holds no model; save_checkpoint was not given one")
    own = model.state_dict()
    for name in [*saved, *own]:
        if name not in own:
            raise StateError(f"the checkpoint's model has {name!r}, which this model does not have")
        if name not in saved:
            raise StateError(f"the checkpoint's model has no {name!r}, which this model has")
        here, there = own[name], saved[name]
        if isinstance(here, Tensor) and (not isinstance(there, Tensor) or there.shape != here.shape):
            shape = list(there.shape) if isinstance(there, Tensor) else type(there).__name__
            raise StateError(f"{name!r} has shape {shape} in the checkpoint's model, {list(here.shape)} in this one")


def _check_optimizer(optimizer: Optimizer | None, saved: object) -> None:
    if optimizer is None:
        return
    if not isinstance(saved, Mapping):
        raise StateError("the checkpoint holds no optimizer; save_checkpoint was not given one")
    groups, own = saved.get("param_groups"), optimizer.state_dict()["param_groups"]
    there = [len(group["params"]) for group in groups] if isinstance(groups, list) else groups
    here = [len(group["params"]) for group in own]
    if there != here:
        raise StateError(f"the checkpoint's optimizer has groups of {there} parameters, this one of {here}")


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
