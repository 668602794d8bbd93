"""What compressors remember, keyed by parameter name, range and role."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gradcomp.bucket import Piece
from gradcomp.errors import StateError
from gradcomp.interfaces import State

__all__ = ["StateStore"]

# "gradient": what a rank holds back of its own gradient; "sum": what the owner of a shard holds back of the sum.
ROLES = ("gradient", "sum")
Saved = dict[str, dict[str, dict[str, State]]]


class StateStore:
    """States by (parameter name, "start:stop" of flat elements, role), made when first asked for.

    Args:
        rank: whose they are: random numbers differ by rank.
    """

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._states: dict[tuple[str, str, str], State] = {}
        self._loaded: dict[tuple[str, str, str], State] = {}

    def get(self, name: str, piece: Piece, role: str, grad: Tensor) -> State:
        """The state for ``piece`` of parameter ``name``.

        Raises:
            StateError: what was loaded for it has other tensors, shapes or dtypes than this compressor's state.
        """
        key = (name, f"{piece.start}:{piece.stop}", role)
        if key not in self._states:
            fresh = piece.codec.new_state(grad)
            piece.codec.seed_state(fresh, parameter=" ".join(key), rank=self._rank)
            self._states[key] = self._restore(key, fresh)
        return self._states[key]

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
        return math.sqrt(sum(squares))

    def save(self) -> Saved:
        """A copy of every state: ``{name: {"start:stop": {role: {field: tensor}}}}``."""
        saved: Saved = {}
        for (name, span, role), state in [*self._loaded.items(), *self._states.items()]:
            fields = {field: tensor.detach().clone() for field, tensor in state.items()}
            saved.setdefault(name, {}).setdefault(span, {})[role] = fields
        return saved

    def load(self, saved: Mapping[str, object], spans: Mapping[str, set[str]]) -> None:
        """Replace every state by what :meth:`save` gave.

        Args:
            spans: for each parameter, the ranges this run cuts it into.

        Raises:
            StateError: a parameter or range this run does not have, or something that is not a tensor.
        """
        loaded: dict[tuple[str, str, str], State] = {}
        for name, ranges in saved.items():
            if name not in spans:
                raise StateError(f"state for parameter {name!r}, which this run does not compress")
            for span, roles in _items(ranges, name):
                if span not in spans[name]:
                    raise StateError(
                        f"state for {name!r}[{span}]; this run cuts it into {', '.join(sorted(spans[name]))} "
                        "(another world size or exchange)"
                    )
                for role, fields in _items(roles, f"{name} {span}"):
                    if role not in ROLES:
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
        self._states = {}
        self._loaded = loaded


def _items(mapping: object, where: str) -> list[tuple[str, object]]:
    if not isinstance(mapping, Mapping):
        raise StateError(f"state of {where} is {type(mapping).__name__}, not a dict")
    return [(str(key), value) for key, value in mapping.items()]


def _layout(state: State) -> dict[str, tuple[tuple[int, ...], str]]:
    return {field: (tuple(tensor.shape), str(tensor.dtype)) for field, tensor in sorted(state.items())}
