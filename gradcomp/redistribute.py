"""A checkpoint of N ranks, loaded by M: what the ranks held back is dealt out anew, so that its sum stays the same.

Old rank j's share joins that of new rank j mod M. Residuals of ranks and of shard owners, and what waits, are all in
units of the sum over ranks: they go into the new rank's residual of the same elements, however tensors are cut now. So
do a compressor's other ``additive`` fields. What else it remembers comes from one old rank, m mod N for new rank m; for
linear compressors, whose ranks must agree on it, from rank 0:

- where the new piece is cut as an old one was: all of it;
- where it is not: scalars (a threshold, a step), from the old piece in which the new one begins. An owner of a shard
  for which there is no such piece takes the step from its own gradient's.

A random stream goes on at the old step, under a key of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from gradcomp import handshake, randomness, replicas
from gradcomp.bucket import Piece
from gradcomp.errors import GradcompError, StateError
from gradcomp.interfaces import State, Transport
from gradcomp.plan import Plan
from gradcomp.states import ROLES, Key, Loose, StateStore, parse, unpack

__all__ = ["needed", "restore", "restore_together"]


# The plan that a state dict's states belong to, and what this run's state dicts then say of it.
PlanFor = Callable[[Mapping[str, object]], tuple[Plan, Mapping[str, object]]]


def needed(rank: int, world_size: int, old_world_size: int) -> dict[int, bool]:
    """The old ranks whose states a new rank needs, ascending.

    Returns:
        By old rank: whether all of it, or only what is not additive.

    >>> needed(1, 2, 4), needed(2, 3, 2)
    ({0: False, 1: True, 3: True}, {0: False})
    """
    if world_size == old_world_size:
        return {rank: True}
    shares = dict.fromkeys(range(rank, old_world_size, world_size), True)
    return dict(sorted(({0: False, rank % old_world_size: False} | shares).items()))


def restore_together(
    state_dicts: Iterable[Mapping[str, object]],
    plan_for: PlanFor,
    transport: Transport,
    turn: int,
    device: torch.device,
) -> tuple[int, Plan, StateStore]:
    """As :func:`restore`, on all ranks at once: if one refuses, all do.

    Args:
        turn: numbers the messages, as for :func:`gradcomp.replicas.check_agreed`.

    Raises:
        StateError: as :func:`restore`.
        HandshakeError: another rank refused, or was given the states of another step.
    """
    problem: GradcompError | None = None
    agreed: handshake.Hello = {}
    try:
        step, plan, store = restore(state_dicts, plan_for, device, transport.party)
        agreed = {"checkpoint": "fits", "step": step, **plan.describe()}
    except GradcompError as error:
        # The others must hear of it, or they would wait for this rank.
        problem = error
        agreed = {"checkpoint": f"refused on rank {transport.rank}: {error}"[:1000]}
    replicas.check_agreed(transport, turn, agreed, problem)
    return step, plan, store


def restore(
    state_dicts: Iterable[Mapping[str, object]], plan_for: PlanFor, device: torch.device, party: int | None
) -> tuple[int, Plan, StateStore]:
    """Step, plan and states of one rank, from the state dicts of as many ranks or of others.

    Args:
        state_dicts: of the old ranks that are :func:`needed`, others are skipped. Taken one at a time, so that a
            generator need not hold more than one.
        plan_for: asked with the first state dict.
        device: where the gradients lie.
        party: this rank's number among those that exchange packets; None if it is not one of them.

    Raises:
        StateError: an old rank's state is missing or there twice, they are from different steps or world sizes, or one
            does not fit this run.
    """
    collected: _Collected | None = None
    for state_dict in state_dicts:
        if collected is None:
            old_world_size = _integer(state_dict, "world_size", 1)
            plan, about = plan_for(state_dict)
            collected = _Collected(plan, about, old_world_size, device, party)
        collected.add(state_dict)
    if collected is None:
        raise StateError("there is no state to load")
    return collected.finish()


class _Collected:
    """What was found so far, of one checkpoint, for one rank."""

    def __init__(
        self, plan: Plan, about: Mapping[str, object], old_world_size: int, device: torch.device, party: int | None
    ) -> None:
        self._party, self._plan = party, plan
        self._rank, self._world_size = _integer(about, "rank", 0), _integer(about, "world_size", 1)
        self._expected = {field: about[field] for field in ("format", "compressor")}
        self._old_world_size = old_world_size
        self._needed = needed(self._rank, self._world_size, old_world_size)
        self._step: int | None = None
        self._seen: set[int] = set()
        self._shapes = {row.name: list(row.shape) for row in plan.table}
        self._numels = {row.name: row.numel for row in plan.table}
        self._codecs = {row.name: row.codec for row in plan.table}
        self._pieces = plan.named_pieces()
        self._store = StateStore(self._rank)
        self._loose = Loose(self._numels, device)
        self._others: dict[Key, State] = {}  # what is not additive

    def add(self, state_dict: Mapping[str, object]) -> None:
        """Take what this rank needs from one old rank's state dict."""
        step, saved = unpack(state_dict, self._expected)
        old_world_size = _integer(state_dict, "world_size", 1)
        old_rank = _integer(state_dict, "rank", 0, old_world_size - 1)
        if old_world_size != self._old_world_size:
            raise StateError(
                f"the state of rank {old_rank} is one of {old_world_size}, another rank's one of {self._old_world_size}"
            )
        if self._step is not None and step != self._step:
            raise StateError(f"the state of rank {old_rank} is of step {step}, another rank's of step {self._step}")
        if old_rank in self._seen:
            raise StateError(f"the state of rank {old_rank} is there twice")
        self._step = step
        self._seen.add(old_rank)
        _check_parameters(state_dict.get("parameters", self._shapes), self._shapes)
        if old_rank not in self._needed:
            return
        states = parse(saved, self._numels)
        if self._world_size == self._old_world_size and all(self._has_place(key) for key in states):
            self._store.load(saved, self._pieces, self._numels)
            return
        for key, state in states.items():
            name, span, _ = key
            codec = self._codecs[name]
            if self._needed[old_rank]:
                self._loose.add(name, span, state, codec.additive)
            linear = codec.linear and self._world_size != self._old_world_size
            if old_rank == (0 if linear else self._rank % self._old_world_size):
                self._others[key] = {f: t.clone() for f, t in state.items() if f not in codec.additive}

    def finish(self) -> tuple[int, Plan, StateStore]:
        """Put together what was found."""
        missing = sorted(self._needed.keys() - self._seen)
        if missing or self._step is None:
            raise StateError(
                f"the state of rank {missing[0]} of {self._old_world_size} is missing; rank {self._rank} of "
                f"{self._world_size} needs those of {', '.join(map(str, self._needed))}"
            )
        old_pieces = _by_name_and_role(self._others)
        for (name, span), piece in self._pieces.items():
            for role in ROLES:
                if role == "gradient" or piece.has_sum(self._party):
                    self._inherit(name, span, role, piece, old_pieces)
        self._store.settle(self._loose, self._pieces)
        # What was loaded as it is must fit, too, and that must be known now.
        for name, span, role in self._store.loaded:
            piece = self._pieces[name, span]
            self._store.get(name, piece, role, self._empty(piece))
        return self._step, self._plan, self._store

    def _has_place(self, key: Key) -> bool:
        """Whether a state of as many ranks can stay what it is."""
        name, span, role = key
        piece = self._pieces.get((name, span))
        if role not in ROLES:
            return True
        return piece is not None and (role == "gradient" or piece.has_sum(self._party))

    def _inherit(
        self, name: str, span: str, role: str, piece: Piece, old: Mapping[tuple[str, str], list[tuple[int, int, State]]]
    ) -> None:
        """Begin a piece's state with what an old rank knew that is not additive."""
        exact = self._others.get((name, span, role))
        around = _around(old, name, role, piece)
        if exact is None and around is None and role == "sum":
            own = _around(old, name, "gradient", piece) or {}
            around = {f: t for f, t in own.items() if randomness.is_stream(f) or not t.is_floating_point()} or None
        if exact is None and around is None:
            return  # there was none, or it is for the first step to make it
        state = self._store.get(name, piece, role, self._empty(piece))
        additive = piece.codec.additive
        own_fields = {field for field in state if field not in additive}
        if exact is not None and exact.keys() != own_fields:
            raise StateError(
                f"state of {name} {span} {role} holds {', '.join(sorted(exact)) or 'nothing'} beside what adds up; "
                f"this compressor keeps {', '.join(sorted(own_fields)) or 'nothing'}"
            )
        for field in own_fields:
            found = (around or {} if exact is None else exact).get(field)
            if found is None or (exact is None and found.dim() and not randomness.is_stream(field)):
                continue
            if (found.shape, found.dtype) != (state[field].shape, state[field].dtype):
                raise StateError(
                    f"{field} of {name} {span} {role} is {found.dtype} of shape {list(found.shape)}; "
                    f"this compressor keeps {state[field].dtype} of shape {list(state[field].shape)}"
                )
            if randomness.is_stream(field):
                randomness.go_on(state[field], found)
            else:
                state[field].copy_(found)

    def _empty(self, piece: Piece) -> Tensor:
        return torch.empty(piece.shape, dtype=torch.float32, device=self._loose.device)


def _by_name_and_role(states: Mapping[Key, State]) -> dict[tuple[str, str], list[tuple[int, int, State]]]:
    """Start, stop and state of the old pieces."""
    found: dict[tuple[str, str], list[tuple[int, int, State]]] = {}
    for (name, span, role), state in states.items():
        start, stop = map(int, span.split(":"))
        found.setdefault((name, role), []).append((start, stop, state))
    return found


def _around(
    old: Mapping[tuple[str, str], list[tuple[int, int, State]]], name: str, role: str, piece: Piece
) -> State | None:
    """The state of the old piece in which the new one begins."""
    for start, stop, state in old.get((name, role), []):
        if start <= piece.start < stop:
            return state
    return None


def _check_parameters(found: object, shapes: Mapping[str, list[int]]) -> None:
    """Raise StateError unless a checkpoint's parameters are this run's."""
    if not isinstance(found, Mapping):
        raise StateError(f"state dict has parameters={type(found).__name__}; it must be a dict of shapes")
    for name in [*found, *shapes]:
        if name not in shapes:
            raise StateError(f"the checkpoint has parameter {name!r}, which this run does not have: another model")
        if name not in found:
            raise StateError(f"the checkpoint has no parameter {name!r}, which this run has: another model")
        if found[name] != shapes[name]:
            raise StateError(
                f"parameter {name!r} has shape {found[name]} in the checkpoint, {shapes[name]} in this run"
            )


def _integer(fields: Mapping[str, object], field: str, least: int, most: int | None = None) -> int:
    value = fields.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        allowed = f">= {least}" if most is None else f"in {least}..{most}"
        raise StateError(f"state dict has {field}={value!r}; it must be an integer {allowed}")
    return value
