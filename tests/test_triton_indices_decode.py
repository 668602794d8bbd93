"""Index sets decoded and added in Triton: the reference's bits, and its errors for whatever is no set."""

from __future__ import annotations

import math
import random
from importlib.metadata import version

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from gradcomp.errors import PacketError
from gradcomp.kernels import indices, native, triton, triton_indices_check, triton_indices_decode
from gradcomp.kernels import reference_indices as reference
from gradcomp.kernels.reference_indices import Coding
from gradcomp.packet import Kind, Packet

CODINGS = [Coding.WORDS, Coding.GAPS, Coding.MAP, Coding.RICE]


def uniform(numel: int, density: float) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(numel)
    index = (torch.rand(numel, generator=dice) < density).nonzero().view(-1)
    return index, torch.rand(len(index), generator=dice) < 0.5


def vector(numel: int) -> Tensor:
    """Any values to add to, zeros of both signs and what is not finite among them."""
    values = torch.randn(numel, generator=torch.Generator().manual_seed(7))
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-40, 3.4e38])
    values[::5] = special[torch.arange(len(values[::5])) % len(special)]
    return values


def terms(count: int) -> Tensor:
    """Values of a packet: finite, zeros of both signs and denormal ones among them."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(8))
    values[::7], values[3::7], values[5::7] = 0.0, -0.0, 1e-40
    return values


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.cpu().view(torch.int32), b.view(torch.int32))


def check_decoded(index: Tensor, negative: Tensor, numel: int, coding: Coding, *, signed: bool) -> Tensor:
    coded = reference.encode(index, negative if signed else None, numel, coding)
    found, signs = triton_indices_decode.decode(coded.to(DEVICE), len(index), numel, coding, signed=signed)
    assert torch.equal(found.cpu(), index)
    assert torch.equal(signs.cpu(), negative if signed else torch.zeros_like(negative))
    return coded


def check_added(coded: Tensor, count: int, numel: int, coding: Coding, *, signed: bool, amount: float = 0.3) -> None:
    expected, values, there = vector(numel), terms(count), coded.to(DEVICE)
    out = expected.to(DEVICE, copy=True)
    if signed:
        reference.add_signs(expected, coded, count, coding, amount)
        triton_indices_decode.add_signs(out, there, count, coding, amount, checked=True)
    else:
        reference.add_values(expected, coded, count, coding, values, amount)
        triton_indices_decode.add_values(out, there, count, coding, values.to(DEVICE), amount, checked=True)
    assert same_bits(out, expected)


def check_all(index: Tensor, negative: Tensor, numel: int, coding: Coding, *, signed: bool) -> None:
    coded = check_decoded(index, negative, numel, coding, signed=signed)
    check_added(coded, len(index), numel, coding, signed=signed)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("coding", CODINGS)
class TestSets:
    # Of one chunk, at its end, and of several, with whole chunks of low bits among them.
    @pytest.mark.parametrize(
        ("numel", "density"), [(0, 0.0), (1, 0.0), (1, 1.0), (1024, 1.0), (4097, 0.3), (30_000, 0.003)]
    )
    def test_uniform(self, coding: Coding, signed: bool, numel: int, density: float) -> None:
        check_all(*uniform(numel, density), numel, coding, signed=signed)

    @pytest.mark.parametrize("index", [range(8000, 9300), range(1025), [8191], [0, 9999]])
    def test_runs_and_ends(self, coding: Coding, signed: bool, index: range | list[int]) -> None:
        chosen = torch.tensor([*index])
        check_all(chosen, chosen % 3 == 0, 10_000, coding, signed=signed)

    def test_of_very_many_chunks(self, coding: Coding, signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are added up in another way."""
        monkeypatch.setattr(triton_indices_decode, "_MANY", 1)
        check_all(*uniform(5001, 0.25), 5001, coding, signed=signed)

    def test_several_packets_in_the_order_of_ranks(self, coding: Coding, signed: bool) -> None:
        numel, scales = 1500, (1e-3, -0.7, 1e8)
        expected = vector(numel)
        out = expected.to(DEVICE, copy=True)
        for rank, scale in enumerate(scales):
            index, negative = torch.arange(rank, numel, 2 + rank), torch.arange(rank, numel, 2 + rank) % 3 == 0
            coded, values = reference.encode(index, negative if signed else None, numel, coding), terms(len(index))
            if signed:
                reference.add_signs(expected, coded, len(index), coding, scale)
                triton_indices_decode.add_signs(out, coded.to(DEVICE), len(index), coding, scale)
            else:
                reference.add_values(expected, coded, len(index), coding, values, scale)
                triton_indices_decode.add_values(out, coded.to(DEVICE), len(index), coding, values.to(DEVICE), scale)
        assert same_bits(out, expected)


@pytest.mark.skipif(
    DEVICE.type == "cpu" and tuple(map(int, version("triton").split(".")[:2])) < (3, 9),
    reason="the interpreter of Triton before 3.9 hands -0.0 over as 0.0",
)
@pytest.mark.parametrize("coding", CODINGS)
def test_minus_zero_is_added_as_such(coding: Coding) -> None:
    index, negative = uniform(100, 0.3)
    coded = reference.encode(index, negative, 100, coding)
    for magnitude in (0.0, -0.0):
        check_added(coded, len(index), 100, coding, signed=True, amount=magnitude)


@pytest.mark.parametrize("log2", [31, 46, 57, 59])
def test_few_of_very_many(log2: int) -> None:
    """Fields of any width, of tensors that fit no memory."""
    numel = 1 << log2
    for count in (1, 3):
        index = torch.tensor([(numel - 1) * k // max(count - 1, 1) for k in range(count)])
        check_decoded(index, index % 2 == 0, numel, Coding.RICE, signed=count == 3)
        check_decoded(torch.tensor([numel - 1]), torch.tensor([True]), numel, Coding.RICE, signed=True)


def check_verdict(coded: Tensor, count: int, numel: int, coding: Coding, *, signed: bool) -> bool:
    """Whether the reference takes it, or with which error not; what is refused is not added."""
    there = coded.to(DEVICE)
    fault = None
    try:
        expected = reference.decode(coded, count, numel, coding, signed=signed)
    except PacketError as error:
        fault = str(error)
    if fault is not None:
        with pytest.raises(PacketError) as found:
            triton_indices_check.check(there, count, numel, coding, signed=signed)
        assert str(found.value) == fault
        return False
    index, negative = triton_indices_decode.decode(there, count, numel, coding, signed=signed)
    assert torch.equal(index.cpu(), expected[0])
    assert torch.equal(negative.cpu(), expected[1])
    return True


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(("numel", "density"), [(13, 0.3), (300, 0.02), (1100, 0.95)])
def test_damaged(numel: int, density: float, coding: Coding, signed: bool) -> None:
    """Flipped bits, other lengths, other numbers. Many are sets again, but the same ones."""
    dice = random.Random(numel)
    index, negative = uniform(numel, density)
    count = len(index)
    good = reference.encode(index, negative if signed else None, numel, coding)
    last = good.numel() - 1
    for flips in (1, 1, 1, 2, 3):
        bad = good.clone()
        for _ in range(flips):
            bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
        check_verdict(bad, count, numel, coding, signed=signed)
    for at, bits in ((0, 255), (last, 255), (last, 128), (max(last - len(good) // 3, 0), 16)):
        bad = good.clone()
        bad[at] |= bits
        check_verdict(bad, count, numel, coding, signed=signed)
    for length in (0, 1, len(good) // 2, last):
        assert not check_verdict(good[:length].clone(), count, numel, coding, signed=signed)
    for more in (0, 1, 255):
        longer = torch.cat([good, good.new_tensor([more])])
        assert not check_verdict(longer, count, numel, coding, signed=signed)
    # All gaps 0 are a set.
    assert check_verdict(torch.zeros_like(good), count, numel, coding, signed=signed) == (coding is Coding.GAPS)
    for other in (0, count - 1, count + 1, numel, numel + 1):
        check_verdict(good, other, numel, coding, signed=signed)
    for other in (numel - 1, numel + 1, 2 * numel, int(index[-1])):
        check_verdict(good, count, other, coding, signed=signed)


@pytest.mark.parametrize("coding", CODINGS)
def test_any_bytes(coding: Coding) -> None:
    dice = random.Random(coding)
    for _ in range(12):
        numel = dice.choice([8, 24, 100, 32_768, 1 << 33, 1 << 59])
        count = dice.randrange(9)
        size = reference.max_coded_nbytes(count, min(numel, 100), coding, signed=True) + dice.choice([0, 0, -1])
        coded = torch.tensor(list(dice.randbytes(max(size, 0))), dtype=torch.uint8)
        check_verdict(coded, count, numel, coding, signed=dice.random() < 0.7)


@pytest.mark.parametrize("coding", CODINGS)
def test_what_is_refused_is_not_added(coding: Coding) -> None:
    index, negative = uniform(500, 0.2)
    out, values = torch.ones(500, device=DEVICE), torch.ones(len(index), device=DEVICE)
    signs = reference.encode(index, negative, 500, coding)[:-4].to(DEVICE)
    with pytest.raises(PacketError, match="index set: "):
        triton_indices_decode.add_signs(out, signs, len(index), coding, 1.0)
    coded = reference.encode(index, None, 500, coding).to(DEVICE)
    with pytest.raises(PacketError, match="index set: "):
        triton_indices_decode.add_values(out, coded[:-4], len(index), coding, values, 1.0)
    with pytest.raises(ValueError, match="values must be"):
        triton_indices_decode.add_values(out, coded, len(index), coding, values[1:], 1.0)
    assert torch.equal(out, torch.ones_like(out))


class TestPackets:
    """Packets on CUDA are checked and added from their payloads. The interpreter's stand in where there is none."""

    @pytest.fixture(autouse=True)
    def kernels_in_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if DEVICE.type == "cpu":
            monkeypatch.setattr(native, "takes", lambda tensor: False)
            monkeypatch.setattr(triton, "takes", lambda tensor: True)

    def packets(self, numel: int, density: float) -> list[Packet]:
        index, negative = uniform(numel, density)
        made = Packet.signs(index, negative, numel, 0.5), Packet.values(index, torch.randn(len(index)), numel)
        return [Packet.from_parts(packet.header(), packet.payload.to(DEVICE), numel=numel) for packet in made]

    @pytest.mark.parametrize(("numel", "density"), [(2000, 0.01), (40_000, 0.01), (2000, 0.5)])
    def test_straight_from_the_payload(self, numel: int, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
        packets = self.packets(numel, density)

        def never(*_: object, **__: object) -> None:
            raise RuntimeError("looked at twice")

        monkeypatch.setattr(triton_indices_check.CodedSet, "check", never)
        for packet in packets:
            out, expected, coded = torch.ones(numel, device=DEVICE), torch.ones(numel), packet.payload.cpu()
            if packet.kind == Kind.SIGNS:
                packet.add_signs(out, 0.5)
                reference.add_signs(expected, coded, packet.count, packet.coding, 0.5)
            else:
                packet.add_values(out, 0.5)
                values, coded = coded[: 4 * packet.count].view(torch.float32), coded[4 * packet.count :]
                reference.add_values(expected, coded, packet.count, packet.coding, values, 0.5)
            assert same_bits(out, expected)
            assert packet._index_set is None

    def test_malformed(self) -> None:
        for packet in self.packets(2000, 0.01):
            broken = packet.payload.clone()
            broken[-1] = 255
            with pytest.raises(PacketError, match="index set"):
                Packet.from_parts(packet.header(), broken, numel=2000)
            unchecked = Packet(
                kind=packet.kind, numel=2000, payload=broken, count=packet.count, coding=packet.coding, scalar=0.5
            )
            out = torch.ones(2000, device=DEVICE)
            with pytest.raises(PacketError, match="index set"):
                unchecked.add_signs(out, 1.0) if packet.kind == Kind.SIGNS else unchecked.add_values(out, 1.0)
            assert torch.equal(out, torch.ones_like(out))

    @pytest.mark.gpu
    @pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
    def test_nothing_waits_for_the_device(self) -> None:
        for density in (0.01, 0.5):
            for packet in self.packets(40_000, density):
                out = torch.ones(40_000, device=DEVICE)
                add = packet.add_signs if packet.kind == Kind.SIGNS else packet.add_values
                add(out, 1.0)  # compiles
                torch.cuda.set_sync_debug_mode("error")
                try:
                    add(out, 1.0)
                finally:
                    torch.cuda.set_sync_debug_mode("default")


def test_the_chooser_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "takes", lambda tensor: False)
    monkeypatch.setattr(triton, "takes", lambda tensor: True)
    monkeypatch.setattr(reference, "decode", None)
    monkeypatch.setattr(reference, "check", None)
    index, negative = uniform(300, 0.05)
    coded = reference.encode(index, negative, 300, Coding.GAPS).to(DEVICE)
    indices.check(coded, len(index), 300, Coding.GAPS, signed=True)
    found, _ = indices.decode(coded, len(index), 300, Coding.GAPS, signed=True)
    assert torch.equal(found.cpu(), index)
    with pytest.raises(PacketError, match="is not below 100"):
        indices.check(coded, len(index), 100, Coding.GAPS, signed=True)
