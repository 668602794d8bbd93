"""Index sets: every coding gives back what was put in, and refuses everything else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradcomp import indices
from gradcomp.errors import PacketError
from gradcomp.indices import Coding

CODINGS = [Coding.WORDS, Coding.GAPS, Coding.MAP]
HUGE = (1 << 33) + 5  # more elements than 32 bits can count, and than this machine can hold


def tensors(index: list[int], negative: list[bool] | None = None) -> tuple[Tensor, Tensor]:
    signs = negative if negative is not None else [i % 2 == 1 for i in range(len(index))]
    return torch.tensor(index, dtype=torch.int64), torch.tensor(signs, dtype=torch.bool)


def units(*values: int) -> Tensor:
    return torch.tensor([byte for v in values for byte in v.to_bytes(2, "little")], dtype=torch.uint8)


def words(*values: int) -> Tensor:
    return torch.tensor([byte for v in values for byte in v.to_bytes(4, "little")], dtype=torch.uint8)


def check_round_trip(index: Tensor, negative: Tensor, numel: int, coding: Coding, signed: bool) -> Tensor:
    coded = indices.encode(index, negative if signed else None, numel, coding)
    assert coded.dtype == torch.uint8
    assert coded.numel() <= indices.max_coded_nbytes(len(index), numel, coding, signed=signed)
    found, signs = indices.decode(coded, len(index), numel, coding, signed=signed)
    assert torch.equal(found, index)
    assert torch.equal(signs, negative if signed else torch.zeros_like(negative))
    return coded


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("coding", CODINGS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_round_trip(coding: Coding, signed: bool, data: st.DataObject) -> None:
    numel = data.draw(st.integers(0, 200))
    index = sorted(data.draw(st.sets(st.integers(0, numel - 1)))) if numel else []
    negative = data.draw(st.lists(st.booleans(), min_size=len(index), max_size=len(index)))
    check_round_trip(*tensors(index, negative), numel, coding, signed)


@pytest.mark.parametrize("signed", [True, False])
def test_gaps_around_the_escape(signed: bool) -> None:
    for first in (0, 1, 32766, 32767, 32768, 65533, 65534, 65535, 98301):
        for gap in (1, 32766, 32767, 32768, 65534, 65535):
            index, negative = tensors([first, first + gap])
            check_round_trip(index, negative, 200_000, Coding.GAPS, signed)


def test_gaps_reach_their_bound() -> None:
    index, negative = tensors([32767 * 3])
    numel = 32767 * 3 + 1
    assert check_round_trip(index, negative, numel, Coding.GAPS, True).numel() == 8
    assert indices.max_coded_nbytes(1, numel, Coding.GAPS, signed=True) == 8


def test_beyond_32_bits() -> None:
    step = 1 << 30
    index, negative = tensors([5, (1 << 31) - 1, 1 << 31, 1 << 32, 7 * step, HUGE - 1])
    check_round_trip(index, negative, HUGE, Coding.GAPS, True)
    assert indices.choose(6, HUGE, signed=True) is not Coding.WORDS
    with pytest.raises(PacketError, match="not below"):
        indices.decode(indices.encode(index, negative, HUGE, Coding.GAPS), 6, HUGE - 1, Coding.GAPS, signed=True)
    top, sign = tensors([(1 << 31) - 1], [True])
    assert check_round_trip(top, sign, 1 << 31, Coding.WORDS, True).tolist() == [255] * 4


def test_choice_is_the_smallest() -> None:
    for numel in (0, 1, 5, 1000, 40_000, 1 << 31, (1 << 31) + 1, HUGE):
        for count in {0, 1, 2, numel // 10_000, numel // 100, numel // 8, numel // 3, numel}:
            if count > numel:
                continue
            for signed in (True, False):
                best = indices.choose(count, numel, signed=signed)
                fitting = CODINGS if numel <= 1 << 31 else CODINGS[1:]
                sizes = [indices.max_coded_nbytes(count, numel, coding, signed=signed) for coding in fitting]
                assert indices.max_coded_nbytes(count, numel, best, signed=signed) == min(sizes)


def test_words_bytes() -> None:
    coded = indices.encode(*tensors([1, 0x01020304], [False, True]), 1 << 30, Coding.WORDS)
    assert bytes(coded.tolist()).hex() == "0100000004030281"


def test_gaps_bytes() -> None:
    coded = indices.encode(*tensors([3, 4, 4 + 32768], [False, True, False]), 40_000, Coding.GAPS)
    assert bytes(coded.tolist()).hex() == "06000100ffff0000"


def test_map_bytes() -> None:
    index, negative = tensors([0, 1, 5], [False, True, True])
    assert indices.encode(index, negative, 6, Coding.MAP).tolist() == [0b1001, 0b1000]
    assert indices.encode(index, None, 9, Coding.MAP).tolist() == [0b100011, 0]


@pytest.mark.parametrize(
    ("coding", "signed", "count", "numel", "coded"),
    [
        pytest.param(Coding.WORDS, True, 2, 10, words(3, 3), id="words repeat"),
        pytest.param(Coding.WORDS, True, 2, 10, words(4, 3), id="words fall"),
        pytest.param(Coding.WORDS, True, 2, 10, words(3, 10), id="words beyond numel"),
        pytest.param(Coding.WORDS, False, 1, 10, words(0x80000003), id="words sign in an unsigned set"),
        pytest.param(Coding.WORDS, True, 2, 10, words(3), id="words too short"),
        pytest.param(Coding.WORDS, True, 1, 10, words(3, 4), id="words too long"),
        pytest.param(Coding.GAPS, True, 1, 10, units(10 << 1), id="gaps beyond numel"),
        pytest.param(Coding.GAPS, True, 2, 10, units(4 << 1, 5 << 1), id="gaps beyond numel together"),
        pytest.param(Coding.GAPS, True, 1, 99_999, units(0xFFFE), id="gaps 0xFFFE"),
        pytest.param(Coding.GAPS, True, 2, 99_999, units(0, 0xFFFF), id="gaps fewer"),
        pytest.param(Coding.GAPS, True, 1, 99_999, units(0, 0xFFFF), id="gaps trailing escape"),
        pytest.param(Coding.GAPS, True, 1, 99_999, units(0, 0), id="gaps more"),
        pytest.param(Coding.GAPS, True, 0, 99_999, units(0xFFFF), id="gaps escape alone"),
        pytest.param(Coding.GAPS, True, 1, 99_999, units(0xFFFF, 0)[:3], id="gaps odd"),
        pytest.param(Coding.GAPS, False, 1, 10, units(1), id="gaps sign in an unsigned set"),
        pytest.param(Coding.GAPS, True, 1, 99_999, units(*[0xFFFF] * 4, 0), id="gaps more escapes than fit"),
        pytest.param(Coding.MAP, True, 1, 4, torch.tensor([3], dtype=torch.uint8), id="map code 11"),
        pytest.param(Coding.MAP, True, 2, 4, torch.tensor([1], dtype=torch.uint8), id="map fewer"),
        pytest.param(Coding.MAP, True, 0, 4, torch.tensor([1], dtype=torch.uint8), id="map more"),
        pytest.param(Coding.MAP, True, 1, 3, torch.tensor([64], dtype=torch.uint8), id="map beyond numel"),
        pytest.param(Coding.MAP, False, 1, 7, torch.tensor([128], dtype=torch.uint8), id="unsigned map beyond numel"),
        pytest.param(Coding.MAP, True, 0, 5, torch.tensor([0], dtype=torch.uint8), id="map too short"),
        pytest.param(Coding.MAP, True, 0, 4, torch.tensor([0, 0], dtype=torch.uint8), id="map too long"),
    ],
)
def test_refused(coding: Coding, signed: bool, count: int, numel: int, coded: Tensor) -> None:
    with pytest.raises(PacketError):
        indices.decode(coded, count, numel, coding, signed=signed)


@settings(max_examples=300, deadline=None)
@given(
    coded=st.binary(max_size=24),
    count=st.integers(0, 20),
    numel=st.sampled_from([20, 24, 100, 70_000, HUGE]),
    coding=st.sampled_from(CODINGS),
    signed=st.booleans(),
)
def test_decode_anything(coded: bytes, count: int, numel: int, coding: Coding, signed: bool) -> None:
    """Whatever decodes is a set, and encodes to the same bytes."""
    payload = torch.tensor(list(coded), dtype=torch.uint8)
    try:
        index, negative = indices.decode(payload, count, numel, coding, signed=signed)
    except PacketError:
        return
    assert len(index) == len(negative) == count
    assert index.dtype == torch.int64
    assert index.tolist() == sorted(set(index.tolist()))
    assert all(0 <= i < numel for i in index.tolist())
    assert torch.equal(indices.encode(index, negative if signed else None, numel, coding), payload)


@pytest.mark.gpu
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("signed", [True, False])
def test_cuda_codes_as_the_cpu_does(coding: Coding, signed: bool) -> None:
    index = torch.arange(0, 200_000, 37)
    negative = index % 3 == 0
    on_cpu = indices.encode(index, negative if signed else None, 200_000, coding)
    on_gpu = indices.encode(index.cuda(), negative.cuda() if signed else None, 200_000, coding)
    assert torch.equal(on_gpu.cpu(), on_cpu)
    found, signs = indices.decode(on_gpu, len(index), 200_000, coding, signed=signed)
    assert torch.equal(found.cpu(), index)
    assert torch.equal(signs.cpu(), negative & signed)
