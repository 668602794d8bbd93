"""Index sets: every coding gives back what was put in, and refuses everything else."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradcomp import indices
from gradcomp.errors import PacketError
from gradcomp.indices import Coding
from gradcomp.kernels import reference_indices as reference

CODINGS = [Coding.WORDS, Coding.GAPS, Coding.MAP, Coding.RICE]
MAX_NUMEL = {Coding.WORDS: 1 << 31, Coding.GAPS: 1 << 15}
HUGE = (1 << 33) + 5  # more elements than 32 bits can count, and than this machine can hold


def tensors(index: list[int], negative: list[bool] | None = None) -> tuple[Tensor, Tensor]:
    signs = negative if negative is not None else [i % 2 == 1 for i in range(len(index))]
    return torch.tensor(index, dtype=torch.int64), torch.tensor(signs, dtype=torch.bool)


def uniform(numel: int, density: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    index = (torch.rand(numel, generator=dice) < density).nonzero().view(-1)
    return index, torch.rand(len(index), generator=dice) < 0.5


def octets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def units(*values: int) -> Tensor:
    return octets(*(byte for v in values for byte in v.to_bytes(2, "little")))


def words(*values: int) -> Tensor:
    return octets(*(byte for v in values for byte in v.to_bytes(4, "little")))


def entropy_bits(count: int, numel: int) -> float:
    """log2 of how many sets there are."""
    return (math.lgamma(numel + 1) - math.lgamma(count + 1) - math.lgamma(numel - count + 1)) / math.log(2)


def check_round_trip(index: Tensor, negative: Tensor, numel: int, coding: Coding, signed: bool) -> Tensor:
    coded = indices.encode(index, negative if signed else None, numel, coding)
    assert coded.dtype == torch.uint8
    assert coded.numel() <= indices.max_coded_nbytes(len(index), numel, coding, signed=signed)
    indices.check(coded, len(index), numel, coding, signed=signed)
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


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("numel", [0, 1, 2, 63, 64, 65, 4099, 32_768, 1_000_000])
@pytest.mark.parametrize("density", [1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.9, 1.0])
def test_round_trip_at_any_density(numel: int, density: float, coding: Coding) -> None:
    if numel > MAX_NUMEL.get(coding, numel):
        return
    index, negative = uniform(numel, density)
    for signed in (True, False):
        check_round_trip(index, negative, numel, coding, signed)


@pytest.mark.parametrize("numel", [3_000_000, 20_000_000])
@pytest.mark.parametrize("density", [1e-4, 1e-3, 0.01])
def test_rice_is_within_3_percent_of_the_entropy(numel: int, density: float) -> None:
    index, _ = uniform(numel, density)
    assert indices.choose(len(index), numel, signed=False) is Coding.RICE
    coded = indices.encode(index, None, numel, Coding.RICE)
    bound = entropy_bits(len(index), numel)
    assert bound <= 8 * len(coded) <= 1.03 * bound + 16


def test_rice_reaches_its_bound() -> None:
    for count, numel in [
        (1, 1),
        (1, 40),
        (3, 40_000),
        (7, 1 << 20),
        (100, 5000),
        (999, 1000),
        (1000, 1000),
        (5, 1 << 40),
    ]:
        last = torch.arange(numel - count, numel)
        for signed in (True, False):
            coded = check_round_trip(last, last % 2 == 0, numel, Coding.RICE, signed)
            assert len(coded) == indices.max_coded_nbytes(count, numel, Coding.RICE, signed=signed)


def test_beyond_32_bits() -> None:
    step = 1 << 30
    index, negative = tensors([5, (1 << 31) - 1, 1 << 31, 1 << 32, 7 * step, HUGE - 1])
    assert indices.choose(6, HUGE, signed=True) is Coding.RICE
    check_round_trip(index, negative, HUGE, Coding.RICE, True)
    with pytest.raises(PacketError, match="not "):
        indices.decode(indices.encode(index, negative, HUGE, Coding.RICE), 6, HUGE - 1, Coding.RICE, signed=True)
    for numel in (1 << 40, 1 << 59):
        for third in (numel // 2, numel - 1):
            check_round_trip(*tensors([0, 1 << 33, third]), numel, Coding.RICE, True)
            check_round_trip(*tensors([third]), numel, Coding.RICE, False)
    top, sign = tensors([(1 << 31) - 1], [True])
    assert check_round_trip(top, sign, 1 << 31, Coding.WORDS, True).tolist() == [255] * 4
    top, sign = tensors([(1 << 15) - 1], [True])
    assert check_round_trip(top, sign, 1 << 15, Coding.GAPS, True).tolist() == [255] * 2


def test_choice_is_the_smallest_but_for_dense_sets() -> None:
    for numel in (0, 1, 5, 1000, 32_768, 32_769, 40_000, 1 << 31, (1 << 31) + 1, HUGE):
        for count in {0, 1, 2, 5, 50, numel // 10_000, numel // 100, numel // 8, numel // 8 + 1, numel // 3, numel}:
            if count > numel:
                continue
            for signed in (True, False):
                best = indices.choose(count, numel, signed=signed)
                if 8 * count > numel:
                    assert best is Coding.MAP
                    continue
                fitting = [coding for coding in CODINGS if numel <= MAX_NUMEL.get(coding, numel)]
                sizes = [indices.max_coded_nbytes(count, numel, coding, signed=signed) for coding in fitting]
                assert fitting[sizes.index(min(sizes))] is best


@pytest.mark.parametrize("signed", [True, False])
def test_fewer_elements_take_no_more(signed: bool) -> None:
    """With their values, that is: a packet of fewer elements is no longer. The most for signs is the map of all."""
    for numel in [*range(200), 32_768, 32_769]:
        counts = range(numel + 1) if numel < 200 else range(5000)
        sizes = [
            indices.max_coded_nbytes(n, numel, indices.choose(n, numel, signed=signed), signed=signed) for n in counts
        ]
        assert all(sizes[n] <= sizes[n + 1] + 4 for n in counts[:-1])
        assert max(sizes) <= indices.max_coded_nbytes(numel, numel, Coding.MAP, signed=signed)


def test_words_bytes() -> None:
    coded = indices.encode(*tensors([1, 0x01020304], [False, True]), 1 << 30, Coding.WORDS)
    assert bytes(coded.tolist()).hex() == "0100000004030281"


def test_gaps_bytes() -> None:
    coded = indices.encode(*tensors([3, 4, 32767], [False, True, False]), 32768, Coding.GAPS)
    assert bytes(coded.tolist()).hex() == "06000100f4ff"


def test_map_bytes() -> None:
    index, negative = tensors([0, 1, 5], [False, True, True])
    assert indices.encode(index, negative, 6, Coding.MAP).tolist() == [0b100011, 0b110]
    assert indices.encode(index, None, 9, Coding.MAP).tolist() == [0b100011, 0]


def test_rice_bytes() -> None:
    coded = indices.encode(*tensors([3, 4, 32772], [False, True, False]), 40_000, Coding.RICE)
    assert bytes(coded.tolist()).hex() == "064000e0ff0323"
    # r = 1, gaps 0, 3, 1: low bits 0, 1, 1, then 1, 0 1, 1.
    assert indices.encode(tensors([0, 4, 6])[0], None, 10, Coding.RICE).tolist() == [0b110, 0b1101]
    # r = 0: no low bits; gaps 0, 1, 0.
    assert indices.encode(tensors([0, 2, 3])[0], None, 5, Coding.RICE).tolist() == [0b1101]


@pytest.mark.parametrize(
    ("coding", "signed", "count", "numel", "coded"),
    [
        pytest.param(Coding.WORDS, True, 2, 10, words(3, 3), id="words repeat"),
        pytest.param(Coding.WORDS, True, 2, 10, words(4, 3), id="words fall"),
        pytest.param(Coding.WORDS, True, 2, 10, words(3, 10), id="words beyond numel"),
        pytest.param(Coding.WORDS, False, 1, 10, words(0x80000003), id="words sign in an unsigned set"),
        pytest.param(Coding.WORDS, True, 2, 10, words(3), id="words too short"),
        pytest.param(Coding.WORDS, True, 1, 10, words(3, 4), id="words too long"),
        pytest.param(Coding.WORDS, True, 1, (1 << 31) + 1, words(3), id="words of too many"),
        pytest.param(Coding.GAPS, True, 1, 10, units(10 << 1), id="gaps beyond numel"),
        pytest.param(Coding.GAPS, True, 2, 10, units(4 << 1, 5 << 1), id="gaps beyond numel together"),
        pytest.param(Coding.GAPS, True, 1, 10, units(0)[:1], id="gaps odd"),
        pytest.param(Coding.GAPS, True, 2, 10, units(0), id="gaps fewer"),
        pytest.param(Coding.GAPS, True, 1, 10, units(0, 0), id="gaps more"),
        pytest.param(Coding.GAPS, False, 1, 10, units(1), id="gaps sign in an unsigned set"),
        pytest.param(Coding.GAPS, True, 1, (1 << 15) + 1, units(3), id="gaps of too many"),
        pytest.param(Coding.MAP, True, 2, 4, octets(1, 0), id="map fewer"),
        pytest.param(Coding.MAP, True, 1, 4, octets(3, 0), id="map more"),
        pytest.param(Coding.MAP, True, 1, 3, octets(8, 0), id="map beyond numel"),
        pytest.param(Coding.MAP, True, 1, 3, octets(1, 2), id="map sign beyond count"),
        pytest.param(Coding.MAP, False, 1, 7, octets(128), id="unsigned map beyond numel"),
        pytest.param(Coding.MAP, True, 0, 9, octets(0), id="map too short"),
        pytest.param(Coding.MAP, True, 1, 8, octets(1), id="map without signs"),
        pytest.param(Coding.MAP, False, 1, 8, octets(1, 0), id="unsigned map with signs"),
        pytest.param(Coding.RICE, False, 1, 10, octets(7, 0b10), id="rice beyond numel"),
        pytest.param(Coding.RICE, False, 2, 10, octets(0b1111, 0b1001), id="rice beyond numel together"),
        pytest.param(Coding.RICE, False, 1, 10, octets(8, 1), id="rice spare low bit"),
        pytest.param(Coding.RICE, False, 1, 10, octets(0, 0b11), id="rice more"),
        pytest.param(Coding.RICE, False, 2, 10, octets(0, 0b1), id="rice fewer"),
        pytest.param(Coding.RICE, False, 1, 10, octets(0, 0), id="rice none"),
        pytest.param(Coding.RICE, False, 1, 10, octets(0), id="rice too short"),
        pytest.param(Coding.RICE, False, 1, 10, octets(0, 1, 0), id="rice too long"),
        pytest.param(Coding.RICE, False, 9, 27, octets(0, 0, 255, 1, 0), id="rice bytes after the last element"),
        pytest.param(Coding.RICE, False, 0, 10, octets(0), id="rice of nothing"),
        *[pytest.param(coding, True, 3, 2, octets(*range(12)), id=f"{coding.name} 3 of 2") for coding in CODINGS],
    ],
)
def test_refused(coding: Coding, signed: bool, count: int, numel: int, coded: Tensor) -> None:
    for module in (indices, reference):
        with pytest.raises(PacketError):
            module.decode(coded, count, numel, coding, signed=signed)
        with pytest.raises(PacketError):
            module.check(coded, count, numel, coding, signed=signed)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("index", [[3, 3], [4, 3], [-1, 3], [3, 10], [*range(11)]])
def test_only_sets_can_be_written(index: list[int], coding: Coding) -> None:
    for module in (indices, reference):
        with pytest.raises(ValueError, match=r"inde|elements"):
            module.encode(*tensors(index), 10, coding)


@settings(max_examples=500, deadline=None)
@given(
    coded=st.binary(max_size=24),
    count=st.integers(0, 20),
    numel=st.sampled_from([8, 20, 24, 100, 70_000, HUGE]),
    coding=st.sampled_from(CODINGS),
    signed=st.booleans(),
)
def test_decode_anything(coded: bytes, count: int, numel: int, coding: Coding, signed: bool) -> None:
    """Whatever decodes is a set, and encodes to the same bytes."""
    payload = octets(*coded)
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
    numel = 30_000
    index = torch.arange(0, numel, 37)
    negative = index % 3 == 0
    on_cpu = indices.encode(index, negative if signed else None, numel, coding)
    on_gpu = indices.encode(index.cuda(), negative.cuda() if signed else None, numel, coding)
    assert torch.equal(on_gpu.cpu(), on_cpu)
    found, signs = indices.decode(on_gpu, len(index), numel, coding, signed=signed)
    assert torch.equal(found.cpu(), index)
    assert torch.equal(signs.cpu(), negative & signed)
    if signed:
        out, on_device = torch.ones(numel), torch.ones(numel, device="cuda")
        reference.add_signs(out, on_cpu, len(index), coding, 0.3)
        reference.add_signs(on_device, on_gpu, len(index), coding, 0.3)
        assert torch.equal(on_device.cpu(), out)
