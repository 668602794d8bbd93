"""The 64-byte header: golden bytes, and every way to be wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradcomp.errors import ConfigError, PacketError
from gradcomp.interfaces import Slot
from gradcomp.transports.chunks import Outgoing, cut
from gradcomp.transports.frames import (
    BYE,
    DATA,
    HEADER_BYTES,
    HELLO,
    MAX_CHUNK_BYTES,
    Header,
    digest_payload,
    pack_header,
    unpack_header,
    verify,
)
from gradcomp.transports.inbound import Inbound, Session
from gradcomp.transports.mailbox import Mailbox
from gradcomp.transports.pacing import TokenBucket, paced_chunk_bytes, parse_rate

PAYLOAD = b"payload"
GOOD = Header(
    kind=DATA,
    run=0x1122334455667788,
    epoch=2,
    incarnation=0xAABBCCDD,
    step=5,
    bucket=6,
    stage=1,
    chunk=0,
    sequence=0,
    length=len(PAYLOAD),
    total=len(PAYLOAD),
)
GOLDEN = (
    "47434d5001020100887766554433221102000000ddccbbaa0500000000000000"
    "060000000000000000000000070000000700000000000000e0b303a97eb9581d"
)


def packed(header: Header, payload: bytes = PAYLOAD) -> bytes:
    return pack_header(header, digest_payload(payload))


def unpack_and_verify(data: bytearray) -> None:
    unpack_header(data)
    verify(data, PAYLOAD)


def test_golden_bytes() -> None:
    assert packed(GOOD).hex() == GOLDEN
    assert unpack_header(bytes.fromhex(GOLDEN)) == GOOD
    verify(bytes.fromhex(GOLDEN), PAYLOAD)


@pytest.mark.parametrize("bit", range(0, 8 * HEADER_BYTES, 3))
def test_every_changed_header_bit_is_noticed(bit: int) -> None:
    changed = bytearray(packed(GOOD))
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PacketError):
        unpack_and_verify(changed)


def test_every_changed_payload_bit_is_noticed() -> None:
    for bit in range(8 * len(PAYLOAD)):
        changed = bytearray(PAYLOAD)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PacketError, match="checksum"):
            verify(packed(GOOD), changed)


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [(0, 0, "magic"), (4, 2, "version 2"), (5, 0, "kind 0"), (5, 5, "kind 5"), (7, 1, "reserved")],
)
def test_fixed_bytes_are_checked(at: int, value: int, reason: str) -> None:
    changed = bytearray(packed(GOOD))
    changed[at] = value
    with pytest.raises(PacketError, match=reason):
        unpack_header(changed)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"length": MAX_CHUNK_BYTES + 1, "total": 1 << 40}, "at most"),
        ({"length": 8}, "at most"),
        ({"length": 0}, "empty chunk"),
        ({"kind": HELLO}, "slot"),
        ({"kind": HELLO, "step": 0, "bucket": 0, "stage": 0, "total": 9}, "cut into chunks"),
        ({"kind": BYE, "step": 0, "bucket": 0, "stage": 0}, "farewell"),
    ],
)
def test_lengths_that_contradict_each_other(changes: dict[str, int], reason: str) -> None:
    with pytest.raises(PacketError, match=reason):
        unpack_header(packed(GOOD._replace(**changes)))


@given(st.binary(max_size=100))
def test_random_headers_are_refused(data: bytes) -> None:
    with pytest.raises(PacketError):
        unpack_header(data)


def inbound(mailbox: Mailbox | None = None) -> Inbound:
    """Rank 1's frames as rank 0 takes them, after the hello."""
    session = Session(run=GOOD.run, epoch=GOOD.epoch, max_message_bytes=1000)
    peer = Inbound(1, GOOD.incarnation, session, mailbox or Mailbox(0, 1.0))
    hello = GOOD._replace(kind=HELLO, step=0, bucket=0, stage=0)
    assert peer.header(packed(hello)) is None
    assert peer.payload(memoryview(PAYLOAD)) == HELLO
    return peer


def take(peer: Inbound, header: Header, payload: bytes) -> None:
    place = peer.header(packed(header, payload))
    if place is not None:
        place[:] = payload
    peer.payload(memoryview(payload) if place is None else place)


FIRST = GOOD._replace(sequence=1, length=5, total=9)
SECOND = FIRST._replace(sequence=2, chunk=1, length=4)


def test_chunks_make_a_message() -> None:
    mailbox = Mailbox(0, 1.0)
    peer = inbound(mailbox)
    incoming = mailbox.claim(1, Slot(5, 6, 1))
    take(peer, FIRST, b"first")
    assert not incoming.done
    take(peer, SECOND, b"last")
    assert bytes(incoming.result()) == b"firstlast"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run": 1}, "another run"),
        ({"epoch": 1}, "another run"),
        ({"incarnation": 1}, "another run"),
        ({"sequence": 0}, "frame 0 where 1"),
        ({"sequence": 2}, "frame 2 where 1"),
        ({"chunk": 1}, "not begun"),
        ({"total": 1001}, "over 1000"),
        ({"kind": HELLO, "step": 0, "bucket": 0, "stage": 0, "total": 5}, "second hello"),
    ],
)
def test_a_first_chunk_that_does_not_fit_is_refused(changes: dict[str, int], reason: str) -> None:
    with pytest.raises(PacketError, match=reason):
        take(inbound(), FIRST._replace(**changes), b"first")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chunk": 2}, "chunk 2 of"),
        ({"chunk": 0}, "chunk 0 of"),
        ({"step": 6}, "is due"),
        ({"bucket": 5}, "is due"),
        ({"stage": 0}, "is due"),
        ({"total": 10}, "is due"),
        ({"length": 5}, "in a message of 9"),
        ({"kind": BYE, "step": 0, "bucket": 0, "stage": 0, "chunk": 0, "length": 0, "total": 0}, "inside a message"),
    ],
)
def test_a_next_chunk_that_does_not_fit_is_refused(changes: dict[str, int], reason: str) -> None:
    peer = inbound()
    take(peer, FIRST, b"first")
    with pytest.raises(PacketError, match=reason):
        peer.header(packed(SECOND._replace(**changes), b"last"))


def test_data_before_the_hello_is_refused() -> None:
    session = Session(run=GOOD.run, epoch=GOOD.epoch, max_message_bytes=1000)
    with pytest.raises(PacketError, match="before the hello"):
        Inbound(1, GOOD.incarnation, session, Mailbox(0, 1.0)).header(packed(GOOD))


def test_a_payload_of_another_length_or_content_is_refused() -> None:
    for payload, reason in ((b"payloa", "6 bytes"), (b"paYload", "checksum")):
        peer = inbound()
        peer.header(packed(GOOD._replace(sequence=1)))
        with pytest.raises(PacketError, match=reason):
            peer.payload(memoryview(payload))


@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(1, 100))
def test_chunks_are_the_parts_and_no_longer_than_allowed(parts: list[bytes], limit: int) -> None:
    chunks = list(cut([memoryview(part) for part in parts if part], limit))
    assert b"".join(chunks) == b"".join(parts)
    assert all(0 < len(chunk) <= limit for chunk in chunks) or chunks == [b""]


def test_big_parts_are_not_copied_and_small_ones_are_joined() -> None:
    big = bytes(3 << 20)
    message = Outgoing([b"head", big, b"tail"], MAX_CHUNK_BYTES)
    lengths: list[int] = []
    while sum(lengths) < message.total:
        lengths.append(message.chunk(len(lengths)).length)
    assert lengths == [128 << 10, 1 << 20, 1 << 20, (7 << 17) + 4, 4]
    chunks = list(cut([memoryview(b"head"), memoryview(big), memoryview(b"tail")], MAX_CHUNK_BYTES))
    assert sum(isinstance(chunk, memoryview) and chunk.obj is big for chunk in chunks) >= 3


@pytest.mark.parametrize(
    ("rate", "bits_per_s"), [("100mbit", 1e8), ("1gbit", 1e9), ("800 kbit", 8e5), (5000, 5e3), (None, None)]
)
def test_rates(rate: object, bits_per_s: float | None) -> None:
    assert parse_rate("zmq", rate) == bits_per_s


@pytest.mark.parametrize("rate", ["", "100", "100MB", "-1mbit", "1e3bit", 999, True, float("nan"), float("inf")])
def test_wrong_rates(rate: object) -> None:
    with pytest.raises(ConfigError, match="rate="):
        parse_rate("zmq", rate)


@given(st.floats(1e5, 1e10), st.floats(0, 0.009))
def test_a_token_bucket_lets_through_its_rate(bits_per_s: float, late_s: float) -> None:
    now_s, sent = 0.0, 0
    bucket, chunk = TokenBucket(bits_per_s, now_s), paced_chunk_bytes(bits_per_s)
    for _ in range(400):
        now_s += bucket.wait_s(now_s) + late_s * (bucket.wait_s(now_s) > 0)
        bucket.take(chunk, now_s)
        sent += chunk
    assert sent * 8 / bits_per_s == pytest.approx(now_s, abs=0.01 + 8 * chunk / bits_per_s)
