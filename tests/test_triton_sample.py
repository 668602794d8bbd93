"""Thresholds found in samples, in Triton, are the torch reference's, and so is what is encoded with them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from gradcomp.kernels import reference, reference_select, triton_sample, triton_select

# What overflows is meant to, but the interpreter's arithmetic is numpy's, and numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

Found = tuple[Tensor | float, ...] | float
FLOAT32_MAX = torch.finfo(torch.float32).max
PLACES = ("residual", "grad", "elsewhere")
LONG = 4096 + 77


@pytest.fixture(autouse=True)
def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tensors which the interpreter gets through are sampled at a stride."""
    monkeypatch.setattr(reference_select, "_SAMPLE", 64)


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def check(
    ours: Callable[..., Found],
    theirs: Callable[..., Found],
    grad: Tensor,
    residual: Tensor | None,
    *options: float,
    places: tuple[str, ...] = PLACES,
) -> None:
    """Compare what is returned, and what is left: in either input, elsewhere, or nowhere."""
    grad, residual = grad.to(DEVICE), None if residual is None else residual.to(DEVICE)
    for where in places:
        results = []
        for encode in (ours, theirs):
            g, r = grad.clone(), None if residual is None else residual.clone()
            left = {"residual": r, "grad": g, "elsewhere": torch.zeros(len(g), device=DEVICE), "nowhere": None}[where]
            results.append((encode(g, r, *options, left=left), left))
        (found, left), (expected, left2) = results
        if isinstance(expected, float) or isinstance(found, float):
            assert isinstance(found, float)
            assert isinstance(expected, float)
            assert found == expected or (math.isnan(found) and math.isnan(expected))
            if where == "residual" and left is not None and residual is not None:
                assert torch.equal(bits(left), bits(residual))
            continue
        assert torch.equal(torch.as_tensor(found[0]), torch.as_tensor(expected[0]))
        assert found[1:] == expected[1:]
        assert left is None or left2 is None or torch.equal(bits(left), bits(left2))


def check_sampled(grad: Tensor, residual: Tensor, tau: float, density: float, places: tuple[str, ...] = PLACES) -> None:
    encode = triton_select.encode_signs_sampled, reference.encode_signs_sampled
    check(*encode, grad, residual, tau, density, 0.7, places=places)


def check_share(grad: Tensor, residual: Tensor | None, density: float, places: tuple[str, ...] = PLACES) -> None:
    encode = triton_select.encode_signs_share, reference.encode_signs_share
    check(*encode, grad, residual, density, 0.7, places=("nowhere",) if residual is None else places)


@pytest.mark.parametrize("numel", [0, 1, 33, LONG])
def test_the_next_threshold_comes_with_what_is_encoded(numel: int) -> None:
    """That one element of the sample passes, some, or all of it."""
    check_sampled(normal(numel), normal(numel, 1), 2.5, 0.01)
    check_sampled(normal(numel), normal(numel, 1), 1.0, 1.0, ("elsewhere",))
    check_sampled(torch.zeros(numel), torch.zeros(numel), 1.0, 0.3, ("residual",))


@pytest.mark.parametrize("numel", [0, 1, 33, LONG])
def test_the_first_threshold_is_found_on_the_way(numel: int) -> None:
    check_share(normal(numel), None, 0.01)
    check_share(normal(numel), normal(numel, 1), 0.01, ("grad", "nowhere"))
    check_share(torch.zeros(numel), torch.zeros(numel), 0.1, ("residual",))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    grad, residual = normal(500).to(dtype), normal(500, 1)
    check_sampled(grad, residual, 1.0, 0.1, ("residual",))
    check_share(grad, residual, 0.1, ("elsewhere",))


def test_denormals_zeros_and_the_largest() -> None:
    tiny = torch.tensor([1e-45, -1e-45, 1e-40, -1.1754942e-38, 0.0, -0.0]).repeat(50)
    check_sampled(tiny, torch.zeros(300), 0.0, 0.3, ("grad",))
    check_share(tiny, torch.zeros(300), 0.3, ("residual",))
    check_share(tiny[:2], torch.zeros(2), 1.0, ("residual",))
    check_share(torch.full((40,), -FLOAT32_MAX), torch.zeros(40), 0.5, ("residual",))


def test_nothing_to_go_by_where_the_sample_misses_what_is_not_zero() -> None:
    """Nothing is sent then: all is left."""
    grad = torch.zeros(300)
    grad[1] = 3.0
    check_share(grad, torch.zeros(300), 0.2, ("residual",))


def test_what_is_expected_next_overflows() -> None:
    """Where acc did not: there is no threshold to go by, and that is 0."""
    grad, residual = normal(300), normal(300, 1)
    grad[7], residual[7] = 2.5e38, 0.5e38
    encode = triton_select.encode_signs_sampled, reference.encode_signs_sampled
    grad[0], residual[0] = grad[7], residual[7]  # in the sample
    check(*encode, grad, residual, 1.0, 1.0, 1.0, places=("grad",))


@pytest.mark.parametrize(("at", "bad"), [(0, math.nan), (1, math.nan), (0, math.inf), (1, -math.inf)])
def test_nonfinite(at: int, bad: float) -> None:
    """In the sample, or beside it; the residual stays as it is."""
    grad, residual = normal(200), normal(200, 1)
    grad[at] = bad
    check_sampled(grad, residual, 1.0, 0.2, ("residual", "grad"))
    check_share(grad, residual, 0.2, ("residual", "nowhere"))
    encode = triton_select.encode_above_sampled, reference.encode_above_sampled
    check(*encode, grad, residual, 0.2, 50, 40, places=("residual",))


@pytest.mark.parametrize(("numel", "density", "most", "k"), [(0, 1.0, 1, 1), (1, 1.0, 1, 1), (2000, 0.05, 125, 100)])
def test_above_the_least_of_a_sample(numel: int, density: float, most: int, k: int) -> None:
    encode = triton_select.encode_above_sampled, reference.encode_above_sampled
    for places, residual in ((("residual", "grad"), normal(numel, 1)), (("nowhere",), None)):
        check(*encode, normal(numel), residual, density, most, k, places=places)


@pytest.mark.parametrize(
    "largest",
    [
        [6.0, 3.0, 2.0],  # equally good: the highest
        [4.0, 3.0, 2.0, 2.0, 2.0, 2.0, 0.0],
        [1e-45],
        [0.0, 0.0],
        [FLOAT32_MAX, 1.0],
        [math.inf, 1.0],
        [math.nan, math.inf],
        [1.0] * 1024 + [0.5] * 1024,  # equally good, of two blocks
        [2.0] * 2 + [1.0] * 1500,
    ],
)
def test_the_best_of_the_largest(largest: list[float]) -> None:
    values, noted = torch.tensor(largest, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    limit = triton_sample.note_best(values, noted)
    best = reference.best_threshold(values)
    assert triton_sample.float_of(noted.tolist()[0]) == best
    assert limit.item() == (best or FLOAT32_MAX)
    assert triton_sample.below_least(values).item() == reference.below_least(values)


@pytest.mark.parametrize("numel", [0, 1, 1000])
def test_sample_threshold(numel: int) -> None:
    grad, residual = normal(numel).to(DEVICE), normal(numel, 1).to(DEVICE)
    for held in (None, residual):
        ours = triton_sample.sample_threshold(grad, held, 0.01, 0.7)
        assert ours == reference.sample_threshold(grad, held, 0.01, 0.7)
