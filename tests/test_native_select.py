"""The native selection kernels give what the torch reference gives, bit for bit, residual and all."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from same import assert_same, bits
from torch import Tensor

from gradcomp import kernels
from gradcomp.kernels import native, reference

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason=f"no native kernels: {native.REASON}")

Found = tuple[Tensor, int] | float

ALL_LEVELS = ["generic", "avx2", "avx512"]
LEVELS = ALL_LEVELS[: ALL_LEVELS.index(native.LEVEL) + 1] if native.AVAILABLE else []
SIZES = [0, 1, 2, 7, 8, 9, 31, 33, 63, 64, 65, 127, 128, 129, 1000, 4096 + 5]
LONG = 2 * (1 << 17) + 77  # enough for two threads
FLOAT32_MAX = torch.finfo(torch.float32).max


def check(
    ours: Callable[..., Found], theirs: Callable[..., Found], grad: Tensor, residual: Tensor | None, option: float
) -> None:
    """Compare every level, on one thread and on two; what is left goes nowhere, or to either input."""
    for where in ("nowhere", "residual", "grad"):
        if where != "nowhere" and residual is None:
            continue
        g, r = grad.clone(), None if residual is None else residual.clone()
        left = {"nowhere": None, "residual": r, "grad": g}[where]
        expected = theirs(g, r, option, left=left)
        if isinstance(expected, float) and r is not None and residual is not None:
            assert torch.equal(bits(r), bits(residual))
            if where == "residual" and not bool(residual.isfinite().all()):
                continue  # what was broken before may be broken otherwise afterwards
        for level in LEVELS:
            for threads in (1, 2):
                g2, r2 = grad.clone(), None if residual is None else residual.clone()
                left2 = {"nowhere": None, "residual": r2, "grad": g2}[where]
                assert_same(ours(g2, r2, option, left2, threads, level), expected)
                if r is not None and r2 is not None:
                    assert torch.equal(bits(r2), bits(r))
                if where != "grad":
                    assert torch.equal(bits(g2), bits(grad))
                elif not isinstance(expected, float):
                    assert torch.equal(bits(g2), bits(g))


def check_signs(grad: Tensor, residual: Tensor | None, tau: float) -> None:
    check(native.module.encode_signs, reference.encode_signs, grad, residual, tau)


def check_largest(grad: Tensor, residual: Tensor | None, k: int) -> None:
    check(native.module.encode_largest, reference.encode_largest, grad, residual, k)


def check_above(grad: Tensor, residual: Tensor | None, tau: float, most: int, k: int) -> None:
    def ours(grad: Tensor, held: Tensor | None, tau: float, left: Tensor | None, threads: int, level: str) -> Found:
        return native.module.encode_above(grad, held, tau, most, k, left, threads, level)

    def theirs(grad: Tensor, held: Tensor | None, tau: float, *, left: Tensor | None) -> Found:
        return reference.encode_above(grad, held, tau, most, k, left=left)

    check(ours, theirs, grad, residual, tau)


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("tau", [0.0, 1e-3, 1.0, 2.5, 100.0])
def test_signs_of_sizes_around_the_vector_width(numel: int, tau: float) -> None:
    check_signs(normal(numel), None, tau)
    check_signs(normal(numel), normal(numel, 1), tau)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("k", [1, 3, 64, 1000, 10**6])
def test_largest_of_sizes_around_the_vector_width(numel: int, k: int) -> None:
    check_largest(normal(numel), None, k)
    check_largest(normal(numel), normal(numel, 1), k)


@pytest.mark.parametrize("tau", [0.0, 0.5, 3.0, 10.0])
def test_signs_on_several_threads(tau: float) -> None:
    check_signs(normal(LONG), normal(LONG, 1), tau)


@pytest.mark.parametrize("numel", [0, 1, 65, 1000, LONG])
@pytest.mark.parametrize(("most", "k"), [(1, 1), (50, 30), (10**6, 10**6)])
def test_above_a_threshold(numel: int, most: int, k: int) -> None:
    for tau in (0.0, 2.0, 100.0):
        check_above(normal(numel), None, tau, most, k)
        check_above(normal(numel), normal(numel, 1), tau, most, k)


@pytest.mark.parametrize("k", [1, 100, 5000, LONG // 3, LONG])
def test_largest_on_several_threads(k: int) -> None:
    check_largest(normal(LONG), normal(LONG, 1), k)


def test_largest_where_the_sample_misleads() -> None:
    # The sample sees 0 only, or the few large elements only.
    grad = torch.zeros(LONG)
    grad[1000:1300] = normal(300)
    check_largest(grad, None, 200)
    check_largest(grad, normal(LONG, 1) * 1e-3, 200)
    grad = torch.ones(LONG) * 1e-3
    grad[::5] = 3.0
    check_largest(grad, None, LONG // 4 - 5)
    grad[::5] = 1e-30
    check_largest(grad, torch.zeros(LONG), LONG // 8)


def test_equal_magnitudes_go_by_index() -> None:
    grad = torch.ones(LONG)
    grad[::2] = -1.0
    for k in (1, 7, 1000):
        check_largest(grad, None, k)
        check_largest(grad, torch.zeros(LONG), k)
    check_largest(torch.zeros(100), None, 5)


@pytest.mark.parametrize("offset", range(1, 9))
def test_unaligned(offset: int) -> None:
    check_signs(normal(300)[offset:], None, 1.5)
    check_signs(normal(300)[offset:200], normal(300, 1)[100 : 300 - offset], 1.5)
    check_largest(normal(300)[offset:200], normal(300, 1)[100 : 300 - offset], 20)


def test_one_element_passes_wherever_it_is() -> None:
    for position in range(200):
        grad = torch.zeros(200)
        grad[position] = -1.0
        check_signs(grad, None, 0.5)
        check_largest(grad, None, 1)


def test_the_threshold_itself_does_not_pass() -> None:
    tau = float(torch.tensor(1e-3))
    up, down = (torch.nextafter(torch.tensor(tau), torch.tensor(limit)) for limit in (1.0, 0.0))
    grad = torch.stack([torch.tensor(tau), torch.tensor(-tau), up, -up, down, -down])
    _, count = kernels.encode_signs(grad, None, tau)  # type: ignore[misc]
    assert count == 2
    check_signs(grad.repeat(20), torch.zeros(120), tau)
    check_signs(grad.repeat(20), torch.zeros(120), 1e-3)  # not a float32: rounded as torch rounds it


@pytest.mark.parametrize("tau", [0.0, 1e-45, 1e-40, 1.2e-38, 1.0, FLOAT32_MAX])
def test_denormals_zeros_and_the_largest(tau: float) -> None:
    tiny = torch.tensor([1e-45, -1e-45, 1e-40, -1e-40, 1.1754942e-38, 0.0, -0.0, FLOAT32_MAX, -FLOAT32_MAX])
    check_signs(tiny.repeat(20), None, tau)
    check_signs(tiny.repeat(20), tiny.flip(0).repeat(20).mul(0.25), tau)
    check_signs(-torch.zeros(130), -torch.zeros(130), tau)
    check_largest(tiny.repeat(20), tiny.flip(0).repeat(20).mul(0.25), 33)


@pytest.mark.parametrize(
    "bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [-math.inf, math.nan], [math.inf, math.inf]]
)
@pytest.mark.parametrize("position", [0, 5, 63, 64, 190, 197])
@pytest.mark.parametrize("tau", [0.0, 1.0, FLOAT32_MAX])
def test_nonfinite(bad: list[float], position: int, tau: float) -> None:
    grad, residual = normal(200), normal(200, 1)
    grad[position : position + len(bad)] = torch.tensor(bad)
    check_signs(grad, None, tau)
    check_signs(grad, residual, tau)
    check_signs(residual, grad, tau)
    check_largest(grad, residual, 9)


def test_nonfinite_on_another_thread() -> None:
    grad, residual = normal(LONG), normal(LONG, 1)
    grad[-1] = math.nan
    check_signs(grad, residual, 1.0)
    check_largest(grad, residual, 100)


@pytest.mark.parametrize("large", [FLOAT32_MAX, 2.0**102, 2.0**103, 1e31])
def test_a_sum_that_overflows_leaves_the_residual(large: float) -> None:
    # The residual is finite, the gradient is finite, their sum is not: found at the end, when most is done.
    grad, residual = normal(LONG), normal(LONG, 1)
    grad[-1], residual[-1] = -large, -FLOAT32_MAX
    check_signs(grad, residual, 1.0)
    check_largest(grad, residual, 50)


def test_below_a_power_of_two_no_sum_overflows() -> None:
    below = math.nextafter(2.0**102, 0.0)
    grad = torch.full((100,), torch.tensor(2.0**102).nextafter(torch.tensor(0.0)).item())
    assert float(grad[0]) <= below
    assert bool((grad + torch.full((100,), FLOAT32_MAX)).isfinite().all())
    check_signs(grad, torch.full((100,), FLOAT32_MAX), 1.0)


# Few distinct values, so that sums cancel and hit the threshold, and any float32 there is.
values = st.one_of(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1e-40]), st.floats(width=32))


@settings(deadline=None)
@given(
    pairs=st.lists(st.tuples(values, values), max_size=150),
    tau=st.floats(0.0, FLOAT32_MAX, width=32),
    k=st.integers(1, 150),
)
def test_any_values(pairs: list[tuple[float, float]], tau: float, k: int) -> None:
    grad = torch.tensor([pair[0] for pair in pairs], dtype=torch.float32)
    residual = torch.tensor([pair[1] for pair in pairs], dtype=torch.float32)
    check_signs(grad, None, tau)
    check_signs(grad, residual, tau)
    check_largest(grad, residual, k)


@pytest.mark.parametrize("numel", [1, 5, 1000, 70_000, LONG])
@pytest.mark.parametrize("density", [1e-4, 0.01, 1.0])
def test_samples(numel: int, density: float) -> None:
    for grad in (normal(numel), torch.zeros(numel)):
        for residual in (None, normal(numel, 1)):
            for weight in (1.0, 0.7):
                ours = kernels.sample_largest(grad, residual, density, weight)
                theirs = reference.sample_largest(grad, residual, density, weight)
                assert torch.equal(bits(ours), bits(theirs))


def test_samples_put_what_is_not_finite_first() -> None:
    grad = normal(1000)
    grad[3], grad[7], grad[11] = math.inf, math.nan, -math.inf
    found = kernels.sample_largest(grad, None, 0.004)
    assert math.isnan(found[0])
    assert found[1:3].tolist() == [math.inf, math.inf]
    assert kernels.sample_largest(torch.empty(0), None, 0.5).tolist() == []


def check_sampled(grad: Tensor, residual: Tensor, tau: float, density: float, weight: float) -> None:
    """Compare every level, on one thread and on two; what is left goes to either input, or elsewhere."""
    stride, count = reference.sample_size(grad.numel(), density)
    for where in range(3):
        g, r = grad.clone(), residual.clone()
        left = (g, r, torch.empty_like(r))[where]
        expected = reference.encode_signs_sampled(g, r, tau, density, weight, left=left)
        if not isinstance(expected, float):
            assert expected[2] == reference.sample_threshold(grad, left, density, weight)
        for level in LEVELS:
            for threads in (1, 2):
                g2, r2 = grad.clone(), residual.clone()
                left2 = (g2, r2, torch.empty_like(r2))[where]
                arguments = (g2, r2, tau, stride, count, weight, left2, threads, level)
                found = native.module.encode_signs_sampled(*arguments)
                if isinstance(expected, float) or isinstance(found, float):
                    assert_same(found, expected)  # type: ignore[arg-type]
                    assert where != 1 or torch.equal(bits(r2), bits(residual))
                    continue
                assert_same(found[:2], expected[:2])
                assert found[2] == expected[2]
                assert torch.equal(bits(left2), bits(left))


@pytest.mark.parametrize("numel", [1, 2, 63, 64, 129, 1000, 4101, LONG])
@pytest.mark.parametrize("density", [1e-4, 0.01, 1.0])
def test_signs_with_a_sample(numel: int, density: float) -> None:
    for tau in (0.0, 1.5, FLOAT32_MAX):
        check_sampled(normal(numel), normal(numel, 1), tau, density, 0.7)
    check_sampled(torch.zeros(numel), torch.zeros(numel), 1.0, density, 1.0)


def test_signs_with_a_sample_at_strides_that_miss_the_chunks() -> None:
    for stride in (1, 3, 63, 65, 127, 129, 1000, 5000):
        grad, left = normal(LONG), normal(LONG, 1)
        expected = (grad[::stride] * 0.7 + (left + grad)[::stride]).abs().topk(40).values
        found = native.module.encode_signs_sampled(grad, left, FLOAT32_MAX, stride, 40, 0.7, left, 2)
        assert not isinstance(found, float)
        assert found[2] == reference.best_threshold(expected)


def test_signs_with_a_sample_of_equal_denormal_and_large_values() -> None:
    tiny = torch.tensor([1e-45, -1e-45, 1e-40, 0.0, -0.0, 1.0, -1.0]).repeat(40)
    check_sampled(tiny, torch.zeros(280), 0.5, 0.3, 0.7)
    check_sampled(torch.full((9000,), 1e-45), torch.zeros(9000), 1.0, 0.01, 0.7)
    check_sampled(torch.full((9000,), 2.0), torch.ones(9000), 1.0, 0.01, 0.7)
    grad, residual = normal(5000), normal(5000, 1)
    grad[7] = 3e38  # weight * grad + left overflows where acc did not: no threshold to go by
    residual[7] = 0.3e38
    check_sampled(grad, residual, 1.0, 1.0, 1.0)
    for bad in (math.nan, math.inf):
        grad[4999] = bad
        check_sampled(grad, residual, 1.0, 0.01, 0.7)


@pytest.mark.parametrize("numel", [0, 1, 5, 1000, 70_000])
def test_thresholds_of_samples(numel: int) -> None:
    for grad in (normal(numel), torch.zeros(numel), normal(numel) ** 9):
        for residual in (None, normal(numel, 1)):
            for density in (1e-3, 0.3):
                ours = kernels.sample_threshold(grad, residual, density, 0.7)
                assert ours == reference.sample_threshold(grad, residual, density, 0.7)
    assert kernels.sample_threshold(torch.tensor([math.inf, 1.0]), None, 1.0) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    grad, residual = normal(1000).to(dtype), normal(1000, 1)
    left = residual.clone()
    ours = kernels.encode_signs(grad, left, 1.0, left=left)
    assert_same(ours, reference.encode_signs(grad, residual, 1.0, left=residual))
    assert torch.equal(bits(left), bits(residual))


def test_results_outlive_their_inputs_and_are_ordinary_tensors() -> None:
    found = kernels.encode_signs(normal(1000).requires_grad_(), None, 1.0)
    assert not isinstance(found, float)
    kept = found[0].clone()
    for seed in range(20):
        kernels.encode_signs(normal(1000, seed), None, 1.0)
    assert torch.equal(found[0], kept)
    found[0].add_(1)
    assert torch.equal(found[0], kept + 1)


def test_threads_at_once() -> None:
    grads = [normal(200_000, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda grad: kernels.encode_signs(grad, None, 2.0), grads, timeout=30))
    for grad, ours in zip(grads, found, strict=True):
        assert_same(ours, reference.encode_signs(grad, None, 2.0))


@pytest.mark.parametrize(
    ("grad", "residual", "tau", "level", "error"),
    [
        (torch.zeros(4), torch.zeros(3), 1.0, "generic", ValueError),
        (torch.zeros(4), None, -1.0, "generic", ValueError),
        (torch.zeros(4), None, math.nan, "generic", ValueError),
        (torch.zeros(4), None, math.inf, "generic", ValueError),
        (torch.zeros(4), None, 1.0, "sse9", ValueError),
        (torch.zeros(2, 2), None, 1.0, "generic", TypeError),
        (torch.zeros(8)[::2], None, 1.0, "generic", TypeError),
        (torch.zeros(4, dtype=torch.float64), None, 1.0, "generic", TypeError),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32), 1.0, "generic", TypeError),
    ],
)
def test_what_it_cannot_read_is_refused(
    grad: Tensor, residual: Tensor | None, tau: float, level: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        native.module.encode_signs(grad, residual, tau, None, 1, level)


@pytest.mark.parametrize("align", [1, 64, 1024])
@pytest.mark.parametrize("numel", [0, 1, 63, 1 << 17, (1 << 31) + 5, (1 << 40) + 1])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_ranges_of_threads(numel: int, align: int, threads: int) -> None:
    starts = native.module.split(numel, align, threads)
    assert starts[0] == 0
    assert starts[-1] == numel
    assert 2 <= len(starts) <= threads + 1
    assert starts == sorted(starts)
    assert all(start % align == 0 for start in starts[:-1])
    longest = max(b - a for a, b in pairwise(starts))
    assert longest <= numel / (len(starts) - 1) + 2 * align
    if numel > 1 << 20:
        assert len(starts) == threads + 1
