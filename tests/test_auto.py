"""compressor="auto": trials with times that are given, and then in runs, where all ranks must decide alike."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from ranks import attach, parameters_of, run_ranks, small_net, train_step
from torch import nn

import gradcomp
from gradcomp import tuner
from gradcomp.forecast import Link
from gradcomp.mixing import Mixer
from gradcomp.plan import Planner
from gradcomp.registry import exchange
from gradcomp.testing_compressor import check_compressor
from gradcomp.trials import IN_TIME, Row, Sample, Trials, race, watch

# -- trials, with times that are given ---------------------------------------------------------------------------------


def play(trials: Trials[str], took: Callable[[str, int], Sample]) -> tuple[str, list[str]]:
    """What comes of trials, and what each step went with."""
    labels = [next(trials)]
    while True:
        try:
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
    assert labels.count("none") == 2  # of which the first one is not counted
    assert rows["none"].out == "given up after 1 steps"


def test_a_pause_decides_nothing() -> None:
    """One rank validates or saves: a step takes a minute, and nobody waited for the network."""
    rows = {"none": Row(), "bf16": Row()}

    def took(label: str, number: int) -> Sample:
        return Sample(60.0 if number in (1, 9) else {"none": 1.0, "bf16": 1.2}[label], 0.1)

    assert play(race(rows, now=None, running="none", trial=4, margin=0.02, least_s={}), took)[0] == "none"


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
    assert steps == 120
    assert "a step took 100.0 ms" in why
    assert stay(lambda _, number: Sample(0.1, 0.01 if number < 100 else 0.05))[1] == 120
    assert stay(lambda _, number: Sample(0.1 if number < 100 else 0.05, 0.01), patience=8)[1] == 180
    assert stay(lambda _, number: Sample(0.1 if number // 10 % 2 else 0.2, 0.01)) == (IN_TIME, 400)


# -- the compressor by itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", [["none", "bf16"], ["none", "onebit", "topk:ratio=0.1"], ["powersgd"], ["qsgd"]])
def test_it_is_a_compressor(candidates: list[str]) -> None:
    auto = gradcomp.compressor({"id": "auto", "candidates": candidates, "every": 50})
    assert gradcomp.compressor(json.loads(json.dumps(auto.config()))) == auto
    check_compressor(auto)


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
