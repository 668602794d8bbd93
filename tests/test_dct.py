"""Chunked DCT: tiles, transform, selection, and an inverse that is the same bits everywhere."""

from __future__ import annotations

import contextlib
import math
import random
import struct

import pytest
import torch
from torch import Tensor

from gradcomp.compressors.dct import DCT
from gradcomp.errors import PacketError
from gradcomp.kernels import reference
from gradcomp.kernels.reference_dct import basis
from gradcomp.packet import Kind, Packet
from gradcomp.tiles import Tiling


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 63, 64, 100, 256])
def test_basis_is_the_orthonormal_dct_of_the_second_kind(size: int) -> None:
    expected = [
        [math.sqrt((2 if u else 1) / size) * math.cos(math.pi * (2 * i + 1) * u / (2 * size)) for i in range(size)]
        for u in range(size)
    ]
    found = basis(size)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found @ found.t(), torch.eye(size), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 128, 129, 1000])
@pytest.mark.parametrize("columns", [1, 64, 65, 777])
@pytest.mark.parametrize("chunk", [8, 64, 256])
def test_tiles_cover_with_little_beyond_the_edge(rows: int, columns: int, chunk: int) -> None:
    tiling = Tiling.of(rows, columns, chunk)
    for size, count, side in ((rows, tiling.down, tiling.height), (columns, tiling.across, tiling.width)):
        assert side <= chunk
        assert (count - 1) * side < size <= count * side < size + count


@pytest.mark.parametrize("shape", [(64, 64), (130, 70), (33, 10, 3, 3), (5000,), (3, 1000)])
def test_what_is_sent_is_the_largest_of_each_tile(shape: tuple[int, ...]) -> None:
    codec = DCT(chunk=32, k=3)
    grad = normal(*shape)
    packet = codec.encode(grad)
    assert packet.kind == Kind.SPECTRUM
    matrix = grad.view(shape[0], -1) if len(shape) > 1 else grad.view(1, -1)
    tiling = Tiling.of(*matrix.shape, 32)
    assert packet.nbytes == 32 + 16 + 6 * 3 * tiling.tiles
    padded = torch.zeros(tiling.down * tiling.height, tiling.across * tiling.width)
    padded[: len(matrix), : matrix.shape[1]] = matrix
    decoded = torch.zeros_like(padded)
    for top in range(0, len(padded), tiling.height):
        for left in range(0, padded.shape[1], tiling.width):
            where = slice(top, top + tiling.height), slice(left, left + tiling.width)
            spectrum = basis(tiling.height) @ padded[where] @ basis(tiling.width).t()
            least = spectrum.abs().flatten().topk(3).values[-1]
            kept = torch.where(spectrum.abs() >= least, spectrum, 0.0)
            decoded[where] = basis(tiling.height).t() @ kept @ basis(tiling.width)
    expected = decoded[: len(matrix), : matrix.shape[1]].reshape(-1)
    torch.testing.assert_close(codec.decompress(packet), expected, atol=1e-5, rtol=1e-5)


def test_a_smooth_gradient_needs_few_coefficients() -> None:
    down, across = torch.linspace(0, 1, 64).view(-1, 1), torch.linspace(0, 1, 64)
    grad = torch.cos(2 * down + across) + down * across
    decoded = DCT(chunk=64, k=32).decompress(DCT(chunk=64, k=32).encode(grad)).view(64, 64)
    assert (decoded - grad).norm() < 0.01 * grad.norm()


def test_all_coefficients_give_the_tensor_back() -> None:
    grad = normal(200, 72)
    tiling = Tiling.of(200, 72, 16)
    values, index = reference.largest_coefficients(grad.view(-1), None, tiling, tiling.tile_numel)
    out = torch.zeros(200 * 72)
    reference.add_spectrum(out, values, index.to(torch.int16), tiling, 1.0)
    torch.testing.assert_close(out, grad.view(-1), atol=1e-5, rtol=1e-5)


def test_error_feedback_sends_everything_in_the_end() -> None:
    grad = normal(64, 64)
    codec = DCT(k=64)
    state = codec.new_state(grad)
    applied = torch.zeros(64 * 64)
    for _ in range(200):
        codec.decompress_add(codec.compress(grad, state), applied)
    assert (applied / 200 - grad.view(-1)).norm() < 0.3 * grad.norm()


@pytest.mark.parametrize("shape", [(), (7,), (1,), (8, 8), (0, 3)])
def test_where_coefficients_are_not_smaller_the_tensor_is_sent(shape: tuple[int, ...]) -> None:
    grad = normal(*shape)
    codec = DCT(k=64)
    state = codec.new_state(grad)
    packet = codec.compress(grad, state)
    assert packet.kind == Kind.DENSE_F32
    assert torch.equal(codec.decompress(packet), grad.view(-1))
    assert not state["residual"].any()


def test_what_overflows_in_the_transform_is_not_finite() -> None:
    codec = DCT(k=4)
    grad = torch.full((64, 64), 3e38)
    state = codec.new_state(grad)
    assert codec.compress(grad, state).is_nonfinite
    assert not state["residual"].any()


def test_damaged_packets_are_refused_or_decoded() -> None:
    codec = DCT(chunk=16, k=5)
    data = codec.encode(normal(40, 30)).to_bytes()
    dice = random.Random(0)
    for _ in range(300):
        flipped = bytearray(data)
        flipped[dice.randrange(len(data)) if dice.random() < 0.5 else dice.randrange(64)] ^= 1 << dice.randrange(8)
        with contextlib.suppress(PacketError):
            codec.decompress(Packet.from_bytes(flipped, numel=1200))


def test_other_tiles_are_refused() -> None:
    packet = DCT(chunk=32, k=3).encode(normal(100, 100))
    for codec in (DCT(chunk=16, k=3), DCT(chunk=32, k=2)):
        out = torch.zeros(10_000)
        with pytest.raises(PacketError, match="3 coefficients of tiles of 32"):
            codec.decompress_add(packet, out)
        assert not out.any()


def spectrum(columns: int, chunk: int, kept: int, index: list[int], value: float = 1.0, **fields: int) -> Packet:
    """Of 20 by 30 elements; with tiles of 16, 4 of them, 10 by 15."""
    payload = struct.pack("<QII", columns, chunk, kept) + struct.pack(f"<{len(index)}f", *[value] * len(index))
    payload += struct.pack(f"<{len(index)}H", *index)
    fields = {"count": len(index)} | fields
    data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    return Packet(kind=Kind.SPECTRUM, numel=600, payload=data, **fields)


def test_a_well_formed_packet() -> None:
    packet = spectrum(30, 16, 2, [0, 149, 0, 1, 7, 8, 100, 101])
    assert DCT(chunk=16, k=2).decompress(packet).any()


@pytest.mark.parametrize(
    ("packet", "words"),
    [
        (spectrum(0, 16, 2, [0, 1] * 4), "0 columns"),
        (spectrum(7, 16, 2, [0, 1] * 4), "7 columns"),
        (spectrum(30, 7, 2, [0, 1] * 4), "tiles of 7"),
        (spectrum(30, 257, 2, [0, 1] * 4), "tiles of 257"),
        (spectrum(30, 16, 0, [0, 1] * 4), "coefficients"),
        (spectrum(30, 16, 2, [0, 1] * 3), "6 coefficients"),
        (spectrum(30, 16, 151, list(range(151)) * 4, count=600), "coefficients"),
        (spectrum(30, 16, 100, list(range(100)) * 4), "dense"),
        (spectrum(30, 16, 2, [0, 1] * 4, count=9), "9 coefficients"),
        (spectrum(30, 16, 2, [0, 1, 1, 0, 0, 1, 0, 1]), "increasing"),
        (spectrum(30, 16, 2, [0, 1, 3, 3, 0, 1, 0, 1]), "increasing"),
        (spectrum(30, 16, 2, [0, 1, 0, 150, 0, 1, 0, 1]), "below 150"),
        (spectrum(30, 16, 2, [0, 1, 0, 65535, 0, 1, 0, 1]), "below 150"),
        (spectrum(30, 16, 2, [0, 1] * 4, value=math.inf), "finite"),
        (spectrum(30, 16, 2, [0, 1] * 4, block=8), "block"),
        (Packet(kind=Kind.SPECTRUM, numel=600, payload=torch.zeros(8, dtype=torch.uint8)), "8 bytes"),
    ],
)
def test_malformed_packets_are_refused(packet: Packet, words: str) -> None:
    out = torch.zeros(600)
    with pytest.raises(PacketError, match=words):
        DCT(chunk=16, k=2).decompress_add(packet, out)
    assert not out.any()
