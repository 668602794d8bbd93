"""The native stochastic quantizers give what the torch reference gives, bit for bit; so do their random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from same import assert_same
from torch import Tensor

from gradcomp import kernels
from gradcomp.kernels import native, reference
from gradcomp.kernels.reference_stochastic import stochastic_limit

pytestmark = pytest.mark.skipif(not native.enabled(), reason=f"no native kernels: {native.REASON}")

ALL_LEVELS = ["generic", "avx2", "avx512"]
LEVELS = ALL_LEVELS[: ALL_LEVELS.index(native.LEVEL) + 1] if native.AVAILABLE else []
SIZES = [0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 511, 513, 1025, 1600]
SPLIT = 2 * (1 << 17) + 1003  # enough that two threads are used
FLOAT32_MAX = torch.finfo(torch.float32).max
KEY, STEP = 0xFEDC_BA98_7654_3210, (1 << 63) + 12345

# levels, norm, clip
STOCHASTIC = [(127, "max", 0.0), (1, "max", 0.0), (1, "max", 2.5), (5, "l2", 0.0), (100, "max", 0.5)]


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def check_encode(
    of_reference: Callable[..., Any],
    chosen: Callable[..., Any],
    of_native: Callable[..., Any],
    grad: Tensor,
    residual: Tensor | None,
    threads: tuple[int, ...],
) -> Any:
    """All of them called as f(grad, residual, update, threads, level); the payload."""
    wanted = None if residual is None else residual.clone()
    expected = of_reference(grad, wanted, True)
    after = None if residual is None else residual.clone()
    assert_same(chosen(grad, after, True), expected)
    if residual is not None:
        assert_same(after, wanted)
    for level in LEVELS:
        for count in threads:
            for update in (False, True):
                after = None if residual is None else residual.clone()
                assert_same(of_native(grad, after, update, count, level), expected)
                if residual is not None:
                    assert_same(after, wanted if update else residual)
    return expected


def check(
    grad: Tensor,
    residual: Tensor | None,
    block: int,
    threads: tuple[int, ...] = (1,),
    options: list[tuple[int, str, float]] = STOCHASTIC,
) -> None:
    for levels, norm, clip in options:
        limit = stochastic_limit(levels.bit_length() + 1)
        check_encode(
            lambda g, r, u, o=(levels, block, norm, clip): reference.encode_stochastic(g, r, *o, KEY, STEP, u),
            lambda g, r, u, o=(levels, block, norm, clip): kernels.encode_stochastic(g, r, *o, KEY, STEP, u),
            lambda g, r, u, n, level, o=(levels, block, norm == "l2", clip, limit): native.module.encode_stochastic(
                g, r, *o, KEY, STEP, u, n, level
            ),
            grad,
            residual,
            threads,
        )
    payload = check_encode(
        lambda g, r, u: reference.encode_powers(g, r, block, KEY, STEP, u),
        lambda g, r, u: kernels.encode_powers(g, r, block, KEY, STEP, u),
        lambda g, r, u, n, level: native.module.encode_powers(g, r, block, KEY, STEP, u, n, level),
        grad,
        residual,
        threads,
    )
    if isinstance(payload, float):
        return
    nbytes = 4 * -(-grad.numel() // block)
    scales, codes = payload[:nbytes].view(torch.float32), payload[nbytes:]
    for scale, addend in [(1.0, None), (1 / 3, grad), (-1.0, grad)]:
        wanted = normal(grad.numel(), 5)
        reference.add_powers(wanted, scales, codes, block, scale, addend)
        out = normal(grad.numel(), 5)
        kernels.add_powers(out, scales, codes, block, scale, addend)
        assert_same(out, wanted)
        for level in LEVELS:
            for count in threads:
                out = normal(grad.numel(), 5)
                native.module.add_powers(out, scales, codes, block, scale, addend, count, level)
                assert_same(out, wanted)


@pytest.mark.parametrize("step", [0, 1, (1 << 32) + 3, (1 << 64) - 1])
@pytest.mark.parametrize("key", [0, 1, KEY, (1 << 64) - 1])
@pytest.mark.parametrize("start", [0, 5, 64, (1 << 35) - 70])
def test_random_numbers(start: int, key: int, step: int) -> None:
    expected = reference.random_halves(key, step, start, 300)
    for level in LEVELS:
        assert_same(native.module.random_halves(key, step, start, 300, level), expected)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("block", [8, 40, 512, 1 << 20])
def test_sizes_around_vectors_groups_and_blocks(numel: int, block: int) -> None:
    check(normal(numel), None, block)
    check(normal(numel), normal(numel, 1), block)


@pytest.mark.parametrize("block", [24, 512, 1 << 30])
def test_threads(block: int) -> None:
    check(normal(SPLIT), normal(SPLIT, 1), block, threads=(1, 2, 5), options=[STOCHASTIC[0], STOCHASTIC[2]])


@pytest.mark.parametrize("offset", [1, 3, 7])
def test_unaligned(offset: int) -> None:
    check(normal(300)[offset:], normal(300, 1)[: 300 - offset], 64)


SPECIAL = torch.tensor(
    [1e-45, -1e-45, 1e-40, -1e-40, 1.1754942e-38, 0.0, -0.0, FLOAT32_MAX, -FLOAT32_MAX, 1.0, -3.0, 1.8e38, 2.0, 2.5]
)


@pytest.mark.parametrize("block", [8, 64, 1024])
def test_denormals_zeros_and_the_largest(block: int) -> None:
    check(SPECIAL.repeat(30), None, block)
    check(SPECIAL.repeat(30), SPECIAL.flip(0).repeat(30) * 0.25, block)
    for value in SPECIAL.tolist():
        check(torch.full((100,), value), torch.zeros(100), block)
        check(torch.full((100,), value), -torch.zeros(100), block)


@pytest.mark.parametrize(
    "bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [-math.inf, math.nan], [math.inf, math.inf]]
)
@pytest.mark.parametrize("position", [0, 63, 64, 197])
def test_nonfinite_leaves_the_residual_alone(bad: list[float], position: int) -> None:
    grad, residual = normal(200), normal(200, 1)
    grad[position : position + len(bad)] = torch.tensor(bad)
    for block in (8, 64, 1024):
        check(grad, None, block)
        check(grad, residual, block)


def test_a_sum_that_overflows_leaves_the_residual_alone() -> None:
    grad = normal(3000)
    grad[2999] = FLOAT32_MAX
    check(grad, grad.clone(), 64)


# Few distinct values, so that blocks are 0 or hold their scale often, and any float32 there is.
values = st.one_of(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1e-40, -2.0]), st.floats(width=32, allow_nan=False))


@settings(deadline=None, max_examples=40)
@given(
    pairs=st.lists(st.tuples(values, values), max_size=100),
    block=st.sampled_from([8, 16, 64]),
    options=st.sampled_from(STOCHASTIC),
)
def test_any_values(pairs: list[tuple[float, float]], block: int, options: tuple[int, str, float]) -> None:
    grad = torch.tensor([pair[0] for pair in pairs], dtype=torch.float32)
    residual = torch.tensor([pair[1] for pair in pairs], dtype=torch.float32)
    check(grad, None, block, options=[options])
    if bool(residual.isfinite().all()):
        check(grad, residual, block, options=[options])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    grad, residual = normal(1003).to(dtype), normal(1003, 1)
    wanted, found = residual.clone(), residual.clone()
    expected = reference.encode_stochastic(grad, wanted, 127, 64, "max", 0.0, KEY, STEP, True)
    assert_same(kernels.encode_stochastic(grad, found, 127, 64, "max", 0.0, KEY, STEP, True), expected)
    assert_same(found, wanted)
    expected = reference.encode_powers(grad, wanted, 64, KEY, STEP, True)
    assert_same(kernels.encode_powers(grad, found, 64, KEY, STEP, True), expected)
    assert_same(found, wanted)


def encode(*, levels: int = 1, block: int = 8, clip: float = 0.0, residual: Tensor | None = None) -> Any:
    return native.module.encode_stochastic(
        torch.zeros(8), residual, levels, block, False, clip, 1.0, KEY, STEP, False, 1
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: encode(levels=0),
        lambda: encode(levels=128),
        lambda: encode(block=0),
        lambda: encode(block=12),
        lambda: encode(clip=-1.0),
        lambda: encode(clip=math.nan),
        lambda: encode(residual=torch.zeros(9)),
        lambda: native.module.add_powers(
            torch.zeros(9), torch.ones(1), torch.zeros(9, dtype=torch.uint8), 8, 1.0, None, 1
        ),
        lambda: native.module.add_powers(
            torch.zeros(8), torch.ones(1), torch.zeros(9, dtype=torch.uint8), 8, 1.0, None, 1
        ),
    ],
)
def test_what_they_cannot_read_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"levels|block|clip|residual|codes"):
        call()
