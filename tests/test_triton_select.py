"""Selection in Triton gives what the torch reference gives, bit for bit, residual and all."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from gradcomp.kernels import reference, triton_select

Found = tuple[Tensor, int] | float
Encode = Callable[[Tensor, Tensor | None, Tensor | None], Found]

BLOCK = 4096
SIZES = [0, 1, 31, 32, 33, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77]
FLOAT32_MAX = torch.finfo(torch.float32).max


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same(found: Found, expected: Found) -> None:
    if isinstance(expected, float) or isinstance(found, float):
        assert isinstance(found, float)
        assert isinstance(expected, float)
        assert found == expected or (math.isnan(found) and math.isnan(expected))
        return
    assert found[1] == expected[1]
    assert found[0].dtype == torch.uint8
    assert torch.equal(found[0], expected[0])


def check(
    ours: Callable[..., Found],
    theirs: Callable[..., Found],
    grad: Tensor,
    residual: Tensor | None,
    *options: float,
    places: tuple[str, ...] = ("nowhere", "residual", "grad"),
) -> None:
    """Compare the payloads and both inputs; what is left goes nowhere, or to either of them."""
    grad, residual = grad.to(DEVICE), None if residual is None else residual.to(DEVICE)
    for where in places:
        if where != "nowhere" and residual is None or where == "grad" and grad.dtype != torch.float32:
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


def check_signs(grad: Tensor, residual: Tensor | None, tau: float) -> None:
    check(triton_select.encode_signs, reference.encode_signs, grad, residual, tau)


def check_largest(grad: Tensor, residual: Tensor | None, k: int) -> None:
    check(triton_select.encode_largest, reference.encode_largest, grad, residual, k)


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("tau", [0.0, 0.5, 2.0, 100.0])
def test_signs(numel: int, tau: float) -> None:
    check_signs(normal(numel), None, tau)
    check_signs(normal(numel), normal(numel, 1), tau)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("k", [1, 3, 64, 2000, 10**6])
def test_largest(numel: int, k: int) -> None:
    check_largest(normal(numel), None, k)
    check_largest(normal(numel), normal(numel, 1), k)
