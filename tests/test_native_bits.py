"""The native one-bit kernels give what the torch reference gives, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from same import assert_same
from torch import Tensor

from gradcomp import kernels
from gradcomp.kernels import native, reference
from gradcomp.kernels.reference_sums import lane_sums

pytestmark = pytest.mark.skipif(not native.enabled(), reason=f"no native kernels: {native.REASON}")

ALL_LEVELS = ["generic", "avx2", "avx512"]
LEVELS = ALL_LEVELS[: ALL_LEVELS.index(native.LEVEL) + 1] if native.AVAILABLE else []
SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 511, 512, 513, 1023, 1025, 1600, 4101]
SPLIT = 2 * (1 << 17) + 1003  # enough that two threads are used
FLOAT32_MAX = torch.finfo(torch.float32).max


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def copy(residual: Tensor | None) -> Tensor | None:
    return None if residual is None else residual.clone()


def check(grad: Tensor, residual: Tensor | None, block: int, threads: tuple[int, ...] = (1,)) -> None:
    for symmetric in (False, True):
        wanted = copy(residual)
        expected = reference.encode_bits(grad, wanted, block, symmetric, update=True)
        assert_same(reference.encode_bits(grad, residual, block, symmetric), expected)
        assert_same(kernels.encode_bits(grad, residual, block, symmetric), expected)
        for level in LEVELS:
            for count in threads:
                # A residual is finite, always: kernels that update it may rely on that.
                for update in (False, True) if residual is None or bool(residual.isfinite().all()) else (False,):
                    after = copy(residual)
                    found = native.module.encode_bits(grad, after, block, symmetric, update, count, level)
                    assert_same(found, expected)
                    if residual is not None:
                        assert_same(after, wanted if update else residual)
        if isinstance(expected, float):
            continue
        nbytes = 8 * -(-grad.numel() // block)
        scales, bits = expected[:nbytes].view(torch.float32), expected[nbytes:]
        start = normal(grad.numel(), 7)
        for addend in (None, grad):
            out = start.clone()
            reference.add_bits(out, scales.view(-1, 2), bits, block, addend)
            for level in LEVELS:
                for count in threads:
                    mine = start.clone()
                    native.module.add_bits(mine, scales, bits, block, addend, count, level)
                    assert_same(mine, out)
            mine = start.clone()
            kernels.add_bits(mine, scales.view(-1, 2), bits, block, addend)
            assert_same(mine, out)
        if residual is not None:
            committed = residual.clone()
            kernels.add_bits(committed, scales.view(-1, 2) * -1.0, bits, block, grad)
            assert_same(committed, wanted)


def check_signs(grad: Tensor, threads: tuple[int, ...] = (1,)) -> None:
    expected, codes = reference.pack_signs(grad), reference.pack_votes(grad)
    assert_same(kernels.pack_signs(grad), expected)
    assert_same(kernels.pack_votes(grad), codes)
    for level in LEVELS:
        for count in threads:
            assert_same(native.module.pack_signs(grad, count, level), expected)
            assert_same(native.module.pack_votes(grad, count, level), codes)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("block", [8, 24, 512, 520, 1024, 1 << 20])
def test_sizes_around_vectors_runs_and_blocks(numel: int, block: int) -> None:
    check(normal(numel), None, block)
    check(normal(numel), normal(numel, 1), block)


@pytest.mark.parametrize("numel", SIZES)
def test_signs_of_any_size(numel: int) -> None:
    check_signs(normal(numel))
    check_signs(normal(numel).round())


@pytest.mark.parametrize("block", [8, 1024, 1 << 30])
def test_threads(block: int) -> None:
    check(normal(SPLIT), normal(SPLIT, 1), block, threads=(1, 2, 5))
    check_signs(normal(SPLIT).round(), threads=(1, 2, 5))


@pytest.mark.parametrize("offset", range(1, 9))
def test_unaligned(offset: int) -> None:
    check(normal(300)[offset:], normal(300, 1)[300 - (300 - offset) :], 64)
    check_signs(normal(300)[offset:])


SPECIAL = torch.tensor([1e-45, -1e-45, 1e-40, -1e-40, 1.1754942e-38, 0.0, -0.0, FLOAT32_MAX, -FLOAT32_MAX, 1.0, -3.0])


@pytest.mark.parametrize("block", [8, 64, 1024])
def test_denormals_zeros_and_the_largest(block: int) -> None:
    check(SPECIAL.repeat(30), None, block)
    check(SPECIAL.repeat(30), SPECIAL.flip(0).repeat(30) * 0.25, block)
    for value in SPECIAL.tolist():
        check(torch.full((100,), value), torch.zeros(100), block)
    check_signs(SPECIAL.repeat(30))


@pytest.mark.parametrize(
    "bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [-math.inf, math.nan], [math.inf, math.inf]]
)
@pytest.mark.parametrize("position", [0, 5, 63, 64, 190, 197])
def test_nonfinite_leaves_the_residual_alone(bad: list[float], position: int) -> None:
    grad, residual = normal(200), normal(200, 1)
    grad[position : position + len(bad)] = torch.tensor(bad)
    for block in (8, 64, 1024):
        check(grad, None, block)
        check(grad, residual, block)
        check(residual, grad, block)
    expected = reference.pack_signs(grad)
    assert isinstance(expected, float)
    assert_same(kernels.pack_signs(grad), expected)
    for level in LEVELS:
        assert_same(native.module.pack_signs(grad, 1, level), expected)


def test_a_sum_that_overflows_leaves_the_residual_alone() -> None:
    grad = normal(3000)
    grad[2999] = FLOAT32_MAX
    check(grad, grad, 64)


def test_nonfinite_far_apart_is_summed_over_the_whole_tensor() -> None:
    grad = torch.zeros(SPLIT + (1 << 18))
    grad[3], grad[-3] = math.inf, -math.inf
    check(grad, None, 1024, threads=(1, 2))


# Few distinct values, so that blocks have one sign or none, and any float32 there is.
values = st.one_of(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1e-40, -1e-40]), st.floats(width=32))


@settings(deadline=None, max_examples=60)
@given(pairs=st.lists(st.tuples(values, values), max_size=150), block=st.sampled_from([8, 16, 64, 128]))
def test_any_values(pairs: list[tuple[float, float]], block: int) -> None:
    grad = torch.tensor([pair[0] for pair in pairs], dtype=torch.float32)
    residual = torch.tensor([pair[1] for pair in pairs], dtype=torch.float32)
    check(grad, None, block)
    check(grad, residual, block)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    grad, residual = normal(1003).to(dtype), normal(1003, 1)
    wanted, found = residual.clone(), residual.clone()
    expected = reference.encode_bits(grad, wanted, 64, update=True)
    assert_same(kernels.encode_bits(grad, found, 64, update=True), expected)
    assert_same(found, wanted)
    assert_same(kernels.pack_signs(grad), reference.pack_signs(grad))
    assert_same(kernels.pack_votes(grad), reference.pack_votes(grad))


@pytest.mark.parametrize("width", [8, 16, 24, 512, 520, 1024, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lane_sums_have_the_order_they_say(width: int, dtype: torch.dtype) -> None:
    data = (normal(3 * width) * 10 ** normal(3 * width, 1)).view(3, width).to(dtype)
    expected = []
    for row in data:
        total = 0.0
        for start in range(0, width, 512):
            lanes = [torch.zeros((), dtype=dtype) for _ in range(16)]
            for i, value in enumerate(row[start : start + 512]):
                lanes[i % 16] = lanes[i % 16] + value
            for half in (8, 4, 2, 1):
                lanes = [lanes[i] + lanes[i + half] for i in range(half)]
            total += lanes[0].item()
        expected.append(total)
    assert lane_sums(data).tolist() == expected


def test_symmetric_scales_are_the_mean_magnitude() -> None:
    found = reference.encode_bits(torch.tensor([1.0, -3.0, 0.0, 4.0] * 2 + [-2.0, 6.0]), None, 8, symmetric=True)
    assert not isinstance(found, float)
    assert found[:16].view(torch.float32).tolist() == [-2.0, 2.0, -4.0, 4.0]
    assert found[16:].tolist() == [0b00100010, 0b01]


@pytest.mark.parametrize("numel", [0, 1, 5, 999])
def test_votes_are_codes_of_two_bits(numel: int) -> None:
    grad = normal(numel).round()
    found = torch.zeros(numel)
    kernels.add_codes(found, torch.ones(1), reference.pack_votes(grad), 2, 0, 1.0)
    assert torch.equal(found, grad.sign())


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: native.module.encode_bits(torch.zeros(8), torch.zeros(9), 8, False, True, 1), ValueError),
        (lambda: native.module.encode_bits(torch.zeros(8), None, 12, False, True, 1), ValueError),
        (lambda: native.module.encode_bits(torch.zeros(8), None, 0, False, True, 1), ValueError),
        (lambda: native.module.encode_bits(torch.zeros(8).double(), None, 8, False, True, 1), TypeError),
        (lambda: native.module.encode_bits(torch.zeros(16)[::2], None, 8, False, True, 1), TypeError),
        (lambda: native.module.encode_bits(torch.zeros(8), None, 8, False, True, 1, "sse9"), ValueError),
        (
            lambda: native.module.add_bits(
                torch.zeros(9), torch.zeros(4), torch.zeros(1, dtype=torch.uint8), 8, None, 1
            ),
            ValueError,
        ),
        (
            lambda: native.module.add_bits(
                torch.zeros(9), torch.zeros(2), torch.zeros(2, dtype=torch.uint8), 8, None, 1
            ),
            ValueError,
        ),
        (
            lambda: native.module.add_bits(
                torch.zeros(9), torch.zeros(4), torch.zeros(2, dtype=torch.uint8), 8, torch.zeros(8), 1
            ),
            ValueError,
        ),
    ],
)
def test_what_they_cannot_read_is_refused(call: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        call()
