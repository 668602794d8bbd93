"""The factors' kernels in Triton add in the reference's order: the same bits."""

from __future__ import annotations

import math

import pytest
import torch
from same import assert_same
from torch import Tensor
from triton_device import DEVICE

import gradcomp
from gradcomp import kernels
from gradcomp.kernels import reference, triton_factors


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 257, 1000, 4095, 4097, 10_001])
def test_norms(size: int) -> None:
    rows = normal(2, size) * torch.tensor([[1e-30], [1e30]], device=DEVICE)
    assert_same(triton_factors.norms(rows), reference.norms(rows))


def test_norms_of_nothing_and_of_zeros() -> None:
    for rows in (torch.zeros(0, 5, device=DEVICE), torch.zeros(2, 5, device=DEVICE)):
        assert_same(triton_factors.norms(rows), reference.norms(rows))


@pytest.mark.parametrize(("rank", "size"), [(1, 1), (2, 1), (3, 2), (2, 37), (4, 300), (2, 5003)])
def test_orthonormal(rank: int, size: int) -> None:
    rows = normal(rank, size)
    assert_same(triton_factors.orthonormal(rows), reference.orthonormal(rows))


def test_rows_that_depend_on_others_become_zero() -> None:
    rows = normal(4, 50)
    rows[1] = 3 * rows[0]
    rows[2, ::2] = -0.0
    rows[2, 1::2] = 0.0
    assert_same(triton_factors.orthonormal(rows), reference.orthonormal(rows))
    rows = torch.tensor([[-0.0, 1.0, 0.0, -0.0, -1.0], [1e-45, 0.0, -0.0, 0.0, 0.0], [3e38] * 5], device=DEVICE)
    assert_same(triton_factors.orthonormal(rows), reference.orthonormal(rows))


@pytest.mark.parametrize(("rank", "rows", "columns"), [(1, 1, 1), (2, 5, 27), (3, 130, 70), (8, 9, 600), (2, 1, 5000)])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_add_factors(rank: int, rows: int, columns: int, dtype: torch.dtype | None) -> None:
    left, right = normal(rank, rows), normal(rank, columns, seed=1)
    addend = None if dtype is None else normal(rows * columns, seed=2).to(dtype)
    out = normal(rows * columns, seed=3)
    expected = out.clone()
    reference.add_factors(expected, left, right, -1 / 3, addend)
    triton_factors.add_factors(out, left, right, -1 / 3, addend)
    assert_same(out, expected)


def test_add_factors_to_nothing() -> None:
    out = torch.zeros(0, device=DEVICE)
    triton_factors.add_factors(out, torch.zeros(1, 0, device=DEVICE), torch.zeros(1, 5, device=DEVICE), 1.0)


@pytest.mark.parametrize(("rank", "rows", "columns"), [(1, 3, 5), (2, 20, 27), (3, 300, 40), (8, 5, 700), (2, 40, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_a_matrix(rank: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    grad, residual = normal(rows * columns).to(dtype), normal(rows * columns, seed=1)
    left, right = normal(rank, rows, seed=2), normal(rank, columns, seed=3)
    for kept in (None, residual):
        matrix = (grad.double() if kept is None else grad.double() + kept.double()).view(rows, columns)
        for found, expected, magnitude in (
            (
                triton_factors.project(grad, kept, right),
                right.double() @ matrix.t(),
                right.double().abs() @ matrix.t().abs(),
            ),
            (triton_factors.combine(grad, kept, left), left.double() @ matrix, left.double().abs() @ matrix.abs()),
        ):
            assert found.dtype == torch.float32
            assert found.shape == expected.shape
            bound = (max(rows, columns) + 2) * 2.0**-24 * magnitude
            assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("broken", [math.nan, math.inf, 3e38])
def test_a_matrix_that_is_not_finite_shows(broken: float) -> None:
    grad, residual = normal(600), torch.zeros(600, device=DEVICE)
    grad[333] = broken
    residual[333] = 3e38  # a sum may overflow where its products do not
    right = torch.full((2, 30), 1e-9, device=DEVICE)
    assert triton_factors.project(grad, residual, right).isnan().any()
    assert kernels.project(grad, residual, right).isnan().any()
    grad[333] = 1.0
    assert triton_factors.project(grad, residual, right).isfinite().all()


@pytest.mark.gpu
def test_a_gpu_and_a_cpu_decode_the_same() -> None:
    codec = gradcomp.compressor("powersgd:rank=2")
    grad = normal(500, 4608)
    state = codec.new_state(grad)
    for _ in range(3):
        before = state["residual"].clone()
        packet = codec.compress(grad, state)
        decoded = codec.decompress(packet)
        torch.testing.assert_close(decoded + state["residual"], grad.view(-1) + before, rtol=1e-5, atol=1e-5)
        on_cpu = gradcomp.Packet.from_bytes(packet.to_bytes(), numel=grad.numel())
        assert_same(decoded.cpu(), codec.decompress(on_cpu))
