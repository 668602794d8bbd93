"""Messages of the parameter server: what is written can be read, and nothing else gets through or does harm."""

from __future__ import annotations

import dataclasses
import math
import random
import tracemalloc
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_sides import ListJournal, Side, admit, ask, copied, named_parameters

from gradcomp.errors import ConfigError, PacketError
from gradcomp.server import messages, protocol
from gradcomp.server.messages import (
    Acked,
    Add,
    Beat,
    Changed,
    Forgot,
    Join,
    Leave,
    Look,
    Message,
    Pull,
    Push,
    Refused,
    Request,
    Setup,
    Summed,
    Total,
    Welcome,
)
from gradcomp.server.service import Service
from gradcomp.server.table import ShardTable

HELLO: messages.Hello = {"version": "0.1.0", "wire": 1, "tensors": b"12345678"}
EXAMPLES: list[Message] = [
    Join(number=1, worker="a", incarnation=7, hello=HELLO, digest=bytes(16)),
    Setup(number=1, worker="ä", incarnation=7, hello=HELLO, digest=bytes(16), table=b"t", optimizer="{}", body=b"1234"),
    Push(
        number=2,
        worker="a",
        incarnation=7,
        sequence=1,
        clock=1,
        version=0,
        options=[{"lr": 0.1, "t": 3}, {}],
        pull=True,
        have=-1,
        body=b"xyz",
    ),
    Pull(number=3, worker="a", incarnation=7, clock=1, have=0),
    Add(number=3, worker="a", incarnation=7, turn=1, body=b"1234"),
    Beat(number=0, worker="a", incarnation=7),
    Leave(number=4, worker="a", incarnation=(1 << 63) - 1),
    Look(number=0, worker="", incarnation=0),
    Welcome(number=1, run=5, version=0, published=0, have=-1, clock=0, turn=0, lease_s=10.0),
    messages.Empty(number=1),
    messages.Busy(number=1, reason="not now"),
    Refused(number=1, field="lr", reason="NaN"),
    messages.Unknown(number=1, run=5),
    Acked(number=2, sequence=1, result="applied", staleness=0, version=1),
    Changed(number=2, have=0, published=1, version=1, clock=1, full=False, body=b"..."),
    messages.Wait(number=2, reason="others"),
    Total(number=2, turn=1, terms=2, body=b"1234"),
    messages.Alive(number=0, version=1),
    messages.Left(number=4),
    messages.Status(number=0, body=b"{}"),
    Forgot(number=0, worker="a", incarnation=7),
    messages.Published(number=0),
    Summed(number=0, turn=1, terms=2, body=b"1234"),
]
CODES = {type(message).__name__: message.code for message in EXAMPLES}


def test_every_kind_has_an_example_and_a_number_of_its_own() -> None:
    kinds = {
        name for name in messages.__all__ if name not in ("Event", "Hello", "Message", "Options", "Reply", "Request")
    }
    assert set(CODES) == kinds
    assert len(set(CODES.values())) == len(CODES)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_there_and_back(message: Message) -> None:
    back = copied(message)
    assert back == message
    assert bytes(protocol.whole(back.body)) == bytes(protocol.whole(message.body))


def test_bodies_in_parts() -> None:
    parts = [b"ab", memoryview(b"cd"), bytearray(b"e")]
    assert bytes(protocol.whole(copied(dataclasses.replace(EXAMPLES[2], body=parts)).body)) == b"abcde"
    assert bytes(protocol.whole(parts)) == b"abcde"
    assert bytes(protocol.whole([])) == b""


def packed(*fields: object) -> bytes:
    return framed(bytes(msgpack.packb(list(fields))))


def framed(head: bytes) -> bytes:
    """With its length before it, and padded to a multiple of eight bytes."""
    return len(head).to_bytes(4, "little") + head + bytes(-(4 + len(head)) % 8)


PULL = [4, 3, "a", 7, 1, 0]  # kind, number, worker, incarnation, clock, have


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no head"),
        (b"\1\0\0", "no head"),
        (b"\xff\xff\xff\xff" + bytes(100), "head of 4294967295 bytes"),
        (b"\2\0\0\0\x90", "head of 2 bytes"),
        (framed(b"\xc1"), "not msgpack"),
        (framed(b"\xdd\xff\xff\xff\xff"), "not msgpack"),  # a list of four billion
        (framed(b"\xc6\xff\xff\xff\xff"), "not msgpack"),
        (framed(b"\xdb\xff\xff\xff\xff"), "not msgpack"),
        (framed(b"\x91" * 5), "not msgpack"),
        (framed(b"\x91" * 4096), "not msgpack"),
        (packed(4, 3, "a", 7, 1, 0)[:-1] + b"\1", "set in its padding"),
        (packed(), "number of a kind"),
        (packed(99), "number of a kind"),
        (packed(True), "number of a kind"),
        (packed("4"), "number of a kind"),
        (packed(4, 3, "a", 7, 1), "Pull of 4 fields; it has 5"),
        (packed(*PULL, 5), "Pull of 6 fields"),
        (packed(4, 3, "a", 7, 1.0, 0), "Pull.clock is '1.0'; it must be an integer"),
        (packed(4, 3, "a", 7, True, 0), "Pull.clock is 'True'"),
        (packed(4, 3, "a", 1 << 63, 1, 0), "Pull.incarnation"),
        (packed(4, -2, "a", 7, 1, 0), "Pull.number is '-2'"),
        (packed(4, 3, b"a", 7, 1, 0), "Pull.worker .* must be text"),
        (packed(3, 1, "a", 7, 1, 1, 0, [{"lr": math.nan}], True, 0), "Push.options .* finite"),
        (packed(3, 1, "a", 7, 1, 1, 0, [{"lr": math.inf}], True, 0), "Push.options"),
        (packed(3, 1, "a", 7, 1, 1, 0, [{"lr": "1"}], True, 0), "Push.options"),
        (packed(3, 1, "a", 7, 1, 1, 0, {"lr": 1.0}, True, 0), "Push.options"),
        (packed(3, 1, "a", 7, 1, 1, 0, [], 1, 0), "Push.pull is '1'; it must be true or false"),
        (packed(1, 1, "a", 7, {"x": 1.5}, bytes(16)), "Join.hello"),
        (packed(1, 1, "a", 7, {"x": [1]}, bytes(16)), "Join.hello"),
        (packed(1, 1, "a", 7, {1: "x"}, bytes(16)), "not msgpack"),
        (packed(65, 1, 5, 0, 0, -1, 0, 0, math.nan), "Welcome.lease_s"),
        (packed(65, 1, 5, 0, 0, -1, 0, 0, 10), "Welcome.lease_s is '10'; it must be a finite float"),
    ],
)
def test_malformed(data: bytes, words: str) -> None:
    with pytest.raises(PacketError, match=words):
        protocol.unpack(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_noise_is_refused(data: bytes) -> None:
    try:
        message = protocol.unpack(data)
    except PacketError:
        return
    assert b"".join(bytes(part) for part in protocol.pack(message))


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([message.code for message in EXAMPLES]), st.lists(PLAIN, max_size=12))
def test_any_fields(code: int, fields: list[Any]) -> None:
    try:
        message = protocol.unpack(packed(code, *fields))
    except PacketError:
        return
    assert copied(message) == message


# -- into a running server ---------------------------------------------------------------------------------------------


def running() -> tuple[Service, ListJournal, Side, list[Request]]:
    """A service that has seen a little, and requests that it would take next."""
    journal = ListJournal()
    service = Service(journal=journal, max_numel=10_000)
    optimizer = torch.optim.SGD(named_parameters(shapes=((6, 5), (7,))), lr=0.1)
    side = Side(optimizer, workers=2, push="threshold:tau=0.5", pull="topk:k=3", dense=True)
    admit(service, side)
    for _ in range(2):
        for reply in ask(service, side.push([torch.ones(6, 5), torch.ones(7)])):
            side.take(reply)
    push = side.push([torch.ones(6, 5), torch.ones(7)])
    add = Add(number=9, worker="a", incarnation=1, turn=1, body=bytes(8))
    return service, journal, side, [push, side.pull(), side.join(), side.setup(), add]


def fingerprint(service: Service) -> str:
    """Everything a request might change."""
    state = service.state_dict()
    state["run"]["counters"] = {k: v for k, v in state["run"]["counters"].items() if k != "pulled_bytes"}
    torch.set_printoptions(profile="full", precision=10)
    try:
        return repr(state)
    finally:
        torch.set_printoptions(profile="default")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_changed_bytes_never_crash_nor_change_anything_unseen(data: st.DataObject) -> None:
    """Whatever is not refused is in the journal; what is refused has changed nothing."""
    service, journal, _, requests = SHARED
    request = data.draw(st.sampled_from(requests))
    raw = bytearray(b"".join(bytes(part) for part in protocol.pack(request)))
    for _ in range(data.draw(st.integers(1, 4))):
        how = data.draw(st.sampled_from(("byte", "cut", "more")))
        at = data.draw(st.integers(0, len(raw) - 1)) if raw else 0
        if how == "byte" and raw:
            raw[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del raw[at:]
        else:
            raw += data.draw(st.binary(max_size=9))
    try:
        message = protocol.unpack(raw)
    except PacketError:
        return
    if not isinstance(message, Request):
        return
    before, entries = fingerprint(service), len(journal.entries)
    replies = service.handle(message, b"x", 0.0)
    for _, reply in replies:
        copied(reply)
    if len(journal.entries) == entries:
        assert fingerprint(service) == before
    else:  # it was a request like any other: undo it
        other, state = Service(max_numel=10_000), STATE[0]
        other.load_state_dict(state, 0.0)
        for entry in journal.read()[STATE[1] :]:
            other.replay(entry, 0.0)
        assert fingerprint(other) == fingerprint(service)
        del journal.entries[STATE[1] :]
        service.load_state_dict(state, 0.0)


SHARED = running()
STATE = (SHARED[0].state_dict(), len(SHARED[1].entries))


def test_every_field_with_every_strange_value() -> None:
    strange = {
        int: (-1, 0, 1 << 40, (1 << 63) - 1),
        str: ("", "x", "x" * 100_000, "a\0b"),
        bytes: (b"", b"x", bytes(16), bytes(100_000)),
        bool: (True, False),
        list: ([], [{}], [{"lr": -1.0}], [{"lr": 1e300}], [{"": 0.0}], [{}] * 4000),
        dict: ({}, {"mode": ""}, {"mode": "{}", "workers": -1}, {str(i): i for i in range(60)}),
    }
    service, journal, _, requests = running()
    fresh = Service(max_numel=10_000)
    state, entries = service.state_dict(), len(journal.entries)
    for request in requests:
        for field in dataclasses.fields(request):
            if field.name == "body":
                continue
            for value in strange[type(getattr(request, field.name))]:
                changed = dataclasses.replace(request, **{field.name: value})
                for one in (service, fresh):
                    for reply in ask(one, changed):
                        assert not isinstance(reply, Refused) or reply.field
                if len(journal.entries) > entries:
                    del journal.entries[entries:]
                    service.load_state_dict(state, 0.0)
                if "run" in fresh.state_dict():
                    fresh = Service(max_numel=10_000)


def test_bodies_of_any_length() -> None:
    service, journal, _, requests = running()
    before, entries = fingerprint(service), list(journal.entries)
    draw = random.Random(0)
    for request in (requests[0], requests[3]):
        body = bytes(protocol.whole(request.body))
        target = service if isinstance(request, Push) else Service(max_numel=10_000)
        for _ in range(100):
            length = draw.randrange(len(body))
            noise = draw.choice((body[:length], body + draw.randbytes(9), draw.randbytes(length)))
            (refused,) = ask(target, dataclasses.replace(request, body=noise))
            assert isinstance(refused, Refused)
            assert refused.field in ("body", "digest")
    assert (fingerprint(service), journal.entries) == (before, entries)


def test_nothing_is_allocated_by_what_a_table_says() -> None:
    optimizer = torch.optim.SGD([torch.zeros(10, 10)], lr=0.1)
    setup = copied(Side(optimizer).setup())
    assert isinstance(setup, Setup)
    row = ["p", 0, 1 << 30, [1 << 30], 0, '{"id": "none"}', '{"id": "powersgd", "rank": 100000}']
    tracemalloc.start()
    try:
        for shape, stop in (([1 << 30], 1 << 30), ([1 << 15, 1 << 15], 1 << 30), ([1 << 47], 1 << 47)):
            row[2:4] = [stop, shape]
            (refused,) = ask(Service(), dataclasses.replace(setup, table=bytes(msgpack.packb([row] * 3))))
            assert isinstance(refused, Refused)
            assert refused.field in ("table", "body")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(PLAIN, max_size=8) | st.lists(st.lists(PLAIN, min_size=7, max_size=7), max_size=3))
def test_tables_of_anything(found: list[Any]) -> None:
    with pytest.raises((PacketError, ConfigError)) if found else pytest.MonkeyPatch.context():
        ShardTable.unpack(msgpack.packb(found), max_numel=1000)
