"""Deep gradient compression does what its paper says, and keeps the invariants that hold with momentum and clipping."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from ranks import attach, run_ranks
from torch import Tensor, nn

from gradcomp.compressors.dgc import DeepGradientCompression as Dgc
from gradcomp.residual import clip_scale, warm_up_rung, warm_up_shares


def noise(numel: int, seed: int, heavy: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator)
    return values**5 if heavy else values


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_about_k_of_the_largest_are_sent(ratio: float, heavy: bool, momentum: float) -> None:
    numel = 300_001
    c = Dgc(ratio=ratio, momentum=momentum)
    grad = noise(numel, 1, heavy)
    packet = c.compress(grad, c.new_state(grad))
    wanted = math.ceil(ratio * numel)
    assert 0.6 * wanted < packet.count <= 1.25 * wanted
    index, _ = packet.index_set
    sent = torch.zeros(numel, dtype=torch.bool)
    sent[index] = True
    assert grad[sent].abs().min() > grad[~sent].abs().max()
    assert torch.equal(c.decompress(packet)[sent], grad[sent])


def test_a_sample_that_misleads_is_corrected_by_a_second_selection() -> None:
    # At every place that is sampled there is little: 100,000 elements pass, and the 50 largest of them are sent.
    grad = torch.linspace(1.0, 2.0, 200_000)
    grad[::5] = 1e-3  # the stride over 200,000 elements is odd: 5
    c = Dgc(k=50)
    packet = c.encode(grad)
    assert packet.count == 50
    assert packet.index_set[0].min() >= 200_000 - 63


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("clip", [0.0, 3.0])
def test_follows_the_algorithm_of_the_paper(nesterov: bool, masking: bool, clip: float) -> None:
    """Beside its listing, a line at a time; what is sent is taken from the packet."""
    c = Dgc(k=20, momentum=0.9, nesterov=nesterov, masking=masking, clip=clip)
    state = c.new_state(torch.zeros(500))
    u, v = torch.zeros(500), torch.zeros(500)
    for step in range(20):
        grad = noise(500, step)
        if step == 7:
            grad *= 0.01  # shorter than clip
        packet = c.compress(grad, state)
        if clip:
            grad = grad * clip_scale(grad, clip)
            assert torch.linalg.vector_norm(grad) < 3.001
        u = 0.9 * (u + grad) if nesterov else 0.9 * u + grad
        v = v + u + grad if nesterov else v + u
        index, _ = packet.index_set
        assert 1 <= len(index) <= 25
        torch.testing.assert_close(c.decompress(packet)[index], v[index])
        v[index] = 0.0
        if masking:
            u[index] = 0.0
        torch.testing.assert_close(state["residual"], v)
        torch.testing.assert_close(state["momentum"], u)
        assert not state["residual"][index].any()


def test_momentum_keeps_its_own_invariant() -> None:
    """What was sent and what waits is what a momentum optimizer would have made of the gradients (nothing masked)."""
    c = Dgc(ratio=0.01, momentum=0.9, masking=False)
    assert not c.conserves
    state = c.new_state(torch.zeros(2000))
    sent, velocity, wanted = torch.zeros(2000), torch.zeros(2000), torch.zeros(2000)
    for step in range(30):
        grad = noise(2000, step)
        c.decompress_add(c.compress(grad, state), sent)
        velocity = 0.9 * velocity + grad
        wanted += velocity
    torch.testing.assert_close(sent + state["residual"], wanted, rtol=1e-4, atol=1e-4)


def test_clipping_loses_what_it_cuts_off_and_nothing_else() -> None:
    c = Dgc(ratio=0.1, clip=1.0)
    assert not c.conserves
    assert Dgc().conserves
    state = c.new_state(torch.zeros(100))
    sent, wanted = torch.zeros(100), torch.zeros(100)
    for step in range(10):
        grad = noise(100, step) * (0.01 if step % 2 else 1.0)
        c.decompress_add(c.compress(grad, state), sent)
        norm = torch.linalg.vector_norm(grad)
        wanted += grad / norm if norm > 1.0 else grad
    torch.testing.assert_close(sent + state["residual"], wanted, rtol=1e-5, atol=1e-6)


def test_clip_scale_of_what_float32_cannot_square() -> None:
    assert clip_scale(torch.full((4,), 1e30), 1.0) == pytest.approx(5e-31, rel=1e-6)
    assert clip_scale(torch.full((4,), 0.5), 1.0) == 1.0
    assert clip_scale(torch.tensor([math.inf, 1.0]), 1.0) == 1.0
    assert clip_scale(torch.tensor([math.nan, 1.0]), 1.0) == 1.0
    assert clip_scale(torch.zeros(0), 1.0) == 1.0


def test_the_share_falls_exponentially_in_the_warm_up() -> None:
    c = Dgc(ratio=0.001, warmup_steps=8)
    grad = noise(100_000, 0)
    state = c.new_state(grad)
    counts = [c.compress(noise(100_000, step), state).count for step in range(12)]
    assert state["step"] == 12
    assert 20_000 < counts[0] <= 31_250
    assert all(later < 0.75 * earlier for earlier, later in pairwise(counts[:8]))
    assert all(50 < count <= 125 for count in counts[8:])
    assert c.max_nbytes(100_000) > 100_000
    assert c.typical_nbytes(100_000) == Dgc(ratio=0.001).typical_nbytes(100_000)


def test_a_step_that_is_not_finite_does_not_count() -> None:
    c = Dgc(warmup_steps=8, momentum=0.5)
    state = c.new_state(torch.zeros(10))
    assert c.compress(torch.full((10,), math.inf), state).is_nonfinite
    assert state["step"] == 0
    assert not state["momentum"].any()
    both = torch.tensor([math.inf, -math.inf])
    assert math.isnan(c.compress(both, c.new_state(both)).scalar)


def test_no_warm_up_where_the_share_is_large_already() -> None:
    assert Dgc(ratio=0.5, warmup_steps=8).max_nbytes(1000) == Dgc(ratio=0.5).max_nbytes(1000)
    assert Dgc(k=3, warmup_steps=8).encode(torch.ones(8)).count <= 3


@pytest.mark.parametrize(("start", "end"), [(0.25, 0.001), (0.5, 0.25), (0.25, 0.24), (1.0, 1e-6)])
def test_warm_up_shares(start: float, end: float) -> None:
    shares = warm_up_shares(start, end)
    assert shares[0] == start
    assert shares[-1] == end
    assert all(0.5 * a <= b * 1.0001 < a * 1.0002 for a, b in pairwise(shares))
    rungs = [warm_up_rung(step, 100, len(shares)) for step in range(101)]
    assert rungs == sorted(rungs)
    assert set(rungs) == set(range(len(shares)))
    assert rungs[99] == len(shares) - 2


@pytest.mark.parametrize("exchange", ["two_shot", "tree"])
@pytest.mark.parametrize(
    "spec",
    [
        "dgc:ratio=1.0,momentum=0.5,masking=false,clip=50",
        'scheduled:stages=[[2,"topk:ratio=1.0"]],then="dgc:ratio=1.0,momentum=0.5,masking=false"',
        'warmup:compressor="dgc:ratio=0.9,momentum=0.5,masking=false",start=1.0,steps=400',
    ],
)
def test_sums_that_are_compressed_again_get_momentum_and_clipping_once(spec: str, exchange: str) -> None:
    """Whoever sends everything gets what all_gather gives, however often it is compressed."""

    def rank_main(transport: Any, exchange: str) -> Tensor:
        weight = nn.Parameter(torch.zeros(1, 4000))  # one row is not cut: clipping is by pieces
        optimizer = torch.optim.SGD([weight], lr=1.0)
        with attach(None, optimizer, transport, compressor=spec, exchange=exchange, reduction="sum") as sync:
            for step in range(6):
                optimizer.zero_grad()
                gradient = torch.randn(1, 4000, generator=torch.Generator().manual_seed(100 * step + transport.rank))
                (weight * gradient).sum().backward()
                optimizer.step()
            states = sync.state_dict()["states"]["group0.0"]
            assert not any("momentum" in field for roles in states.values() for field in roles.get("sum", {}))
        return weight.detach()

    (expected, *_) = run_ranks(5, lambda transport: rank_main(transport, "all_gather"))
    assert float(expected.abs().mean()) > 0.3
    for found in run_ranks(5, lambda transport: rank_main(transport, exchange)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
