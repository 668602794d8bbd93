"""The native quantizers give the bytes and the residual of the reference, bit for bit, at every level."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradcomp.kernels import native, reference

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason=f"no native kernels: {native.REASON}")

ALL_LEVELS = ["generic", "avx2", "avx512"]
LEVELS = ALL_LEVELS[: ALL_LEVELS.index(native.LEVEL) + 1] if native.AVAILABLE else []
SIZES = [0, 1, 2, 7, 8, 9, 31, 32, 33, 63, 65, 1000, 1023, 1024, 1025, 1056, 4099]
FLOAT32_MAX = torch.finfo(torch.float32).max
CASES: list[tuple[str, tuple[float, ...]]] = [
    *(("encode_levels", (bits, 1024)) for bits in range(1, 9)),
    ("encode_levels", (4, 8)),
    ("encode_levels", (5, 40)),
    ("encode_int8", (1024,)),
    ("encode_int8", (8,)),
    ("encode_int8", (1 << 30,)),
    ("encode_float8", (1024,)),
    ("encode_float8", (40,)),
    ("encode_ternary", (0.5,)),
    ("encode_ternary", (1e-40,)),
    ("encode_ternary", (FLOAT32_MAX,)),
]
NAMES = [f"{name}{options}" for name, options in CASES]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def check_one(
    name: str, options: tuple[float, ...], grad: Tensor, residual: Tensor | None, update: bool, threads: int
) -> None:
    theirs = None if residual is None else residual.clone()
    expected = getattr(reference, name)(grad, theirs, *options, update)
    for level in LEVELS:
        ours = None if residual is None else residual.clone()
        found = getattr(native.module, name)(grad, ours, *options, update, threads, level)
        if isinstance(expected, float):
            assert isinstance(found, float)
            assert found == expected or (math.isnan(found) and math.isnan(expected))
            assert residual is None or ours is None or same(ours, residual)
        else:
            assert isinstance(found, Tensor)
            assert torch.equal(found, expected), (level, update)
        if ours is not None and theirs is not None:
            assert same(ours, theirs), (level, update)


def check(name: str, options: tuple[float, ...], grad: Tensor, residual: Tensor, threads: int = 1) -> None:
    check_one(name, options, grad, None, False, threads)
    check_one(name, options, grad, residual, False, threads)
    check_one(name, options, grad, residual, True, threads)


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "options"), CASES, ids=NAMES)
def test_sizes(name: str, options: tuple[float, ...]) -> None:
    for numel in SIZES:
        check(name, options, normal(numel), normal(numel, 1))


@pytest.mark.parametrize(("name", "options"), CASES, ids=NAMES)
def test_unaligned_and_threads(name: str, options: tuple[float, ...]) -> None:
    check(name, options, normal(1100)[3:], normal(1100, 1)[1:-2])
    numel = (1 << 18) + 77
    check(name, options, normal(numel), normal(numel, 1), threads=2)


SPECIAL = {
    "zeros": torch.zeros(1000),
    "negative zeros": -torch.zeros(1000),
    "both zeros": torch.tensor([0.0, -0.0, -0.0]).repeat(400),
    "constant": torch.full((1000,), -1.1),
    "denormals": torch.linspace(-1e-40, 1e-40, 1000),
    "a few denormal steps": torch.linspace(-300, 300, 601) * 2.0**-149,
    "a step that underflows": torch.tensor([0.0, 2.0**-149]).repeat(500),
    "the largest": torch.tensor([FLOAT32_MAX, -FLOAT32_MAX, 0.0, 1.0]).repeat(300),
    "the largest, all positive": torch.linspace(0.5, 1.0, 999) * FLOAT32_MAX,
    "largest alone": torch.full((100,), FLOAT32_MAX),
    "ties": torch.arange(-508, 509) * 0.25,
}


@pytest.mark.parametrize(("name", "options"), CASES, ids=NAMES)
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_values(kind: str, name: str, options: tuple[float, ...]) -> None:
    values = SPECIAL[kind]
    check(name, options, values, torch.zeros_like(values))
    check(name, options, values * 0.5, values.flip(0) * 0.25)


@pytest.mark.parametrize(("name", "options"), CASES, ids=NAMES)
@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [3e38]])
def test_nonfinite_leaves_the_residual_alone(bad: list[float], name: str, options: tuple[float, ...]) -> None:
    for position in (0, 40, 1999, 2097):
        grad, residual = normal(2100), normal(2100, 1)
        grad[position : position + len(bad)] = torch.tensor(bad)
        residual[position] = 3e38
        check(name, options, grad, residual)


values = st.one_of(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1e-40, FLOAT32_MAX]), st.floats(width=32))


@settings(deadline=None, max_examples=25)
@given(pairs=st.lists(st.tuples(values, st.floats(width=32, allow_nan=False, allow_infinity=False)), max_size=90))
def test_any_values(pairs: list[tuple[float, float]]) -> None:
    grad = torch.tensor([pair[0] for pair in pairs], dtype=torch.float32)
    residual = torch.tensor([pair[1] for pair in pairs], dtype=torch.float32)
    for name, options in CASES:
        check(name, options, grad, residual)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.encode_levels(torch.zeros(9), None, 0, 8), "bits"),
        (lambda m: m.encode_levels(torch.zeros(9), None, 4, 12), "block"),
        (lambda m: m.encode_int8(torch.zeros(9), None, 0), "block"),
        (lambda m: m.encode_int8(torch.zeros(9), torch.zeros(8), 8), "residual"),
        (lambda m: m.encode_float8(torch.zeros(9), None, 8, True), "residual"),
        (lambda m: m.encode_ternary(torch.zeros(9), None, math.nan), "tau"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Callable[[object], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(native.module)
