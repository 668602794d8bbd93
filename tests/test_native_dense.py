"""Casts: every rounding as torch has it, by all levels alike, and NaNs of one kind."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradcomp import kernels
from gradcomp.kernels import native, reference

ALL_LEVELS = ["generic", "avx2", "avx512"]
LEVELS = ALL_LEVELS[: ALL_LEVELS.index(native.LEVEL) + 1] if native.AVAILABLE else []
NARROW = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TYPES = {"float32": torch.float32, **NARROW}
CANONICAL = {"float16": 0x7E00, "bfloat16": 0x7FC0}

needs_native = pytest.mark.skipif(not native.AVAILABLE, reason=f"no native kernels: {native.REASON}")


def check_cast(grad: Tensor, threads: int = 1) -> None:
    for name, dtype in TYPES.items():
        expected = reference.cast(grad, dtype)
        for level in LEVELS:
            assert torch.equal(native.module.cast(grad, name, threads, level), expected), (name, level)


def of_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


@needs_native
def test_every_upper_half_with_lower_halves_around_the_ties() -> None:
    # Of a float32's bits, all that survives a cast to bfloat16, with what decides how it is rounded. For float16 it is
    # the upper 19 bits: these are all of them, and a tie of either parity is among the lower halves.
    upper = torch.arange(-(1 << 15), 1 << 15).view(-1, 1) << 16
    lower = torch.tensor(
        [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xEFFF, 0xF000, 0xF001, 0xFFFF]
    )
    check_cast(of_bits((upper | lower).view(-1)))


@needs_native
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 31, 1000])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_sizes_and_alignments(numel: int, offset: int) -> None:
    check_cast(torch.randn(numel + offset, generator=torch.Generator().manual_seed(0))[offset:])


@needs_native
def test_several_threads() -> None:
    check_cast(torch.randn((1 << 18) + 77, generator=torch.Generator().manual_seed(0)), threads=2)


@needs_native
@settings(deadline=None)
@given(st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=40))
def test_any_bits(bits: list[int]) -> None:
    check_cast(of_bits(torch.tensor(bits, dtype=torch.int64)))


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("cast", [reference.cast, kernels.cast], ids=["reference", "chosen"])
def test_nan_is_one(name: str, cast: object) -> None:
    bits = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -(1 << 22), 0x7FA00000, 0]).repeat(5)
    found = cast(of_bits(bits), NARROW[name]).view(torch.int16)  # type: ignore[operator]
    assert found.tolist() == [CANONICAL[name]] * 6 + [0] + found.tolist()[7:]
    assert set(found.tolist()) == {CANONICAL[name], 0}


@pytest.mark.parametrize("dtype", NARROW.values(), ids=str)
def test_narrow_gradients(dtype: torch.dtype) -> None:
    grad = torch.randn(100).to(dtype)
    for wanted in TYPES.values():
        assert torch.equal(kernels.cast(grad, wanted), grad.to(wanted).view(torch.uint8))
        assert kernels.cast(grad, wanted).data_ptr() != grad.data_ptr()


def check_adding(values: Tensor, scale: float, with_addend: bool, threads: int = 1) -> None:
    generator = torch.Generator().manual_seed(len(values))
    start, other = torch.randn(len(values), generator=generator), torch.randn(len(values), generator=generator)
    addend = other if with_addend else None
    name = str(values.dtype).removeprefix("torch.")
    expected = start.clone()
    reference.add_scaled(expected, values, scale, addend)
    for level in LEVELS:
        found = start.clone()
        native.module.add_scaled(found, values.view(torch.uint8), name, scale, addend, threads, level)
        # Which of two NaNs an addition hands on is the processor's affair.
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(0.0).view(torch.int32), expected.nan_to_num(0.0).view(torch.int32))


@needs_native
@pytest.mark.parametrize("dtype", NARROW.values(), ids=str)
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.3, 0.0, math.inf])
def test_adding_every_narrow_float(dtype: torch.dtype, scale: float) -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    check_adding(every, scale, with_addend=False)
    check_adding(every, scale, with_addend=True)


@needs_native
@pytest.mark.parametrize("dtype", TYPES.values(), ids=str)
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 1000, (1 << 18) + 77])
def test_adding(dtype: torch.dtype, numel: int) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(1)).to(dtype)
    check_adding(values, 1 / 3, with_addend=False, threads=2)
    check_adding(values, -1.0, with_addend=True, threads=2)


@needs_native
def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        native.module.add_scaled(torch.zeros(3), torch.zeros(7, dtype=torch.uint8), "float16", 1.0)
    with pytest.raises(ValueError, match="float64"):
        native.module.cast(torch.zeros(3), "float64")
    with pytest.raises(ValueError, match="addend"):
        native.module.add_scaled(torch.zeros(3), torch.zeros(12, dtype=torch.uint8), "float32", 1.0, torch.zeros(4))
