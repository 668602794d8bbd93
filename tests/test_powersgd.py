"""PowerSGD: what the paper promises, and sums that are the same bits everywhere."""

from __future__ import annotations

import contextlib
import random
import struct

import pytest
import torch
from torch import Tensor

import gradcomp
from gradcomp import kernels
from gradcomp.compressors.powersgd import PowerSGD
from gradcomp.errors import PacketError
from gradcomp.packet import Kind, Packet


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_rank(rank: int, rows: int, columns: int) -> Tensor:
    return normal(rows, rank) @ normal(rank, columns, seed=1)


def relative_error(codec: PowerSGD, grad: Tensor, steps: int = 1) -> float:
    """Of the last of so many approximations to the same matrix, without error feedback: power iteration."""
    state = codec.new_state(grad)
    for _ in range(steps):
        state["residual"].zero_()
        packet = codec.compress(grad, state)
    return float((codec.decompress(packet) - grad.view(-1)).norm() / grad.norm())


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_matrix_of_that_rank_is_exact(rank: int) -> None:
    grad = of_rank(rank, 60, 45)
    assert relative_error(PowerSGD(rank=rank), grad) < 1e-5
    assert relative_error(PowerSGD(rank=rank + 2), grad) < 1e-5


@pytest.mark.parametrize("shape", [(2, 300), (300, 2), (3, 5), (7,), (1, 50), ()])
def test_where_factors_are_not_smaller_the_matrix_is_sent(shape: tuple[int, ...]) -> None:
    grad = normal(*shape)
    codec = PowerSGD(rank=8)
    state = codec.new_state(grad)
    packet = codec.compress(grad, state)
    assert packet.kind == Kind.DENSE_F32
    assert torch.equal(codec.decompress(packet), grad.view(-1))
    assert not state["residual"].any()


def test_convolutions_are_seen_as_matrices() -> None:
    grad = of_rank(2, 32, 8 * 9).view(32, 8, 3, 3)
    packet = PowerSGD().encode(grad)
    assert packet.nbytes == 32 + 16 + 4 * 2 * (32 + 72)
    torch.testing.assert_close(PowerSGD().decompress(packet).view(grad.shape), grad, rtol=1e-4, atol=1e-4)


def test_warm_start_finds_the_best_approximation() -> None:
    grad = normal(50, 50) @ torch.diag(0.7 ** torch.arange(50.0)) @ normal(50, 50, seed=1)
    values = torch.linalg.svdvals(grad)
    best = float(values[3:].norm() / values.norm())
    first, later = relative_error(PowerSGD(rank=3), grad), relative_error(PowerSGD(rank=3), grad, 20)
    assert best <= later < 1.001 * best < 1.05 * best < first


def test_error_feedback_sends_everything_in_the_end() -> None:
    grad = normal(40, 30)
    codec = PowerSGD(rank=2)
    state = codec.new_state(grad)
    applied = torch.zeros(1200)
    for _ in range(100):
        codec.decompress_add(codec.compress(grad, state), applied)
    assert (applied / 100 - grad.view(-1)).norm() < 0.2 * grad.norm()


def test_a_zero_gradient_does_not_stop_it_for_good() -> None:
    codec = PowerSGD(rank=2)
    state = codec.new_state(torch.zeros(40, 30))
    codec.compress(torch.zeros(40, 30), state)
    assert state["q"].any(1).all()
    grad = of_rank(1, 40, 30)
    for _ in range(2):  # its second column is worth nothing, and must be of use again when the rank grows
        torch.testing.assert_close(
            codec.decompress(codec.compress(grad, state)).view(40, 30), grad, rtol=1e-3, atol=1e-3
        )
        state["residual"].zero_()
    grad = of_rank(2, 40, 30)
    torch.testing.assert_close(codec.decompress(codec.compress(grad, state)).view(40, 30), grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e15, 1e30])
def test_any_scale(scale: float) -> None:
    grad = of_rank(2, 40, 30) * scale
    codec = PowerSGD(rank=2)
    state = codec.new_state(grad)
    for _ in range(3):
        state["residual"].zero_()
        packet = codec.compress(grad, state)
        error = (codec.decompress(packet).double() - grad.view(-1).double()).norm() / grad.double().norm()
        assert error < 1e-4


def test_a_matrix_too_large_for_its_products_is_not_finite() -> None:
    grad = torch.full((40, 30), 3e38)
    codec = PowerSGD(rank=2)
    state = codec.new_state(grad)
    state["q"].fill_(1.0)
    before = {name: value.clone() for name, value in state.items()}
    assert codec.compress(grad, state).is_nonfinite
    assert all(torch.equal(before[name], state[name]) for name in state)


def test_the_first_basis_is_the_parameters_and_the_same_on_all_ranks() -> None:
    codec = PowerSGD(rank=2, seed=4)
    states = {}
    for name, rank in (("a", 0), ("a", 1), ("b", 0)):
        states[name, rank] = codec.new_state(torch.zeros(40, 30))
        codec.seed_state(states[name, rank], parameter=name, rank=rank)
    assert torch.equal(states["a", 0]["q"], states["a", 1]["q"])
    assert not torch.equal(states["a", 0]["q"], states["b", 0]["q"])
    assert states["a", 0]["q"].abs().max() <= 1
    assert states["a", 0]["q"].mean().abs() < 0.4


class TestOrthonormal:
    @pytest.mark.parametrize(("rank", "size"), [(1, 1), (1, 7), (3, 3), (4, 1000), (16, 333)])
    def test_rows_are(self, rank: int, size: int) -> None:
        rows = normal(rank, size) * 10.0 ** torch.arange(-rank, rank, 2).view(-1, 1)
        found = kernels.orthonormal(rows)
        torch.testing.assert_close(found @ found.t(), torch.eye(rank), atol=1e-5, rtol=0)
        assert ((rows @ found.t() @ found - rows).norm(dim=1) < 1e-5 * rows.norm(dim=1)).all()

    def test_rows_that_depend_on_others_are_zero(self) -> None:
        rows = normal(4, 100)
        rows[1] = 2 * rows[0]
        rows[3] = 0
        found = kernels.orthonormal(rows)
        assert found.any(1).tolist() == [True, False, True, False]

    def test_the_bits_do_not_depend_on_threads_or_layout(self) -> None:
        rows = normal(5, 70_001)
        expected = kernels.orthonormal(rows)
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(kernels.orthonormal(rows), expected)
                assert torch.equal(kernels.orthonormal(rows.t().contiguous().t()), expected)
        finally:
            torch.set_num_threads(threads)


def factors(columns: int, rank: int, floats: int, numel: int, **fields: int) -> Packet:
    payload = torch.frombuffer(bytearray(struct.pack("<QQ", columns, rank) + bytes(4 * floats)), dtype=torch.uint8)
    return Packet(kind=Kind.FACTORS, numel=numel, payload=payload, **fields)


def test_a_well_formed_packet() -> None:
    assert not PowerSGD().decompress(factors(30, 2, 140, 1200)).any()


@pytest.mark.parametrize(
    ("packet", "words"),
    [
        (factors(7, 2, 140, 1200), "7 columns"),
        (factors(0, 2, 140, 1200), "0 columns"),
        (factors(1 << 63, 2, 140, 1200), "columns"),
        (factors(30, 0, 0, 1200), "rank 0"),
        (factors(30, 31, 31 * 70, 1200), "rank 31"),
        (factors(30, 29, 29 * 70, 1200), "dense"),
        (factors(30, 2, 139, 1200), "572 bytes"),
        (factors(30, 2, 140, 1200, count=1), "count"),
        (factors(30, 2, 140, 1200, block=30), "block"),
        (Packet(kind=Kind.FACTORS, numel=1200, payload=torch.zeros(15, dtype=torch.uint8)), "15 bytes"),
        (factors(30, 3, 210, 1200), "at most 2"),
    ],
)
def test_malformed_packets_are_refused(packet: Packet, words: str) -> None:
    out = torch.zeros(1200)
    with pytest.raises(PacketError, match=words):
        gradcomp.compressor("powersgd").decompress_add(packet, out)
    assert not out.any()


def test_damaged_packets_are_refused_or_decoded() -> None:
    data = PowerSGD().encode(normal(40, 30)).to_bytes()
    dice = random.Random(0)
    for _ in range(300):
        flipped = bytearray(data)
        flipped[dice.randrange(len(data)) if dice.random() < 0.5 else dice.randrange(64)] ^= 1 << dice.randrange(8)
        with contextlib.suppress(PacketError):
            PowerSGD().decompress(Packet.from_bytes(flipped, numel=1200))


def test_factors_must_be_finite() -> None:
    packet = PowerSGD().encode(normal(40, 30))
    packet.payload[-4:] = torch.tensor([float("nan")]).view(torch.uint8)
    with pytest.raises(PacketError, match="finite"):
        Packet.from_bytes(packet.to_bytes(), numel=1200)
