"""For each bucket the choice that is expected to make the step shortest: what ``auto`` tries beside its candidates.

A bucket that backward hides goes dense at no cost; the last one, for which everybody waits, may be worth compressing.
What is expected is gradcomp.forecast's; what things cost is taken from steps that were measured in the run.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gradcomp.compressors.cast import NoCompression
from gradcomp.forecast import CodecCost, Link, StepProfile, forecast
from gradcomp.interfaces import Compressor, Exchange
from gradcomp.plan import Plan
from gradcomp.routes import route
from gradcomp.rules import Choice, Rule, Rules
from gradcomp.trials import Sample

__all__ = ["Mixer"]

_USUAL_NUMEL = 1 << 20
_SWEEPS = 2
# A mixture is tried if it is expected to be better by that; and what is more faithful is taken if worse by less.
_WORTH_TRYING, _AS_GOOD = 0.99, 1.001
_MOST_FORECASTS = 200
_MOST_TEXT = 100_000  # ranks agree on a choice's config as text (gradcomp.handshake)


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """Mixes choices, bucket by bucket; the same on every rank if its arguments are.

    Attributes:
        choices: by label, the most faithful first, as all that follows.
        plans: whose buckets hold the same parameters.
        samples: what a step took with them; those that were not timed are left out.
        exchange, world_size: as for :func:`gradcomp.forecast.forecast`.
        link: as the ranks found it.
        ready_s: from the end of the last exchange until each bucket's gradients were there.
    """

    choices: Mapping[str, Choice]
    plans: Mapping[str, Plan]
    samples: Mapping[str, Sample]
    exchange: Exchange
    world_size: int
    link: Link
    ready_s: Sequence[float]

    def mix(self, best: str) -> tuple[str, Choice] | None:
        """A mixture that is expected to be faster than the best choice alone, and what to call it.

        Buckets are changed one by one, twice over, from all in ``best``; what needs hundreds of forecasts is not tried.
        """
        labels = [label for label in self.choices if label in self.samples]
        buckets = len(self.plans[best].buckets)
        if buckets < 2 or len(labels) < 2 or _SWEEPS * buckets * len(labels) > _MOST_FORECASTS:
            return None
        costs = self._costs(labels)
        sample = self.samples[best]
        computing_s = max(sample.step_s - sample.wait_s, *self.ready_s)
        profile = StepProfile(forward_s=0.0, backward_s=computing_s, optimizer_s=0.0, ready_s=tuple(self.ready_s))

        def expected_s(labels: Sequence[str]) -> float:
            return forecast(
                self._plan(labels),
                self.exchange,
                profile=profile,
                link=self.link,
                cost_of=lambda codec: costs.get(codec) or _free(codec),
                world_size=self.world_size,
            ).step_s

        mixed = [best] * buckets
        alone_s = least_s = expected_s(mixed)
        for _ in range(_SWEEPS):
            for index in range(buckets):
                for label in reversed(labels):  # the most faithful last: it wins where it is as good
                    other = [*mixed[:index], label, *mixed[index + 1 :]]
                    other_s = expected_s(other)
                    if other_s < least_s * (_AS_GOOD if labels.index(label) < labels.index(mixed[index]) else 1.0):
                        mixed, least_s = other, other_s
        if least_s > _WORTH_TRYING * alone_s:
            return None
        choice = self._rules(mixed)
        return None if len(json.dumps(choice.config())) > _MOST_TEXT else (_label(mixed), choice)

    def _plan(self, labels: Sequence[str]) -> Plan:
        plans = [self.plans[label] for label in labels]
        buckets = [plan.buckets[index] for index, plan in enumerate(plans)]
        return replace(plans[0], buckets=buckets, pieces=[plan.pieces[index] for index, plan in enumerate(plans)])

    def _rules(self, labels: Sequence[str]) -> Rules:
        """Each parameter by its name, where it goes another way than with the most frequent choice."""
        usual = Counter(labels).most_common(1)[0][0]
        default, given = self.plans[usual], self.choices[usual]
        named = []
        for index, label in enumerate(labels):
            table = self.plans[label].table
            for position in self.plans[label].buckets[index].parameters:
                row = table[position]
                if row.codec != default.table[position].codec:
                    named.append(Rule(name=_exactly(row.name), compressor=row.codec))
        rest = given if isinstance(given, Rules) else Rules(default=given)
        return Rules([*named, *rest.rules], default=rest.default)

    def _costs(self, labels: Sequence[str]) -> dict[Compressor, CodecCost]:
        """What each choice's compressor takes, from the time that all of it took in a step."""
        costs: dict[Compressor, CodecCost] = {}
        for label in labels:
            given = self.choices[label]
            codec = given.default if isinstance(given, Rules) else given
            work = [self._work(label, codec, cost) for cost in (_ENCODING, _DECODING)]
            (encoded, _), (decoded_to_encode, decoded) = work
            decode_s = self.samples[label].decompress_s / decoded if decoded else 0.0
            left_s = max(self.samples[label].compress_s - decode_s * decoded_to_encode, 0.0)
            encode_s = left_s / encoded if encoded else 0.0
            costs[codec] = replace(_free(codec), encode_s_per_element=encode_s, decode_s_per_element=decode_s)
        return costs

    def _work(self, label: str, codec: Compressor, cost: CodecCost) -> tuple[float, float]:
        """How many elements a step encodes and decodes, or whatever else ``cost`` counts, in each of both stages."""
        plan, nothing = self.plans[label], CodecCost()
        routes = [
            route(
                self.exchange,
                bucket,
                pieces,
                world_size=self.world_size,
                cost_of=lambda one: cost if one == codec else nothing,
            )
            for bucket, pieces in zip(plan.buckets, plan.pieces, strict=True)
        ]
        return sum(way.encode_s for way in routes), sum(way.decode_s for way in routes)


_ENCODING, _DECODING = CodecCost(encode_s_per_element=1.0), CodecCost(decode_s_per_element=1.0)


def _free(codec: Compressor) -> CodecCost:
    """The length of its packets, in no time."""
    if isinstance(codec, NoCompression):
        return CodecCost()
    return CodecCost(bytes_per_element=codec.typical_nbytes(_USUAL_NUMEL) / _USUAL_NUMEL)


def _exactly(name: str) -> str:
    """A rule's pattern for this name and no other."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _label(labels: Sequence[str]) -> str:
    parts: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        parts.setdefault(label, []).append(index)
    return "; ".join(f"{label} in bucket {', '.join(map(str, found))}" for label, found in parts.items())
