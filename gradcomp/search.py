"""The search for the fastest choice, all through a run: trials, waiting for a change, trials again.

:mod:`gradcomp.trials` says how trials go; this is their way to the other ranks, and what is known beforehand: of the
link, which is timed, and of mixtures (:mod:`gradcomp.mixing`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from gradcomp import replicas
from gradcomp.compressors.auto import Auto
from gradcomp.forecast import Link
from gradcomp.gradients import HeldGradients
from gradcomp.interfaces import Transport
from gradcomp.mixing import Mixer
from gradcomp.plan import Plan, Planner, message_bounds
from gradcomp.rules import Choice
from gradcomp.stepper import Stepper
from gradcomp.trials import IN_TIME, Row, Sample, Trials, race, watch

__all__ = ["Search", "Settled"]

_WARM_UP_STEPS = 3
_LEAST_PATIENCE, _MOST_PATIENCE = 2, 32
# What the link carries is timed with messages of growing size, until one takes long enough to tell.
_PROBE_BYTES = (1 << 14, 1 << 18, 1 << 22, 1 << 24)
_LONG_ENOUGH_S = 0.1
_PROBE_TIMES = 3

logger = logging.getLogger("gradcomp")


@dataclass(frozen=True)
class Settled:
    """What was chosen last, and after how many steps it is to be tried again."""

    label: str
    sample: Sample
    steps: int


@dataclass
class _Found:
    """For people: what the last search found, and what all of them cost."""

    why: str = "no step is over"
    rows: dict[str, Row] = field(default_factory=dict)
    link: Link | None = None
    searches: int = 0
    trial_steps: int = 0
    trial_s: float = 0.0


class Search:
    """One run's, on one rank; the others' find the same.

    Args:
        candidates: labels of the choices that are tried.
        choices: by label; mixtures come to them.
        agreed: the longest message, and how much a rank may send in a step (gradcomp.plan).
        clock: in seconds.

    Attributes:
        settled: what was chosen last.
        since: steps since then.
        ready_s: of the last step: from its start until each bucket left.
        found: what is known.
    """

    def __init__(
        self,
        auto: Auto,
        candidates: Sequence[str],
        choices: dict[str, Choice],
        *,
        planner: Planner,
        stepper: Stepper,
        transport: Transport,
        agreed: tuple[int, int],
        clock: Callable[[], float],
    ) -> None:
        self.settled: Settled | None = None
        self.since = 0
        self.ready_s: list[float] = []
        self.found = _Found()
        self._auto, self._candidates, self._choices = auto, list(candidates), choices
        self._planner, self._stepper, self._transport = planner, stepper, transport
        self._agreed, self._clock = agreed, clock

    def run(self, settled: Settled | None) -> Trials[None]:
        """All of it; never ends.

        Args:
            settled: what was chosen before this part of the run.
        """
        if self._transport.world_size == 1:
            self.found.why = "there is nobody to send to: the first candidate"
            while True:
                yield self._candidates[0]
        self.settled = settled
        why, patience = "the run begins", _LEAST_PATIENCE
        if settled is None:
            for _ in range(_WARM_UP_STEPS):
                yield self._in_force()
        else:
            why = yield from self._stay(settled, patience)
        while True:
            before = self.settled
            self.settled = yield from self._search(why)
            # What changes all the time, and is no reason to choose otherwise, is looked at less often.
            fruitless = why != IN_TIME and before is not None and before.label == self.settled.label
            patience = min(2 * patience, _MOST_PATIENCE) if fruitless else _LEAST_PATIENCE
            why = yield from self._stay(self.settled, patience)

    def _in_force(self) -> str:
        """The label of what compresses now."""
        now = self._stepper.plan.compressor
        found = next((label for label, choice in self._choices.items() if choice == now), "as loaded")
        self._choices.setdefault(found, now)
        return found

    def _stay(self, settled: Settled, patience: int) -> Trials[str]:
        self.since = 0

        def count() -> None:
            self.since += 1

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

    def _search(self, why: str) -> Trials[Settled]:
        found = self.found
        found.why, found.searches = why, found.searches + 1
        found.link = link = self._probe()
        now = None if self.settled is None else self.settled.label
        labels = dict.fromkeys([*self._candidates, *([] if now is None else [now])])
        plans = {label: self._planner.plan(self._stepper.named, self._choices[label]) for label in labels}
        found.rows = rows = {label: Row(out=self._too_long(plan)) for label, plan in plans.items()}
        least_s = {label: self._least_bytes(plan) / link.bytes_per_s for label, plan in plans.items()}
        chosen = yield from self._race(rows, now, least_s)
        mixed = self._mix(plans) if self._auto.per_bucket else None
        if mixed is not None and mixed[0] not in rows:
            label, choice = mixed
            self._choices[label] = choice
            rows[label] = Row(out=self._too_long(self._planner.plan(self._stepper.named, choice)))
            # What is in it is more faithful than the least faithful candidate alone.
            pair = {
                name: rows[name] for name in ([chosen, label] if chosen == self._candidates[0] else [label, chosen])
            }
            chosen = yield from self._race(pair, chosen if chosen == now else None, {})
        settled = Settled(chosen, rows[chosen].median, self._auto.every)
        self._tell(settled)
        return settled

    def _race(self, rows: Mapping[str, Row], now: str | None, least_s: Mapping[str, float]) -> Trials[str]:
        """With every sample made the same on all ranks; counts what it costs."""
        auto = self._auto
        trials = race(rows, now=now, running=self._in_force(), trial=auto.trial, margin=auto.margin, least_s=least_s)
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
        self.found.trial_steps += steps
        self.found.trial_s += max(spent_s - steps * rows[chosen].step_s, 0.0)
        return chosen

    def _mix(self, plans: Mapping[str, Plan]) -> tuple[str, Choice] | None:
        """A mixture of candidates worth trying, where it is known when buckets leave."""
        rows, stepper, link = self.found.rows, self._stepper, self.found.link
        if link is None or self._transport.levels is not None or isinstance(stepper.gradients, HeldGradients):
            return None
        buckets = len(stepper.plan.buckets)
        known, *ready_s = zip(*self._gather(self._ready_s(buckets)), strict=True)
        if not all(known):
            return None
        labels = [label for label in self._candidates if rows[label].samples]
        mixer = Mixer(
            choices={label: self._choices[label] for label in labels},
            plans=plans,
            samples={label: rows[label].median for label in labels},
            exchange=self._planner.exchange,
            world_size=self._transport.parties,
            link=link,
            ready_s=[max(sum(times) / len(times), 0.0) for times in ready_s],
        )
        return mixer.mix(min(labels, key=lambda label: rows[label].step_s))

    def _ready_s(self, buckets: int) -> list[float]:
        """Whether it is known when so many buckets left in the last step, and when."""
        known = len(self.ready_s) == buckets
        return [float(known), *(self.ready_s if known else [0.0] * buckets)]

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

    def _probe(self) -> Link:
        """The link of the rank that has the slowest. What a short message takes is latency, and no part of the rest."""
        others = self._transport.world_size - 1
        latency_s = math.inf
        for total_bytes in _PROBE_BYTES:
            message = torch.zeros(min(total_bytes // others, replicas.BROADCAST_CHUNK_BYTES) // 4)
            times_s = []
            for _ in range(_PROBE_TIMES):  # ranks do not come to the first one together
                start = self._clock()
                replicas.gather(self._transport, self._stepper.next_turn(), message)
                times_s.append(self._clock() - start)
            took_s = max(row[0] for row in self._gather([min(times_s)]))
            latency_s = min(latency_s, took_s)
            if took_s >= _LONG_ENOUGH_S:
                break
        # At least a tenth, where the longest was no longer than a trip: the link is then fast.
        carrying_s = max(took_s - latency_s, 0.1 * took_s, 1e-9)
        return Link(latency_s=latency_s, bytes_per_s=4 * message.numel() * others / carrying_s)

    def _least_bytes(self, plan: Plan) -> float:
        """What a rank sends in a step, however the exchange goes: as in a ring, twice all but its own share."""
        parties = self._transport.parties
        expected = sum(piece.codec.typical_nbytes(piece.numel) for pieces in plan.pieces for piece in pieces)
        return expected * 2 * (parties - 1) / max(parties, 1)

    def fits(self, plan: Plan) -> bool:
        """Whether its messages are no longer than was agreed at the start."""
        bounds = message_bounds(plan.message_bytes(), self._stepper.tensors)
        return all(most <= allowed for most, allowed in zip(bounds, self._agreed, strict=True))

    def _too_long(self, plan: Plan) -> str:
        return "" if self.fits(plan) else "not tried: its messages could be longer than was agreed on at the start"

    def _tell(self, settled: Settled) -> None:
        found = self.found
        if self._transport.rank == 0 and found.link is not None:
            logger.info(
                "auto: step %d, %s: %s from now on, %.1f ms a step. Tried: %s. The link carries about %.3g Mbit/s. "
                "Trials so far: %d steps, which took %.2f s longer than with what was best",
                *(self._stepper.step, found.why, settled.label, settled.sample.step_s * 1e3),
                "; ".join(f"{label}: {row}" for label, row in found.rows.items()),
                *(found.link.bytes_per_s * 8e-6, found.trial_steps, found.trial_s),
            )
