"""The native index sets are the reference's, byte for byte, and refuse what it refuses, whatever the processor has."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradcomp.errors import PacketError
from gradcomp.indices import Coding, choose, max_coded_nbytes
from gradcomp.kernels import native, reference
from gradcomp.kernels import reference_indices as sets

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason=f"no native kernels: {native.REASON}")

ALL_LEVELS = ["generic", "avx2", "avx512"]
LEVELS = ALL_LEVELS[: ALL_LEVELS.index(native.LEVEL) + 1] if native.AVAILABLE else []
CODINGS = [Coding.WORDS, Coding.GAPS, Coding.MAP, Coding.RICE]
# Around the words, the chunks, and the widths that the vector code can and cannot unpack.
SIZES = [0, 1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 255, 257, 1000, 4099, 32_768]
DENSITIES = [0.0, 1e-3, 0.03, 0.125, 0.3, 0.7, 1.0]
THREADED = 2 * (1 << 17) + 77  # split among two threads


def uniform(numel: int, density: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    index = (torch.rand(numel, generator=dice) < density).nonzero().view(-1)
    return index, torch.rand(len(index), generator=dice) < 0.5


def planes(index: Tensor, negative: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """The bit planes of a set, in words of 64 bits."""
    both = torch.zeros((2, -(-numel // 64) * 64), dtype=torch.bool)
    both[0, index] = True
    both[1, index] = negative
    mask, minus = (reference.pack_bits(plane).view(torch.int64) for plane in both)
    return mask, minus


def vector(numel: int) -> Tensor:
    """Any values, zeros of both signs and what is not finite among them."""
    values = torch.randn(numel, generator=torch.Generator().manual_seed(7))
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-40, 3.4e38])
    values[::5] = special[torch.arange(len(values[::5])) % len(special)]
    return values


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def check(index: Tensor, negative: Tensor, numel: int, coding: Coding) -> None:
    """Everything there is, at every level, signed and unsigned."""
    count, start, values = len(index), vector(numel), vector(len(index))
    for signs in (negative, None):
        signed = signs is not None
        coded = sets.encode(index, signs, numel, coding)
        added = start.clone()
        if signed:
            sets.add_signs(added, coded, count, coding, 0.3)
        else:
            sets.add_values(added, coded, count, coding, values, 0.3)
        mask, minus = planes(index, negative, numel)
        for level in LEVELS:
            assert torch.equal(native.module.encode_indices(index, signs, numel, coding, level), coded)
            written = native.module.encode_planes(mask, minus if signed else None, numel, coding, level)
            assert torch.equal(written, coded)
            assert native.module.check_indices(coded, count, numel, coding, signed, level) is None
            found, its_signs = native.module.decode_indices(coded, count, numel, coding, signed, level)
            assert torch.equal(found, index)
            assert torch.equal(its_signs, negative if signed else torch.zeros_like(negative))
            for threads in (1, 2):
                out = start.clone()
                if signed:
                    assert native.module.add_signs(out, coded, count, coding, 0.3, level, threads) is None
                else:
                    assert native.module.add_values(out, coded, count, coding, values, 0.3, level, threads) is None
                assert same_bits(out, added)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("numel", SIZES)
def test_sizes_around_the_words(numel: int, coding: Coding) -> None:
    for density in DENSITIES:
        check(*uniform(numel, density), numel, coding)


@pytest.mark.parametrize("coding", [Coding.MAP, Coding.RICE])
@pytest.mark.parametrize("density", [1e-5, 0.01, 0.5])
def test_large_enough_for_threads(density: float, coding: Coding) -> None:
    check(*uniform(THREADED, density), THREADED, coding)


@pytest.mark.parametrize("coding", CODINGS)
def test_runs_and_ends(coding: Coding) -> None:
    for numel in (200, 3000):
        for index in (range(numel), range(100), range(numel - 100, numel), [0], [numel - 1], [0, numel - 1]):
            chosen = torch.tensor([*index])
            check(chosen, chosen % 3 == 0, numel, coding)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), numel=st.integers(0, 400), coding=st.sampled_from(CODINGS))
def test_any_set(data: st.DataObject, numel: int, coding: Coding) -> None:
    index = sorted(data.draw(st.sets(st.integers(0, numel - 1)))) if numel else []
    negative = data.draw(st.lists(st.booleans(), min_size=len(index), max_size=len(index)))
    check(torch.tensor(index, dtype=torch.int64), torch.tensor(negative, dtype=torch.bool), numel, coding)


@pytest.mark.parametrize("log2", range(1, 60))
def test_few_of_very_many(log2: int) -> None:
    """Fields of every width there is, of tensors that fit no memory."""
    numel = 1 << log2
    for count in (1, 2, 3, 9):
        index = torch.tensor(sorted({(numel - 1) * k // max(count - 1, 1) for k in range(count)}))
        negative = index % 2 == 0
        for signs in (negative, None):
            coded = sets.encode(index, signs, numel, Coding.RICE)
            for level in LEVELS:
                assert torch.equal(native.module.encode_indices(index, signs, numel, Coding.RICE, level), coded)
                found = native.module.decode_indices(coded, len(index), numel, 4, signs is not None, level)
                assert torch.equal(found[0], index)
                assert torch.equal(found[1], negative if signs is not None else torch.zeros_like(negative))


def test_choice_is_the_reference_s() -> None:
    dice = random.Random(0)
    pairs = [(count, numel) for numel in range(70) for count in range(numel + 1)]
    for _ in range(3000):
        numel = dice.randrange(1 << dice.randrange(1, 60))
        pairs.append((min(dice.randrange(1 << dice.randrange(1, 60)), numel), numel))
    for border in (1 << 15, 1 << 31):
        pairs += [(count, border + more) for count in range(20) for more in (-1, 0, 1)]
    for count, numel in pairs:
        for signed in (True, False):
            assert native.module.choose_coding(count, numel, signed) == choose(count, numel, signed=signed)
            for coding in CODINGS:
                ours = native.module.max_coded_nbytes(count, numel, coding, signed)
                assert ours == max_coded_nbytes(count, numel, coding, signed=signed)


def check_verdict(coded: bytes, count: int, numel: int, coding: Coding, signed: bool) -> bool:
    """Whether the reference takes it; every level does what it does, and whoever refuses leaves ``out`` alone."""
    # At the end of its memory, so that a checker of memory would see a reading beyond.
    payload = torch.tensor(list(coded), dtype=torch.uint8)
    try:
        expected = sets.decode(payload, count, numel, coding, signed=signed)
    except PacketError:
        expected = None
    for level in LEVELS:
        fault = native.module.check_indices(payload, count, numel, coding, signed, level)
        found = native.module.decode_indices(payload, count, numel, coding, signed, level)
        assert (fault is None) == (expected is not None)
        assert isinstance(found, str) == (expected is None)
        if expected is not None:
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
            assert torch.equal(sets.encode(found[0], found[1] if signed else None, numel, coding), payload)
        if numel > 1 << 20:
            continue
        whole = torch.zeros(numel + 32)
        out = whole[16 : numel + 16]
        if signed:
            fault = native.module.add_signs(out, payload, count, coding, 1.0, level)
        elif count <= numel:
            fault = native.module.add_values(out, payload, count, coding, torch.ones(count), 1.0, level)
        assert (fault is None) == (expected is not None)
        assert int(out.count_nonzero()) == (0 if expected is None else count)
        assert int(whole.count_nonzero()) == int(out.count_nonzero())
    return expected is not None


@settings(max_examples=400, deadline=None)
@given(
    coded=st.binary(max_size=40),
    count=st.one_of(st.integers(0, 24), st.sampled_from([(1 << 62), (1 << 64) - 1])),
    numel=st.sampled_from([0, 1, 7, 8, 20, 64, 100, 32_768, 70_000, 1 << 33, 1 << 59, 1 << 62]),
    coding=st.sampled_from(CODINGS),
    signed=st.booleans(),
)
def test_any_bytes(coded: bytes, count: int, numel: int, coding: Coding, signed: bool) -> None:
    check_verdict(coded, count, numel, coding, signed)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(("numel", "density"), [(12, 0.3), (300, 0.02), (300, 0.12), (2000, 0.5), (30_000, 1e-3)])
def test_damaged(numel: int, density: float, coding: Coding, signed: bool) -> None:
    """Flipped bits, other lengths and other counts. Many are sets again, but the same ones for all."""
    dice = random.Random(0)
    index, negative = uniform(numel, density)
    count = len(index)
    good = bytes(sets.encode(index, negative if signed else None, numel, coding).tolist())
    assert check_verdict(good, count, numel, coding, signed)
    for _ in range(60):
        bad = bytearray(good)
        for _ in range(dice.randint(1, 3)):
            bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
        check_verdict(bytes(bad), count, numel, coding, signed)
    for length in {*range(min(20, len(good))), len(good) - 1}:
        assert not check_verdict(good[:length], count, numel, coding, signed)
    for more in (b"\0", b"\1", bytes(9)):
        assert not check_verdict(good + more, count, numel, coding, signed)
    for other in (0, count - 1, count + 1, numel, numel + 1):
        check_verdict(good, other, numel, coding, signed)
    for other in (numel - 1, numel + 1, 2 * numel, int(index[-1])):
        check_verdict(good, count, other, coding, signed)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("shift", range(8))
def test_at_any_alignment(shift: int, coding: Coding) -> None:
    numel = 5000
    index, negative = uniform(numel, 0.1)
    coded = sets.encode(index, negative, numel, coding)
    moved = torch.cat([torch.full((shift,), 255, dtype=torch.uint8), coded])[shift:]
    for level in LEVELS:
        found = native.module.decode_indices(moved, len(index), numel, coding, True, level)
        assert torch.equal(found[0], index)
        assert torch.equal(found[1], negative)
        out, wanted = torch.zeros(numel + shift)[shift:], torch.zeros(numel)
        assert native.module.add_signs(out, moved, len(index), coding, -2.0, level) is None
        wanted[index] = torch.where(negative, 2.0, -2.0)
        assert torch.equal(out, wanted)


def test_elements_outside_the_set_stay_as_they_are() -> None:
    """Also -0.0, which adding 0.0 would change."""
    index, negative = torch.arange(0, 300, 2), torch.zeros(150, dtype=torch.bool)
    for coding in CODINGS:
        coded = sets.encode(index, negative, 300, coding)
        outs = [torch.full((300,), -0.0) for _ in range(len(LEVELS) + 1)]
        sets.add_signs(outs[-1], coded, 150, coding, 1.0)
        for level, out in zip(LEVELS, outs, strict=False):
            native.module.add_signs(out, coded, 150, coding, 1.0, level)
        for out in outs:
            assert out.signbit().tolist() == [False, True] * 150


def packed(numel: int, density: float, coding: Coding, signed: bool, seed: int) -> sets.CodedPacket:
    """A packet: of signs, or of values that come before the set."""
    index, negative = uniform(numel, density, seed)
    coded = sets.encode(index, negative if signed else None, numel, coding)
    if signed:
        return coded, len(index), coding, 0.1 * (seed + 1)
    return torch.cat([vector(len(index)).view(torch.uint8), coded]), len(index), coding, None


def check_sum(numel: int, packets: list[sets.CodedPacket], scale: float) -> None:
    """One packet after the other, and all at once, on every level."""
    expected = torch.zeros(numel)
    for payload, count, coding, magnitude in packets:
        if magnitude is None:
            values, coded = payload[: 4 * count].view(torch.float32), payload[4 * count :]
            sets.add_values(expected, coded, count, coding, values, scale)
        else:
            sets.add_signs(expected, payload, count, coding, float(torch.tensor(magnitude) * scale))
    plain = [(payload, count, int(coding), magnitude) for payload, count, coding, magnitude in packets]
    for level in LEVELS:
        for threads in (1, 2):
            whole = torch.full((numel + 32,), math.nan)
            out = whole[16 : 16 + numel]
            assert native.module.sum_sets(out, plain, scale, level, threads) is None
            assert same_bits(out, expected)
            assert int(whole.isnan().sum()) - int(out.isnan().sum()) == 32
    out = torch.full((numel,), math.nan)
    sets.sum_sets(out, packets, scale)
    assert same_bits(out, expected)


@pytest.mark.parametrize("numel", [0, 1, 64, 65, 1000, 4095, 4096, 4097, 8200, 32_768])
def test_sums_of_sets(numel: int) -> None:
    """All codings together, and elements of several packets on each other."""
    kinds = [(coding, signed) for coding in CODINGS for signed in (True, False)]
    for density in (0.0, 1e-3, 0.1, 1.0):
        packets = [packed(numel, density, *kind, seed) for seed, kind in enumerate(kinds)]
        check_sum(numel, packets, 0.3)
    check_sum(numel, [], 1.0)


@pytest.mark.parametrize("density", [1e-5, 1e-3, 0.2])
def test_sums_of_long_sets(density: float) -> None:
    """Long enough for two threads and for writing past the caches, which wants aligned memory: off by one it is not."""
    kinds = [(coding, signed) for coding in CODINGS if coding is not Coding.GAPS for signed in (True, False)]
    packets = [packed(THREADED, density, *kind, seed) for seed, kind in enumerate(kinds)]
    check_sum(THREADED, packets, -0.25)
    plain = [(payload, count, int(coding), magnitude) for payload, count, coding, magnitude in packets]
    outs = [torch.empty(THREADED + shift)[shift:] for shift in (0, 1)]
    for out in outs:
        assert native.module.sum_sets(out, plain, 0.3) is None
    assert same_bits(*outs)


def test_a_sum_of_very_many() -> None:
    packets = [packed(5000, 0.01, choose(50, 5000, signed=True), True, seed) for seed in range(100)]
    check_sum(5000, packets, 1 / 3)


def test_a_sum_writes_nothing_if_one_set_is_refused() -> None:
    good = packed(3000, 0.01, Coding.RICE, True, 0)
    values = packed(3000, 0.01, Coding.RICE, False, 1)
    for bad in (
        (good[0][:-1], good[1], 4, 1.0),
        (good[0], good[1] + 1, 4, 1.0),
        (values[0], 1 << 62, 4, None),
        (values[0][:8], values[1], 4, None),
        (torch.full((375,), 255, dtype=torch.uint8), 3000, 1, 1.0),
    ):
        for level in LEVELS:
            out = torch.ones(3000)
            plain = [(good[0], good[1], 4, 1.0), bad]
            assert isinstance(native.module.sum_sets(out, plain, 1.0, level), str)
            assert bool((out == 1.0).all())
        with pytest.raises(PacketError):
            sets.sum_sets(torch.ones(3000), [good, (bad[0], bad[1], Coding(bad[2]), bad[3])], 1.0)
    with pytest.raises(ValueError, match="coding"):
        native.module.sum_sets(torch.ones(3000), [(good[0], good[1], 0, 1.0)], 1.0)
    with pytest.raises(ValueError, match="multiple of 4"):
        native.module.sum_sets(torch.ones(3000), [(values[0][1:], 1, 4, None)], 1.0)
    with pytest.raises(TypeError):
        native.module.sum_sets(torch.ones(3000), [(good[0].int(), good[1], 4, 1.0)], 1.0)


def test_misuse() -> None:
    index, negative = torch.tensor([1, 2]), torch.tensor([True, False])
    coded = sets.encode(index, negative, 10, Coding.MAP)
    out = torch.zeros(10)
    for call in (
        lambda: native.module.encode_indices(index, negative[:1], 10, 3),
        lambda: native.module.encode_indices(index, negative, 10, 0),
        lambda: native.module.encode_indices(index, negative, 10, 5),
        lambda: native.module.encode_indices(index, negative, 10, 3, "mmx"),
        lambda: native.module.encode_planes(torch.tensor([1 << 10]), None, 10, 3),
        lambda: native.module.encode_planes(torch.tensor([1, 1]), None, 10, 3),
        lambda: native.module.decode_indices(coded, 2, 10, 0, True),
        lambda: native.module.add_values(out, coded, 2, 3, torch.ones(3), 1.0),
    ):
        with pytest.raises(ValueError, match=r"must|cannot|beyond|level"):
            call()
    for call in (
        lambda: native.module.add_signs(out.double(), coded, 2, 3, 1.0),
        lambda: native.module.add_signs(torch.zeros(20)[::2], coded, 2, 3, 1.0),
        lambda: native.module.add_signs(out, coded.int(), 2, 3, 1.0),
        lambda: native.module.decode_indices(coded, -1, 10, 3, True),
        lambda: native.module.encode_indices(index.int(), negative, 10, 3),
    ):
        with pytest.raises(TypeError):
            call()
    assert not out.any()
