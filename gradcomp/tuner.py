"""``compressor="auto"`` in a run: steps are timed, candidates tried, and the fastest one kept, by all ranks alike.

What decides is how long steps take, from the end of one exchange to the end of the next: forward, optimizer and reading
data are in it, and whatever the exchange takes from them. This is the clock, and what an exchange asks; what is tried
when is in :mod:`gradcomp.search`. docs/AUTO.md describes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from gradcomp.compressors.auto import Auto
from gradcomp.errors import ConfigError, GradcompError
from gradcomp.interfaces import Transport
from gradcomp.plan import Plan, Planner
from gradcomp.registry import format_spec
from gradcomp.rules import Choice, Rules, choose
from gradcomp.search import Search, Settled
from gradcomp.stepper import Stepper
from gradcomp.trials import Sample, Trials

__all__ = ["Tuner", "names_auto"]


def names_auto(choice: Choice) -> bool:
    """Whether ``auto`` is in a choice."""
    given = [*(rule.compressor for rule in choice.rules), choice.default] if isinstance(choice, Rules) else [choice]
    return any(isinstance(codec, Auto) for codec in given)


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
        self._is_on = isinstance(given, Auto)
        self._auto = given if isinstance(given, Auto) else Auto()
        self._given, self._planner, self._clock = choice, planner, clock
        # By label; the candidates first, then mixtures of them and what was loaded.
        self._choices: dict[str, Choice] = {}
        for inner in self._auto.candidates if self._is_on else ():
            self._choices[format_spec(inner)] = Rules(rules, default=inner) if rules else inner
        self._candidates = list(self._choices)
        self._mark = 0.0  # when the last exchange was over

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
        lengths += [other.message_bytes() for other in self._plans(named).values()]
        return [max(column) for column in zip(*lengths, strict=True)]

    def _plans(self, named: Sequence[tuple[str, Tensor]]) -> dict[str, Plan]:
        return {label: self._plan(label, named) for label in self._candidates}

    def _plan(self, label: str, named: Sequence[tuple[str, Tensor]]) -> Plan:
        try:
            return self._planner.plan(named, self._choices[label])
        except ConfigError as error:
            raise ConfigError(f"auto: candidate {label!r}: {error}") from None

    def hello(self) -> dict[str, str]:
        """What ranks must agree on."""
        return {"auto": json.dumps(self._given.config(), sort_keys=True)} if self._is_on else {}

    def bind(
        self, stepper: Stepper, transport: Transport, agreed: tuple[int, int], switch: Callable[[Choice], None]
    ) -> None:
        """What to tune.

        Args:
            agreed: the longest message, and how much a rank may send in a step (gradcomp.plan).
            switch: changes the compressor from the next step on; called on all ranks alike.
        """
        self._stepper, self._transport, self._agreed, self._switch = stepper, transport, agreed, switch
        self._begin(None)

    def _begin(self, settled: Settled | None) -> None:
        self._search = Search(
            self._auto,
            self._candidates,
            self._choices,
            planner=self._planner,
            stepper=self._stepper,
            transport=self._transport,
            agreed=self._agreed,
            clock=self._clock,
        )
        self._search.settled = settled
        self._script: Trials[None] | None = None

    def step_over(self) -> None:
        """After each exchange, on all ranks: time it, and change the compressor where that is due."""
        if not self._is_on:
            return
        if self._script is None:
            self._script = self._search.run(self._search.settled)
            wanted = next(self._script)
        else:
            record, took_s = self._stepper.totals.last, self._clock() - self._mark
            self._search.ready_s = [submitted - self._mark for submitted, _ in sorted(record.under_way)]
            wanted = self._script.send(Sample(took_s, record.wait_s, record.compress_s, record.decompress_s))
        if self._choices[wanted] != self._stepper.plan.compressor:
            self._switch(self._choices[wanted])
        self._mark = self._clock()  # what was agreed on and changed here is no step's time

    def restart(self) -> None:
        """Other parameters: what was found holds no more."""
        self._begin(None)

    def fixed(self, choice: Choice) -> Choice:
        """A choice that may be set in mid-run.

        Raises:
            ConfigError: it is ``auto``.
        """
        if names_auto(choice):
            raise ConfigError("set_compressor: compressor 'auto' is not allowed in mid-run; give it to attach()")
        return choice

    def stop(self) -> None:
        """Leave the compressor alone from now on: the user has chosen."""
        self._is_on = False

    def stats(self) -> dict[str, Any]:
        """What was tried and decided, and why; nothing without ``auto``."""
        if not self._is_on:
            return {}
        found, settled = self._search.found, self._search.settled
        return {
            "auto": {
                "choice": None if settled is None else settled.label,
                "step_ms": None if settled is None else settled.sample.step_s * 1e3,
                "why": found.why,
                "tried": {label: row.as_dict() for label, row in found.rows.items()},
                "link_mbit_per_s": None if found.link is None else found.link.bytes_per_s * 8e-6,
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
        settled = self._search.settled
        kept: dict[str, object] = {}
        if settled is not None:
            kept = {
                "label": settled.label,
                "compressor": self._choices[settled.label].config(),
                "sample": [settled.sample.step_s, settled.sample.wait_s],
                "steps": max(settled.steps - self._search.since, 1),
            }
        return {"auto": json.dumps(kept, sort_keys=True)}

    def plan_for(self, state_dict: Mapping[str, object]) -> Plan:
        """The plan that a state dict's states belong to: with ``auto`` that of what was in force, be it on trial.

        Where there is no such plan it is the present one, with which the state dict is refused.
        """
        if self._is_on:
            try:
                plan = self._planner.plan(self._stepper.named, choose(json.loads(str(state_dict.get("compressor")))))
                if self._search.fits(plan):
                    return plan
            except (ValueError, GradcompError):
                pass
        return self._stepper.plan

    def resume(self, state_dict: Mapping[str, object]) -> None:
        """Go on from where a state was saved, once it is loaded; from the beginning, if it says nothing of ``auto``."""
        try:
            settled = self._parse(str(state_dict.get("auto", "{}")))
        except (ValueError, TypeError, KeyError, GradcompError):
            settled = None  # it only saves trials
        self._begin(settled)

    def _parse(self, text: str) -> Settled | None:
        kept = json.loads(text)
        if not kept:
            return None
        step_s, wait_s = (float(number) for number in kept["sample"])
        label, choice = str(kept["label"]), choose(kept["compressor"])
        if self._choices.setdefault(label, choice) != choice:
            raise ValueError(f"{label} is another compressor")
        return Settled(label, Sample(step_s, wait_s), max(int(kept["steps"]), 1))
