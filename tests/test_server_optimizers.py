"""The optimizers of a parameter server: what it makes of gradients is what torch makes of them, bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from server_sides import Side, admit, ask, named_parameters
from torch import Tensor

from gradcomp.errors import ConfigError, StateError
from gradcomp.server import optimizers
from gradcomp.server.optimizers import OPTIMIZERS, Description, ShardOptimizer, describe, numbers
from gradcomp.server.service import Service

SHAPES = [(200, 80), (80,), (3, 5, 2), (), (91, 53)]
OPTIONS = {
    "SGD": {"momentum": 0.9, "weight_decay": 1e-3, "nesterov": True},
    "Adagrad": {"lr_decay": 1e-2, "initial_accumulator_value": 0.1},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Adam": {"amsgrad": True, "betas": (0.8, 0.99)},
    "NAdam": {"weight_decay": 1e-2, "decoupled_weight_decay": True},
    "Rprop": {"etas": (0.4, 1.3), "step_sizes": (1e-5, 1.0)},
    "ASGD": {"t0": 2.0, "lambd": 1e-3},
}


def optimizer_of(name: str, parameters: list[Tensor], **options: object) -> torch.optim.Optimizer:
    """Two groups with options of their own."""
    groups = [{"params": parameters[:2], "lr": 0.05}, {"params": parameters[2:], "lr": 0.01}]
    made: torch.optim.Optimizer = getattr(torch.optim, name)(groups, **options)
    return made


@pytest.mark.parametrize("mode", ["async", "sync"])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "SGD plain", "Adam fused", "SGD fused", "Adagrad fused"])
def test_one_worker_and_two_shards_are_training_as_it_was(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "_CHUNK_NUMEL", 1 << 10)
    name, _, how = name.partition(" ")
    options = {"plain": {}, "fused": {"fused": True}}.get(how, OPTIONS.get(name, {}))
    parameters = named_parameters(shapes=SHAPES)
    optimizer = optimizer_of(name, parameters, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    sides = [Side(optimizer, spec=mode, shard=i, shards=2) for i in range(2)]
    assert any(row.start for row in sides[1].table.rows)  # a tensor was cut
    services = [Service() for _ in sides]
    for service, side in zip(services, sides, strict=True):
        admit(service, side)
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        for i, parameter in enumerate(parameters):
            # One of them has no gradient now and then: torch passes over it.
            present = i != 2 or step % 3
            parameter.grad = torch.randn(parameter.shape, generator=generator) if present else None
        for service, side in zip(services, sides, strict=True):
            for reply in ask(service, side.push(side.gradients())):
                side.take(reply)
        optimizer.step()
        scheduler.step()
        for side in sides:
            assert side.version == step + 1
            assert torch.equal(side.values, side.of_parameters())


def test_state_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPTIMIZERS:
        rows = [torch.linspace(-1, 1, 700), torch.ones(1)]
        gradients = [torch.linspace(0.5, -1, 700), torch.ones(1)]
        described = describe(optimizer_of(name, [*named_parameters(), torch.zeros(3)], **OPTIONS.get(name, {})))
        monkeypatch.setattr(optimizers, "_CHUNK_NUMEL", 256)
        first = ShardOptimizer(described, rows, [0, 1])
        usual = numbers(first._torch)
        for _ in range(3):
            first.step(gradients, usual)
        state = first.state_dict()
        assert all(
            tensor.shape in ((), row.shape) for row, s in zip(rows, state["rows"], strict=True) for tensor in s.values()
        )
        # Cut in other pieces, and not changed by what the first one does from here on.
        monkeypatch.setattr(optimizers, "_CHUNK_NUMEL", 100)
        copies = [row.clone() for row in rows]
        second = ShardOptimizer(described, copies, [0, 1])
        for _ in range(2):
            first.step(gradients, usual)
        second.load_state_dict(state)
        for _ in range(2):
            second.step(gradients, usual)
        assert all(map(torch.equal, rows, copies)), name


def test_state_of_another_optimizer() -> None:
    parameters = named_parameters()
    adam, sgd = (
        ShardOptimizer(describe(optimizer_of(name, parameters)), [torch.zeros(4)], [0]) for name in ("Adam", "SGD")
    )
    with pytest.raises(StateError, match="Adam"):
        sgd.load_state_dict(adam.state_dict())
    adam.step([torch.ones(4)], numbers(adam._torch))
    state = adam.state_dict()
    state["rows"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(StateError, match=r"row 0: exp_avg .* 4 elements"):
        adam.load_state_dict(state)
    state["optimizer"] = "{}"
    with pytest.raises(StateError, match="not JSON with a class"):
        adam.load_state_dict(state)


def test_learning_rate_is_multiplied_once() -> None:
    row = torch.zeros(2)
    sgd = ShardOptimizer(describe(torch.optim.SGD([torch.zeros(2)], lr=0.5)), [row], [0])
    sgd.step([torch.ones(2)], [{"lr": 0.5}], rate=0.25)
    assert row.tolist() == [-0.125, -0.125]
    sgd.step([torch.ones(2)], [{"lr": 0.5}])
    assert row.tolist() == [-0.625, -0.625]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_described_and_read_again(name: str) -> None:
    optimizer = optimizer_of(name, named_parameters(), **OPTIONS.get(name, {}))
    described = describe(optimizer)
    assert Description.parse(described.text()) == described
    described.check(numbers(optimizer))
    assert all(isinstance(value, float) for group in numbers(optimizer) for value in group.values())
    optimizer.param_groups[1]["lr"] = 0.7
    assert describe(optimizer).structure() == described.structure()
    assert numbers(optimizer)[1]["lr"] == 0.7


def test_adam_with_decoupled_decay_is_adamw() -> None:
    optimizer = torch.optim.AdamW([torch.zeros(2)], weight_decay=0.1)
    assert describe(optimizer).name == "AdamW"
    if "decoupled_weight_decay" in torch.optim.Adam([torch.zeros(2)]).param_groups[0]:
        other = torch.optim.Adam([torch.zeros(2)], weight_decay=0.1, decoupled_weight_decay=True)
        assert describe(other) == describe(optimizer)


def test_betas_follow_a_schedule() -> None:
    parameters = named_parameters()
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    description = describe(optimizer)
    row = torch.ones(5)
    shard = ShardOptimizer(description, [row], [0])
    optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    shard.step([torch.ones(5)], numbers(optimizer))
    assert shard._torch.param_groups[0]["betas"] == (0.5, 0.9)


class Mine(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: Mine(p, lr=0.1), r"class='test_server_optimizers.Mine' .* one of SGD, Adagrad"),
        (lambda p: torch.optim.LBFGS(p), r"class='torch.optim.lbfgs.LBFGS'"),
        (lambda p: torch.optim.SGD(p, lr=math.nan), r"SGD group 0: lr=nan is not allowed; lr must be a finite"),
    ],
)
def test_what_a_server_does_not_run(make: Callable[[list[Tensor]], torch.optim.Optimizer], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        describe(make(named_parameters()))


def changed(**options: object) -> str:
    found = json.loads(describe(torch.optim.Adam(named_parameters())).text())
    for group in found["groups"]:
        for key, value in options.items():
            group.pop(key) if value is ... else group.update({key: value})
    return json.dumps(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not JSON"),
        ('{"class": "SGD"}', "not JSON"),
        ('{"class": "SGD", "groups": []}', "groups must be a list"),
        ('{"class": "SGD", "groups": [{}], "more": 1}', "groups must be a list"),
        ('{"class": "os.system", "groups": [{}]}', r"class='os.system' .* one of SGD"),
        ('{"class": ["SGD"], "groups": [{}]}', r"class=\['SGD'\]"),
        ('{"class": "SGD", "groups": [7]}', "options=7"),
        ('{"class": "SGD", "groups": [{}]}', "group 0: lr is missing"),
        (changed(lr=-1.0), r"lr=-1.0 .* >= 0"),
        (changed(lr=math.nan), "lr=nan"),
        (changed(lr="1"), "lr='1'"),
        (changed(lr=True), "lr=True"),
        (changed(lr=...), "lr is missing"),
        (changed(params=[1]), "unknown option 'params'"),
        (changed(foreach=True), "unknown option 'foreach'"),
        (changed(betas=[0.9]), "betas must be two numbers"),
        (changed(betas=[0.9, 1.0]), r"betas.1=1.0 .* >= 0 and < 1"),
        (changed(betas=0.9), "betas must be two numbers"),
        (changed(eps=-1e-9), "eps=-1e-09"),
        (changed(amsgrad=1), "amsgrad must be true or false"),
    ],
)
def test_malformed(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Description.parse(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "options=0 groups; there are 1"),
        ([{}, {}], "options=2 groups"),
        ([{"lr": -0.1}], r"Adam group 0: lr=-0.1"),
        ([{"lr": math.inf}], "lr=inf"),
        ([{"lr": 1e300}], r"lr=1e\+300 .* <= 1e\+10"),
        ([{"betas.0": 1.0}], r"betas.0=1.0"),
        ([{"betas.2": 0.5}], r"unknown number 'betas.2'; it has lr"),
        ([{"betas": 0.5}], "unknown number 'betas'"),
        ([{"amsgrad": 1.0}], "unknown number 'amsgrad'"),
        ([{"params": 1.0}], "unknown number 'params'"),
    ],
)
def test_options_of_a_push(options: list[dict[str, float]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        describe(torch.optim.Adam(named_parameters())).check(options)


def test_options_that_are_too_much_together() -> None:
    row = torch.ones(3)
    optimizer = torch.optim.NAdam([row], lr=1.0, betas=(math.nextafter(1.0, 0.0), 0.9), momentum_decay=1e10)
    shard = ShardOptimizer(describe(optimizer), [row], [0])
    assert not shard.step([torch.ones(3)], numbers(optimizer))


def test_what_torch_does_not_take() -> None:
    text = json.dumps({"class": "SGD", "groups": [dict(describe(torch.optim.SGD(named_parameters(), lr=1)).groups[0])]})
    description = Description.parse(text.replace('"nesterov": false', '"nesterov": true'))
    with pytest.raises(ConfigError, match="Nesterov"):
        ShardOptimizer(description, [torch.zeros(2)], [0])
