"""What compressors remember, keyed by parameter name, range and role."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gradcomp.bucket import Piece
from gradcomp.errors import StateError
from gradcomp.interfaces import State

__all__ = ["StateStore", "unpack"]

# "gradient": what a rank holds back of its own gradient; "sum": what the owner of a shard holds back of the sum.
ROLES = ("gradient", "sum")
# What is left of another compressor's residual, for the whole parameter, until it is sent with the next gradient.
WAITING = "waiting"
Saved = dict[str, dict[str, dict[str, State]]]
NamedPieces = Mapping[tuple[str, str], Piece]  # by parameter name and "start:stop"


class StateStore:
    """States by (parameter name, "start:stop" of flat elements, role), made when first asked for.

    Args:
        rank: whose they are: random numbers differ by rank.
    """

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._states: dict[tuple[str, str, str], State] = {}
        self._loaded: dict[tuple[str, str, str], State] = {}
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

    def _fresh(self, key: tuple[str, str, str], piece: Piece, grad: Tensor) -> State:
        fresh = piece.codec.new_state(grad)
        if piece.codec.in_step and key[2] == "sum":
            # An owner that is new, to a run that is not: it counts the steps that all ranks have counted.
            counted = self._states.get((*key[:2], "gradient"), {})
            fresh |= {field: tensor.clone() for field, tensor in counted.items() if tensor.dtype == torch.int64}
        piece.codec.seed_state(fresh, parameter=" ".join(key), rank=self._rank)
        return fresh

    def _restore(self, key: tuple[str, str, str], fresh: State) -> State:
        loaded = self._loaded.pop(key, None)
        if loaded is None:
            return fresh
        if _layout(loaded) != _layout(fresh):
            raise StateError(
                f"state of {' '.join(key)} holds {_layout(loaded)}; this compressor keeps {_layout(fresh)}"
            )
        return {field: tensor.to(fresh[field].device).clone() for field, tensor in loaded.items()}

    def residual_norm(self) -> float:
        """Euclidean norm of all that is held back on this rank."""
        squares = [
            torch.linalg.vector_norm(state["residual"]).item() ** 2
            for state in self._states.values()
            if "residual" in state
        ]
        squares += [torch.linalg.vector_norm(waiting).item() ** 2 for waiting in self._waiting.values()]
        return math.sqrt(sum(squares))

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
        loose = {name: held.to(device, copy=True) for name, held in self._waiting.items() if name in numels}
        for states, kept in ((self._loaded, new._loaded), (self._states, new._states)):
            for key, state in states.items():
                name, span, role = key
                if name not in numels:
                    continue  # a parameter that is exchanged no more
                if _same_piece(before.get(key[:2]), after.get(key[:2]), role):
                    kept[key] = state
                elif "residual" in state:
                    start, stop = map(int, span.split(":"))
                    if state["residual"].numel() != stop - start:
                        raise StateError(f"residual of {' '.join(key)} has {state['residual'].numel()} elements")
                    if name not in loose:
                        loose[name] = torch.zeros(numels[name], dtype=torch.float32, device=device)
                    loose[name][start:stop] += state["residual"].to(device)
        for (name, span), piece in after.items():
            if name not in loose:
                continue
            key = (name, span, "gradient")
            part = loose[name][piece.start : piece.stop]
            own = new._states.get(key)
            if own is None and key not in new._loaded:
                own = new._fresh(key, piece, torch.empty(piece.shape, dtype=torch.float32, device=device))
            if own is not None and "residual" in own:
                new._states[key] = own | {"residual": own["residual"] + part}
                part.zero_()
        new._waiting = {name: left for name, left in loose.items() if bool(left.any())}
        return new

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
        loaded: dict[tuple[str, str, str], State] = {}
        spans: dict[str, set[str]] = {}
        for name, span in pieces:
            spans.setdefault(name, set()).add(span)
        for name, ranges in saved.items():
            if name not in numels:
                raise StateError(f"state for parameter {name!r}, which this run does not have")
            for span, roles in _items(ranges, name):
                by_role = dict(_items(roles, f"{name} {span}"))
                cut = spans.get(name, set())
                if span not in cut and set(by_role) != {WAITING}:
                    raise StateError(
                        f"state for {name!r}[{span}]; this run cuts it into "
                        f"{', '.join(sorted(cut)) or 'nothing'} (another world size, exchange or compressor)"
                    )
                for role, fields in by_role.items():
                    if role not in (*ROLES, WAITING):
                        raise StateError(f"state for {name!r}[{span}] has role {role!r}; roles are {', '.join(ROLES)}")
                    state = dict(_items(fields, f"{name} {span} {role}"))
                    for field, tensor in state.items():
                        if not isinstance(tensor, Tensor):
                            raise StateError(
                                f"{name!r}[{span}] {role} {field} is {type(tensor).__name__}, not a tensor"
                            )
                    loaded[name, span, role] = {
                        f: t.detach().clone() for f, t in state.items() if isinstance(t, Tensor)
                    }
        waiting = {key[0]: loaded.pop(key) for key in [*loaded] if key[2] == WAITING}
        for name, held in waiting.items():
            if _layout(held) != {"residual": ((numels[name],), "torch.float32")}:
                raise StateError(f"what waits for {name!r} is {_layout(held)}; it must be a residual")
        self._states = {}
        self._loaded = loaded
        self._waiting = {name: held["residual"] for name, held in waiting.items()}


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


def _same_piece(old: Piece | None, new: Piece | None, role: str) -> bool:
    """Whether a state of ``old`` serves ``new`` as it is."""
    if old is None or new is None or (old.codec, old.shape) != (new.codec, new.shape):
        return False
    return role == "gradient" or old.owner == new.owner


def _items(mapping: object, where: str) -> list[tuple[str, object]]:
    if not isinstance(mapping, Mapping):
        raise StateError(f"state of {where} is {type(mapping).__name__}, not a dict")
    return [(str(key), value) for key, value in mapping.items()]


def _layout(state: State) -> dict[str, tuple[tuple[int, ...], str]]:
    return {field: (tuple(tensor.shape), str(tensor.dtype)) for field, tensor in sorted(state.items())}
