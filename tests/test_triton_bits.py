"""The Triton kernels of one bit an element give what the torch reference gives, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from gradcomp.kernels import reference, triton_bits

FLOAT32_MAX = torch.finfo(torch.float32).max
BLOCKS = [8, 24, 64, 512, 520, 1024, 4104, 1 << 20]

# What NumPy says of the sums that must overflow, interpreted.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.cpu().view(torch.uint8), expected.cpu().view(torch.uint8))


def same_result(found: object, expected: object) -> bool:
    if isinstance(expected, float):
        return isinstance(found, float) and (found == expected or (math.isnan(found) and math.isnan(expected)))
    return isinstance(found, Tensor) and isinstance(expected, Tensor) and same(found, expected)


def check(grad: Tensor, residual: Tensor | None, block: int, symmetric: bool = False, update: bool = True) -> None:
    theirs = None if residual is None else residual.clone()
    expected = reference.encode_bits(grad, theirs, block, symmetric, update)
    ours = None if residual is None else residual.clone().to(DEVICE)
    assert same_result(triton_bits.encode_bits(grad.to(DEVICE), ours, block, symmetric, update), expected)
    if ours is not None and theirs is not None:
        assert same(ours, theirs)


@pytest.mark.parametrize("block", BLOCKS)
def test_encoding(block: int) -> None:
    for numel in (0, 1, 8, 17, 513, 4097):
        # Magnitudes far apart: sums in another order differ.
        grad = normal(numel) * 10 ** normal(numel, 2)
        check(grad, normal(numel, 1), block, symmetric=numel % 2 == 0)
    grad, residual = normal(8205) * 10 ** normal(8205, 2), normal(8205, 1)
    check(grad, None, block)
    check(grad, residual, block)
    check(grad.half(), residual, block, update=False)
    check(grad.bfloat16()[3:], residual[3:], block, symmetric=True)


@pytest.mark.parametrize("numel", [0, 1, 513, 8205])
@pytest.mark.parametrize("block", BLOCKS)
def test_adding(numel: int, block: int) -> None:
    encoded = reference.encode_bits(normal(numel), None, block)
    assert isinstance(encoded, Tensor)
    scales, bits = encoded.split([8 * -(-numel // block), -(-numel // 8)])
    scales = scales.view(torch.float32).view(-1, 2)
    for addend in (None, normal(numel, 1), normal(numel, 1).half()):
        expected, found = normal(numel, 2), normal(numel, 2).to(DEVICE)
        reference.add_bits(expected, scales, bits, block, addend)
        other = None if addend is None else addend.to(DEVICE)
        triton_bits.add_bits(found, scales.to(DEVICE), bits.to(DEVICE), block, other)
        assert same(found, expected)


SPECIAL = torch.tensor([1e-45, -1e-45, 1e-40, -1e-40, 1.1754942e-38, 0.0, -0.0, FLOAT32_MAX, -FLOAT32_MAX, 1.0, -3.0])


@pytest.mark.parametrize("block", [8, 64, 1024, 4104])
@pytest.mark.parametrize("symmetric", [False, True])
def test_denormals_zeros_and_the_largest(block: int, symmetric: bool) -> None:
    values = SPECIAL.repeat(30) if block < 4096 else SPECIAL.repeat(420)
    check(values, values.flip(0) * 0.25, block, symmetric)
    check(values.clamp(-1e-38, 1e-38), values.flip(0) * 0, block, symmetric)
    constant = SPECIAL.repeat_interleave(min(block, 64))  # for the smaller, blocks of one value
    check(constant, torch.zeros_like(constant), block, symmetric)


@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [3e38]], ids=str)
@pytest.mark.parametrize(("block", "position"), [(8, 5), (8, 4298), (1024, 4298), (4104, 5)])
def test_nonfinite_leaves_the_residual_alone(bad: list[float], block: int, position: int) -> None:
    grad, residual = normal(4300), normal(4300, 1)
    grad[position : position + len(bad)] = torch.tensor(bad)
    residual[position] = 3e38
    check(grad, residual, block)
    check(residual, grad, block, update=False)


@pytest.mark.parametrize("numel", [0, 1, 7, 4103])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_signs(numel: int, dtype: torch.dtype) -> None:
    grad = normal(numel).round().to(dtype)
    grad[::7] *= -0.0
    expected, found = reference.pack_signs(grad), triton_bits.pack_signs(grad.to(DEVICE))
    assert isinstance(expected, tuple)
    assert isinstance(found, tuple)
    assert same(found[0], expected[0])
    assert found[1] == expected[1]
    assert same(triton_bits.pack_votes(grad.to(DEVICE)), reference.pack_votes(grad))
    if numel:
        for bad in (math.nan, math.inf, -math.inf):
            grad[-1] = bad
            assert same_result(triton_bits.pack_signs(grad.to(DEVICE)), reference.pack_signs(grad))
            assert same(triton_bits.pack_votes(grad.to(DEVICE)), reference.pack_votes(grad))
