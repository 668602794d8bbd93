"""``compressor="auto"`` in a run: steps are timed, candidates tried, and the fastest one kept, by all ranks alike.

What decides is how long steps take, from the end of one exchange to the end of the next: forward, optimizer and reading
data are in it, and whatever the exchange takes from them. :mod:`gradcomp.trials` says how; this is its clock, and its
way to the other ranks. docs/AUTO.md describes it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradcomp import replicas
from gradcomp.compressors.auto import Auto
from gradcomp.errors import ConfigError, GradcompError
from gradcomp.interfaces import Transport
from gradcomp.plan import Plan, Planner, message_bounds
from gradcomp.registry import format_spec
from gradcomp.rules import Choice, Rules, choose
from gradcomp.stepper import Stepper
from gradcomp.trials import IN_TIME, Row, Sample, Trials, race, watch

__all__ = ["Tuner"]

_WARM_UP_STEPS = 3
_LEAST_PATIENCE, _MOST_PATIENCE = 2, 32
# What the link carries is timed with messages of growing size, until one takes long enough to tell.
_PROBE_BYTES = (1 << 14, 1 << 18, 1 << 22, 1 << 24)
_LONG_ENOUGH_S = 0.02

logger = logging.getLogger("gradcomp")


@dataclass(frozen=True)
class _Settled:
    """What was chosen last, and after how many steps it is to be tried again."""

    label: str
    sample: Sample
    steps: int


@dataclass
class _Found:
    """For people: what the last search found, and what all searches cost."""

    why: str = "no step is over"
    rows: Mapping[str, Row] = field(default_factory=dict)
    bytes_per_s: float = 0.0
    searches: int = 0
    trial_steps: int = 0
    trial_s: float = 0.0


class Tuner:
    """The compressor of an exchange: the one that was given or, of ``auto``, the one that is fastest now.

    Args:
        choice: what was given.
        planner: makes plans for the choices.
        clock: in seconds.

    Raises:
        ConfigError: ``auto`` in a rule.
    """

    def __init__(self, choice: Choice, planner: Planner, clock: Callable[[], float] = time.perf_counter) -> None:
        rules = choice.rules if isinstance(choice, Rules) else ()
        if any(isinstance(rule.compressor, Auto) for rule in rules):
            raise ConfigError(
                "a rule has compressor 'auto', which is not allowed: steps are timed as a whole; it can be the default"
            )
        given = choice.default if isinstance(choice, Rules) else choice
        self._auto = given if isinstance(given, Auto) else Auto()
        self._is_on = isinstance(given, Auto)
        self._given, self._planner, self._clock = choice, planner, clock
        # By label, as all that follows; the candidates first, then what was loaded.
        self._choices: dict[str, Choice] = {}
        for inner in self._auto.candidates if self._is_on else ():
            self._choices[format_spec(inner)] = Rules(rules, default=inner) if rules else inner
        self._candidates = list(self._choices)
        self._begin(None)

    def _begin(self, settled: _Settled | None) -> None:
        self._settled = settled
        self._script: Trials[None] | None = None
        self._found = _Found()
        self._since = 0

    # -- for the exchange ----------------------------------------------------------------------------------------------

    def first_plan(self, named: Sequence[tuple[str, Tensor]]) -> Plan:
        """The plan to begin with: of ``auto``, that of the candidate that sends least.

        Raises:
            ConfigError: a candidate that cannot be used.
        """
        if not self._is_on:
            return self._planner.plan(named, self._given)
        return self._plans(named)[format_spec(self._auto.least)]

    def most_bytes(self, plan: Plan, named: Sequence[tuple[str, Tensor]], parties: int) -> list[int]:
        """The longest message of each bucket there can be: as float32, or with any candidate."""
        lengths = [plan.most_bytes(self._planner.exchange, parties)]
        if self._is_on:
            lengths += [other.message_bytes() for other in self._plans(named).values()]
        return [max(column) for column in zip(*lengths, strict=True)]

    def _plans(self, named: Sequence[tuple[str, Tensor]]) -> dict[str, Plan]:
        plans = {}
        for label in self._candidates:
            try:
                plans[label] = self._planner.plan(named, self._choices[label])
            except ConfigError as error:
                raise ConfigError(f"auto: candidate {label!r}: {error}") from None
        return plans

    def hello(self) -> dict[str, str]:
        """What ranks must agree on."""
        return {} if not self._is_on else {"auto": json.dumps(self._given.config(), sort_keys=True)}

    def bind(
        self, stepper: Stepper, transport: Transport, agreed: tuple[int, int], switch: Callable[[Choice], None]
    ) -> None:
        """What to tune.

        Args:
            agreed: the longest message, and how much a rank may send in a step (gradcomp.plan).
            switch: changes the compressor from the next step on; called on all ranks alike.
        """
        self._stepper, self._transport, self._agreed, self._switch = stepper, transport, agreed, switch

    def fixed(self, choice: Choice) -> Choice:
        """A choice that may be set in mid-run.

        Raises:
            ConfigError: it is ``auto``.
        """
        given = [*(rule.compressor for rule in choice.rules), choice.default] if isinstance(choice, Rules) else [choice]
        if any(isinstance(codec, Auto) for codec in given):
            raise ConfigError("set_compressor: compressor 'auto' is not allowed in mid-run; give it to attach()")
        return choice

    def stop(self) -> None:
        """Leave the compressor alone from now on: the user has chosen."""
        self._is_on = False

    def restart(self) -> None:
        """Other parameters: what was found holds no more."""
        self._begin(None)

    def step_over(self) -> None:
        """After each exchange, on all ranks: time it, and change the compressor where that is due."""
        if not self._is_on:
            return
        if self._script is None:
            self._script = self._tune(self._settled)
            wanted = next(self._script)
        else:
            record = self._stepper.totals.last
            took_s = self._clock() - self._mark
            wanted = self._script.send(Sample(took_s, record.wait_s, record.compress_s, record.decompress_s))
        if self._choices[wanted] != self._stepper.plan.compressor:
            self._switch(self._choices[wanted])
        self._mark = self._clock()  # what was agreed on and changed here is no step's time

    def stats(self) -> dict[str, Any]:
        """What was tried and decided, and why; nothing without ``auto``."""
        if not self._is_on:
            return {}
        found, settled = self._found, self._settled
        rows = {
            label: {
                "steps": len(row.samples),
                "step_ms": row.step_s * 1e3 if row.samples else None,
                "out": row.out,
            }
            for label, row in found.rows.items()
        }
        return {
            "auto": {
                "choice": None if settled is None else settled.label,
                "step_ms": None if settled is None else settled.sample.step_s * 1e3,
                "why": found.why,
                "tried": rows,
                "link_mbit_per_s": found.bytes_per_s * 8e-6,
                "searches": found.searches,
                "trial_steps": found.trial_steps,
                "trial_s": found.trial_s,
            }
        }

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """What an exchange's state dict says of this beside the compressor in force, which may be one on trial."""
        if not self._is_on:
            return {}
        settled = self._settled
        if settled is None:
            return {"auto": "{}"}
        kept = {
            "label": settled.label,
            "compressor": self._choices[settled.label].config(),
            "sample": [settled.sample.step_s, settled.sample.wait_s],
            "steps": max(settled.steps - self._since, 1),
        }
        return {"auto": json.dumps(kept, sort_keys=True)}

    def plan_for(self, state_dict: Mapping[str, object]) -> tuple[Plan, _Settled | None]:
        """The plan that a state dict's states belong to, with ``auto`` that of whatever was in force; and what to
        :meth:`resume` with once they are loaded.

        Where there is no such plan it is the present one, with which the state dict is refused.
        """
        if not self._is_on:
            return self._stepper.plan, None
        try:
            plan = self._planner.plan(self._stepper.named, choose(json.loads(str(state_dict["compressor"]))))
            settled = self._parse(str(state_dict.get("auto", "{}")))
        except (ValueError, TypeError, KeyError, GradcompError):
            return self._stepper.plan, None
        return (plan, settled) if self._fits(plan) else (self._stepper.plan, None)

    def resume(self, settled: _Settled | None) -> None:
        """Go on from where a state was saved."""
        self._begin(settled)

    def _parse(self, text: str) -> _Settled | None:
        kept = json.loads(text)
        if not kept:
            return None
        step_s, wait_s = (float(number) for number in kept["sample"])
        label, choice = str(kept["label"]), choose(kept["compressor"])
        if self._choices.setdefault(label, choice) != choice:
            raise ValueError(f"{label} is another compressor")
        return _Settled(label, Sample(step_s, wait_s), max(int(kept["steps"]), 1))

    # -- the search ----------------------------------------------------------------------------------------------------

    def _tune(self, settled: _Settled | None) -> Trials[None]:
        """All of the run."""
        if self._transport.world_size == 1:
            self._found.why = "there is nobody to send to: the first candidate"
            while True:
                yield self._candidates[0]
        why, patience = "the run begins", _LEAST_PATIENCE
        if settled is None:
            for _ in range(_WARM_UP_STEPS):
                yield self._in_force()
        else:
            why = yield from self._stay(settled, patience)
        while True:
            before = self._settled
            self._settled = yield from self._search(why)
            # What changes all the time, and is no reason to choose otherwise, is looked at less often.
            fruitless = why != IN_TIME and before is not None and before.label == self._settled.label
            patience = min(2 * patience, _MOST_PATIENCE) if fruitless else _LEAST_PATIENCE
            why = yield from self._stay(self._settled, patience)

    def _in_force(self) -> str:
        """The label of what compresses now."""
        now = self._stepper.plan.compressor
        found = next((label for label, choice in self._choices.items() if choice == now), "as loaded")
        self._choices.setdefault(found, now)
        return found

    def _stay(self, settled: _Settled, patience: int) -> Trials[str]:
        self._since = 0

        def count() -> None:
            self._since += 1

        return (
            yield from watch(
                settled.label,
                settled.sample,
                steps=settled.steps,
                patience=patience,
                agree=self._agree,
                step_over=count,
            )
        )

    def _search(self, why: str) -> Trials[_Settled]:
        found = self._found
        found.why, found.searches = why, found.searches + 1
        found.bytes_per_s = self._probe()
        now = None if self._settled is None else self._settled.label
        rows = {label: Row() for label in dict.fromkeys([*self._candidates, *([] if now is None else [now])])}
        found.rows = rows
        least_s = {}
        for label, row in rows.items():
            plan = self._planner.plan(self._stepper.named, self._choices[label])
            least_s[label] = self._least_bytes(plan) / found.bytes_per_s
            if not self._fits(plan):
                row.out = "its messages could be longer than was agreed on at the start"
        chosen = yield from self._together(
            race(
                rows,
                now=now,
                running=self._in_force(),
                trial=self._auto.trial,
                margin=self._auto.margin,
                least_s=least_s,
            )
        )
        settled = _Settled(chosen, rows[chosen].median, self._auto.every)
        self._tell(settled)
        return settled

    def _together(self, trials: Trials[str]) -> Trials[str]:
        """With every sample made the same on all ranks; counts what it costs."""
        spent_s, steps = 0.0, 0
        label = next(trials)
        while True:
            sample = self._agree((yield label))
            spent_s, steps = spent_s + sample.step_s, steps + 1
            try:
                label = trials.send(sample)
            except StopIteration as end:
                chosen: str = end.value
                break
        self._found.trial_steps += steps
        self._found.trial_s += max(spent_s - steps * self._found.rows[chosen].median.step_s, 0.0)
        return chosen

    def _agree(self, mine: Sample) -> Sample:
        """Of all ranks' samples one, the same bits on all."""
        values = [mine.step_s, mine.wait_s, mine.compress_s, mine.decompress_s]
        step_s, wait_s, compress_s, decompress_s = zip(*self._gather(values), strict=True)
        # The rank that waited least waited for the network; the others may have waited for a rank that was late.
        # Where hosts are levels, not all ranks compress.
        return Sample(sum(step_s) / len(step_s), min(wait_s), max(compress_s), max(decompress_s))

    def _gather(self, values: Sequence[float]) -> list[list[float]]:
        turn = self._stepper.next_turn()
        rows: list[list[float]] = replicas.gather(self._transport, turn, torch.tensor(values)).tolist()
        return rows

    def _probe(self) -> float:
        """What a rank can send to all others together, in bytes a second: the least of all ranks, and rather too much.

        Short messages take as long as a trip, so that is what they are taken to show.
        """
        others = self._transport.world_size - 1
        for total_bytes in _PROBE_BYTES:
            message = torch.zeros(min(total_bytes // others, replicas.BROADCAST_CHUNK_BYTES) // 4)
            times_s = []
            for _ in range(2):  # ranks do not come to the first one together
                start = self._clock()
                replicas.gather(self._transport, self._stepper.next_turn(), message)
                times_s.append(self._clock() - start)
            slowest_s = max(row[0] for row in self._gather([times_s[1]]))
            if slowest_s >= _LONG_ENOUGH_S:
                break
        return 4 * message.numel() * others / max(slowest_s, 1e-9)

    def _least_bytes(self, plan: Plan) -> float:
        """What a rank sends in a step, however the exchange goes: as in a ring, twice all but its own share."""
        parties = self._transport.parties
        expected = sum(piece.codec.typical_nbytes(piece.numel) for pieces in plan.pieces for piece in pieces)
        return expected * 2 * (parties - 1) / max(parties, 1)

    def _fits(self, plan: Plan) -> bool:
        """Whether its messages are as short as the ranks agreed at the start."""
        bounds = message_bounds(plan.message_bytes(), self._stepper.tensors)
        return all(most <= allowed for most, allowed in zip(bounds, self._agreed, strict=True))

    def _tell(self, settled: _Settled) -> None:
        if self._transport.rank == 0:
            rows = self._found.rows.items()
            logger.info(
                "auto: step %d, %s: %s from now on (%.1f ms a step). Tried: %s; on a link of about %.3g Mbit/s; "
                "all searches so far: %d steps, %.2f s longer than with the best",
                *(self._stepper.step, self._found.why, settled.label, settled.sample.step_s * 1e3),
                "; ".join(f"{label}: {row}" for label, row in rows),
                *(self._found.bytes_per_s * 8e-6, self._found.trial_steps, self._found.trial_s),
            )
