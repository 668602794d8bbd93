"""What an exchange puts in a checkpoint, and takes from one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from gradcomp import redistribute
from gradcomp.interfaces import Transport
from gradcomp.plan import Plan
from gradcomp.states import StateStore, unpack
from gradcomp.stepper import Stepper
from gradcomp.tuner import Tuner

__all__ = ["load", "load_all", "save"]

_STATE_FORMAT = 1


def save(stepper: Stepper, transport: Transport, tuner: Tuner) -> dict[str, object]:
    """See :meth:`gradcomp.GradientExchange.state_dict`."""
    shapes = {row.name: list(row.shape) for row in stepper.plan.table}
    about = _about(stepper.plan, transport) | tuner.state()
    return about | {"step": stepper.step, "parameters": shapes, "states": stepper.store.save()}


def load(state_dict: Mapping[str, object], stepper: Stepper, transport: Transport, tuner: Tuner) -> None:
    """See :meth:`gradcomp.GradientExchange.load_state_dict`."""
    plan = tuner.plan_for(state_dict)
    step, states = unpack(state_dict, _about(plan, transport))
    store = StateStore(transport.rank)
    store.load(states, plan.named_pieces(), plan.numels)
    _go_on(step, plan, store, stepper)
    tuner.resume(state_dict)


def load_all(state_dicts: Iterable[Mapping[str, object]], stepper: Stepper, transport: Transport, tuner: Tuner) -> None:
    """See :meth:`gradcomp.GradientExchange.load_state_dicts`."""
    said: dict[str, object] = {}

    def plan_for(state_dict: Mapping[str, object]) -> tuple[Plan, Mapping[str, object]]:
        plan = tuner.plan_for(state_dict)
        said["auto"] = state_dict.get("auto", "")
        return plan, _about(plan, transport)

    device = stepper.tensors[0].device
    step, plan, store = redistribute.restore_together(state_dicts, plan_for, transport, stepper.next_turn(), device)
    _go_on(step, plan, store, stepper)
    tuner.resume(said)


def _go_on(step: int, plan: Plan, store: StateStore, stepper: Stepper) -> None:
    stepper.use(plan, store, stepper.tensors, stepper.gradients)
    stepper.step = step


def _about(plan: Plan, transport: Transport) -> dict[str, object]:
    return {
        "format": _STATE_FORMAT,
        "rank": transport.rank,
        "world_size": transport.world_size,
        "compressor": json.dumps(plan.compressor.config(), sort_keys=True),
    }
