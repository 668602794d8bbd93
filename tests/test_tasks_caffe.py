"""Caffe's learning-rate policies against values computed by hand, and stepped once an iteration by the Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from test_tasks import rates_of_steps, write_cifar10
from torch import nn

from gradcomp.errors import ConfigError
from gradcomp.examples.tasks.caffe_policies import CaffePolicy, Policy
from gradcomp.integrations.tasks import load


@pytest.mark.parametrize(
    ("policy", "options", "rates"),
    [
        ("fixed", {}, {0: 0.01, 1000: 0.01}),
        ("step", {"gamma": 0.1, "stepsize": 100}, {0: 0.01, 99: 0.01, 100: 1e-3, 199: 1e-3, 200: 1e-4}),
        ("exp", {"gamma": 0.5}, {0: 0.01, 1: 0.005, 3: 0.00125}),
        # (1 + 0.01 * 100) ^ -0.75 = 2 ^ -0.75
        ("inv", {"gamma": 1e-2, "power": 0.75}, {0: 0.01, 100: 0.01 * 0.5946035575}),
        ("multistep", {"gamma": 0.1, "stepvalue": [3, 5]}, {2: 0.01, 3: 1e-3, 4: 1e-3, 5: 1e-4, 99: 1e-4}),
        ("poly", {"power": 2, "max_iter": 100}, {0: 0.01, 50: 0.0025, 90: 1e-4, 100: 0.0, 150: 0.0}),
        (
            "sigmoid",
            {"gamma": -0.5, "stepsize": 10},
            {10: 0.005, 12: 0.01 / (1 + math.e), 8: 0.01 * math.e / (1 + math.e)},
        ),
    ],
)
def test_policies(policy: str, options: dict[str, Any], rates: dict[int, float]) -> None:
    found = CaffePolicy(policy=policy, **options)  # type: ignore[arg-type]
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.02}], lr=0.01)
    scheduler = found.scheduler(optimizer)
    for iteration in range(max(rates) + 1):
        if iteration in rates:
            one, two = (group["lr"] for group in optimizer.param_groups)
            assert one == pytest.approx(rates[iteration], rel=1e-6)
            assert two == pytest.approx(2 * rates[iteration], rel=1e-6), "lr_mult"
        optimizer.step()
        scheduler.step()


def test_every_policy_is_here_and_none_overflows() -> None:
    for policy in get_args(Policy):
        for gamma in (0.1, 0.999):
            assert 0 <= CaffePolicy(policy=policy, gamma=gamma).factor(10**7) <= 1
    assert CaffePolicy(policy="sigmoid", gamma=0.01, stepsize=10**6).factor(0) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "cosine"}, "policy='cosine' is not allowed; policy must be one of fixed, step"),
        ({"gamma": math.nan}, "gamma=nan is not allowed"),
        ({"policy": "step", "gamma": -0.1}, "gamma=-0.1 is not allowed; gamma must be a finite number >= 0"),
        ({"stepsize": 0}, "stepsize=0 is not allowed"),
        ({"max_iter": 1.5}, "max_iter=1.5 is not allowed"),
        ({"stepvalue": 4000}, "stepvalue=4000 is not allowed; it must be a list"),
        ({"stepvalue": [5, 3]}, r"stepvalue=\[5, 3\] is not allowed; it must be ascending"),
        ({"stepvalue": [-1]}, "stepvalue=-1 is not allowed"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CaffePolicy(**options)


def test_cifar10_quick_follows_its_policy_step_by_step(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    task = load("gradcomp.examples.tasks.cifar10_quick").build([f"data={tmp_path}", "stepvalue=[2,3]"], batch_size=4)
    assert task.scheduler is None
    assert rates_of_steps(task, 4) == [pytest.approx([lr, 2 * lr]) for lr in (1e-3, 1e-3, 1e-4, 1e-5)]
    assert [len(group["params"]) for group in task.optimizer.param_groups] == [5, 5]
