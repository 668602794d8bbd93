"""What an exchange puts in a checkpoint, and takes from one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from gradcomp import redistribute
from gradcomp.interfaces import Transport
from gradcomp.states import unpack
from gradcomp.stepper import Stepper

__all__ = ["load", "load_all", "save"]

_STATE_FORMAT = 1


def save(stepper: Stepper, transport: Transport) -> dict[str, object]:
    """See :meth:`gradcomp.GradientExchange.state_dict`."""
    shapes = {row.name: list(row.shape) for row in stepper.plan.table}
    about = _about(stepper, transport)
    return about | {"step": stepper.step, "parameters": shapes, "states": stepper.store.save()}


def load(state_dict: Mapping[str, object], stepper: Stepper, transport: Transport) -> None:
    """See :meth:`gradcomp.GradientExchange.load_state_dict`."""
    step, states = unpack(state_dict, _about(stepper, transport))
    stepper.store.load(states, stepper.plan.named_pieces(), stepper.plan.numels)
    stepper.step = step


def load_all(state_dicts: Iterable[Mapping[str, object]], stepper: Stepper, transport: Transport) -> None:
    """See :meth:`gradcomp.GradientExchange.load_state_dicts`."""
    about, device = _about(stepper, transport), stepper.tensors[0].device
    stepper.step, stepper.store = redistribute.restore_together(
        state_dicts, stepper.plan, about, transport, stepper.next_turn(), device
    )


def _about(stepper: Stepper, transport: Transport) -> dict[str, object]:
    return {
        "format": _STATE_FORMAT,
        "rank": transport.rank,
        "world_size": transport.world_size,
        "compressor": json.dumps(stepper.plan.compressor.config(), sort_keys=True),
    }
