"""The Triton quantizers give the bytes and the residual of the reference, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from gradcomp.kernels import reference, triton_quantize

# What NumPy says of the differences that must overflow, interpreted.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

FLOAT32_MAX = torch.finfo(torch.float32).max
SIZES = [0, 1, 8, 41, 1025]
CASES: list[tuple[str, tuple[float, ...]]] = [
    *(("encode_levels", (bits, 1024)) for bits in range(1, 9)),
    ("encode_levels", (4, 8)),
    ("encode_levels", (5, 40)),
    ("encode_levels", (3, 4104)),
    ("encode_levels", (4, 1 << 20)),
    ("encode_int8", (1024,)),
    ("encode_int8", (8,)),
    ("encode_int8", (1 << 30,)),
    ("encode_float8", (1024,)),
    ("encode_float8", (40,)),
    ("encode_float8", (8200,)),
    ("encode_ternary", (0.5,)),
    ("encode_ternary", (1e-40,)),
    ("encode_ternary", (FLOAT32_MAX,)),
]
NAMES = [f"{name}{options}" for name, options in CASES]
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=NAMES)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.cpu().view(torch.int32), b.cpu().view(torch.int32))


def check_one(name: str, options: tuple[float, ...], grad: Tensor, residual: Tensor | None, update: bool) -> None:
    theirs = None if residual is None else residual.clone()
    expected = getattr(reference, name)(grad, theirs, *options, update)
    ours = None if residual is None else residual.clone().to(DEVICE)
    found = getattr(triton_quantize, name)(grad.to(DEVICE), ours, *options, update)
    if isinstance(expected, float):
        assert isinstance(found, float)
        assert found == expected or (math.isnan(found) and math.isnan(expected))
    else:
        assert isinstance(found, Tensor)
        assert torch.equal(found.cpu(), expected)
    if ours is not None and theirs is not None:
        assert same(ours, theirs)


def check(name: str, options: tuple[float, ...], grad: Tensor, residual: Tensor) -> None:
    check_one(name, options, grad, None, False)
    check_one(name, options, grad, residual, False)
    check_one(name, options, grad, residual, True)


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


@each_case
def test_sizes(name: str, options: tuple[float, ...]) -> None:
    for numel in SIZES:
        check_one(name, options, normal(numel), normal(numel, 1), True)
    check(name, options, normal(8205), normal(8205, 1))


@each_case
def test_half_precision_and_unaligned(name: str, options: tuple[float, ...]) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        check_one(name, options, normal(1100).to(dtype)[3:], normal(1100, 1)[1:-2], True)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_large_block_of_one_sign_that_ends_early(sign: float) -> None:
    values = sign * (1 + normal(8211).abs())
    check_one("encode_levels", (4, 8200), values, torch.zeros(8211), True)


SPECIAL = {
    "zeros": torch.tensor([0.0, -0.0, -0.0]).repeat(16),
    "negative zeros": -torch.zeros(40),
    "constant": torch.full((40,), -1.1),
    "denormals": torch.linspace(-1e-40, 1e-40, 80),
    "a few denormal steps": torch.linspace(-300, 300, 601) * 2.0**-149,
    "a step that underflows": torch.tensor([0.0, 2.0**-149]).repeat(20),
    "the largest": torch.tensor([FLOAT32_MAX, -FLOAT32_MAX, 0.0, 1.0]).repeat(20),
    "the largest, all positive": torch.linspace(0.5, 1.0, 99) * FLOAT32_MAX,
    "ties": torch.arange(-508, 509) * 0.25,
    "magnitudes": torch.logspace(-45, 38, 500) * torch.tensor([1.0, -1.0]).repeat(250),
}


@each_case
def test_special_values(name: str, options: tuple[float, ...]) -> None:
    for values in SPECIAL.values():
        check_one(name, options, values * 0.5, values.flip(0) * 0.5, True)
    values = torch.cat([*SPECIAL.values()])
    check_one(name, options, values, torch.zeros_like(values), True)


@pytest.mark.parametrize(("name", "options"), [CASES[i] for i in (3, 10, 11, 12, 15, 16, 18)])
@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [3e38]], ids=str)
def test_nonfinite_leaves_the_residual_alone(bad: list[float], name: str, options: tuple[float, ...]) -> None:
    grad, residual = normal(4300), normal(4300, 1)
    position = 40 if bad[0] > 0 else 4298
    grad[position : position + len(bad)] = torch.tensor(bad)
    residual[position] = 3e38
    check(name, options, grad, residual)
    check_one(name, options, residual, grad, False)
