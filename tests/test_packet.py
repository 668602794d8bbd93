"""The packet format: golden bytes that stay readable, and nothing malformed that gets through.

tests/golden/packets.json holds, for each case, the packet in hex and the elements that do not decode to 0. A format is
never changed under its version number: a case that fails here is a bug in the code, not a golden value to be updated.
"""

from __future__ import annotations

import json
import math
import random
import struct
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradcomp import registry
from gradcomp.errors import PacketError
from gradcomp.packet import HEADER_NBYTES, Coding, Kind, Packet

GOLDEN = json.loads((Path(__file__).parent / "golden" / "packets.json").read_text())
SPECS = ["none", "fp16", "bf16", "threshold:tau=0.5", "threshold:tau=1.9", "onebit:block=16", "topk:k=4", "topk:k=60"]
SPECS += ["minmax:bits=3,block=16", "int8:block=16", "fp8:block=16", "twobit"]
SPECS += [
    "signsgd:block=16",
    "signsgd:variant=majority",
    "qsgd:levels=5,bucket=16",
    "terngrad:block=16",
    "natural:block=16",
]


def ramp(numel: int) -> Tensor:
    """Values in -2..2 without a pattern, all of them multiples of 1/256: exact in every dtype but bfloat16."""
    return torch.tensor([(i * 7919 % 1021 - 510) / 256 for i in range(numel)])


def bytes_of(numel: int, kind: int, payload: bytes = b"", **fields: float) -> bytes:
    """A packet put together by hand."""
    values = {
        "magic": b"GC",
        "version": 1,
        "coding": 0,
        "zeros": bytes(3),
        "count": 0,
        "block": 0,
        "scalar": 0.0,
    } | fields
    return (
        struct.pack(
            "<2s3B3sQQIf",
            values["magic"],
            values["version"],
            kind,
            values["coding"],
            values["zeros"],
            values["count"],
            numel,
            values["block"],
            values["scalar"],
        )
        + payload
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    case = GOLDEN[name]
    data = bytes.fromhex(case["packet"])
    compressor = registry.compressor(case["spec"])
    packet = Packet.from_bytes(data, numel=case["numel"])
    assert packet.to_bytes() == data
    decoded = compressor.decompress(packet).tolist()
    assert {str(i): repr(value) for i, value in enumerate(decoded) if value} == case["decoded"]
    if case["encodes"]:
        assert compressor.encode(ramp(case["numel"])).to_bytes().hex() == case["packet"]


def test_golden_has_every_kind_and_coding() -> None:
    packets = [Packet.from_bytes(bytes.fromhex(case["packet"]), numel=case["numel"]) for case in GOLDEN.values()]
    assert {packet.kind for packet in packets} == set(Kind)
    assert {packet.coding for packet in packets if packet.kind == Kind.SIGNS} == set(Coding) - {Coding.NONE}
    assert {packet.coding for packet in packets if packet.kind == Kind.VALUES} == set(Coding) - {Coding.NONE}


F = struct.Struct("<f").pack
FINE = {
    "signs": bytes_of(100_000, Kind.SIGNS, struct.pack("<I", 99_999), coding=1, count=1, scalar=0.5),
    "values": bytes_of(100_000, Kind.VALUES, F(2.0) + b"\x07\x00\x02", coding=4, count=1),
    "bits": bytes_of(9, Kind.BITS, F(-1.0) + F(2.0) + F(-3.0) + F(4.0) + b"\x81\x01", block=8),
    "plug-in": bytes_of(5, 200, b"anything", count=3, block=9, coding=3, scalar=-1.5),
}


@pytest.mark.parametrize("name", FINE)
def test_well_formed(name: str) -> None:
    numel = struct.unpack_from("<Q", FINE[name], 16)[0]
    assert Packet.from_bytes(FINE[name], numel=numel).to_bytes() == FINE[name]


NAN_WITH_PAYLOAD = struct.pack("<I", 0x7FC00001)
MALFORMED = {
    "empty": (b"", "shorter"),
    "half a header": (bytes_of(5, Kind.NONFINITE, scalar=math.nan)[:31], "shorter"),
    "magic": (bytes_of(5, Kind.NONFINITE, scalar=math.nan, magic=b"GZ"), "starts with"),
    "version": (bytes_of(5, Kind.NONFINITE, scalar=math.nan, version=2), "version 2"),
    "kind 0": (bytes_of(5, 0), "kind 0"),
    "kind 99": (bytes_of(5, 99), "kind 99"),
    "kind 127": (bytes_of(5, 127), "kind 127"),
    "coding 5": (bytes_of(5, 200, coding=5), "coding 5"),
    "reserved": (bytes_of(5, Kind.DENSE_F32, bytes(20), zeros=b"\0\1\0"), "reserved"),
    "numel": (bytes_of(6, Kind.DENSE_F32, bytes(24)), "6 elements"),
    "huge numel": (bytes_of((1 << 64) - 1, Kind.DENSE_F32, bytes(20)), "elements"),
    "count": (bytes_of(5, Kind.SIGNS, bytes(24), coding=1, count=6), "6 of 5"),
    "huge count": (bytes_of(5, Kind.SIGNS, bytes(24), coding=1, count=(1 << 64) - 1), "of 5"),
    "dense too short": (bytes_of(5, Kind.DENSE_F32, bytes(19)), "19 bytes"),
    "dense too long": (bytes_of(5, Kind.DENSE_F16, bytes(11)), "11 bytes"),
    "dense count": (bytes_of(5, Kind.DENSE_BF16, bytes(10), count=1), "count"),
    "dense coding": (bytes_of(5, Kind.DENSE_F32, bytes(20), coding=1), "coding"),
    "dense block": (bytes_of(5, Kind.DENSE_F32, bytes(20), block=1), "block"),
    "dense scalar": (bytes_of(5, Kind.DENSE_F32, bytes(20), scalar=-0.0), "scalar"),
    "signs coding": (bytes_of(5, Kind.SIGNS, bytes(8), coding=1, count=2, scalar=1.0), "must be MAP"),
    "signs no coding": (bytes_of(5, Kind.SIGNS, scalar=1.0), "must be WORDS"),
    "signs block": (bytes_of(5, Kind.SIGNS, coding=1, scalar=1.0, block=8), "block"),
    "signs negative": (bytes_of(5, Kind.SIGNS, coding=1, scalar=-1.0), "magnitude"),
    "signs negative zero": (bytes_of(5, Kind.SIGNS, coding=1, scalar=-0.0), "magnitude"),
    "signs infinite": (bytes_of(5, Kind.SIGNS, coding=1, scalar=math.inf), "magnitude"),
    "signs NaN": (bytes_of(5, Kind.SIGNS, coding=1, scalar=math.nan), "magnitude"),
    "signs set": (bytes_of(5, Kind.SIGNS, b"\x0d\0", coding=3, count=2, scalar=1.0), "does not name"),
    "signs sign": (bytes_of(5, Kind.SIGNS, b"\x0c\x04", coding=3, count=2, scalar=1.0), "beyond the last"),
    "values too short": (bytes_of(5, Kind.VALUES, bytes(3), coding=3, count=1), "too short"),
    "values scalar": (bytes_of(5, Kind.VALUES, F(1.0) + b"\x01", coding=3, count=1, scalar=1.0), "scalar"),
    "values infinite": (bytes_of(5, Kind.VALUES, F(math.inf) + b"\x01", coding=3, count=1), "not finite"),
    "values set": (bytes_of(5, Kind.VALUES, F(1.0) + b"\x20", coding=3, count=1), "beyond the last"),
    "bits block 0": (bytes_of(5, Kind.BITS, bytes(9)), "block"),
    "bits block 12": (bytes_of(5, Kind.BITS, bytes(9), block=12), "block"),
    "bits huge block": (bytes_of(5, Kind.BITS, bytes(9), block=(1 << 32) - 8), "block"),
    "bits too short": (bytes_of(5, Kind.BITS, bytes(8), block=8), "8 bytes"),
    "bits scale": (bytes_of(5, Kind.BITS, F(math.nan) + bytes(5), block=8), "not finite"),
    "bits spare bit": (bytes_of(5, Kind.BITS, bytes(8) + b"\x20", block=8), "beyond its last"),
    "nonfinite payload": (bytes_of(5, Kind.NONFINITE, b"\0", scalar=math.inf), "1 bytes"),
    "nonfinite finite": (bytes_of(5, Kind.NONFINITE, scalar=1.0), "value is 1.0"),
    "nonfinite other NaN": (bytes_of(5, Kind.NONFINITE)[:-4] + NAN_WITH_PAYLOAD, "canonical"),
    "nonfinite negative NaN": (bytes_of(5, Kind.NONFINITE)[:-4] + struct.pack("<I", 0xFFC00000), "canonical"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name: str) -> None:
    data, words = MALFORMED[name]
    with pytest.raises(PacketError, match=words):
        Packet.from_bytes(data, numel=5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite(value: float) -> None:
    packet = Packet.nonfinite(value, 7)
    assert packet.is_nonfinite
    assert packet.nbytes == HEADER_NBYTES
    assert Packet.from_bytes(packet.to_bytes(), numel=7) == packet
    decoded = registry.compressor("threshold").decompress(packet)
    assert decoded.shape == (7,)
    assert not decoded.isfinite().any()


def test_nonfinite_needs_such_a_value() -> None:
    with pytest.raises(ValueError, match=r"got 1\.0"):
        Packet.nonfinite(1.0, 7)


@pytest.mark.parametrize(
    "payload", [torch.zeros(3), torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)[::2]]
)
def test_payload_must_be_flat_bytes(payload: Tensor) -> None:
    with pytest.raises(ValueError, match="payload must be"):
        Packet(kind=200, numel=3, payload=payload)


def test_equal_if_the_bytes_are() -> None:
    a, b = (registry.compressor("topk").encode(ramp(50)) for _ in range(2))
    other = registry.compressor("topk").encode(-ramp(50))
    assert a == b
    assert len({a, b, other}) == 2
    assert a != a.to_bytes()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shift", range(9))
def test_any_buffer_at_any_alignment(spec: str, shift: int) -> None:
    compressor = registry.compressor(spec)
    packet = compressor.encode(ramp(333))
    data = packet.to_bytes()
    padded = bytes(shift) + data
    writable = bytearray(padded)
    for buffer in (data, padded[shift:], memoryview(padded)[shift:], memoryview(writable)[shift:], bytearray(data)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            received = Packet.from_bytes(buffer, numel=333)
        assert received == packet
        assert torch.equal(compressor.decompress(received), compressor.decompress(packet))
        assert received.payload.data_ptr() % 4 == 0
    assert writable == padded


def test_buffers_do_not_copy_and_writable_memory_is_shared() -> None:
    packet = registry.compressor("none").encode(ramp(100))
    header, payload = packet.buffers()
    assert len(header) == HEADER_NBYTES
    assert torch.frombuffer(payload, dtype=torch.uint8).data_ptr() == packet.payload.data_ptr()
    data = bytearray(packet.to_bytes())
    received = Packet.from_bytes(data, numel=100)
    assert received.payload.data_ptr() == torch.frombuffer(data, dtype=torch.uint8).data_ptr() + HEADER_NBYTES


def decode_safely(data: bytes, numel: int, compressors: dict[int, object]) -> bool:
    """Whether the bytes were a packet; whatever they are, nothing but PacketError may come of them."""
    try:
        packet = Packet.from_bytes(data, numel=numel)
    except PacketError:
        return False
    assert packet.to_bytes() == data, "a second encoding of the same packet"
    compressor = compressors.get(packet.kind, compressors[Kind.SIGNS])
    whole = torch.zeros(numel + 8)
    try:
        compressor.decompress_add(packet, whole[4:-4])  # type: ignore[attr-defined]
    except PacketError:
        assert not whole.any()
    assert not whole[:4].any()
    assert not whole[-4:].any()
    return True


def test_100_000_bad_packets() -> None:
    """Random, truncated, extended, spliced and bit-flipped packets: each is refused, or decodes within its bounds."""
    dice = random.Random(1)
    compressors = {}
    valid = []
    for spec in SPECS:
        compressor = registry.compressor(spec)
        for numel in (1, 9, 333):
            packet = compressor.encode(ramp(numel))
            compressors[packet.kind] = compressor
            valid.append((packet.to_bytes(), numel))
    accepted = 0
    for i in range(100_000):
        data, numel = valid[dice.randrange(len(valid))]
        bad = bytearray(data)
        way = i % 5
        if way == 0:
            bad = bytearray(dice.randbytes(dice.randrange(80)))
            bad[:5] = data[: dice.choice([0, 2, 5])]
        elif way == 1:
            del bad[dice.randrange(len(bad)) :]
        elif way == 2:
            other = valid[dice.randrange(len(valid))][0]
            cut = dice.randrange(HEADER_NBYTES + 1)
            bad = bad[:cut] + other[cut:]
        elif way == 3:  # header fields
            bad[dice.randrange(3, HEADER_NBYTES)] = dice.choice([0, 1, 2, 3, 4, 8, 16, 127, 128, 255])
        else:
            for _ in range(dice.randint(1, 3)):
                bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
        accepted += decode_safely(bytes(bad), numel, compressors)
    assert 1000 < accepted < 50_000  # flipped values are still values; what is checked above did happen


@settings(max_examples=300, deadline=None)
@given(
    kind=st.integers(1, 7),
    coding=st.integers(0, 4),
    count=st.integers(0, 12),
    numel=st.integers(0, 12),
    block=st.sampled_from([0, 8, 16]),
    scalar=st.sampled_from([0.0, 1.0, math.inf]),
    payload=st.binary(max_size=24),
)
def test_headers_that_almost_fit(
    kind: int, coding: int, count: int, numel: int, block: int, scalar: float, payload: bytes
) -> None:
    compressors = {Kind.SIGNS: registry.compressor("threshold"), Kind.VALUES: registry.compressor("topk")}
    data = bytes_of(numel, kind, payload, coding=coding, count=count, block=block, scalar=scalar)
    decode_safely(data, numel, compressors)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS)
def test_cuda_packet_has_the_bytes_of_the_cpu_one(spec: str) -> None:
    compressor = registry.compressor(spec)
    data = compressor.encode(ramp(5000)).to_bytes()
    assert compressor.encode(ramp(5000).cuda()).to_bytes() == data
    received = Packet.from_bytes(data, numel=5000, device="cuda")
    assert received.device.type == "cuda"
    decoded = compressor.decompress(Packet.from_bytes(data, numel=5000))
    assert torch.equal(compressor.decompress(received).cpu(), decoded)
