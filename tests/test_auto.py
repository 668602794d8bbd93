"""compressor="auto": trials with times that are given, and then in runs, where all ranks must decide alike."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from ranks import attach, parameters_of, run_ranks, small_net, train_step
from test_hierarchical import run_hosts
from torch import nn

import gradcomp
from gradcomp.forecast import Link
from gradcomp.mixing import Mixer
from gradcomp.plan import Planner
from gradcomp.registry import exchange
from gradcomp.trials import IN_TIME, Row, Sample, Trials, race, watch

# -- trials, with times that are given ---------------------------------------------------------------------------------


def play(trials: Trials[str], took: Callable[[str, int], Sample]) -> tuple[str, list[str]]:
    """What comes of trials, and what each step went with."""
    labels = [next(trials)]
    try:
        while True:
            labels.append(trials.send(took(labels[-1], len(labels) - 1)))
    except StopIteration as end:
        return end.value, labels


def run_race(
    times_s: Mapping[str, float], *, noise: float = 0.0, now: str | None = None, **options: Any
) -> tuple[str, list[str], dict[str, Row]]:
    rows = {label: Row() for label in times_s}
    least = min(times_s.values())
    shake = itertools.cycle([1.0, 1.0 + noise, 1.0 - noise])

    def took(label: str, number: int) -> Sample:
        return Sample(times_s[label] * next(shake), times_s[label] - least)

    given = {"trial": 4, "margin": 0.02, "least_s": {}, "running": now or next(iter(times_s))} | options
    chosen, labels = play(race(rows, now=now, **given), took)
    return chosen, labels, rows


def test_the_fastest_wins() -> None:
    chosen, labels, rows = run_race({"none": 1.3, "bf16": 1.0, "threshold": 1.1}, noise=0.05)
    assert chosen == "bf16"
    assert rows["none"].out == rows["threshold"].out == "slower"
    assert len(labels) < 100


def test_of_equals_the_first_is_taken_unless_another_is_there() -> None:
    times_s = {"none": 1.01, "bf16": 1.0, "threshold": 1.0}
    assert run_race(times_s)[0] == "none"
    assert run_race(times_s, now="threshold")[0] == "threshold"
    assert run_race({"none": 0.97, "threshold": 1.0}, now="threshold")[0] == "none"
    assert run_race({"none": 0.97, "threshold": 1.0}, now="threshold", margin=0.05)[0] == "threshold"


def test_what_is_hopeless_costs_a_step_or_none() -> None:
    times_s = {"none": 130.0, "bf16": 2.5, "threshold": 1.0}
    _, labels, rows = run_race(times_s, running="threshold", least_s={"bf16": 1.2, "none": 2.1, "threshold": 0.1})
    assert labels.count("none") == 0
    assert "not tried" in rows["none"].out
    _, labels, rows = run_race({"none": 130.0, "threshold": 1.0}, running="threshold", least_s={"none": 1.0})
    assert labels.count("none") == 1
    assert rows["none"].out == "given up at once"
    _, labels, rows = run_race({"none": 3.5, "threshold": 1.0}, running="threshold", least_s={"none": 1.0})
    assert labels.count("none") == 3  # of which the first one is not counted
    assert rows["none"].out == "given up after 2 steps"


def test_a_pause_decides_nothing() -> None:
    """One rank validates or saves: a step takes a minute, and nobody waited for the network."""
    rows = {"none": Row(), "bf16": Row()}

    def took(label: str, number: int) -> Sample:
        return Sample(60.0 if number in (1, 9) else {"none": 1.0, "bf16": 1.2}[label], 0.1)

    assert play(race(rows, now=None, running="none", trial=4, margin=0.02, least_s={}), took)[0] == "none"


def test_a_link_that_becomes_slow_in_mid_trial_costs_two_steps() -> None:
    rows = {"none": Row(), "threshold": Row()}
    shake = itertools.cycle([0.9, 1.0, 1.1])

    def took(label: str, number: int) -> Sample:
        return Sample(1.0 * next(shake), 0.1) if label == "threshold" or number < 20 else Sample(4.0, 3.1)

    chosen, labels = play(race(rows, now=None, running="none", trial=4, margin=0.02, least_s={}), took)
    assert chosen == "threshold"
    assert labels[20:].count("none") <= 3


def test_accidents_leave_somebody_in_the_race() -> None:
    rows = {"none": Row(), "bf16": Row()}
    chance = random.Random(0)

    def took(label: str, number: int) -> Sample:
        return Sample(20.0, 19.0) if chance.random() < 0.3 else Sample(1.0, 0.1)

    for _ in range(50):
        assert play(race(rows, now=None, running="none", trial=2, margin=0.0, least_s={}), took)[0] in rows
        rows = {"none": Row(), "bf16": Row(), "fp16": Row(out="not tried")}


def test_it_stays_until_its_time_is_over_or_something_lasts() -> None:
    known = Sample(0.1, 0.01)

    def stay(took: Callable[[str, int], Sample], patience: int = 2) -> tuple[str, int]:
        why, labels = play(
            watch("a", known, steps=400, patience=patience, agree=lambda s: s, step_over=lambda: None), took
        )
        assert set(labels) == {"a"}
        return why, len(labels)

    assert stay(lambda _, number: Sample(5.0 if number % 50 == 49 else 0.11, 0.01)) == (IN_TIME, 400)
    why, steps = stay(lambda _, number: Sample(0.1 if number < 100 else 0.15, 0.01))
    assert steps == 114  # a second look comes soon
    assert "a step took 100.0 ms" in why
    assert stay(lambda _, number: Sample(0.1, 0.01 if number < 100 else 0.05))[1] == 114
    assert stay(lambda _, number: Sample(0.1 if number < 100 else 0.05, 0.01), patience=8)[1] == 138
    assert stay(lambda _, number: Sample(0.1 if number % 14 >= 10 else 0.2, 0.01)) == (IN_TIME, 400)


def test_short_steps_that_become_long_are_noticed_before_long() -> None:
    known = Sample(0.001, 0.0001)
    watching = watch("a", known, steps=1000, patience=2, agree=lambda s: s, step_over=lambda: None)
    _, labels = play(watching, lambda _, number: Sample(1.0, 0.9))
    assert len(labels) == 29


# -- mixtures ----------------------------------------------------------------------------------------------------------


def test_a_bucket_that_is_hidden_goes_dense() -> None:
    """Three get through while backward goes on; for the last one everybody waits."""
    net = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
    named = [(f"a[{name}]", parameter) for name, parameter in net.named_parameters()]
    planner = Planner(
        exchange=exchange("all_gather"),
        world_size=4,
        bucket_bytes=4 * 65536,
        dense=gradcomp.DenseRule(),
        accept=None,
    )
    choices = {spec: gradcomp.compressor(spec) for spec in ("none", "threshold:density=0.001")}
    mixer = Mixer(
        choices=choices,
        plans={label: planner.plan(named, choice) for label, choice in choices.items()},
        samples={"none": Sample(0.5, 0.3), "threshold:density=0.001": Sample(0.3, 0.001, 0.1, 0.01)},
        exchange=planner.exchange,
        world_size=4,
        link=Link(latency_s=1e-4, bytes_per_s=1e7),
        ready_s=(0.05, 0.1, 0.15, 0.2),
    )
    mixed = mixer.mix("threshold:density=0.001")
    assert mixed is not None
    label, choice = mixed
    assert label == "none in bucket 0, 1, 2; threshold:density=0.001 in bucket 3"
    plan = planner.plan(named, choice)
    assert [row.codec.id for row in plan.table] == ["threshold", "none", "none", "none"]
    fast = dataclasses.replace(mixer, link=Link(latency_s=1e-5, bytes_per_s=1e10))
    assert fast.mix("none") is None


# -- the compressor by itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": []}, "must be a list"),
        ({"candidates": ["dgc:momentum=0.9"]}, "momentum"),
        ({"candidates": ["adaptive:clip=5"]}, "clipped"),
        ({"candidates": ["none", "warmup"]}, "begin anew"),
        ({"candidates": ["auto"]}, "its own candidates"),
        ({"candidates": ["fp16", "fp16"]}, "twice"),
        ({"every": 5}, "every"),
        ({"trial": 0}, "trial"),
        ({"margin": 1.0}, "margin"),
        ({"per_bucket": 1}, "per_bucket"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(gradcomp.ConfigError, match=message):
        gradcomp.compressor({"id": "auto", **options})


# -- in a run: the clock is the test's, and stands still while nobody trains -------------------------------------------


class Clock:
    """Moves by what a step takes, and a little whenever it is asked, for what is timed between steps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.1
        return self.now_s


StepS = Callable[[str], float]


class Run:
    """A run whose steps take what the test says, by the name of the compressor."""

    def __init__(self, transport: Any, monkeypatch: pytest.MonkeyPatch | None = None, **options: Any) -> None:
        self.clock, self.net = Clock(), small_net()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05)
        self.sync = attach(self.net, self.optimizer, transport, **{"digest_every": 1} | options)
        self.sync._tuner._clock = self.sync._tuner._search._clock = self.clock
        self.number = 0

    def steps(self, count: int, step_s: StepS) -> Iterator[str]:
        for _ in range(count):
            yield self.step(step_s)

    def step(self, step_s: StepS) -> str:
        now = self.sync.compressor
        name = now.id if isinstance(now, gradcomp.interfaces.Compressor) else "mixture"
        self.clock.now_s += step_s(name)
        train_step(self.net, self.optimizer, self.sync.rank, self.number)
        self.number += 1
        return name

    @property
    def choice(self) -> str:
        chosen: str = self.sync.stats()["auto"]["choice"]
        return chosen


FAST = {"none": 100.0, "bf16": 110.0, "threshold": 120.0, "mixture": 130.0}
SLOW = {"none": 900.0, "bf16": 500.0, "threshold": 120.0, "mixture": 600.0}


def test_all_ranks_change_together_when_the_link_does() -> None:
    def rank_main(transport: Any) -> tuple[list[str], list[str], list[torch.Tensor]]:
        shake = itertools.cycle([0.97, 1.05, 1.0, 0.96, 1.02] if transport.rank else [1.04, 0.98, 1.0])
        with (run := Run(transport, compressor="auto")).sync:
            used: list[str] = []
            chosen = []
            for times_s, count in ((FAST, 60), (SLOW, 70), (FAST, 0)):
                used += run.steps(count, lambda name: times_s[name] * next(shake))  # noqa: B023
                chosen.append(run.choice)
            auto = run.sync.stats()["auto"]
            assert auto["searches"] == 2
            assert auto["trial_steps"] > 10
            assert auto["trial_s"] > 100
            assert "a step took" in auto["why"]
            assert auto["tried"]["none"]["out"]
            json.dumps(auto)
        return used, chosen, parameters_of(run.net)

    first, *others = run_ranks(3, rank_main, timeout_s=60.0)
    assert first[1] == ["none", "threshold:density=0.001", "threshold:density=0.001"]
    assert first[0][0] == "threshold"  # it begins with what sends least
    assert first[0][50] == "none"
    for other in others:
        assert other[:2] == first[:2]
        assert all(torch.equal(a, b) for a, b in zip(first[2], other[2], strict=True))


def held_by(sync: Any) -> torch.Tensor:
    """All that a rank holds back of its first parameter, in whatever role."""
    held = torch.zeros(160 * 64)
    for span, roles in sync.state_dict()["states"].get("group0.0", {}).items():
        start, stop = map(int, span.split(":"))
        for state in roles.values():
            held[start:stop] += state["residual"]
    return held


@pytest.mark.parametrize("kind", ["all_gather", "two_shot"])
def test_nothing_is_lost_by_trials(kind: str) -> None:
    def rank_main(transport: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight, given = nn.Parameter(torch.zeros(160, 64)), torch.zeros(160, 64)
        optimizer = torch.optim.SGD([weight], lr=1.0)
        spec = {"id": "auto", "candidates": ["none", "onebit:block=64", "topk:ratio=0.05", "threshold"], "trial": 1}
        generator = torch.Generator().manual_seed(transport.rank)
        used = set()
        with attach(None, optimizer, transport, compressor=spec, exchange=kind, reduction="sum") as sync:
            for _ in range(25):
                gradient = 0.01 * torch.randn(160, 64, generator=generator)
                given += gradient
                optimizer.zero_grad()
                used.add(sync.compressor.id)
                (weight * gradient).sum().backward()
                optimizer.step()
            assert len(used) > 1
            return given.view(-1), -weight.detach().view(-1), held_by(sync)

    ranks = run_ranks(3, rank_main, timeout_s=60.0)
    assert all(torch.equal(applied, ranks[0][1]) for _, applied, _ in ranks)
    lost = sum(given for given, _, _ in ranks) - (ranks[0][1] + sum(held for _, _, held in ranks))
    assert lost.abs().max() < 3e-4


def test_a_run_goes_on_in_the_middle_of_a_trial() -> None:
    """With another clock, but what was on trial, what it held back, and what was chosen are all there."""

    def rank_main(transport: Any) -> tuple[bytes, str, str]:
        with (run := Run(transport, compressor="auto:every=40")).sync:
            list(run.steps(50, FAST.__getitem__))
            assert run.choice == "none"
            while run.step(FAST.__getitem__) != "threshold":
                assert run.number < 200
            torch.save([run.net.state_dict(), run.sync.state_dict()], file := io.BytesIO())
            return file.getvalue(), run.sync.compressor.id, run.choice

    def resumed(transport: Any, states: list[list[Any]]) -> list[torch.Tensor]:
        with (run := Run(transport, compressor="auto:every=40")).sync:
            if len(states) == transport.world_size:
                run.sync.load_state_dict(states[transport.rank][1])
            else:
                run.sync.load_state_dicts(state for _, state in states)
            run.net.load_state_dict(states[0][0])
            assert run.sync.compressor.id == "threshold"
            assert run.choice == "none"
            assert run.sync.state_dict()["states"]
            assert list(run.steps(5, FAST.__getitem__)) == ["threshold", *["none"] * 4]
        return parameters_of(run.net)

    def fixed(transport: Any, states: list[list[Any]]) -> None:
        with attach(
            net := small_net(), torch.optim.SGD(net.parameters(), lr=0.1), transport, compressor="none"
        ) as sync:
            with pytest.raises(gradcomp.StateError, match="compressor"):
                sync.load_state_dict(states[transport.rank][1])
            sync.set_compressor("threshold")
            sync.load_state_dict(states[transport.rank][1])

    found = run_ranks(3, rank_main, timeout_s=60.0)
    assert {row[1:] for row in found} == {("threshold", "none")}
    states = [torch.load(io.BytesIO(row[0]), weights_only=True) for row in found]
    for world_size in (3, 2):
        first, *others = run_ranks(world_size, lambda t: resumed(t, states), timeout_s=60.0)
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    run_ranks(3, lambda t: fixed(t, states))


def test_a_checkpoint_of_another_compressor_is_where_it_begins() -> None:
    def rank_main(transport: Any) -> None:
        with Run(transport, compressor="topk:ratio=0.1").sync as sync:
            train_step(net := small_net(), torch.optim.SGD(net.parameters(), lr=0.1), sync.rank, 0)
            state = sync.state_dict()
            with (run := Run(transport.__class__.world(1)[0], compressor="auto")).sync:
                run.sync.load_state_dict(state)
                assert run.sync.compressor == gradcomp.compressor("topk:ratio=0.1")
                assert list(run.steps(3, lambda _: 1.0)) == ["topk", "none", "none"]
                with pytest.raises(gradcomp.StateError):
                    run.sync.load_state_dict(state | {"compressor": '{"id": "auto"'})
                with pytest.raises(gradcomp.StateError):
                    run.sync.load_state_dict(state | {"compressor": 5})

    run_ranks(1, rank_main)


def test_the_users_word_ends_it() -> None:
    def rank_main(transport: Any) -> None:
        with (run := Run(transport, compressor="auto")).sync:
            list(run.steps(4, FAST.__getitem__))
            with pytest.raises(gradcomp.ConfigError, match="give it to attach"):
                run.sync.set_compressor("auto")
            run.sync.set_compressor("onebit")
            assert set(run.steps(8, lambda _: 1.0)) == {"onebit"}
            assert "auto" not in run.sync.stats()
            assert "auto" not in run.sync.state_dict()

    run_ranks(2, rank_main)


def test_parameters_may_be_added_meanwhile() -> None:
    def rank_main(transport: Any) -> list[str]:
        with (run := Run(transport, compressor="auto")).sync:
            list(run.steps(40, FAST.__getitem__))
            named = [(name, p) for name, p in run.net.named_parameters() if not name.startswith("0.")]
            run.sync.set_parameters(named)
            assert run.choice is None
            list(run.steps(40, SLOW.__getitem__))
            return [run.choice]

    assert run_ranks(2, rank_main, timeout_s=60.0) == [["threshold:density=0.001"]] * 2


@pytest.mark.parametrize("options", [{"overlap": "forward"}, {"when": "step"}])
def test_it_goes_with_other_times_of_exchange(options: dict[str, str]) -> None:
    def rank_main(transport: Any) -> list[torch.Tensor]:
        with (run := Run(transport, compressor="auto", **options)).sync:
            used = list(run.steps(45, SLOW.__getitem__))
            run.sync.wait()
            assert set(used) == {"none", "bf16", "threshold"}
            assert run.choice == "threshold:density=0.001"
        return parameters_of(run.net)

    a, b = run_ranks(2, rank_main, timeout_s=60.0)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_it_goes_between_hosts() -> None:
    def rank_main(transport: Any) -> list[str]:
        with (run := Run(transport, compressor="auto")).sync:
            used = list(run.steps(45, SLOW.__getitem__))
            assert run.choice == "threshold:density=0.001"
        return used

    first, *others = run_hosts(2, 2, rank_main, timeout_s=60.0)
    assert set(first) == {"none", "bf16", "threshold"}
    assert others == [first] * 3


def test_rules_keep_what_they_name() -> None:
    def rank_main(transport: Any) -> None:
        rules = {"rules": [{"name": "4.*", "compressor": "topk:ratio=0.5"}], "default": "auto"}
        with (run := Run(transport, compressor=rules)).sync:
            list(run.steps(45, lambda _: FAST[run.sync.compressor.default.id]))
            assert run.choice == "none"
            compressors = run.sync.stats()["compressors"]
            assert {compressors["4.weight"], compressors["4.bias"]} == {"topk:ratio=0.5"}
            assert compressors["6.weight"] == "none"
        with pytest.raises(gradcomp.ConfigError, match="a rule has compressor 'auto'"):
            Run(transport, compressor={"rules": [{"name": "4.*", "compressor": "auto"}]})

    run_ranks(2, rank_main, timeout_s=60.0)


def test_ranks_must_agree_on_the_candidates() -> None:
    def rank_main(transport: Any) -> None:
        with pytest.raises(gradcomp.HandshakeError, match="auto"):
            Run(transport, compressor=f"auto:every={100 + transport.rank}")

    run_ranks(2, rank_main)


def test_what_cannot_be_is_refused() -> None:
    def rank_main(transport: Any) -> None:
        net = small_net()
        with pytest.raises(gradcomp.ConfigError, match="'threshold' is not for LBFGS"):
            attach(net, torch.optim.LBFGS(net.parameters()), transport, compressor="auto")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with pytest.raises(gradcomp.ConfigError, match=r"candidate 'factors'.*pass model="):
            attach(None, optimizer, transport, compressor='auto:candidates=["none","factors"]')
        with pytest.raises(gradcomp.ConfigError, match="parameter server"):
            gradcomp.attach(optimizer, compressor="auto", exchange="server:addresses=localhost:1")
        with pytest.raises(gradcomp.ConfigError, match="parameter server"):
            gradcomp.attach(optimizer, compressor={"rules": [], "default": "auto"}, exchange="server:addresses=h:1")

    run_ranks(1, rank_main)
