"""Selection in Triton gives what the torch reference gives, bit for bit, residual and all."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from same import assert_same, bits
from torch import Tensor
from triton_device import DEVICE

from gradcomp.kernels import reference, triton_sample, triton_select
from gradcomp.kernels.triton_indices import COUNT

# What overflows is meant to, but the interpreter's arithmetic is numpy's, and numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

Found = tuple[Tensor, int] | float
BLOCK = 4096
FLOAT32_MAX = torch.finfo(torch.float32).max
TINY = [1e-45, -1e-45, 1e-40, -1e-40, 1.1754942e-38, 0.0, -0.0, FLOAT32_MAX, -FLOAT32_MAX]
EVERYWHERE = ("nowhere", "residual", "grad")


def check(
    ours: Callable[..., Found],
    theirs: Callable[..., Found],
    grad: Tensor,
    residual: Tensor | None,
    *options: float,
    places: tuple[str, ...] = EVERYWHERE,
) -> None:
    """Compare the payloads and both inputs; what is left goes nowhere, or to either of them."""
    grad, residual = grad.to(DEVICE), None if residual is None else residual.to(DEVICE)
    for where in places:
        if (where != "nowhere" and residual is None) or (where == "grad" and grad.dtype != torch.float32):
            continue
        results = []
        for encode in (ours, theirs):
            g, r = grad.clone(), None if residual is None else residual.clone()
            left = {"nowhere": None, "residual": r, "grad": g}[where]
            results.append((encode(g, r, *options, left=left), g, r))
        (found, g, r), (expected, g2, r2) = results
        assert_same(found, expected)
        if r is not None and r2 is not None and residual is not None:
            if isinstance(expected, float) and not bool(residual.isfinite().all()):
                continue  # what was broken before may be broken otherwise afterwards
            assert torch.equal(bits(r), bits(r2))
        if where != "grad" or not isinstance(expected, float):
            assert torch.equal(bits(g), bits(g2))


def check_signs(grad: Tensor, residual: Tensor | None, tau: float, places: tuple[str, ...] = EVERYWHERE) -> None:
    check(triton_select.encode_signs, reference.encode_signs, grad, residual, tau, places=places)


def check_largest(grad: Tensor, residual: Tensor | None, k: int, places: tuple[str, ...] = ("residual",)) -> None:
    places = places if residual is not None else ("nowhere",)
    check(triton_select.encode_largest, reference.encode_largest, grad, residual, k, places=places)


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77])
def test_signs_of_all_densities(numel: int) -> None:
    """All pass, a third of them, few: a MAP, a list."""
    check_signs(normal(numel), None, 0.9)
    check_signs(normal(numel), normal(numel, 1), 0.0 if numel < 100 else 2.5, ("residual",))


def test_signs_of_few_among_many() -> None:
    """Several blocks of a list, with words and units of 16 bits as well as Rice's."""
    numel = 9 * BLOCK + 5
    check_signs(normal(numel), normal(numel, 1), 2.2, ("grad",))
    for at in ([0], [numel - 1], [5, 6], range(31, numel, 4000)):
        grad = torch.zeros(numel)
        grad[[*at]] = -1.0
        check_signs(grad, None, 0.5)
    check_signs(normal(60), None, 1.9)
    check_signs(normal(60), None, 100.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    grad, residual = normal(500).to(dtype), normal(500, 1)
    check_signs(grad, residual, 1.0, ("residual",))
    check_signs(grad, None, 1.0)
    check_largest(grad, residual, 20)


@pytest.mark.parametrize("tau", [0.0, 1e-45, 1.2e-38, 1e-3, FLOAT32_MAX])
def test_denormals_zeros_and_the_largest(tau: float) -> None:
    tiny = torch.tensor([*TINY, tau, -tau])
    check_signs(tiny.repeat(9), tiny.flip(0).repeat(9).mul(0.25), tau, ("residual",))
    check_signs(tiny.repeat(9), None, tau)


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [
        ([math.nan], [0.0], math.nan),
        ([math.inf], [1.0], math.inf),
        ([1.0], [-math.inf], -math.inf),
        ([math.inf, -math.inf], [0.0, 0.0], math.nan),
        ([-math.inf], [math.inf], math.nan),
        ([FLOAT32_MAX], [FLOAT32_MAX], math.inf),
        ([-FLOAT32_MAX, 1.0], [-1e38, 1.0], -math.inf),
        ([FLOAT32_MAX, math.nan], [FLOAT32_MAX, 1.0], math.nan),
    ],
)
def test_nonfinite(first: list[float], second: list[float], value: float) -> None:
    """The residual stays as it is, and what is returned says what was found."""
    grad, residual = normal(150), normal(150, 1)
    grad[60 : 60 + len(first)] = torch.tensor(first)
    residual[60 : 60 + len(second)] = torch.tensor(second)
    check_signs(grad, residual, 1.0, ("residual",))
    grad = grad.to(DEVICE)
    assert_same(triton_select.encode_signs(grad, residual.to(DEVICE), 0.0, left=grad), value)


def test_nonfinite_among_the_largest() -> None:
    grad = normal(150)
    grad[77] = -math.inf
    check_largest(grad, normal(150, 1), 9, ("residual", "grad"))


def test_large_but_finite() -> None:
    """A gradient that could overflow, but does not: the residual is changed after all."""
    grad, residual = normal(BLOCK + 100), normal(BLOCK + 100, 1)
    grad[77] = -FLOAT32_MAX
    check_signs(grad, residual, 1.0, ("residual",))
    check_largest(grad, residual, 50)


@pytest.mark.parametrize(("numel", "k"), [(0, 1), (1, 3), (33, 1), (100, 64), (100, 10**6), (BLOCK + 1, 30)])
def test_largest(numel: int, k: int) -> None:
    check_largest(normal(numel), None, k)
    check_largest(normal(numel), normal(numel, 1), k)


def test_equal_magnitudes_go_by_index() -> None:
    grad = torch.ones(2500)
    grad[::2] = -1.0
    for k in (1, 1500):
        check_largest(grad, torch.zeros(2500), k)
    grad[::3] = 2.0
    check_largest(grad, None, 1200)
    check_largest(torch.zeros(100), None, 5)
    check_largest(torch.tensor(TINY).repeat(20), torch.tensor(TINY).repeat(20).mul(0.25), 33)


@pytest.mark.parametrize(("guess", "room"), [(9.0, 1 << 16), (2.0, 0), (0.0, 0)])
def test_largest_where_the_sample_misleads(monkeypatch: pytest.MonkeyPatch, guess: float, room: int) -> None:
    """None pass, not enough, or more than there is room for."""
    monkeypatch.setattr(triton_select, "sample_largest", lambda *_: torch.tensor([guess], device=DEVICE))
    monkeypatch.setattr(triton_select, "_LEAST_ROOM", room)
    check_largest(normal(1000), normal(1000, 1), 200)


@pytest.mark.parametrize(("tau", "most", "k"), [(1.0, 10**6, 10**6), (1.0, 50, 30), (0.5, 1, 1), (9.0, 5, 5)])
def test_above_a_threshold(tau: float, most: int, k: int) -> None:
    encode = triton_select.encode_above, reference.encode_above
    check(*encode, normal(2000), normal(2000, 1), tau, most, k, places=("residual",))


def test_more_above_a_threshold_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_select, "_LEAST_ROOM", 0)
    encode = triton_select.encode_above, reference.encode_above
    check(*encode, normal(2000), normal(2000, 1), 0.1, 100, 90, places=("residual",))


@pytest.mark.parametrize("numel", [0, 1, 1000, 140_000])
def test_sample_largest(numel: int) -> None:
    grad, residual = normal(numel).to(DEVICE), normal(numel, 1).to(DEVICE)
    for held, weight in ((None, 1.0), (residual, 0.7)):
        for values in (grad, grad.to(torch.bfloat16)):
            ours = triton_sample.sample_largest(values, held, 0.01, weight)
            assert torch.equal(ours, reference.sample_largest(values, held, 0.01, weight))


@pytest.mark.gpu
def test_nothing_waits() -> None:
    """A CUDA graph captures all up to the reading of the status, and gives the same for what it is replayed on."""
    grad, residual = normal(100_000).to(DEVICE), normal(100_000, 1).to(DEVICE)
    expected = reference.encode_signs(2 * grad, residual, 3.0)
    tau = torch.full((), 3.0, device=DEVICE)
    triton_select.pad_signs(grad, residual, tau, None, triton_select.new_status(grad))  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        status = triton_select.new_status(grad)
        out = triton_select.pad_signs(grad, residual, tau, None, status)
    grad *= 2
    graph.replay()
    assert not isinstance(expected, float)
    payload, count = expected
    assert int(status[COUNT.value]) == count
    assert torch.equal(out.view(torch.uint8)[: len(payload)], payload)
