"""The stochastic kernels in Triton give what the reference gives, bit for bit; so do their random numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from same import assert_same
from torch import Tensor
from triton_device import DEVICE

from gradcomp import kernels
from gradcomp.kernels import reference, reference_random, triton_random, triton_stochastic

# What overflows or is NaN is meant to be; under the interpreter NumPy has a word to say about it.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

KEY, STEP = 0xFEDC_BA98_7654_3210, (1 << 63) + 12345
FLOAT32_MAX = torch.finfo(torch.float32).max
TILE = 4096

# levels, norm, clip: 8, 2, 2, 4, 6 and 8 bits
STOCHASTIC = [(127, "max", 0.0), (1, "max", 0.0), (1, "max", 2.5), (5, "l2", 0.0), (20, "max", 0.0), (100, "max", 0.1)]


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def check(name: str, grad: Tensor, residual: Tensor | None, *options: Any) -> Any:
    """One of the encoders, with and without an update; the payload."""
    expected, payload = None, None
    for update in (False, True) if residual is not None else (False,):
        wanted, after = (None if residual is None else residual.clone() for _ in range(2))
        expected = getattr(reference, name)(grad, wanted, *options, KEY, STEP, update)
        payload = getattr(triton_stochastic, name)(grad, after, *options, KEY, STEP, update)
        assert_same(payload, expected)
        if residual is not None:
            assert_same(after, wanted)
    return payload


def check_all(grad: Tensor, residual: Tensor | None, block: int, options: list[tuple[int, str, float]]) -> None:
    for levels, norm, clip in options:
        check("encode_stochastic", grad, residual, levels, block, norm, clip)
    payload = check("encode_powers", grad, residual, block)
    if isinstance(payload, float):
        return
    nbytes = 4 * -(-grad.numel() // block)
    scales, codes = payload[:nbytes].view(torch.float32), payload[nbytes:]
    for scale, addend in ((1 / 3, None), (-1.0, grad)):
        wanted, out = normal(grad.numel(), 5), normal(grad.numel(), 5)
        reference.add_powers(wanted, scales, codes, block, scale, addend)
        triton_stochastic.add_powers(out, scales, codes, block, scale, addend)
        assert_same(out, wanted)


@pytest.mark.parametrize(
    ("key", "step", "start"), [(1, 0, 0), (KEY, (1 << 32) + 3, 5), ((1 << 64) - 1, (1 << 64) - 1, (1 << 35) - 70)]
)
def test_random_numbers(key: int, step: int, start: int) -> None:
    of_reference = reference_random.random_halves(key, step, start, 300, DEVICE)
    assert_same(triton_random.random_halves(key, step, start, 300, DEVICE), of_reference)
    for first in (start, (1 << 64) - 100 - start):
        of_reference = reference_random.philox(key, step, first, 77, DEVICE)
        assert_same(triton_random.philox(key, step, first, 77, DEVICE), of_reference)


@pytest.mark.parametrize("count", [0, 1, 6, 2049])
def test_random_words(count: int) -> None:
    stream = triton_random.new_stream(KEY, STEP, DEVICE)
    expected = reference_random.philox(KEY, STEP, 0, -(-count // 4), DEVICE).view(-1)[:count]
    assert_same(triton_random.random_words(stream, count), expected)


def test_no_random_numbers() -> None:
    assert triton_random.random_halves(KEY, STEP, 3, 0, DEVICE).shape == (0,)
    assert triton_random.philox(KEY, STEP, 3, 0, DEVICE).shape == (0, 4)


# The interpreter is slow: no product of all of these.
@pytest.mark.parametrize(
    ("numel", "block", "options"),
    [
        (0, 8, STOCHASTIC[:4]),
        (1, 512, STOCHASTIC[2:4]),
        (9, 24, STOCHASTIC[1:3]),
        (65, 8, STOCHASTIC[4:]),
        (1001, 24, STOCHASTIC[2:5]),
        (1001, 512, STOCHASTIC[:4]),
        (1001, 1 << 30, STOCHASTIC[3:5]),
    ],
)
def test_sizes(numel: int, block: int, options: list[tuple[int, str, float]]) -> None:
    check_all(normal(numel), None, block, options[:1])
    check_all(normal(numel), normal(numel, 1), block, options)


# Blocks that fill a tile, cross its edge, and take several; a last one that is not full.
@pytest.mark.parametrize(
    ("block", "options"),
    [(520, STOCHASTIC[2:3]), (TILE, STOCHASTIC[1:2]), (TILE + 8, STOCHASTIC[3:5]), (1 << 30, STOCHASTIC[:1])],
)
def test_blocks_and_tiles(block: int, options: list[tuple[int, str, float]]) -> None:
    numel = TILE + 1003
    check_all(normal(numel), normal(numel, 1), block, options)


@pytest.mark.parametrize(("dtype", "block"), [(torch.float16, 64), (torch.bfloat16, 1000)])
def test_half_precision(dtype: torch.dtype, block: int) -> None:
    grad = normal(1003).to(dtype)
    check_all(grad, None, block, STOCHASTIC[:1])
    check_all(grad, normal(1003, 1), block, STOCHASTIC[2:3])


SPECIAL = torch.tensor(
    [1e-45, -1e-45, 1e-40, -1e-40, 1.1754942e-38, 0.0, -0.0, FLOAT32_MAX, -FLOAT32_MAX, 1.0, -3.0, 1.8e38, 2.0, 2.5],
    device=DEVICE,
)


@pytest.mark.parametrize("block", [8, 24])
def test_denormals_zeros_and_the_largest(block: int) -> None:
    values = torch.cat([SPECIAL.repeat_interleave(24), SPECIAL.repeat(3)])
    check_all(values, None, block, STOCHASTIC[:1])
    residual = torch.cat([SPECIAL.flip(0).repeat_interleave(24), SPECIAL.flip(0).repeat(3)]) * 0.25
    check_all(values, residual, block, STOCHASTIC[1:4])
    check_all(values, -torch.zeros_like(values), block, STOCHASTIC[:1])


@pytest.mark.parametrize(
    ("bad", "position", "block", "options"),
    [
        ([math.nan], 0, 8, STOCHASTIC[1:2]),
        ([math.inf], 197, 24, STOCHASTIC[2:3]),
        ([-math.inf], 198, 1024, STOCHASTIC[3:4]),
        ([math.inf, -math.inf], 60, 8, STOCHASTIC[3:4]),
        ([math.inf, math.inf], 100, 64, STOCHASTIC[:1]),
    ],
)
def test_nonfinite_leaves_the_residual_alone(
    bad: list[float], position: int, block: int, options: list[tuple[int, str, float]]
) -> None:
    grad, residual = normal(200), normal(200, 1)
    grad[position : position + len(bad)] = torch.tensor(bad)
    check_all(grad, None, block, options)
    check_all(grad, residual, block, options)


def test_a_sum_that_overflows_leaves_the_residual_alone() -> None:
    grad = normal(TILE + 5)
    grad[-1] = FLOAT32_MAX
    check_all(grad, grad.clone(), 64, STOCHASTIC[1:2])


@pytest.mark.gpu
@pytest.mark.parametrize("block", [512, 1000, 1 << 30])
def test_a_gpu_and_a_cpu_compute_the_same(block: int) -> None:
    grad, residual = normal(3_000_017), normal(3_000_017, 1)
    for levels, norm, clip in STOCHASTIC:
        for update in (False, True):
            on_cpu, after = residual.cpu(), residual.clone()
            expected = kernels.encode_stochastic(grad.cpu(), on_cpu, levels, block, norm, clip, KEY, STEP, update)
            found = kernels.encode_stochastic(grad, after, levels, block, norm, clip, KEY, STEP, update)
            assert_same(found.cpu(), expected)
            assert_same(after.cpu(), on_cpu)
