"""The native kernels give what the torch reference gives, bit for bit, whatever the processor can do."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradcomp import kernels
from gradcomp.errors import ConfigError
from gradcomp.kernels import native, reference

Found = tuple[Tensor, Tensor] | float

ALL_LEVELS = ["generic", "avx2", "avx512"]
LEVELS = ALL_LEVELS[: ALL_LEVELS.index(native.LEVEL) + 1] if native.AVAILABLE else []
SIZES = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 1000, 4096 + 5]
FLOAT32_MAX = torch.finfo(torch.float32).max

needs_native = pytest.mark.skipif(not native.AVAILABLE, reason=f"no native kernels: {native.REASON}")


@pytest.fixture(autouse=True)
def _decide_afresh() -> Iterator[None]:
    native.enabled.cache_clear()
    yield
    native.enabled.cache_clear()


def assert_same(found: Found, expected: Found) -> None:
    if isinstance(expected, float) or isinstance(found, float):
        assert isinstance(found, float)
        assert isinstance(expected, float)
        assert found == expected or (math.isnan(found) and math.isnan(expected))
        return
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs)


def check(grad: Tensor, residual: Tensor | None, tau: float) -> None:

    expected = reference.select_threshold(grad, residual, tau)
    assert_same(kernels.select_threshold(grad, residual, tau), expected)
    for level in LEVELS:
        assert_same(native.module.select_threshold(grad, residual, tau, level), expected)


def select(grad: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    found = kernels.select_threshold(grad, None, tau)
    assert not isinstance(found, float)
    return found


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


@needs_native
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("tau", [0.0, 1e-3, 1.0, 2.5, 100.0])
def test_sizes_around_the_vector_width(numel: int, tau: float) -> None:
    check(normal(numel), None, tau)
    check(normal(numel), normal(numel, 1), tau)


@needs_native
@pytest.mark.parametrize("offset", range(1, 9))
def test_unaligned(offset: int) -> None:
    check(normal(300)[offset:], None, 1.5)
    check(normal(300)[offset:200], normal(300, 1)[100 : 300 - offset], 1.5)


@needs_native
def test_one_element_passes_wherever_it_is() -> None:
    for position in range(200):
        grad = torch.zeros(200)
        grad[position] = -1.0
        index, negative = select(grad, 0.5)
        assert index.tolist() == [position]
        assert negative.tolist() == [True]


@needs_native
def test_many_pass() -> None:
    # The output grows several times on the way.
    check(normal(100_000), None, 0.0)
    check(torch.ones(100_000), normal(100_000), 0.3)


@needs_native
def test_the_threshold_itself_does_not_pass() -> None:
    tau = float(torch.tensor(1e-3))
    up, down = (torch.nextafter(torch.tensor(tau), torch.tensor(limit)) for limit in (1.0, 0.0))
    grad = torch.stack([torch.tensor(tau), torch.tensor(-tau), up, -up, down, -down])
    index, negative = select(grad, tau)
    assert index.tolist() == [2, 3]
    assert negative.tolist() == [False, True]
    check(grad, None, tau)
    check(grad, None, 1e-3)  # not a float32: rounded as torch rounds it


@needs_native
@pytest.mark.parametrize("tau", [0.0, 1e-45, 1e-40, 1.2e-38, 1.0, FLOAT32_MAX])
def test_denormals_zeros_and_the_largest(tau: float) -> None:
    tiny = torch.tensor([1e-45, -1e-45, 1e-40, -1e-40, 1.1754942e-38, 0.0, -0.0, FLOAT32_MAX, -FLOAT32_MAX])
    check(tiny.repeat(20), None, tau)
    check(tiny.repeat(20), tiny.flip(0).repeat(20).mul(0.25), tau)


@needs_native
@pytest.mark.parametrize(
    "bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [-math.inf, math.nan], [math.inf, math.inf]]
)
@pytest.mark.parametrize("position", [0, 5, 63, 64, 190, 197])
@pytest.mark.parametrize("tau", [0.0, 1.0, FLOAT32_MAX])
def test_nonfinite(bad: list[float], position: int, tau: float) -> None:
    grad, residual = normal(200), normal(200, 1)
    grad[position : position + len(bad)] = torch.tensor(bad)
    check(grad, None, tau)
    check(grad, residual, tau)
    check(residual, grad, tau)


@needs_native
def test_a_sum_that_overflows_is_not_finite() -> None:
    grad = torch.full((100,), -FLOAT32_MAX)
    assert kernels.select_threshold(grad, grad, 1.0) == -math.inf
    check(grad, grad, 1.0)
    assert kernels.select_threshold(torch.tensor([math.inf]), torch.tensor([-math.inf]), 1.0) != 0.0
    check(torch.tensor([math.inf]), torch.tensor([-math.inf]), 1.0)


# Few distinct values, so that sums cancel and hit the threshold, and any float32 there is.
values = st.one_of(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1e-40]), st.floats(width=32))


@needs_native
@settings(deadline=None)
@given(pairs=st.lists(st.tuples(values, values), max_size=150), tau=st.floats(0.0, FLOAT32_MAX, width=32))
def test_any_values(pairs: list[tuple[float, float]], tau: float) -> None:
    grad = torch.tensor([pair[0] for pair in pairs], dtype=torch.float32)
    residual = torch.tensor([pair[1] for pair in pairs], dtype=torch.float32)
    check(grad, None, tau)
    check(grad, residual, tau)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_to_the_reference(dtype: torch.dtype) -> None:
    grad, residual = normal(1000).to(dtype), normal(1000, 1)
    assert_same(kernels.select_threshold(grad, residual, 1.0), reference.select_threshold(grad, residual, 1.0))


@needs_native
def test_results_outlive_their_inputs_and_are_ordinary_tensors() -> None:
    index, negative = select(normal(1000).requires_grad_(), 1.0)
    kept = index.clone()
    for seed in range(20):
        kernels.select_threshold(normal(1000, seed), None, 1.0)
    assert torch.equal(index, kept)
    index += 1
    assert torch.equal(index, kept + 1)
    assert negative.sum() > 0


@needs_native
def test_threads_at_once() -> None:
    grads = [normal(200_000, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda grad: kernels.select_threshold(grad, None, 2.0), grads, timeout=30))
    for grad, ours in zip(grads, found, strict=True):
        assert_same(ours, reference.select_threshold(grad, None, 2.0))


@needs_native
@pytest.mark.parametrize(
    ("grad", "residual", "tau", "level", "error"),
    [
        (torch.zeros(4), torch.zeros(3), 1.0, "generic", ValueError),
        (torch.zeros(4), None, -1.0, "generic", ValueError),
        (torch.zeros(4), None, math.nan, "generic", ValueError),
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
        native.module.select_threshold(grad, residual, tau, level)


@needs_native
def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(native, "select_threshold", lambda *args: calls.append(args))
    monkeypatch.setenv("GRADCOMP_KERNELS", "torch")
    kernels.select_threshold(normal(10), None, 1.0)
    assert not calls
    native.enabled.cache_clear()
    monkeypatch.setenv("GRADCOMP_KERNELS", "native")
    kernels.select_threshold(normal(10), None, 1.0)
    assert len(calls) == 1


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADCOMP_KERNELS", "cuda")
    with pytest.raises(ConfigError, match=r"GRADCOMP_KERNELS='cuda'.*torch or native"):
        kernels.select_threshold(normal(10), None, 1.0)


def test_missing_kernels_are_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("GRADCOMP_KERNELS", raising=False)
    monkeypatch.setattr(native, "AVAILABLE", False)
    monkeypatch.setattr(native, "REASON", "no compiler")
    with caplog.at_level(logging.WARNING, logger="gradcomp"):
        for _ in range(3):
            assert_same(
                kernels.select_threshold(normal(99), None, 1.0), reference.select_threshold(normal(99), None, 1.0)
            )
    assert [record.getMessage() for record in caplog.records] == [
        "no native kernels (no compiler): running the torch kernels, which are slower"
    ]
    native.enabled.cache_clear()
    monkeypatch.setenv("GRADCOMP_KERNELS", "native")
    with pytest.raises(ConfigError, match="no compiler"):
        native.enabled()
