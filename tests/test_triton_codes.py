"""The Triton kernels of packed codes compute what the reference does, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from gradcomp.kernels import reference, triton_codes

# (numel, block): blocks that are powers of 2 and not, several to a tile, one, several tiles to a block; ends anywhere
SHAPES = [(0, 8), (1, 8), (77, 24), (1000, 0), (4103, 1024), (4100, 1000), (8201, 0), (8207, 4104), (4096, 4096)]


def draw(numel: int, bits: int) -> Tensor:
    """Codes, none of them all ones unless there is only one bit."""
    most = max((1 << bits) - 2, 1)
    return torch.randint(0, most + 1, (numel,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("numel", "block"), SHAPES)
def test_adding(numel: int, block: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(numel + bits)
    start, addend = torch.randn(2, numel, generator=generator).to(DEVICE)
    parameters = torch.rand(-(-numel // block) if block else 1, 2, generator=generator).to(DEVICE)
    scales = parameters[:, 0]
    packed = reference.pack_codes(draw(numel, bits), bits).to(DEVICE)
    scale, other = [(-1.0, addend), (0.3, None), (1.0, addend.half()), (1 / 3, addend.bfloat16())][bits % 4]

    def check(name: str, *options: object) -> None:
        expected, found = start.clone(), start.clone()
        getattr(reference, name)(expected, *options, block, scale, other)
        getattr(triton_codes, name)(found, *options, block, scale, other)
        assert same(found, expected)

    check("add_levels", parameters, packed, bits)
    if bits > 1:
        check("add_codes", scales, packed, bits)
    if bits == 8:
        check("add_float8", scales, torch.where((packed & 0x7F) == 0x7F, 3, packed))


def test_every_float8() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    for scale in (1.0, 2.0**-140, 3e35):
        expected = codes.view(torch.float8_e4m3fn).float() * scale
        found = torch.full_like(expected, -0.0).to(DEVICE)
        triton_codes.add_float8(found, torch.tensor([scale], device=DEVICE), codes.to(DEVICE), 0, 1.0)
        assert same(found.cpu(), expected)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("numel", [1, 65, 4103])
def test_find_code(bits: int, numel: int) -> None:
    mask = (1 << bits) - 1
    codes = draw(numel, bits) if bits > 1 else torch.zeros(numel, dtype=torch.uint8)

    def find(values: Tensor) -> bool:
        return triton_codes.find_code(reference.pack_codes(values, bits).to(DEVICE), numel, bits, mask)

    assert not find(codes)
    for position in {0, numel - 1}:
        bad = codes.clone()
        bad[position] = mask
        assert find(bad)
    assert not triton_codes.find_code(torch.zeros(0, dtype=torch.uint8, device=DEVICE), 0, bits, mask)
