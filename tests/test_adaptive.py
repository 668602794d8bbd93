"""The adaptive threshold follows Deeplearning4j's rule, and clips the residual when it does."""

from __future__ import annotations

import math

import pytest
import torch

from gradcomp.compressors.adaptive import AdaptiveThreshold as Adaptive
from gradcomp.compressors.threshold import Threshold


def noise(numel: int, seed: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def test_the_defaults_are_deeplearning4js() -> None:
    c = Adaptive()
    assert (c.min_density, c.max_density, c.clip, c.clip_every) == (1e-4, 1e-2, 0.0, 5)
    assert c.decay**20 == pytest.approx(0.5)


def test_the_first_threshold_is_taken_from_the_first_gradient_that_is_not_zero() -> None:
    c = Adaptive(max_density=0.05)
    state = c.new_state(torch.zeros(20_000))
    for _ in range(2):
        assert c.compress(torch.zeros(20_000), state).count == 0
    grad = 1e-7 * noise(20_000, 0)
    packet = c.compress(grad, state)
    assert 0.02 < packet.count / 20_000 < 0.08
    assert float(state["tau"]) in (packet.scalar, pytest.approx(packet.scalar / c.decay))
    assert c.compress(grad).scalar == pytest.approx(packet.scalar)


def test_the_threshold_follows_the_share_sent() -> None:
    c = Adaptive(tau=1.0, min_density=0.25, max_density=0.5, decay=0.5, clip=0)
    state = c.new_state(torch.zeros(8))
    expected = 1.0
    for passing in (0, 1, 2, 4, 5, 8, 3, 0):
        state["residual"].zero_()
        grad = torch.zeros(8)
        grad[:passing] = 100.0
        packet = c.compress(grad, state)
        assert packet.scalar == expected
        assert packet.count == passing
        assert c.stats(packet, state) == {"tau": expected, "density": passing / 8}
        if passing / 8 < 0.25:
            expected *= 0.5
        elif passing / 8 > 0.5:
            expected /= 0.5
        assert float(state["tau"]) == expected


@pytest.mark.parametrize("tau", [1e-6, 10.0])
def test_the_share_comes_into_range_from_both_sides(tau: float) -> None:
    c = Adaptive(tau=tau, min_density=0.01, max_density=0.05, decay=0.8)
    state = c.new_state(torch.zeros(20_000))
    densities = [c.stats(c.compress(noise(20_000, step), state))["density"] for step in range(200)]
    assert not 0.01 <= densities[0] <= 0.05
    late = densities[120:]
    assert 0.01 / 2 < sum(late) / len(late) < 0.05 * 2


def test_the_residual_is_clipped_every_so_many_steps() -> None:
    c = Adaptive(tau=1.0, min_density=1e-9, max_density=1.0, clip=2.0, clip_every=3)
    state = c.new_state(torch.zeros(4))
    grad = torch.tensor([5.0, -5.0, 0.5, 0.0])
    largest = []
    for _ in range(8):
        c.compress(grad, state)
        largest.append(float(state["residual"].abs().max()))
    # Not at step 0; at steps 3 and 6 to 2 * tau. In between it grows by 4 a step.
    assert largest == [4.0, 8.0, 12.0, 2.0, 6.0, 10.0, 2.0, 6.0]
    assert state["residual"][3] == 0
    assert not c.conserves


def test_between_clippings_nothing_is_lost() -> None:
    c, plain = Adaptive(tau=0.5, clip=1.0, clip_every=100), Adaptive(tau=0.5, clip=0)
    assert plain.conserves
    assert set(plain.new_state(torch.zeros(3))) == {"residual", "tau"}
    state, given, sent = c.new_state(torch.zeros(1000)), torch.zeros(1000), torch.zeros(1000)
    for step in range(20):
        given += noise(1000, step)
        c.decompress_add(c.compress(noise(1000, step), state), sent)
    torch.testing.assert_close(sent + state["residual"], given, rtol=1e-5, atol=1e-5)


def test_at_the_same_tau_it_is_the_threshold() -> None:
    grad = noise(1000, 0)
    assert Adaptive(tau=0.5).encode(grad) == Threshold(tau=0.5).encode(grad)


def test_tau_stays_a_float32() -> None:
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    low = Adaptive(tau=tiny, decay=0.5)
    state = low.new_state(torch.zeros(4))
    low.compress(torch.zeros(4), state)
    assert float(state["tau"]) == tiny
    high = Adaptive(tau=huge, max_density=0.01, clip_every=1)
    state = high.new_state(torch.zeros(4))
    state["residual"].fill_(huge)
    for _ in range(3):
        assert not high.compress(torch.full((4,), 1e30), state).is_nonfinite
    assert math.isfinite(float(state["tau"]))
