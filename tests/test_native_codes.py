"""Packed codes: packed as the format says, and added by the native kernels as by the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradcomp.kernels import native, reference

ALL_LEVELS = ["generic", "avx2", "avx512"]
LEVELS = ALL_LEVELS[: ALL_LEVELS.index(native.LEVEL) + 1] if native.AVAILABLE else []
SIZES = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 1000, 1023, 1024, 1025, 2100]

needs_native = pytest.mark.skipif(not native.AVAILABLE, reason=f"no native kernels: {native.REASON}")


def draw(numel: int, bits: int, seed: int = 0) -> Tensor:
    """Codes, none of them all ones unless there is only one bit."""
    most = max((1 << bits) - 2, 1)
    return torch.randint(0, most + 1, (numel,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 100])
def test_packed_lowest_bits_first(bits: int, numel: int) -> None:
    codes = draw(numel, bits)
    number = sum(code << (bits * i) for i, code in enumerate(codes.tolist()))
    packed = reference.pack_codes(codes, bits)
    assert bytes(packed.tolist()) == number.to_bytes(-(-numel * bits // 8), "little")
    assert torch.equal(reference.unpack_codes(packed, numel, bits), codes)


def check_adding(numel: int, bits: int, block: int, scale: float, with_addend: bool, threads: int = 1) -> None:
    generator = torch.Generator().manual_seed(numel + bits)
    start, other = torch.randn(numel, generator=generator), torch.randn(numel, generator=generator)
    addend = other if with_addend else None
    rows = -(-numel // block) if block else 1
    parameters = torch.rand(rows, 2, generator=generator)
    scales = parameters[:, 0].contiguous()
    packed = reference.pack_codes(draw(numel, bits), bits)
    expected = [start.clone() for _ in range(3)]
    reference.add_levels(expected[0], parameters, packed, bits, block, scale, addend)
    if bits > 1:
        reference.add_codes(expected[1], scales, packed, bits, block, scale, addend)
    if bits == 7:  # all codes but NaN, and no sign
        eight = reference.unpack_codes(packed, numel, bits)
        reference.add_float8(expected[2], scales, eight, block, scale, addend)
    for level in LEVELS:
        found = [start.clone() for _ in range(3)]
        native.module.add_levels(found[0], parameters.view(-1), packed, bits, block, scale, addend, threads, level)
        if bits > 1:
            native.module.add_codes(found[1], scales, packed, bits, block, scale, addend, threads, level)
        if bits == 7:
            native.module.add_float8(found[2], scales, eight, block, scale, addend, threads, level)
        assert all(same(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@needs_native
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("numel", SIZES)
def test_adding(numel: int, bits: int) -> None:
    for block in (0, 8, 64, 1000, 4096):
        check_adding(numel, bits, block, -1.0, with_addend=True)
        check_adding(numel, bits, block, 0.3, with_addend=False)


@needs_native
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_adding_on_several_threads(bits: int) -> None:
    for block in (0, 1000, 1 << 20):
        check_adding((1 << 18) + 77, bits, block, 0.3, with_addend=True, threads=2)


@needs_native
@settings(deadline=None)
@given(
    numel=st.integers(0, 200),
    bits=st.integers(1, 8),
    block=st.sampled_from([0, 8, 24]),
    scale=st.floats(width=32, allow_nan=False, allow_infinity=False),
    with_addend=st.booleans(),
)
def test_adding_anything(numel: int, bits: int, block: int, scale: float, with_addend: bool) -> None:
    check_adding(numel, bits, block, scale, with_addend)


@needs_native
def test_every_float8() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    for scale in (1.0, 2.0**-140, 3e35):
        expected = codes.view(torch.float8_e4m3fn).float() * scale
        for level in LEVELS:
            found = torch.full_like(expected, -0.0)
            native.module.add_float8(found, torch.tensor([scale]), codes, 0, 1.0, None, 1, level)
            assert same(found, expected)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("numel", [1, 8, 65, 1024, 1031])
def test_find_code(bits: int, numel: int) -> None:
    mask = (1 << bits) - 1
    codes = draw(numel, bits)
    find = [reference.find_code]
    find += [
        lambda *args, level=level: native.module.find_code(*args, 1, level)  # type: ignore[misc]
        for level in LEVELS
    ]
    for one in find:
        assert not one(reference.pack_codes(codes, bits), numel, bits, mask)
        for position in {0, numel // 2, numel - 1}:
            bad = codes.clone()
            bad[position] = mask
            assert one(reference.pack_codes(bad, bits), numel, bits, mask)


@needs_native
@pytest.mark.parametrize(
    ("parameters", "codes", "bits", "block"),
    [
        (torch.zeros(1), torch.zeros(9, dtype=torch.uint8), 8, 0),  # two bytes for 2 codes of 8 bits
        (torch.zeros(2), torch.zeros(16, dtype=torch.uint8), 8, 0),
        (torch.zeros(1), torch.zeros(16, dtype=torch.uint8), 8, 8),
        (torch.zeros(1), torch.zeros(18, dtype=torch.uint8), 9, 0),
        (torch.zeros(1), torch.zeros(2, dtype=torch.uint8), 1, 0),
        (torch.zeros(2), torch.zeros(16, dtype=torch.uint8), 8, 12),
    ],
)
def test_what_does_not_fit_is_refused(parameters: Tensor, codes: Tensor, bits: int, block: int) -> None:
    with pytest.raises(ValueError, match=r"bits|block|fit"):
        native.module.add_codes(torch.zeros(16), parameters, codes, bits, block, 1.0)
