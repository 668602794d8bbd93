"""What compressors remember, keyed by parameter name, range and role."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gradcomp.bucket import Piece
from gradcomp.errors import StateError
from gradcomp.interfaces import State

__all__ = ["ROLES", "WAITING", "Key", "Loose", "NamedPieces", "StateStore", "parse", "unpack"]

# "gradient": what a rank holds back of its own gradient; "sum": what one that compresses sums holds back of them.
ROLES = ("gradient", "sum")
# What is left of another compressor's residual, for the whole parameter, until it is sent with the next gradient.
WAITING = "waiting"
Saved = dict[str, dict[str, dict[str, State]]]
Key = tuple[str, str, str]  # parameter name, "start:stop", role
NamedPieces = Mapping[tuple[str, str], Piece]  # by parameter name and "start:stop"


class StateStore:
    """States by (parameter name, "start:stop" of flat elements, role), made when first asked for.

    Args:
        rank: whose they are: random numbers differ by rank.
    """

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._states: dict[Key, State] = {}
        self._loaded: dict[Key, State] = {}
        self._waiting: dict[str, Tensor] = {}

    def get(self, name: str, piece: Piece, role: str, grad: Tensor) -> State:
        """The state for ``piece`` of parameter ``name``.

        Raises:
            StateError: what was loaded for it has other tensors, shapes or dtypes than this compressor's state.
        """
        key = (name, f"{piece.start}:{piece.stop}", role)
        if key not in self._states:
            self._states[key] = self._restore(key, self._fresh(key, piece, grad))
        return self._states[key]

    def _fresh(self, key: Key, piece: Piece, grad: Tensor) -> State:
        codec = piece.codec.for_sums if key[2] == "sum" else piece.codec
        fresh = codec.new_state(grad)
        if codec.in_step and key[2] == "sum":
            # An owner that is new, to a run that is not: it counts the steps that all ranks have counted.
            counted = self._states.get((*key[:2], "gradient"), {})
            fresh |= {field: tensor.clone() for field, tensor in counted.items() if tensor.dtype == torch.int64}
        codec.seed_state(fresh, parameter=" ".join(key), rank=self._rank)
        return fresh

    def _restore(self, key: Key, fresh: State) -> State:
        loaded = self._loaded.pop(key, None)
        if loaded is None:
            return fresh
        if _layout(loaded) != _layout(fresh):
            raise StateError(
                f"state of {' '.join(key)} holds {_layout(loaded)}; this compressor keeps {_layout(fresh)}"
            )
        return {field: tensor.to(fresh[field].device).clone() for field, tensor in loaded.items()}

    @property
    def loaded(self) -> list[Key]:
        """What was loaded and not yet asked for: whether it fits is not known before."""
        return list(self._loaded)

    def residual_norms(self) -> dict[str, float]:
        """Euclidean norm of what is held back of each parameter on this rank."""
        # A copy, for the exchange's thread adds states as they are first needed.
        held = [(key[0], state["residual"]) for key, state in list(self._states.items()) if "residual" in state]
        held += list(self._waiting.items())
        if not held:
            return {}
        device = held[0][1].device
        norms = torch.stack([torch.linalg.vector_norm(residual).to(device) for _, residual in held])
        found: dict[str, float] = {}
        for (name, _), norm in zip(held, norms.tolist(), strict=True):  # a GPU is waited for once
            found[name] = math.hypot(found.get(name, 0.0), norm)
        return found

    def residual_norm(self) -> float:
        """Euclidean norm of all that is held back on this rank."""
        return math.hypot(*self.residual_norms().values())

    @property
    def holds_waiting(self) -> bool:
        """Whether something waits to be sent with the next gradient."""
        return bool(self._waiting)

    def waiting(self, name: str) -> Tensor | None:
        """What is to be added to the next gradient of a parameter, flat float32; None if nothing."""
        return self._waiting.get(name)

    def drop_waiting(self, names: Iterable[str]) -> None:
        """Forget what was :meth:`waiting` for these parameters: it is sent, and the step is sure."""
        for name in names:
            self._waiting.pop(name, None)

    def recut(
        self, before: NamedPieces, after: NamedPieces, numels: Mapping[str, int], device: torch.device
    ) -> StateStore:
        """A store for another plan, to which all that is held back is carried over; this one stays as it is.

        A piece that both plans have, with the same compressor, keeps its state. All other residuals, of ranks and of
        shard owners alike, go into this rank's residual of the same elements: all are in units of the sum over ranks.
        Where the new compressor keeps none they wait for the next gradient. What else a state held is dropped.

        Args:
            before, after: the plans' pieces that have state.
            numels: the elements of every parameter; what others hold back is dropped.
            device: where the gradients lie.

        Raises:
            StateError: a residual that was loaded is not of its piece's size.
        """
        new = StateStore(self._rank)
        loose = Loose(numels, device)
        for name, waiting in self._waiting.items():
            if name in numels:
                loose.add(name, f"0:{waiting.numel()}", {"residual": waiting})
        for states, kept in ((self._loaded, new._loaded), (self._states, new._states)):
            for key, state in states.items():
                if key[0] not in numels:
                    continue  # a parameter that is exchanged no more
                if _same_piece(before.get(key[:2]), after.get(key[:2]), key[2]):
                    kept[key] = state
                else:
                    loose.add(*key[:2], state)
        new.settle(loose, after)
        return new

    def settle(self, loose: Loose, pieces: NamedPieces) -> None:
        """Add what is loose to this rank's states of ``pieces``; residuals without a place wait."""
        cut = _by_name(pieces)
        for name in loose.names:
            sums = loose.take(name)
            for span, piece in cut.get(name, {}).items():
                grad = torch.empty(piece.shape, dtype=torch.float32, device=loose.device)
                own = self.get(name, piece, "gradient", grad)
                placed = sums.keys() & own.keys()
                parts = {field: sums[field][piece.start : piece.stop] for field in placed}
                # Not in place: another store may hold the same tensors.
                self._states[name, span, "gradient"] = own | {field: own[field] + parts[field] for field in placed}
                for part in parts.values():
                    part.zero_()
            left = sums.get("residual")
            if left is not None and bool(left.any()):
                self._waiting[name] = left

    def save(self) -> Saved:
        """A copy of every state: ``{name: {"start:stop": {role: {field: tensor}}}}``."""
        saved: Saved = {}
        for (name, span, role), state in [*self._loaded.items(), *self._states.items()]:
            fields = {field: tensor.detach().clone() for field, tensor in state.items()}
            saved.setdefault(name, {}).setdefault(span, {})[role] = fields
        for name, waiting in self._waiting.items():
            whole = saved.setdefault(name, {}).setdefault(f"0:{waiting.numel()}", {})
            whole[WAITING] = {"residual": waiting.clone()}
        return saved

    def load(self, saved: Mapping[str, object], pieces: NamedPieces, numels: Mapping[str, int]) -> None:
        """Replace every state by what :meth:`save` gave.

        Args:
            pieces: those of this run that have state.
            numels: the elements of every parameter.

        Raises:
            StateError: a parameter or range this run does not have, or something that is not a tensor.
        """
        found = parse(saved, numels)
        cuts = _by_name(pieces)
        for name, span, role in found:
            cut = cuts.get(name, {})
            if span not in cut and role != WAITING:
                raise StateError(
                    f"state for {name!r}[{span}]; this run cuts it into "
                    f"{', '.join(sorted(cut)) or 'nothing'} (another world size, exchange or compressor)"
                )
        copies = {
            key: {field: tensor.detach().clone() for field, tensor in state.items()} for key, state in found.items()
        }
        self._waiting = {key[0]: copies.pop(key)["residual"] for key in found if key[2] == WAITING}
        self._states = {}
        self._loaded = copies


class Loose:
    """What is held back and looks for a place: sums over the whole of each parameter, whatever pieces they came from.

    Args:
        numels: the elements of every parameter.
        device: where the sums are made.
    """

    def __init__(self, numels: Mapping[str, int], device: torch.device) -> None:
        self.device = device
        self._numels = numels
        self._sums: dict[str, dict[str, Tensor]] = {}

    @property
    def names(self) -> list[str]:
        """The parameters of which there is something."""
        return list(self._sums)

    def add(self, name: str, span: str, state: State, fields: Sequence[str] = ("residual",)) -> None:
        """Add ``fields`` of a state for elements ``span`` of a parameter.

        Raises:
            StateError: a field that is not float32 of the range's size.
        """
        start, stop = map(int, span.split(":"))
        for field in fields:
            values = state.get(field)
            if values is None:
                continue
            if values.dtype != torch.float32 or values.shape != (stop - start,):
                raise StateError(
                    f"{field} of {name!r}[{span}] has {values.numel()} elements, {values.dtype} and shape "
                    f"{list(values.shape)}; it must be float32 of shape [{stop - start}]"
                )
            sums = self._sums.setdefault(name, {})
            if field not in sums:
                sums[field] = torch.zeros(self._numels[name], dtype=torch.float32, device=self.device)
            sums[field][start:stop] += values.to(self.device)

    def take(self, name: str) -> dict[str, Tensor]:
        """What there is of a parameter, by field: flat float32 of all its elements. It is gone from here."""
        return self._sums.pop(name)


def parse(saved: Mapping[str, object], numels: Mapping[str, int]) -> dict[Key, State]:
    """What :meth:`StateStore.save` gave, by parameter, range and role; the tensors themselves, not copies.

    Args:
        numels: the elements of every parameter.

    Raises:
        StateError: a parameter or elements this run does not have, an unknown role, or something that is not a tensor.
    """
    found: dict[Key, State] = {}
    for name, ranges in saved.items():
        if name not in numels:
            raise StateError(f"state for parameter {name!r}, which this run does not have")
        for span, roles in _items(ranges, name):
            _check_span(name, span, numels[name])
            by_role = _items(roles, f"{name} {span}")
            if not by_role:
                raise StateError(f"state for {name!r}[{span}] holds nothing")
            for role, fields in by_role:
                if role not in (*ROLES, WAITING):
                    raise StateError(f"state for {name!r}[{span}] has role {role!r}; roles are {', '.join(ROLES)}")
                state: State = {}
                for field, tensor in _items(fields, f"{name} {span} {role}"):
                    if not isinstance(tensor, Tensor):
                        raise StateError(f"{name!r}[{span}] {role} {field} is {type(tensor).__name__}, not a tensor")
                    state[field] = tensor
                if role == WAITING and _layout(state) != {"residual": ((numels[name],), "torch.float32")}:
                    raise StateError(f"what waits for {name!r} is {_layout(state)}; it must be a residual")
                found[name, span, role] = state
    return found


def _check_span(name: str, span: str, numel: int) -> None:
    start, _, stop = span.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) <= int(stop) <= numel):
        raise StateError(f"state for {name!r}[{span}]; a range is START:STOP with 0 <= START <= STOP <= {numel}")


def unpack(state_dict: Mapping[str, object], expected: Mapping[str, object]) -> tuple[int, Mapping[str, object]]:
    """Step and states of an exchange's state dict, whose other fields must be as expected.

    Raises:
        StateError: names the field that is not.
    """
    for field, value in expected.items():
        if state_dict.get(field) != value:
            raise StateError(f"state dict has {field}={state_dict.get(field)!r}; this run has {value!r}")
    step, states = state_dict.get("step"), state_dict.get("states")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise StateError(f"state dict has step={step!r}; it must be an integer >= 0")
    if not isinstance(states, Mapping):
        raise StateError(f"state dict has states={type(states).__name__}; it must be a dict")
    return step, states


def _by_name(pieces: NamedPieces) -> dict[str, dict[str, Piece]]:
    found: dict[str, dict[str, Piece]] = {}
    for (name, span), piece in pieces.items():
        found.setdefault(name, {})[span] = piece
    return found


def _same_piece(old: Piece | None, new: Piece | None, role: str) -> bool:
    """Whether a state of ``old`` serves ``new`` as it is."""
    if old is None or new is None or (old.codec, old.shape) != (new.codec, new.shape):
        return False
    return role == "gradient" or (old.owner, old.reducers) == (new.owner, new.reducers)


def _items(mapping: object, where: str) -> list[tuple[str, object]]:
    if not isinstance(mapping, Mapping):
        raise StateError(f"state of {where} is {type(mapping).__name__}, not a dict")
    return [(str(key), value) for key, value in mapping.items()]


def _layout(state: State) -> dict[str, tuple[tuple[int, ...], str]]:
    return {field: (tuple(tensor.shape), str(tensor.dtype)) for field, tensor in sorted(state.items())}
