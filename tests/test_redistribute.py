"""Loading what N ranks held back on M: the sum over ranks stays, and training goes on in step."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from ranks import attach, parameters_of, run_ranks, train_step
from torch import nn

from gradcomp.errors import HandshakeError, StateError
from gradcomp.redistribute import needed

SPECS = [
    "threshold:density=0.05",
    "adaptive:tau=0.01,clip=5",
    "onebit:block=64",
    "topk:ratio=0.05",
    "dgc:ratio=0.05,momentum=0.9,warmup_steps=9",
    "qsgd:levels=7,bucket=64,feedback=true",
    "terngrad",
    "signsgd",
    "minmax:bits=4,block=64",
    "twobit",
    "dct",
    "powersgd:rank=2",
    "randomk:ratio=0.05",
    'scheduled:stages=[[3,"none"]],then="dgc:ratio=0.05,momentum=0.9"',
    "warmup:compressor=threshold,steps=9",
]
LINEAR = ["powersgd:rank=2", "randomk:ratio=0.05"]


def wide_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 640), nn.ReLU(), nn.Linear(640, 10))  # two_shot cuts the first


class Run:
    """One rank: a net that trains."""

    def __init__(self, transport: Any, **options: Any) -> None:
        self.net = wide_net()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.02)
        self.sync = attach(self.net, self.optimizer, transport, bucket_bytes=1 << 20, digest_every=1, **options)

    def train(self, *numbers: int) -> None:
        for number in numbers:
            train_step(self.net, self.optimizer, self.sync.rank, number)

    def saved(self) -> dict[str, Any]:
        return {"net": parameters_of(self.net), "sync": self.sync.state_dict()}

    def load(self, saved: list[dict[str, Any]]) -> None:
        for parameter, value in zip(self.net.parameters(), saved[0]["net"], strict=True):
            parameter.data.copy_(value)
        wanted = needed(self.sync.rank, self.sync.world_size, len(saved))
        self.sync.load_state_dicts(saved[rank]["sync"] for rank in wanted)


def held(saved: list[dict[str, Any]], field: str = "residual") -> dict[str, torch.Tensor]:
    """The sum over ranks and roles of all that is held back, float64, by parameter."""
    sums: dict[str, torch.Tensor] = {}
    for one in saved:
        shapes = one["sync"]["parameters"]
        for name, spans in one["sync"]["states"].items():
            total = sums.setdefault(name, torch.zeros(shapes[name], dtype=torch.float64).view(-1))
            for span, roles in spans.items():
                start, stop = map(int, span.split(":"))
                for state in roles.values():
                    for key, value in state.items():
                        if key.rpartition(".")[2] == field:
                            total[start:stop] += value
    return sums


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("spec", "exchange"),
    [(spec, exchange) for spec in SPECS for exchange in ("all_gather", "two_shot", "tree", "auto")]
    + [(spec, "all_reduce") for spec in LINEAR],
)
def test_four_then_two_then_three(spec: str, exchange: str) -> None:
    options = {"compressor": spec, "exchange": exchange}

    def start(transport: Any) -> dict[str, Any]:
        run = Run(transport, **options)
        with run.sync:
            run.train(0, 1, 2)
            return run.saved()

    def go_on(transport: Any, saved: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
        run = Run(transport, **options)
        with run.sync:
            run.load(saved)
            at_once = run.saved()
            assert at_once["sync"]["step"] == saved[0]["sync"]["step"]
            run.train(3, 4)
            run.sync.check_replicas()
            return at_once, run.saved()

    saved = run_ranks(4, start)
    for world_size in (2, 3):
        before = saved
        results = run_ranks(world_size, lambda transport, before=before: go_on(transport, before))
        resumed, saved = [r[0] for r in results], [r[1] for r in results]
        for field in ("residual", "momentum"):
            assert_close(held(resumed, field), held(before, field))
        for other in saved[1:]:
            assert all(torch.equal(a, b) for a, b in zip(saved[0]["net"], other["net"], strict=True))
        assert all(torch.isfinite(p).all() for p in saved[0]["net"])


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
@pytest.mark.parametrize("spec", ["threshold:density=0.05", "dgc:momentum=0.9", "qsgd:feedback=true", *LINEAR])
def test_the_same_ranks_resume_bit_for_bit(spec: str, exchange: str) -> None:
    options = {"compressor": spec, "exchange": exchange}

    def straight(transport: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        run = Run(transport, **options)
        with run.sync:
            run.train(0, 1)
            saved = run.saved()
            run.train(2, 3)
            return saved, run.saved()

    def resumed(transport: Any, saved: list[dict[str, Any]]) -> dict[str, Any]:
        run = Run(transport, **options)
        with run.sync:
            run.train(90)
            run.load(saved)
            run.train(2, 3)
            return run.saved()

    results = run_ranks(3, straight)
    for end, again in zip(
        [r[1] for r in results], run_ranks(3, lambda t: resumed(t, [r[0] for r in results])), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(end["net"], again["net"], strict=True))
        assert flat(end["sync"]).keys() == flat(again["sync"]).keys()
        assert all(torch.equal(value, flat(again["sync"])[key]) for key, value in flat(end["sync"]).items())


def flat(state_dict: dict[str, Any]) -> dict[tuple[str, ...], torch.Tensor]:
    return {
        (name, span, role, field): tensor
        for name, spans in state_dict["states"].items()
        for span, roles in spans.items()
        for role, fields in roles.items()
        for field, tensor in fields.items()
    }


def trained(world_size: int, **options: Any) -> list[dict[str, Any]]:
    def rank_main(transport: Any) -> dict[str, Any]:
        run = Run(transport, **options)
        with run.sync:
            run.train(0, 1, 2)
            return run.saved()

    return run_ranks(world_size, rank_main)


def loaded(world_size: int, saved: list[dict[str, Any]], **options: Any) -> list[dict[tuple[str, ...], torch.Tensor]]:
    def rank_main(transport: Any) -> dict[tuple[str, ...], torch.Tensor]:
        run = Run(transport, **options)
        with run.sync:
            run.load(saved)
            return flat(run.sync.state_dict())

    return run_ranks(world_size, rank_main)


def test_more_ranks_keep_residuals_as_they_were_and_the_new_one_begins_with_none() -> None:
    options = {"compressor": "threshold:density=0.05", "exchange": "all_gather"}
    saved = trained(2, **options)
    first, second, third = loaded(3, saved, **options)
    for rank, found in enumerate((first, second)):
        before = flat(saved[rank]["sync"])
        assert found.keys() == before.keys()
        assert all(torch.equal(found[key], before[key]) for key in before)
    for key, value in flat(saved[0]["sync"]).items():
        assert torch.equal(third[key], torch.zeros_like(value) if key[3] == "residual" else value)


def test_random_streams_go_on_under_keys_of_their_own() -> None:
    options = {"compressor": "qsgd:bucket=64", "exchange": "all_gather"}
    streams = [
        found["1.weight", "0:10240", "gradient", "random"] for found in loaded(3, trained(2, **options), **options)
    ]
    assert [int(stream[1]) for stream in streams] == [3, 3, 3]
    assert len({int(stream[0]) for stream in streams}) == 3


@pytest.mark.parametrize("spec", LINEAR)
def test_linear_compressors_agree_even_if_the_old_ranks_did_not(spec: str) -> None:
    """Two ranks go by all_gather, each with a basis of its own; three by all_reduce, which needs them alike."""
    options = {"compressor": spec, "exchange": "auto"}
    saved = trained(2, **options)
    saved[1]["sync"]["states"]["1.weight"]["0:10240"]["gradient"]["random"][1] = 17
    for other in (results := loaded(3, saved, **options))[1:]:
        for key, value in results[0].items():
            assert key[3] == "residual" or torch.equal(value, other[key])


def test_a_schedule_goes_on_where_shards_are_cut_elsewhere() -> None:
    options = {"compressor": 'scheduled:stages=[[2,"none"]],then="threshold"', "exchange": "two_shot"}
    for found in loaded(2, trained(4, **options), **options):
        steps = {key[:3]: int(value) for key, value in found.items() if key[3] == "step"}
        assert {role for *_, role in steps} == {"gradient", "sum"}
        assert set(steps.values()) == {3}


def test_another_exchange_on_as_many_ranks() -> None:
    saved = trained(2, compressor="topk:ratio=0.05", exchange="two_shot")
    results = loaded(2, saved, compressor="topk:ratio=0.05", exchange="all_gather")
    total: dict[str, torch.Tensor] = {}
    for found in results:
        assert {role for _, _, role, _ in found} == {"gradient"}
        for (name, *_), value in found.items():
            total[name] = total.get(name, torch.zeros(())) + value.double()
    assert_close(total, held(saved))


def test_what_waits_is_shared_out_too() -> None:
    def rank_main(transport: Any) -> dict[str, Any]:
        run = Run(transport, compressor="topk:ratio=0.05")
        with run.sync:
            run.train(0)
            run.sync.set_compressor("bf16")
            return run.saved()

    saved = run_ranks(3, rank_main)
    results = loaded(2, saved, compressor="bf16")
    assert all(role == "waiting" for found in results for _, _, role, _ in found)
    total = {
        name: sum(found[name, span, role, field].double() for found in results)
        for name, span, role, field in results[0]
    }
    assert_close(total, held(saved))


def refused(saved: list[dict[str, Any]], **options: Any) -> list[Exception]:
    """What each of two ranks says to ``saved``; neither may have changed."""

    def rank_main(transport: Any) -> Exception:
        run = Run(transport, **({"compressor": "topk:ratio=0.05"} | options))
        with run.sync:
            run.train(7)
            before = run.sync.state_dict()
            with pytest.raises((StateError, HandshakeError)) as caught:
                run.sync.load_state_dicts(one["sync"] for one in saved)
            after = run.sync.state_dict()
            assert before["step"] == after["step"]
            assert all(torch.equal(value, flat(after)[key]) for key, value in flat(before).items())
            run.train(8)
            return caught.value

    return run_ranks(2, rank_main)


def test_what_does_not_fit_is_refused_by_all_and_changes_nothing() -> None:
    saved = trained(3, compressor="topk:ratio=0.05")

    def damaged(**fields: Any) -> list[dict[str, Any]]:
        return [{"sync": one["sync"] | (fields if i == 0 else {})} for i, one in enumerate(saved)]

    shapes = saved[0]["sync"]["parameters"]
    held_back = saved[0]["sync"]["states"]["1.weight"]["0:10240"]["gradient"]["residual"]
    cases: list[tuple[list[dict[str, Any]], str]] = [
        ([], "no state"),
        (saved[:2], "rank 2 of 3 is missing"),
        ([*saved, saved[0]], "twice"),
        (damaged(format=2), "format"),
        (damaged(rank=3), "rank=3"),
        (damaged(world_size=4), "is one of"),
        (damaged(step=1), "of step"),
        (damaged(compressor='{"id": "none"}'), "compressor"),
        (damaged(parameters={}), "no parameter '1.weight'"),
        (damaged(parameters=shapes | {"other": [1]}), "'other'"),
        (damaged(parameters=shapes | {"1.weight": [64, 160]}), r"\[64, 160\] in the checkpoint, \[640, 16\] in"),
        (damaged(states={"other": {}}), "'other'"),
        (damaged(states={"1.weight": {"0:99999": {"gradient": {"residual": held_back}}}}), "0:99999"),
        (damaged(states={"1.weight": {"0:-1": {"gradient": {"residual": held_back}}}}), "0:-1"),
        (damaged(states={"1.weight": {"0:10240": {"gradient": {"residual": held_back[:5]}}}}), "5 elements"),
        (damaged(states={"1.weight": {"0:10240": {"gradient": {"tau": torch.zeros(())}}}}), "tau"),
    ]
    for states, match in cases:
        first, second = refused(states)
        errors = [error for error in (first, second) if isinstance(error, StateError)]
        assert errors, (match, first, second)
        assert any(re.search(match, str(error)) for error in errors), (match, str(first), str(second))


def test_a_state_that_does_not_fit_is_refused_on_as_many_ranks_too() -> None:
    saved = trained(2, compressor="topk:ratio=0.05")
    residual = {"1.weight": {"0:10240": {"gradient": {"residual": torch.zeros(5)}}}}
    first, second = refused([{"sync": saved[0]["sync"] | {"states": residual}}, saved[1]])
    assert isinstance(first, StateError)
    assert "0:10240" in str(first)
    assert isinstance(second, HandshakeError)
    assert (second.field, second.peer) == ("checkpoint", 0)


def test_who_needs_whom() -> None:
    assert needed(1, 3, 3) == {1: True}
    assert [needed(rank, 2, 4) for rank in range(2)] == [{0: True, 2: True}, {0: False, 1: True, 3: True}]
    assert [needed(rank, 3, 2) for rank in range(3)] == [{0: True}, {0: False, 1: True}, {0: False}]
