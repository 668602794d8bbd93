"""What ``gradcomp plan`` compares: methods, what is forecast of each, the best of them, and of its buckets."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from gradcomp import registry
from gradcomp.bench.probe_model import ModelProbe
from gradcomp.bucket import DenseRule
from gradcomp.errors import ConfigError
from gradcomp.exchanges.hierarchical import Hierarchical
from gradcomp.forecast import CodecCost, Forecast, Link, forecast
from gradcomp.interfaces import Compressor
from gradcomp.plan import Plan
from gradcomp.registry import format_spec
from gradcomp.rules import Choice, Rule, Rules, choose

__all__ = ["Bench", "BucketAdvice", "Method", "Mixture", "Prediction", "best_of", "mix"]

# Of methods about as fast the one that loses least is taken.
_ABOUT_AS_FAST = 1.03
_FREE = 1.005  # a bucket may go dense if the step takes no longer than that
_LOSSES = {"none": 0, "bf16": 1, "fp16": 1}


@dataclass(frozen=True)
class Method:
    """A compressor, and how its packets meet; spec strings."""

    compressor: str
    exchange: str


@dataclass(frozen=True)
class Prediction:
    """One method, forecast."""

    method: Method
    plan: Plan
    forecast: Forecast

    @property
    def step_s(self) -> float:
        return self.forecast.step_s

    def core_s(self, link: Link) -> float:
        """Core time of a rank, for all of the exchange."""
        buckets = self.forecast.buckets
        work_s = sum(bucket.encode_s + bucket.decode_s for bucket in buckets)
        return work_s + link.cpu_s_per_byte * self.forecast.sent_bytes


@dataclass(frozen=True)
class Bench:
    """What all methods have in common.

    Attributes:
        costs: by spec string, ``none``'s included.
    """

    named: Sequence[tuple[str, Tensor]]
    model: ModelProbe
    costs: dict[str, CodecCost]
    link: Link
    world_size: int
    bucket_bytes: int
    overlap: str = "backward"

    def predict(self, method: Method, choice: Choice | None = None) -> Prediction:
        """Forecast a method; ``choice``: rules in place of its compressor.

        Raises:
            ConfigError: a compressor that its exchange does not take.
        """
        exchange = registry.exchange(method.exchange)
        if isinstance(exchange, Hierarchical):
            raise ConfigError(f"exchange {method.exchange!r} has levels, and is not forecast")
        plan = Plan.make(
            self.named,
            choose(method.compressor) if choice is None else choice,
            dense=DenseRule(),
            exchange=exchange,
            world_size=self.world_size,
            bucket_bytes=self.bucket_bytes,
        )
        found = forecast(
            plan,
            exchange,
            profile=self.model.profile([row.name for row in plan.table], plan.buckets),
            link=self.link,
            cost_of=self.cost_of,
            world_size=self.world_size,
            overlap=self.overlap,
        )
        return Prediction(method, plan, found)

    def _predict_or_why_not(self, method: Method) -> Prediction | str:
        try:
            return self.predict(method)
        except ConfigError as error:
            return str(error)

    def cost_of(self, codec: Compressor) -> CodecCost:
        """Of a compressor that was probed."""
        spec = format_spec(codec)
        if spec not in self.costs:
            raise ConfigError(f"compressor {spec!r} was not probed; there are {', '.join(self.costs)}")
        return self.costs[spec]

    def when_computing_took(self, compute_s: float) -> Bench:
        """With the cores that a rank had when its step by itself took so long; others may use a machine as well."""
        model = self.model
        had = (model.forward_s + model.backward_s + model.optimizer_s) / compute_s  # of each core that computes
        alone = had >= 0.95 * min(1.0, model.cores / max(model.compute_cores, 1.0))
        return replace(self, model=replace(model, thread_cores=1.0 if alone else had))

    def predict_all(self, methods: Sequence[Method]) -> tuple[list[Prediction], dict[Method, str]]:
        """The fastest first; and why others cannot be had."""
        predictions, refused = [], {}
        for method in methods:
            found = self._predict_or_why_not(method)
            if isinstance(found, str):
                refused[method] = found
            else:
                predictions.append(found)
        return sorted(predictions, key=lambda prediction: prediction.step_s), refused


def best_of(predictions: Sequence[Prediction]) -> Prediction:
    """The fastest; of those about as fast the one that loses least."""
    limit_s = _ABOUT_AS_FAST * min(prediction.step_s for prediction in predictions)
    near = [prediction for prediction in predictions if prediction.step_s <= limit_s]
    return min(near, key=lambda p: (_LOSSES.get(p.method.compressor.partition(":")[0], 2), p.step_s))


@dataclass(frozen=True)
class BucketAdvice:
    """What one bucket should go through, and why."""

    compressor: str
    why: str


@dataclass(frozen=True)
class Mixture:
    """The best method, with what need not be compressed going dense.

    Attributes:
        rules: for attach; None if one compressor serves all.
    """

    prediction: Prediction
    rules: Rules | None
    buckets: tuple[BucketAdvice, ...]


def mix(bench: Bench, best: Prediction) -> Mixture:
    """Bucket by bucket, the last one first, since only the wait for that is hard to hide: does dense cost anything?"""
    if best.method.compressor == "none":
        return Mixture(best, None, tuple(_why_dense(best, i) for i in range(len(best.plan.buckets))))
    limit_s = _FREE * best.step_s
    count = len(best.plan.buckets)
    dense: set[int] = set()
    now, rules, why = best, None, [""] * count
    for i in range(count):
        trial = _rules(best, dense | {i})
        found = bench.predict(best.method, trial)
        longer_s = found.step_s - now.step_s
        if found.step_s <= limit_s:
            dense.add(i)
            now, rules = found, trial
            why[i] = "hidden anyway: dense costs no time"
        else:
            ratio = 4 * sum(unit.numel for unit in best.plan.buckets[i].units) / max(_packet_bytes(bench, best, i), 1)
            why[i] = f"dense would make the step {1e3 * longer_s:.1f} ms longer; packets are {ratio:.0f} times smaller"
    advice = tuple(BucketAdvice("none" if i in dense else best.method.compressor, why[i]) for i in range(count))
    return Mixture(now, rules, advice)


def _packet_bytes(bench: Bench, prediction: Prediction, bucket: int) -> float:
    return sum(bench.cost_of(piece.codec).nbytes(piece) for piece in prediction.plan.pieces[bucket])


def _why_dense(best: Prediction, i: int) -> BucketAdvice:
    bucket = best.forecast.buckets[i]
    if bucket.exposed_s < 1e-3:
        return BucketAdvice("none", "hidden under backward as it is")
    return BucketAdvice(
        "none", f"waited for {1e3 * bucket.exposed_s:.1f} ms, and compressing it would take longer than it saves"
    )


def _rules(best: Prediction, dense: set[int]) -> Rules:
    names = [best.plan.table[p].name for i in sorted(dense) for p in best.plan.buckets[i].parameters]
    rules = [Rule(name=glob.escape(name), compressor=registry.compressor("none")) for name in names]
    return Rules(rules, default=best.method.compressor)
