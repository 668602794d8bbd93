"""qsgd, terngrad and natural do what their papers say: no bias, bounded noise, and random numbers that repeat."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gradcomp import registry
from gradcomp.compressors.natural import Natural
from gradcomp.compressors.qsgd import QSGD
from gradcomp.compressors.terngrad import TernGrad
from gradcomp.errors import PacketError
from gradcomp.interfaces import Compressor, State
from gradcomp.packet import Kind, Packet

SPECS = [
    "qsgd:levels=3,bucket=64",
    "qsgd:levels=127,norm=l2,bucket=128",
    "terngrad:block=64",
    "natural:block=64",
]


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def seeded(c: Compressor, grad: Tensor, parameter: str = "weight", rank: int = 0) -> State:
    state = c.new_state(grad)
    c.seed_state(state, parameter=parameter, rank=rank)
    return state


def of_rows(grad: Tensor, width: int, norm: float) -> Tensor:
    """Each element's block's norm."""
    return torch.linalg.vector_norm(grad.view(-1, width), norm, dim=1).repeat_interleave(width)


@pytest.mark.parametrize(
    ("spec", "gaps"),
    [
        ("qsgd:levels=3,bucket=64", lambda grad: of_rows(grad, 64, math.inf) / 3),
        ("qsgd:levels=127,norm=l2,bucket=128", lambda grad: of_rows(grad, 128, 2.0) / 127),
        ("terngrad:block=64", lambda grad: of_rows(grad, 64, math.inf)),
        ("natural:block=64", lambda grad: 2.0 ** grad.abs().log2().floor()),
    ],
)
def test_unbiased(spec: str, gaps: Callable[[Tensor], Tensor]) -> None:
    """The mean of n packets is the gradient, for each element and over all, within six standard errors."""
    c = registry.compressor(spec)
    grad = torch.cat([normal(512), normal(512, 1) * 1e-3]).double()
    gap = gaps(grad)  # between the two values an element can take
    chance = (grad.abs() / gap).frac()
    state = seeded(c, grad.float())
    n = 1000
    total = torch.zeros(1024, dtype=torch.float64)
    for _ in range(n):
        total += c.decompress(c.compress(grad.float(), state))
    error = (total / n - grad) * grad.sign()  # away from zero
    deviation = gap * (chance * (1 - chance) / n).sqrt()
    rare = 30 * gap / n  # where one of the two is rare, the tail is Poisson's
    assert bool((error.abs() < 6 * deviation + rare).all())
    assert abs(float(error.sum())) < 6 * float(deviation.square().sum().sqrt())


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_names_give_the_same_packet_and_others_others(spec: str) -> None:
    c = registry.compressor(spec)
    grad = normal(1000)
    first = seeded(c, grad)
    packet = c.encode(grad, first)
    assert c.encode(grad, seeded(c, grad)) == packet
    assert c.encode(grad) == c.encode(grad, c.new_state(grad))
    others = [
        c.encode(grad, seeded(c, grad, rank=1)),
        c.encode(grad, seeded(c, grad, "bias")),
        c.encode(grad, seeded(registry.compressor(f"{spec},seed=1"), grad)),
        c.encode(grad),
    ]
    c.commit(grad, packet, first)
    others.append(c.encode(grad, first))
    assert len({packet, *others}) == 6
    assert c.encode(grad, first) == others[-1]


@pytest.mark.parametrize("spec", ["qsgd", "terngrad", "natural"])
def test_the_state_is_a_stream_and_a_residual_if_wanted(spec: str) -> None:
    grad = normal(100)
    plain, feedback = registry.compressor(spec), registry.compressor(f"{spec}:feedback=true")
    assert set(plain.new_state(grad)) == {"random"}
    state = feedback.new_state(grad)
    assert set(state) == {"random", "residual"}
    key = int(state["random"][0])
    for step in range(3):
        assert state["random"].tolist() == [key, step]
        feedback.compress(grad, state)
    bad = grad.clone()
    bad[3] = math.nan
    assert feedback.compress(bad, state).is_nonfinite
    assert state["random"].tolist() == [key, 3]


@pytest.mark.parametrize("spec", ["qsgd:levels=1", "terngrad", "natural"])
def test_feedback_sends_everything_in_the_end(spec: str) -> None:
    c = registry.compressor(f"{spec},feedback=true" if ":" in spec else f"{spec}:feedback=true")
    grad = normal(512)
    state = seeded(c, grad)
    total = torch.zeros(512)
    for _ in range(400):
        c.decompress_add(c.compress(grad, state), total)
    assert torch.allclose(total / 400, grad, atol=0.15)


class TestQSGD:
    def test_levels_of_the_largest(self) -> None:
        c = QSGD(levels=2, bucket=8)
        decoded = c.decompress(c.encode(torch.tensor([4.0, -2.0, 0.0, 1.0, -3.0, -0.0, 2.0, 4.0, 8.0, 3.0])))
        assert decoded[[0, 1, 2, 5, 6, 7, 8]].tolist() == [4, -2, 0, 0, 2, 4, 8]
        assert decoded[3] in (0, 2)
        assert decoded[4] in (-2, -4)
        assert decoded[9] in (0, 4)

    def test_levels_of_the_euclidean_norm(self) -> None:
        c = QSGD(levels=5, bucket=8, norm="l2")
        decoded = c.decompress(c.encode(torch.tensor([3.0, -4.0, 0.0, 0.0])))
        assert torch.allclose(decoded, torch.tensor([3.0, -4.0, 0.0, 0.0]), atol=1e-6)

    @pytest.mark.parametrize(("levels", "bits"), [(1, 2), (2, 3), (3, 3), (7, 4), (8, 5), (127, 8)])
    def test_as_few_bits_as_will_do(self, levels: int, bits: int) -> None:
        packet = QSGD(levels=levels, bucket=512).encode(normal(1024))
        assert (packet.kind, packet.bits, packet.nbytes) == (Kind.CODES, bits, 32 + 2 * 4 + 128 * bits)

    def test_an_error_is_below_a_level(self) -> None:
        grad = normal(4096)
        c = QSGD(levels=7, bucket=64)
        step = grad.view(-1, 64).abs().amax(1, keepdim=True) / 7
        assert bool(((c.decompress(c.encode(grad)) - grad).view(-1, 64).abs() <= step * 1.00001).all())

    def test_too_small_for_a_scale_is_zero(self) -> None:
        c = QSGD()
        assert not c.decompress(c.encode(torch.full((100,), 1e-38))).any()
        assert c.decompress(c.encode(torch.full((100,), 2e-36))).any()


class TestTernGrad:
    def test_three_values(self) -> None:
        grad = normal(1000)
        decoded = TernGrad(block=1000).decompress(TernGrad(block=1000).encode(grad))
        assert decoded.abs().unique().tolist() == [0.0, grad.abs().max().item()]
        assert not ((decoded * grad) < 0).any()

    def test_clipping_bounds_the_scale(self) -> None:
        grad = normal(1000)
        grad[7] = 100.0
        c = TernGrad(block=1000, clip=2.5)
        decoded = c.decompress(c.encode(grad))
        limit = 2.5 * grad.double().square().mean().sqrt()
        assert torch.isclose(decoded.abs().max().double(), limit, rtol=1e-6)
        assert decoded[7] == decoded.abs().max()
        assert TernGrad(clip=2) == TernGrad(clip=2.0)

    def test_two_bits(self) -> None:
        assert TernGrad().encode(normal(2048)).nbytes == 32 + 2 * 4 + 512


class TestNatural:
    def test_one_of_the_powers_around(self) -> None:
        grad = normal(10_000)
        c = Natural()
        decoded = c.decompress(c.encode(grad))
        power = 2.0 ** grad.abs().log2().floor()
        assert bool(((decoded.abs() == power) | (decoded.abs() == 2 * power)).all())
        assert torch.equal(decoded.sign(), grad.sign())

    def test_powers_are_exact(self) -> None:
        grad = 2.0 ** torch.arange(-126, 1) * (-1.0) ** torch.arange(127)
        assert torch.equal(Natural().decompress(Natural().encode(grad)), grad)
        grad = 2.0 ** torch.arange(1, 128)
        assert torch.equal(Natural().decompress(Natural().encode(grad)), grad)

    def test_what_is_too_small_beside_the_largest_is_rounded_to_0_or_the_smallest(self) -> None:
        grad = torch.full((8192,), 2.0**-121)
        grad[::8] = 2.0**8  # the smallest power is 2**-118
        decoded = Natural(block=8).decompress(Natural(block=8).encode(grad))
        small = decoded[grad < 1]
        assert set(small.tolist()) == {0.0, 2.0**-118}
        assert abs((small != 0).double().mean().item() - 1 / 8) < 0.02

    def test_beyond_the_largest_power_it_is_that(self) -> None:
        grad = torch.full((8,), torch.finfo(torch.float32).max)
        assert Natural().decompress(Natural().encode(grad)).tolist() == [2.0**127] * 8

    def test_bytes(self) -> None:
        packet = Natural().encode(normal(2048))
        assert (packet.kind, packet.nbytes) == (Kind.POWERS, 32 + 2 * 4 + 2048)


def powers(scale: float, codes: list[int], **fields: int) -> Packet:
    payload = torch.cat([torch.tensor([scale]).view(torch.uint8), torch.tensor(codes, dtype=torch.uint8)])
    return Packet(kind=Kind.POWERS, numel=len(codes), payload=payload, **({"bits": 8, "block": 1024} | fields))


def test_powers_by_hand() -> None:
    assert Natural().decompress(powers(2.0, [0, 1, 0x82, 127, 126])).tolist() == [2, 1, -0.5, 0, 2.0**-125]


@pytest.mark.parametrize(
    ("packet", "words"),
    [
        (powers(2.0, [0, 255]), "stands for nothing"),
        (powers(0.5, [0]), "power of two"),
        (powers(3.0, [0]), "power of two"),
        (powers(-2.0, [0]), "power of two"),
        (powers(0.0, [127]), "power of two"),
        (powers(math.inf, [0]), "not finite"),
        (powers(1.0, [0], bits=7), "7 bits"),
        (powers(1.0, [0], bits=0), "0 bits"),
        (powers(1.0, [0], block=512), "blocks of 512"),
        (powers(1.0, [0], block=4), "multiple of 8"),
        (powers(1.0, [0], count=1), "count"),
    ],
)
def test_malformed_powers_are_refused(packet: Packet, words: str) -> None:
    out = torch.zeros(packet.numel)
    with pytest.raises(PacketError, match=words):
        Natural().decompress_add(packet, out)
    assert not out.any()


@pytest.mark.parametrize(
    ("c", "other"),
    [(QSGD(), QSGD(levels=7)), (QSGD(), QSGD(bucket=64)), (TernGrad(), QSGD(levels=1)), (Natural(), Natural(block=8))],
)
def test_packets_of_another_layout_are_refused(c: Compressor, other: Compressor) -> None:
    with pytest.raises(PacketError, match="blocks of"):
        c.decompress(other.encode(normal(100)))
