"""The native kernels for factors and spectra give what the torch reference gives, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradcomp import kernels
from gradcomp.kernels import native, reference
from gradcomp.kernels.reference_dct import basis
from gradcomp.tiles import Tiling

ALL_LEVELS = ["generic", "avx2", "avx512"]
LEVELS = ALL_LEVELS[: ALL_LEVELS.index(native.LEVEL) + 1] if native.AVAILABLE else []

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason=f"no native kernels: {native.REASON}")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(a: Tensor, b: Tensor) -> bool:
    """All bits but those of NaNs."""
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(torch.int32), b[~nan].view(torch.int32))


def check_factors(rows: int, columns: int, rank: int, scale: float, *, special: float | None = None) -> None:
    left, right, out = normal(rank, rows), normal(rank, columns, seed=1), normal(rows * columns, seed=2)
    addend = normal(rows * columns, seed=3)
    if special is not None:
        for tensor in (left, right, out, addend):
            tensor.view(-1)[:: max(tensor.numel() // 3, 1)] = special
    for given_addend in (None, addend):
        expected = out.clone()
        reference.add_factors(expected, left, right, scale, given_addend)
        for level in LEVELS:
            for threads in (1, 3):
                found = out.clone()
                native.module.add_factors(
                    found, left.view(-1), right.view(-1), columns, scale, given_addend, threads, level
                )
                assert same(found, expected)
        found = out.clone()
        kernels.add_factors(found, left, right, scale, given_addend)
        assert same(found, expected)


def check_spectrum(rows: int, columns: int, chunk: int, kept: int, scale: float, seed: int = 0) -> None:
    tiling = Tiling.of(rows, columns, chunk)
    kept = min(kept, tiling.tile_numel)
    values = normal(tiling.tiles, kept, seed=seed)
    index = normal(tiling.tiles, tiling.tile_numel, seed=seed + 1).topk(kept).indices.sort().values
    index = (index - (index >> 15 << 16)).to(torch.int16)
    out, addend = normal(rows * columns, seed=2), normal(rows * columns, seed=3)
    for given_addend in (None, addend):
        expected = out.clone()
        reference.add_spectrum(expected, values, index, tiling, scale, given_addend)
        for level in LEVELS:
            for threads in (1, 3):
                found = out.clone()
                native.module.add_spectrum(
                    found,
                    values.view(-1),
                    index.view(-1),
                    basis(tiling.height).view(-1),
                    basis(tiling.width).view(-1),
                    *(rows, columns, tiling.height, tiling.width, scale, given_addend, threads, level),
                )
                assert same(found, expected)
        found = out.clone()
        kernels.add_spectrum(found, values, index, tiling, scale, given_addend)
        assert same(found, expected)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 63, 64, 65, 72, 136, 1000])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_factors_of_widths_around_the_vector(columns: int, rank: int) -> None:
    check_factors(13, columns, rank, 1.0)
    check_factors(3, columns, rank, -0.3)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -0.0, 1e-40, 3e38])
def test_factors_of_special_values(special: float) -> None:
    check_factors(17, 77, 3, 0.25, special=special)


def test_factors_on_several_threads() -> None:
    check_factors(900, 700, 2, 1 / 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(1, 200), st.integers(1, 9), st.floats(-3, 3, width=32))
def test_factors_of_any_shape(rows: int, columns: int, rank: int, scale: float) -> None:
    check_factors(rows, columns, rank, scale)


@pytest.mark.parametrize("rows", [1, 31, 65])
@pytest.mark.parametrize("columns", [1, 9, 64, 65, 200])
@pytest.mark.parametrize(("chunk", "kept"), [(8, 1), (64, 32), (256, 3)])
def test_spectra_of_sizes_around_a_tile(rows: int, columns: int, chunk: int, kept: int) -> None:
    check_spectrum(rows, columns, chunk, kept, 0.7)


def test_spectra_on_several_threads() -> None:
    check_spectrum(900, 700, 64, 4, 1 / 3)


def test_spectra_whose_indices_need_all_sixteen_bits() -> None:
    check_spectrum(256, 512, 256, 40, -1.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(1, 200), st.integers(8, 40), st.integers(1, 9), st.floats(-3, 3, width=32))
def test_spectra_of_any_shape(rows: int, columns: int, chunk: int, kept: int, scale: float) -> None:
    check_spectrum(rows, columns, chunk, kept, scale)


def test_wrong_sizes_are_refused() -> None:
    out, one, three = torch.zeros(12), torch.zeros(1), torch.zeros(3)
    with pytest.raises(ValueError, match="columns"):
        native.module.add_factors(out, three, three, 5, 1.0)
    with pytest.raises(ValueError, match="left"):
        native.module.add_factors(out, three, three, 3, 1.0)
    with pytest.raises(ValueError, match="addend"):
        native.module.add_factors(out, torch.zeros(4), three, 3, 1.0, three)
    index = torch.tensor([12], dtype=torch.int16)
    bases = basis(3).view(-1), basis(4).view(-1)
    with pytest.raises(ValueError, match="not in its tile"):
        native.module.add_spectrum(out, one, index, *bases, 3, 4, 3, 4, 1.0)
    with pytest.raises(ValueError, match="bases"):
        native.module.add_spectrum(out, one, index, *reversed(bases), 3, 4, 3, 4, 1.0)
    with pytest.raises(ValueError, match="coefficients"):
        native.module.add_spectrum(out, three, index, *bases, 3, 4, 3, 4, 1.0)
    assert not out.any()
