"""Streams of random numbers: Philox against its authors' vectors, and keys that tell everything apart."""

from __future__ import annotations

import pytest
import torch

from gradcomp import randomness
from gradcomp.kernels import reference_random as reference

# Counter, key and words: "kat_vectors" of the authors' library Random123, philox4x32 with 10 rounds.
KNOWN = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


def word64(low: int, high: int) -> int:
    return low | high << 32


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name: str) -> None:
    counter, key, words = KNOWN[name]
    found = reference.philox(word64(*key), word64(*counter[2:]), word64(*counter[:2]), 1)
    assert found.tolist() == [list(words)]


def test_positions_carry_into_the_high_word() -> None:
    across = reference.philox(7, 3, (1 << 32) - 2, 4)
    for i in range(4):
        assert torch.equal(across[i], reference.philox(7, 3, (1 << 32) - 2 + i, 1)[0])
    assert len({tuple(row) for row in across.tolist()}) == 4


def test_halves_are_those_of_the_words() -> None:
    halves = reference.random_halves(11, 5, 0, 640)
    for i in (0, 1, 7, 8, 15, 16, 63, 64, 100, 639):
        word = int(reference.philox(11, 5, i // 64 * 8 + i % 8, 1)[0, i // 16 % 4])
        assert halves[i] == (word >> 16 if i // 8 % 2 else word & 0xFFFF)


@pytest.mark.parametrize("start", [0, 1, 63, 64, 65, (1 << 31) - 5, (1 << 35) - 5])
@pytest.mark.parametrize("count", [0, 1, 64, 200])
def test_any_range_is_a_part_of_the_whole(start: int, count: int) -> None:
    whole = reference.random_halves(1, 2, start // 64 * 64, count + 64)
    assert torch.equal(reference.random_halves(1, 2, start, count), whole[start % 64 :][:count])


def test_halves_are_uniform() -> None:
    halves = reference.random_halves(randomness.stream_key(0), 0, 0, 1 << 20)
    counts = torch.bincount(halves >> 6, minlength=1024).double()
    expected = (1 << 20) / 1024
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_squared - 1023) < 5 * (2 * 1023) ** 0.5
    bits = torch.stack([(halves >> k) & 1 for k in range(16)]).double().mean(1)
    assert bool((bits - 0.5).abs().lt(5 * 0.5 / 1024).all())


def test_streams_differ_by_everything_that_names_them() -> None:
    keys = {
        randomness.stream_key(seed, parameter, rank)
        for seed in (0, 1, -1, 11)
        for parameter in ("", "1", "weight", "weight 0:8 sum")
        for rank in (None, 0, 1, 11)
    }
    assert len(keys) == 4 * 4 * 4
    assert all(0 <= key < 1 << 64 for key in keys)


def test_a_state_s_stream() -> None:
    states = [{"random": randomness.new_stream(3)} for _ in range(3)]
    assert randomness.stream(states[0], 3) == randomness.stream(None, 3) == (randomness.stream_key(3), 0)
    randomness.seed_stream(states[0], 3, "weight", 0)
    randomness.seed_stream(states[1], 3, "weight", 1)
    randomness.seed_stream(states[2], 3, "weight")
    assert len({randomness.stream(state, 3) for state in states}) == 3
    key, step = randomness.stream(states[0], 3)
    assert (key, step) == (randomness.stream_key(3, "weight", 0), 0)
    randomness.advance(states[0])
    assert randomness.stream(states[0], 3) == (key, 1)
