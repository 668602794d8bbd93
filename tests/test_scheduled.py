"""Schedules and warm-ups: one residual through all stages, and specs that nest."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ranks import attach, parameters_of, run_ranks, small_net, there_and_back, train_step

import gradcomp
from gradcomp.compressors.scheduled import Scheduled
from gradcomp.compressors.warmup import Warmup
from gradcomp.packet import Kind

SPEC = (
    'scheduled:stages=[[2,"none"],[4,"topk:ratio=0.1"],[6,"fp16"],[8,"threshold:density=0.01"]],then="onebit:block=64"'
)
KINDS = [Kind.DENSE_F32] * 2 + [Kind.VALUES] * 2 + [Kind.DENSE_F16] * 2 + [Kind.SIGNS] * 2 + [Kind.BITS] * 3


def noise(numel: int, seed: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def test_specs_parse_and_nest() -> None:
    c = gradcomp.compressor(SPEC)
    assert isinstance(c, Scheduled)
    assert [until for until, _ in c.stages] == [2, 4, 6, 8]
    assert c.stages[1][1] == gradcomp.compressor("topk:ratio=0.1")
    assert gradcomp.compressor(c.config()) == c
    inner = 'warmup:compressor=\\"topk:ratio=0.01\\",steps=5'
    nested = gradcomp.compressor(f'scheduled:stages=[[3,"{inner}"],[9,{{"id":"topk","k":2}}]],then=none')
    assert isinstance(nested, Scheduled)
    assert nested.stages == (
        (3, Warmup(compressor=gradcomp.compressor("topk:ratio=0.01"), steps=5)),
        (9, gradcomp.compressor("topk:k=2")),
    )
    assert nested.then == gradcomp.compressor("none")


def test_format_spec_is_read_back() -> None:
    from gradcomp.registry import compressor, format_spec

    for spec in (SPEC, "none", "topk:k=7", "dgc:momentum=0.9,nesterov=true", 'warmup:compressor="topk:ratio=0.125"'):
        assert compressor(format_spec(compressor(spec))) == compressor(spec)
    assert format_spec(compressor("dgc:momentum=0.5,k=3")) == "dgc:k=3,momentum=0.5"
    assert format_spec(compressor("adaptive")) == "adaptive"


def test_stages_change_at_their_steps_and_nothing_is_lost() -> None:
    c = gradcomp.compressor(SPEC)
    state = c.new_state(torch.zeros(1000))
    assert set(state) == {"residual", "step", "3.tau"}
    given, sent = torch.zeros(1000, dtype=torch.float64), torch.zeros(1000)
    for step, kind in enumerate(KINDS):
        given += noise(1000, step)
        packet = c.encode(noise(1000, step), state)
        assert packet.kind == kind
        assert set(c.stats(packet, state)) <= {"tau", "density"}
        assert c.compress(noise(1000, step), state) == packet
        c.decompress_add(packet, sent)
        torch.testing.assert_close((sent + state["residual"]).double(), given, rtol=1e-5, atol=1e-5)
        if kind == Kind.DENSE_F32:
            assert not state["residual"].any()
        if kind == Kind.DENSE_F16:
            assert 0 < state["residual"].abs().max() < 0.01
    assert int(state["step"]) == len(KINDS)


def test_a_dense_stage_sends_what_the_stage_before_held_back() -> None:
    c = gradcomp.compressor('scheduled:stages=[[1,"topk:k=1"]],then="none"')
    state = c.new_state(torch.zeros(3))
    assert c.decompress(c.compress(torch.tensor([1.0, 2.0, 3.0]), state)).tolist() == [0, 0, 3]
    assert c.decompress(c.compress(torch.tensor([0.5, 0.5, 0.5]), state)).tolist() == [1.5, 2.5, 0.5]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_dense_stage_keeps_what_is_not_finite_out_of_the_residual(value: float) -> None:
    c = gradcomp.compressor('scheduled:stages=[[9,"fp16"]],then="topk"')
    state = c.new_state(torch.zeros(3))
    c.compress(torch.tensor([0.1, 0.2, 0.3]), state)
    before = {field: tensor.clone() for field, tensor in state.items()}
    packet = c.compress(torch.tensor([1.0, value, 2.0]), state)
    assert packet.is_nonfinite
    assert all(torch.equal(before[field], state[field]) for field in state)


def test_momentum_and_thresholds_belong_to_their_stage() -> None:
    c = gradcomp.compressor('scheduled:stages=[[1,"dgc:momentum=0.9"]],then="adaptive:clip=0,tau=0.5"')
    assert not c.conserves
    assert gradcomp.compressor(SPEC).conserves
    state = c.new_state(torch.zeros(100))
    assert set(state) == {"residual", "step", "0.momentum", "1.tau"}
    c.compress(noise(100, 0), state)
    assert state["0.momentum"].any()
    assert float(state["1.tau"]) == 0.5
    c.compress(noise(100, 1), state)
    assert float(state["1.tau"]) > 0.5


def test_bounds_cover_every_stage() -> None:
    c = gradcomp.compressor(SPEC)
    assert c.max_nbytes(1000) == gradcomp.compressor("none").max_nbytes(1000)
    assert c.typical_nbytes(1000) == gradcomp.compressor("onebit:block=64").typical_nbytes(1000)


def test_a_warm_up_ends_where_the_compressor_is() -> None:
    c = gradcomp.compressor('warmup:compressor="threshold:density=0.002",steps=50,start=0.3')
    plain = gradcomp.compressor("threshold:density=0.002")
    state = c.new_state(torch.zeros(20_000))
    assert set(state) == {"residual", "step", "0.tau"}
    densities = [c.compress(noise(20_000, step), state).count / 20_000 for step in range(70)]
    assert 0.1 < densities[0] < 0.4
    assert sum(densities[40:50]) < sum(densities[20:30]) < sum(densities[:10])
    own = {"residual": state["residual"].clone(), "tau": state["0.tau"].clone()}
    grad = noise(20_000, 99)
    assert c.compress(grad, state) == plain.compress(grad, own)


def test_a_warm_up_of_dgc_keeps_its_momentum() -> None:
    c = gradcomp.compressor('warmup:compressor="dgc:ratio=0.01,momentum=0.9,masking=false",steps=4')
    state = c.new_state(torch.zeros(500))
    velocity = torch.zeros(500)
    for step in range(8):
        c.compress(noise(500, step), state)
        velocity = 0.9 * velocity + noise(500, step)
        torch.testing.assert_close(state["0.momentum"], velocity)


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
def test_a_checkpoint_restores_the_stage(exchange: str) -> None:
    def rank_main(transport: Any, resumed: bool) -> list[torch.Tensor]:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        options = {"exchange": exchange, "digest_every": 1}
        with attach(net, optimizer, transport, compressor=SPEC, **options) as sync:
            for step in range(5):
                train_step(net, optimizer, sync.rank, step)
            if resumed:
                there_and_back(net, optimizer, sync, range(90, 93))
            for step in range(5, 10):
                train_step(net, optimizer, sync.rank, step)
        return parameters_of(net)

    straight = run_ranks(3, lambda t: rank_main(t, False))
    resumed = run_ranks(3, lambda t: rank_main(t, True))
    for other in (*straight[1:], *resumed):
        assert all(torch.equal(p, q) for p, q in zip(straight[0], other, strict=True))


def test_random_numbers_are_seeded_stage_by_stage() -> None:
    seeded: list[tuple[str, int]] = []

    class Seeded(gradcomp.Compressor):
        id = "seeded"
        conserves = True

        def config(self) -> dict[str, object]:
            return {"id": "seeded"}

        def seed_state(self, state: dict[str, torch.Tensor], *, parameter: str, rank: int) -> None:
            seeded.append((parameter, rank))
            state["random"] = torch.tensor([rank])

        def new_state(self, grad: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"random": torch.zeros(1, dtype=torch.int64)}

        def encode(self, grad: torch.Tensor, state: Any = None) -> Any:
            return gradcomp.compressor("none").encode(grad)

        def commit(self, grad: torch.Tensor, packet: Any, state: Any) -> None:
            state["random"] = state["random"] + 1

        def decode_add(self, packet: Any, out: torch.Tensor, scale: float) -> None:
            gradcomp.compressor("none").decode_add(packet, out, scale)

        def max_nbytes(self, numel: int) -> int:
            return 32 + 4 * numel

    c = Scheduled(stages=((1, gradcomp.compressor("topk")), (3, Seeded())), then=gradcomp.compressor("topk"))
    state = c.new_state(torch.zeros(4))
    c.seed_state(state, parameter="w", rank=7)
    assert seeded == [("w stage 1", 7)]
    assert state["1.random"].tolist() == [7]
    for _ in range(4):
        c.compress(torch.ones(4), state)
    assert state["1.random"].tolist() == [9]
