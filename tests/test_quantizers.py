"""The dense quantizers do what their papers say, and their packets are checked before they are decoded."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import Tensor

from gradcomp import registry
from gradcomp.compressors.fp8 import Float8
from gradcomp.compressors.int8 import Int8
from gradcomp.compressors.minmax import MinMax
from gradcomp.compressors.twobit import TwoBit
from gradcomp.errors import PacketError
from gradcomp.packet import HEADER_NBYTES, Kind, Packet

FLOAT32_MAX = torch.finfo(torch.float32).max
SPECS = ["minmax", "minmax:bits=2", "minmax:bits=5,block=8", "int8", "int8:block=8", "fp8", "fp8:block=8", "twobit"]


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


class TestMinMax:
    def test_levels_from_the_lowest_to_the_highest(self) -> None:
        c = MinMax(bits=2, block=8)
        grad = torch.tensor([-1.0, 2.0, 0.4, 0.6, 1.4, 1.5, 0.0, -0.5, 5.0, 5.0])
        packet = c.encode(grad)
        # 1.5 is half-way between 1 and 2, and -0.5 between -1 and 0: ties go to the even code.
        assert c.decompress(packet).tolist() == [-1, 2, 0, 1, 1, 1, 0, -1, 5, 5]
        assert packet.nbytes == HEADER_NBYTES + 2 * 8 + 3

    @pytest.mark.parametrize("bits", range(1, 9))
    def test_error_is_at_most_half_a_step(self, bits: int) -> None:
        c = MinMax(bits=bits, block=64)
        grad = normal(640)
        rows = grad.view(-1, 64)
        step = (rows.amax(1) - rows.amin(1)) / (2**bits - 1)
        error = (c.decompress(c.encode(grad)) - grad).abs().view(-1, 64).amax(1)
        assert bool((error <= step * 0.5001).all())

    def test_more_bits_more_bytes(self) -> None:
        sizes = [MinMax(bits=bits).encode(normal(8192)).nbytes for bits in range(1, 9)]
        assert sizes == [HEADER_NBYTES + 8 * 8 + 1024 * bits for bits in range(1, 9)]
        assert sizes == [MinMax(bits=bits).max_nbytes(8192) for bits in range(1, 9)]


class TestInt8:
    def test_multiples_of_the_largest_over_127(self) -> None:
        c = Int8(block=8)
        grad = torch.tensor([127.0, -127.0, 0.4, 0.6, 1.5, 2.5, -0.5, 0.0, 254.0, 3.0, -5.0])
        assert c.decompress(c.encode(grad)).tolist() == [127, -127, 0, 1, 2, 2, 0, 0, 254, 4, -4]

    def test_zeros_stay_zeros(self) -> None:
        grad = normal(1000)
        grad[::3] = 0
        decoded = Int8().decompress(Int8().encode(grad))
        assert not decoded[::3].any()
        assert (decoded - grad).abs().max() <= grad.abs().max() / 254 * 1.0001


class TestFloat8:
    def test_rounds_as_torch_does(self) -> None:
        grad = normal(1000)
        grad[3] = 448.0  # the largest: the scale is then 1
        c = Float8()
        assert torch.equal(c.decompress(c.encode(grad)), grad.to(torch.float8_e4m3fn).float())

    def test_relative_error(self) -> None:
        grad = torch.cat([normal(1023), torch.tensor([10.0])])
        large = grad.abs() > 10 * 3.5e-5
        decoded = Float8().decompress(Float8().encode(grad))
        assert ((decoded - grad).abs()[large] / grad.abs()[large]).max() <= 1 / 16


class TestTwoBit:
    def test_plus_minus_or_nothing(self) -> None:
        c = TwoBit(tau=1.0)
        grad = torch.tensor([0.5, 1.0, 3.0, -1.0, -0.75, -2.5, 0.0])
        state = c.new_state(grad)
        packet = c.compress(grad, state)
        assert c.decompress(packet).tolist() == [0, 1, 1, -1, 0, -1, 0]
        assert state["residual"].tolist() == [0.5, 0, 2, 0, -0.75, -1.5, 0]
        assert packet.payload.tolist() == [0b10_01_01_00, 0b00_10_00]

    def test_what_waits_is_sent_in_time(self) -> None:
        c = TwoBit(tau=0.5)
        grad = normal(1000) * 0.1
        state = c.new_state(grad)
        sent = sum((c.decompress(c.compress(grad, state)) for _ in range(50)), torch.zeros(1000))
        assert (sent / 50 - grad).abs().max() <= 0.5 / 50 * 1.01


@pytest.mark.parametrize("spec", SPECS)
def test_feedback_makes_the_mean_right(spec: str) -> None:
    grad = normal(1000) * 0.1
    c, without = (
        registry.compressor(spec),
        registry.compressor({**registry.compressor(spec).config(), "feedback": False}),
    )
    state = c.new_state(grad)
    sent = sum((c.decompress(c.compress(grad, state)) for _ in range(50)), torch.zeros(1000))
    assert without.new_state(grad) == {}
    once = without.decompress(without.compress(grad, {}))
    assert torch.equal(once, c.decompress(c.encode(grad)))
    assert (sent / 50 - grad).abs().sum() < 0.2 * (once - grad).abs().sum()


@pytest.mark.parametrize("spec", [*SPECS, "minmax:bits=8,block=16"])
def test_the_largest_floats_decode_finite(spec: str) -> None:
    c = registry.compressor(spec)
    for pattern in ([FLOAT32_MAX, -FLOAT32_MAX, 1.0], [FLOAT32_MAX, FLOAT32_MAX * 0.9], [-FLOAT32_MAX, 0.0]):
        grad = torch.tensor(pattern).repeat(100)
        packet = Packet.from_bytes(c.encode(grad).to_bytes(), numel=len(grad))
        assert bool(c.decompress(packet).isfinite().all())


@pytest.mark.parametrize("spec", SPECS)
def test_steps_below_the_smallest_float(spec: str) -> None:
    c = registry.compressor(spec)
    grad = torch.arange(-20, 21) * 2.0**-149
    state = c.new_state(grad)
    for _ in range(20):
        before = state["residual"].clone()
        packet = c.compress(grad, state)
        assert torch.equal(grad + before, c.decompress(packet) + state["residual"])


def test_packets_of_other_options_are_refused() -> None:
    grad = normal(64)
    for ours, other in (
        (MinMax(), MinMax(bits=3)),
        (MinMax(), MinMax(block=8)),
        (Int8(), TwoBit()),
        (Int8(), Int8(block=8)),
    ):
        out = torch.zeros(64)
        with pytest.raises(PacketError, match="this compressor's have"):
            ours.decompress_add(other.encode(grad), out)
        assert not out.any()


def packed(*floats: float, codes: bytes) -> Tensor:
    return torch.tensor(list(struct.pack(f"<{len(floats)}f", *floats) + codes), dtype=torch.uint8)


def parsed(
    numel: int, kind: Kind, payload: Tensor, bits: int, block: int, scalar: float = 0.0, count: int = 0
) -> Packet:
    packet = Packet(kind=kind, numel=numel, payload=payload, bits=bits, block=block, scalar=scalar, count=count)
    return Packet.from_bytes(packet.to_bytes(), numel=numel)


def test_well_formed() -> None:
    parsed(5, Kind.LEVELS, packed(-1.0, 0.0, codes=b"\xff\x7f"), 3, 8)  # codes of all ones are levels like others
    parsed(5, Kind.CODES, packed(0.5, codes=b"\x00\x00"), 3, 8)
    parsed(5, Kind.CODES, packed(codes=b"\x99\x02"), 2, 0, 0.5)
    parsed(5, Kind.FLOAT8, packed(0.5, codes=b"\x7e\xfe\x80\x00\x01"), 8, 8)


MALFORMED = {
    "no bits": (Kind.LEVELS, packed(0.0, 1.0, codes=b""), 0, 8, 0.0, "1..8"),
    "9 bits": (Kind.LEVELS, packed(0.0, 1.0, codes=bytes(6)), 9, 8, 0.0, "1..8"),
    "1 bit": (Kind.CODES, packed(1.0, codes=b"\0"), 1, 8, 0.0, "2..8"),
    "7 bits of float8": (Kind.FLOAT8, packed(1.0, codes=bytes(5)), 7, 8, 0.0, "8..8"),
    "levels without blocks": (Kind.LEVELS, packed(0.0, 1.0, codes=b"\0\0"), 3, 0, 0.0, "block"),
    "float8 without blocks": (Kind.FLOAT8, packed(1.0, codes=bytes(5)), 8, 0, 0.0, "block"),
    "a block of 12": (Kind.CODES, packed(1.0, codes=b"\0\0"), 3, 12, 0.0, "block"),
    "too short": (Kind.CODES, packed(1.0, codes=b"\0"), 3, 8, 0.0, "5 bytes"),
    "too long": (Kind.LEVELS, packed(0.0, 1.0, codes=b"\0\0\0"), 3, 8, 0.0, "11 bytes"),
    "a scalar beside blocks": (Kind.CODES, packed(1.0, codes=b"\0\0"), 3, 8, 1.0, "scalar"),
    "a scalar of levels": (Kind.LEVELS, packed(0.0, 1.0, codes=b"\0\0"), 3, 8, 1.0, "scalar"),
    "low": (Kind.LEVELS, packed(math.inf, 1.0, codes=b"\0\0"), 3, 8, 0.0, "not finite"),
    "step": (Kind.LEVELS, packed(0.0, math.nan, codes=b"\0\0"), 3, 8, 0.0, "not finite"),
    "the last level": (Kind.LEVELS, packed(0.0, 1e38, codes=b"\0\0"), 3, 8, 0.0, "level that is not finite"),
    "a negative step": (Kind.LEVELS, packed(0.0, -1.0, codes=b"\0\0"), 3, 8, 0.0, "negative step"),
    "a negative zero": (Kind.LEVELS, packed(0.0, -0.0, codes=b"\0\0"), 3, 8, 0.0, "negative step"),
    "an infinite scale": (Kind.CODES, packed(math.inf, codes=b"\0\0"), 3, 8, 0.0, "not finite"),
    "a large scale": (Kind.CODES, packed(2e38, codes=b"\0\0"), 3, 8, 0.0, "multiple is not finite"),
    "a negative scale": (Kind.CODES, packed(-1.0, codes=b"\0\0"), 3, 8, 0.0, "negative scale"),
    "a negative scalar": (Kind.CODES, packed(codes=b"\0\0"), 3, 0, -1.0, "negative scale"),
    "an infinite scalar": (Kind.CODES, packed(codes=b"\0\0"), 2, 0, math.inf, "not finite"),
    "a scale of float8": (Kind.FLOAT8, packed(1e36, codes=bytes(5)), 8, 8, 0.0, "multiple is not finite"),
    "code 11": (Kind.CODES, packed(codes=b"\x0c\0"), 2, 0, 1.0, "stands for nothing"),
    "code 111": (Kind.CODES, packed(1.0, codes=b"\xc0\x01"), 3, 8, 0.0, "stands for nothing"),
    "code 255": (Kind.CODES, packed(1.0, codes=b"\0\0\0\0\xff"), 8, 8, 0.0, "stands for nothing"),
    "NaN": (Kind.FLOAT8, packed(1.0, codes=b"\0\x7f\0\0\0"), 8, 8, 0.0, "stands for nothing"),
    "negative NaN": (Kind.FLOAT8, packed(1.0, codes=b"\0\0\0\0\xff"), 8, 8, 0.0, "stands for nothing"),
    "a spare bit": (Kind.CODES, packed(1.0, codes=b"\0\x80"), 3, 8, 0.0, "beyond its last code"),
    "a spare bit of levels": (Kind.LEVELS, packed(0.0, 1.0, codes=b"\x20"), 1, 8, 0.0, "beyond its last code"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name: str) -> None:
    kind, payload, bits, block, scalar, words = MALFORMED[name]
    with pytest.raises(PacketError, match=words):
        parsed(5, kind, payload, bits, block, scalar)


def test_a_count_is_refused() -> None:
    with pytest.raises(PacketError, match="count"):
        parsed(5, Kind.FLOAT8, packed(1.0, codes=bytes(5)), 8, 8, count=1)
