"""The reference kernels against the plainest way of saying the same, and whatever runs against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gradcomp.kernels import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [0, 1, 2, 7, 8, 1000, (1 << 18) - 1, (1 << 18) + 1]  # around a chunk, where halves of it could be mixed up


def make(numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=generator).to(dtype), torch.randn(numel, generator=generator)


@pytest.mark.parametrize("select", [reference.select_threshold], ids=["reference"])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_select_threshold(
    numel: int, dtype: torch.dtype, with_residual: bool, select: reference.SelectThreshold
) -> None:
    grad, residual = make(numel, dtype)
    acc = grad.float() + residual if with_residual else grad.float()
    for tau in (0.0, 0.5, 3.0, 1e30):
        found = select(grad, residual if with_residual else None, tau)
        assert not isinstance(found, float)
        index, negative = found
        assert torch.equal(index, (acc.abs() > tau).nonzero().view(-1))
        assert torch.equal(negative, acc[index] < 0)


@pytest.mark.parametrize("select", [reference.select_threshold], ids=["reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_select_threshold_is_strict(dtype: torch.dtype, select: reference.SelectThreshold) -> None:
    grad = torch.tensor([2.0, -2.0, 2.015625, -2.015625, 0.0, -0.0, 1.0, -1.0, 3.0], dtype=dtype)
    found = select(grad, None, 2.0)
    assert not isinstance(found, float)
    assert [t.tolist() for t in found] == [[2, 3, 8], [False, True, False]]
    found = select(grad, None, 0.0)
    assert not isinstance(found, float)
    assert found[0].tolist() == [0, 1, 2, 3, 6, 7, 8]


@pytest.mark.parametrize("kernel", ["select_threshold", "chosen", "encode_bits", "select_largest"])
def test_nonfinite_value(kernel: str) -> None:
    def run(grad: Tensor, residual: Tensor | None) -> object:
        if kernel == "select_threshold":
            return reference.select_threshold(grad, residual, 5.0)
        if kernel == "chosen":
            return reference.select_threshold(grad, residual, 5.0)
        return (
            reference.encode_bits(grad, residual, 8)
            if kernel == "encode_bits"
            else reference.select_largest(grad, residual, 3)
        )

    for position in range(40):  # every place in a vector register, and the scalar tail
        for value in (math.nan, math.inf, -math.inf):
            grad, residual = torch.zeros(37), torch.zeros(37)
            (grad if position % 2 else residual)[position % 37] = value
            found = run(grad, residual)
            assert isinstance(found, float)
            assert found == value or (math.isnan(found) and math.isnan(value))
    both = torch.zeros(37)
    both[3], both[30] = math.inf, -math.inf
    assert math.isnan(run(both, None))  # type: ignore[arg-type]
    big = torch.full((9,), 3e38)
    assert run(big, big) == math.inf  # finite parts, but their sum is not


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 64, 1001])
def test_pack_bits(numel: int) -> None:
    bits = torch.rand(numel, generator=torch.Generator().manual_seed(numel)) < 0.5
    packed = reference.pack_bits(bits)
    wanted = [
        sum(bits[8 * j : 8 * j + 8].tolist()[k] << k for k in range(min(8, numel - 8 * j)))
        for j in range(-(-numel // 8))
    ]
    assert packed.tolist() == wanted
    assert torch.equal(reference.unpack_bits(packed, numel), bits)


def test_pack_bits_of_a_view_that_is_not_aligned() -> None:
    bits = torch.arange(33) % 3 == 0
    assert torch.equal(reference.pack_bits(bits[1:]), reference.pack_bits(bits[1:].clone()))


def bits_parts(payload: Tensor, numel: int, block: int) -> tuple[Tensor, Tensor]:
    """Scales [blocks, 2] and packed bits."""
    nbytes = 8 * -(-numel // block)
    return payload[:nbytes].view(torch.float32).view(-1, 2), payload[nbytes:]


@pytest.mark.parametrize("block", [8, 64, 1024, 1 << 20])
@pytest.mark.parametrize("numel", [1, 7, 8, 1000, 1024, 300_000])
def test_bits(numel: int, block: int) -> None:
    grad, residual = make(numel)
    found = reference.encode_bits(grad, residual, block)
    assert not isinstance(found, float)
    scales, bits = bits_parts(found, numel, block)
    out = torch.zeros(numel)
    reference.add_bits(out, scales, bits, block)
    acc = grad + residual
    for start in {0, (numel - 1) // block * block}:
        part = acc[start : start + block]
        for sign in (part < 0, part >= 0):
            if sign.any():
                mean = part[sign].double().mean().float()
                assert torch.allclose(out[start : start + block][sign], mean, rtol=1e-6)


def test_bits_of_values_whose_sum_is_no_float32() -> None:
    found = reference.encode_bits(torch.full((1024,), 3e38), None, 1024)
    assert not isinstance(found, float)
    none, mean = found[:8].view(torch.float32)
    assert none == 0.0
    assert torch.allclose(mean, torch.tensor(3e38), rtol=1e-6)
    largest = reference.encode_bits(torch.full((1024,), torch.finfo(torch.float32).max), None, 1024)
    assert not isinstance(largest, float)
    assert bool(largest[:8].view(torch.float32).isfinite().all())


@pytest.mark.parametrize("numel", [0, 1, 5, 999, 300_001])
def test_signs_from_indices_and_from_a_map(numel: int) -> None:
    from gradcomp import indices

    index = torch.arange(0, numel, 3)
    negative = index % 2 == 0
    start, _ = make(numel)
    scattered, mapped = start.clone(), start.clone()
    reference.scatter_signs(scattered, index, negative, 0.3)
    coded = indices.encode(index, negative, numel, indices.Coding.MAP)
    reference.add_signs(mapped, coded, len(index), indices.Coding.MAP, 0.3)
    wanted = start.clone()
    wanted[index] += torch.where(negative, -0.3, 0.3)
    assert torch.equal(scattered, wanted)
    assert torch.equal(mapped, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, -1.0, 1 / 3, 0.0])
def test_add_scaled(dtype: torch.dtype, scale: float) -> None:
    values, start = make(300_001, dtype)
    out = start.clone()
    reference.add_scaled(out, values, scale)
    assert torch.equal(out, start + values.float() * scale)


@pytest.mark.parametrize("k", [1, 2, 10, 39, 40, 1000, 20_000])
@pytest.mark.parametrize("kind", ["noise", "ties", "sparse", "constant", "hidden"])
def test_select_largest(kind: str, k: int) -> None:
    acc = {
        "noise": make(20_000)[0],
        "ties": (make(20_000)[0] * 2).round(),
        "sparse": torch.where(torch.arange(20_000) % 500 == 7, make(20_000)[0], 0.0),
        "constant": torch.full((20_000,), -1.0),
        # What the sample sees is large, and nothing else is.
        "hidden": torch.where(torch.arange(20_000) % 3 == 0, 1.0, 1e-3),
    }[kind]
    found = reference.select_largest(acc, None, k)
    assert not isinstance(found, float)
    magnitude = acc.abs().tolist()
    order = sorted(range(len(acc)), key=lambda i: (-magnitude[i], i))[:k]
    wanted = sorted(i for i in order if acc[i] != 0)
    assert found[0].tolist() == wanted
    assert torch.equal(found[1], acc[wanted])


@pytest.mark.parametrize("numel", [1, 10, 1000, 100_000])
def test_sample_largest(numel: int) -> None:
    grad, residual = make(numel)
    largest = reference.sample_largest(grad, residual, 0.01)
    assert torch.equal(largest, largest.sort(descending=True).values)
    passing = ((grad + residual).abs() >= largest[-1]).sum().item()
    assert 1 <= passing <= max(1.4 * 0.01 * numel, 2)
    assert reference.sample_largest(grad[:0], None, 0.01).numel() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_gives_what_the_cpu_does(dtype: torch.dtype) -> None:
    grad, residual = make(1_000_003, dtype)
    on_cpu = reference.select_threshold(grad, residual, 2.0), reference.select_largest(grad, residual, 1000)
    on_gpu = (
        reference.select_threshold(grad.cuda(), residual.cuda(), 2.0),
        reference.select_largest(grad.cuda(), residual.cuda(), 1000),
    )
    for here, there in zip(on_cpu, on_gpu, strict=True):
        assert not isinstance(here, float)
        assert not isinstance(there, float)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
