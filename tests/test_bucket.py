"""Buckets, units, pieces and messages."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import gradcomp
from gradcomp.bucket import (
    DenseRule,
    Parameter,
    Piece,
    Unit,
    plan_buckets,
    tensor_table,
)
from gradcomp.compressors.cast import NoCompression
from gradcomp.message import Head, Message, max_message_bytes, together
from gradcomp.packet import Packet

SPARSE = gradcomp.compressor("topk:ratio=0.1")
CPU = torch.device("cpu")


def table_of(*sizes: int) -> list[Parameter]:
    return [Parameter(f"p{i}", (size,), torch.float32, SPARSE) for i, size in enumerate(sizes)]


def test_buckets_run_backwards_and_hold_at_most_bucket_bytes() -> None:
    buckets = plan_buckets(table_of(10, 20, 30, 500, 1), bucket_bytes=4 * 60)
    assert [bucket.parameters for bucket in buckets] == [(4,), (3,), (2, 1, 0)]
    assert [bucket.index for bucket in buckets] == [0, 1, 2]


def test_what_little_waits_goes_along_with_a_tensor_that_fills_more_than_a_bucket() -> None:
    """A bias with the dense layer that it comes just before; a bucket of its own would cost as much as the layer's."""
    limit = 64 * 10  # elements: up to 10 of them go along
    cut = plan_buckets(table_of(3, 900, 4, 700, 6, 5), bucket_bytes=4 * limit)
    assert [bucket.parameters for bucket in cut] == [(5, 4), (3,), (2, 1), (0,)]  # 11 elements were too many
    cut = plan_buckets(table_of(3, 900, 4, 700, 6, 4), bucket_bytes=4 * limit)
    assert [bucket.parameters for bucket in cut] == [(5, 4, 3), (2, 1), (0,)]
    cut = plan_buckets(table_of(640, 4), bucket_bytes=4 * limit)  # one that fits into a bucket does not overfill it
    assert [bucket.parameters for bucket in cut] == [(1,), (0,)]


def test_small_and_one_dimensional_tensors_are_joined_and_go_dense() -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Linear(64, 64), nn.Linear(64, 3))
    table = tensor_table(list(net.named_parameters()), SPARSE, DenseRule())
    assert {row.name for row in table if row.codec == SPARSE} == {"0.weight", "2.weight"}
    (bucket,) = plan_buckets(table, 1 << 20)
    assert [unit.parameters for unit in bucket.units] == [(4,), (0,), (7, 6, 5, 3, 2, 1)]
    assert bucket.units[-1].codec == NoCompression()
    assert bucket.units[-1].shape == (3 + 192 + 64 + 16 + 16 + 16,)


def test_the_dense_rule_can_be_changed() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    assert DenseRule()("w", weight)
    assert not DenseRule(min_numel=16)("w", weight)
    assert DenseRule(min_numel=0, min_dim=3)("w", weight)
    with pytest.raises(gradcomp.ConfigError, match="min_numel=-1"):
        DenseRule(min_numel=-1)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([("w", torch.zeros(3, dtype=torch.float64))], r"'w' is torch\.float64"),
        ([("w", torch.zeros(3)), ("w", torch.zeros(3))], "'w' occurs twice"),
    ],
)
def test_a_table_that_cannot_be_exchanged_is_refused(named: list[tuple[str, torch.Tensor]], message: str) -> None:
    with pytest.raises(gradcomp.ConfigError, match=message):
        tensor_table(named, SPARSE, DenseRule())


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(
    "shapes", [[(4096, 2048)], [(10,), (3, 5, 7)], [(2, 100_000)], [(), (0, 4), (1,)], [(640, 64)] * 5 + [(9000,)]]
)
def test_pieces_cover_every_element_once(exchange: str, world_size: int, shapes: list[tuple[int, ...]]) -> None:
    units = [Unit((i,), shape, SPARSE) for i, shape in enumerate(shapes)]
    pieces = gradcomp.exchange(exchange).cut(units, world_size)
    at = [0] * len(units)
    for piece in pieces:
        assert piece.start == at[piece.unit]
        assert piece.numel == torch.Size(piece.shape).numel()
        assert piece.shape[1:] == units[piece.unit].shape[1:]
        assert piece.owner is None or 0 <= piece.owner < world_size
        at[piece.unit] = piece.stop
    assert at == [unit.numel for unit in units]


def test_two_shot_shares_a_large_tensor_evenly() -> None:
    pieces = gradcomp.exchange("two_shot").cut([Unit((0,), (4096, 1024), SPARSE)], 4)
    assert [piece.owner for piece in pieces] == [0, 1, 2, 3]
    assert {piece.shape for piece in pieces} == {(1024, 1024)}


def some_message() -> tuple[Message, list[Piece]]:
    pieces = [Piece(0, 0, 500, (500,), SPARSE), Piece(1, 0, 60, (60,), SPARSE), Piece(2, 0, 7, (7,), NoCompression())]
    generator = torch.Generator().manual_seed(0)
    packets = [piece.codec.encode(torch.randn(piece.shape, generator=generator)) for piece in pieces]
    return Message((packets[0], None, packets[2]), (True, False, True, True, False, False, False, False, True)), pieces


def test_messages_round_trip() -> None:
    message, pieces = some_message()
    check_round_trip(message, pieces)


def test_messages_whose_payloads_move_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do from CUDA and to it: the same bytes."""
    (message, pieces), (again, _) = some_message(), some_message()
    data = b"".join(message.buffers)
    monkeypatch.setattr(gradcomp.message, "joins", lambda device: True)
    assert b"".join(again.buffers) == data
    check_round_trip(again, pieces)
    nothing = Message((None, None, None), (False,) * 9)
    assert Message.parse(memoryview(b"".join(nothing.buffers)), pieces, 9, CPU) == nothing
    broken = Message((Packet.nonfinite(math.inf, 500), message.packets[2], None), message.present)
    check_round_trip(broken, [pieces[0], pieces[2], pieces[1]])


def check_round_trip(message: Message, pieces: list[Piece]) -> None:
    data = b"".join(message.buffers)
    assert len(data) <= max_message_bytes(pieces, 9)
    for offset in (0, 1):  # whatever the alignment
        shifted = memoryview(b"x" * offset + data)[offset:]
        parsed = Message.parse(shifted, pieces, 9, CPU)
        assert parsed.present == message.present
        assert [p and p.to_bytes() for p in parsed.packets] == [p and p.to_bytes() for p in message.packets]


@pytest.fixture(params=[False, True], ids=["one by one", "as one"])
def _joined(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once more with all payloads moved as one, as from CUDA and to it."""
    if request.param:
        monkeypatch.setattr(gradcomp.message, "joins", lambda device: True)


@pytest.mark.usefixtures("_joined")
def test_malformed_messages_are_refused() -> None:
    message, pieces = some_message()
    data = b"".join(message.buffers)
    with pytest.raises(gradcomp.PacketError, match="expected"):
        Message.parse(memoryview(data), pieces, 10, CPU)
    with pytest.raises(gradcomp.PacketError, match="expected"):
        Message.parse(memoryview(data + bytes(8)), pieces[:2], 9, CPU)
    for length in range(len(data)):
        with pytest.raises(gradcomp.PacketError):
            Message.parse(memoryview(data[:length]), pieces, 9, CPU)
    with pytest.raises(gradcomp.PacketError, match="does not hold"):
        Message.parse(memoryview(data + bytes(1)), pieces, 9, CPU)
    fat = Message((NoCompression().encode(torch.zeros(500)), *message.packets[1:]), message.present)
    with pytest.raises(gradcomp.PacketError, match="over the most"):
        Message.parse(memoryview(b"".join(fat.buffers)), pieces, 9, CPU)


def test_no_mutated_message_gets_past_but_as_another_message() -> None:
    """One flipped byte anywhere: refused, or the very bytes of what was parsed."""
    message, pieces = some_message()
    data = b"".join(message.buffers)
    chooser = random.Random(0)
    refused = 0
    for _ in range(5000):
        mutated = bytearray(data)
        for _ in range(chooser.choice((1, 1, 2, 8))):
            mutated[chooser.randrange(len(data))] ^= chooser.randrange(1, 256)
        try:
            parsed = Message.parse(memoryview(bytes(mutated)), pieces, 9, CPU)
        except gradcomp.PacketError:
            refused += 1
        else:
            assert b"".join(parsed.buffers) == mutated
    assert refused > 500


def test_heads_and_payloads_make_the_message_again() -> None:
    message, pieces = some_message()
    data = b"".join(message.head)
    head = Head.parse(memoryview(data), pieces, 9)
    payload = message.payload(CPU)
    assert head.empty_payload(CPU).shape == payload.shape
    again = head.message(payload)
    assert again.present == message.present
    assert b"".join(again.buffers) == b"".join(message.buffers)
    for length in range(len(data)):
        with pytest.raises(gradcomp.PacketError):
            Head.parse(memoryview(data[:length]), pieces, 9)
    with pytest.raises(gradcomp.PacketError, match="does not hold"):
        Head.parse(memoryview(data + bytes(8)), pieces, 9)
    wrong = payload.clone()
    wrong[:4] = 255
    with pytest.raises(gradcomp.PacketError):
        head.message(wrong)


def test_who_gets_the_same_message_gets_it_at_once_unless_the_next_is_still_to_be_made() -> None:
    one, other = Message((), (True,)), Message((), (True,))
    assert list(together([(2, one), (1, one), (0, other), (3, one)])) == [([2, 1], one), ([0], other), ([3], one)]
    assert list(together([])) == []

    made: list[int] = []

    def making() -> Iterator[tuple[int, Message]]:
        for peer in range(3):
            made.append(peer)
            yield peer, one

    for count, (peers, message) in enumerate(together(making()), start=1):
        assert (peers, message) == ([count - 1], one)
        assert len(made) == count
