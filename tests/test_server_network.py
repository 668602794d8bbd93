"""Workers and a parameter server over ZeroMQ: lost and doubled frames, absent and returning servers, hostile peers."""

from __future__ import annotations

import dataclasses
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from ports import free_port
from processes import until
from relay import Relay
from server_network import ask, gradients, in_threads, join, linked, same, serving, side, work
from server_sides import ListJournal

from gradcomp.errors import ConfigError, HandshakeError, TransportError, TransportTimeout
from gradcomp.server.messages import (
    Alive,
    Beat,
    Busy,
    Changed,
    Join,
    Look,
    Pull,
    Refused,
    Reply,
    Request,
    Status,
    Unknown,
    Wait,
    Welcome,
)
from gradcomp.server.protocol import pack
from gradcomp.server.service import Service
from gradcomp.transports.chunks import Chunk, Outgoing
from gradcomp.transports.frames import ASK, HEADER_BYTES, Header, digest_payload, pack_header
from gradcomp.transports.server_frames import Inbox, Letter, Outbox
from gradcomp.transports.server_loop import ServerLoop

PUSHES = int(os.environ.get("GRADCOMP_SOAK_PUSHES", "1200"))
WHO = {"number": 0, "worker": "a", "incarnation": 1}
PULL = Pull(**WHO, clock=0, have=0)


class Answers:
    """Answers each request with what ``reply`` makes of it."""

    def __init__(self, reply: Callable[[Request], list[Reply]]) -> None:
        self.reply = reply
        self.requests: list[Request] = []

    def handle(self, request: Request, sender: bytes, now: float) -> list[tuple[bytes, Reply]]:
        self.requests.append(request)
        return [(sender, reply) for reply in self.reply(request)]

    def tick(self, now: float) -> list[tuple[bytes, Reply]]:
        return []


def changed(request: Request, body: Any = b"") -> Changed:
    return Changed(number=request.number, have=0, published=1, version=1, clock=1, full=True, body=body)


def welcome(request: Request, *, run: int = 7, lease_s: float = 10.0) -> Welcome:
    return Welcome(number=request.number, run=run, version=0, published=0, have=0, clock=0, turn=0, lease_s=lease_s)


def hello_join() -> Join:
    return Join(**WHO, hello={"version": "1"}, digest=b"")


# What is lost.


@pytest.mark.parametrize("spec", ["async", "sync"])
def test_a_relay_that_loses_and_doubles_changes_nothing(spec: str) -> None:
    """Every push counts once, and a serial replay of the journal gives the same parameters, bit for bit."""
    workers = 4
    each = (PUSHES if spec == "async" else PUSHES // 5) // workers
    journal = ListJournal()
    service = Service(journal=journal, lease_s=600.0)
    with serving(service) as loop, Relay(loop.address, drop=0.10, double=0.05, seed=5) as relay:
        bodies = [
            partial(work, relay.address, f"w{i}", each, seed=i, workers=workers, spec=spec) for i in range(workers)
        ]
        in_threads(bodies, deadline_s=60 + PUSHES / 20)
        assert relay.dropped > 0
        assert relay.doubled > 0
    status = service.status()
    assert status["applied"] == workers * each
    assert status["updates"] == (workers * each if spec == "async" else each)
    assert all(worker["pushes"] == each for worker in status["workers"].values())
    serial = Service()
    for entry in journal.read():
        serial.replay(entry, 0.0)
    mine, theirs = serial.state_dict()["run"], service.state_dict()["run"]
    assert mine["counters"]["applied"] == theirs["counters"]["applied"]
    for part in ("shard", "roster", "pace", "totals"):
        assert same(mine[part], theirs[part]), part


def test_long_messages_get_through_a_relay_that_loses_and_doubles() -> None:
    body = random.Random(1).randbytes(2_000_000)
    answers = Answers(lambda request: [changed(request, bytes(request.body))])  # type: ignore[arg-type]
    with (
        serving(answers) as loop,
        Relay(loop.address, drop=0.03, double=0.05, seed=3) as relay,
        linked(relay.address, timeout_s=60.0) as links,
    ):
        for _ in range(5):
            (reply,) = ask(links, Join(**WHO, hello={}, digest=b"", body=body))
            assert bytes(reply.body) == body  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    fates=st.lists(st.sampled_from("ppppld"), min_size=64, max_size=64),
)
def test_what_is_put_together_is_what_was_sent(sizes: list[int], fates: list[str]) -> None:
    """Whatever is lost (l) or doubled (d), no message comes out changed; if nothing is lost, all come out."""
    chunk = 8
    messages = {i + 1: bytes([i + 1]) * size for i, size in enumerate(sizes)}
    outbox, frames = Outbox(ASK, 1), []
    for number, data in messages.items():
        outbox.put(Letter(number, Outgoing([data], chunk)))
    while outbox:
        outbox.send(lambda header, chunk: frames.append((header, bytes(chunk.frame.buffer))), 0.0)
    inbox, came = Inbox(ASK, 1000), []
    for (raw, payload), fate in zip(frames, fates, strict=False):
        for _ in range({"p": 1, "l": 0, "d": 2}[fate]):
            place = inbox.header(raw)
            if place is not None:
                place[:] = payload
            whole = inbox.payload(memoryview(payload) if place is None else place, 0.0)
            if whole is not None:
                came.append(whole[0].step)
                assert bytes(whole[1]) == messages[whole[0].step]
    if "l" not in fates[: len(frames)]:
        assert set(came) == set(messages)
    assert inbox.held_bytes <= 40


def test_a_short_message_comes_between_the_chunks_of_a_long_one() -> None:
    outbox, order = Outbox(ASK, 1), []

    def send(header: bytes, chunk: Chunk) -> None:
        order.append(struct.unpack_from("<Q", header, 24)[0])

    outbox.put(Letter(1, Outgoing([bytes(100)], 40)))
    outbox.send(send, 0.0)
    outbox.put(Letter(2, Outgoing([bytes(10)], 40)))
    while outbox:
        outbox.send(send, 0.0)
    assert order == [1, 2, 1, 1]


# Who is not there.


def test_a_server_that_is_not_there_is_named_in_time() -> None:
    address = f"127.0.0.1:{free_port()}"
    with linked(address, timeout_s=0.4) as links, pytest.raises(TransportTimeout) as found:
        ask(links, PULL)
    assert str(found.value) == (f"server: shard 0 at {address} did not answer Pull within 0.4 s: nobody listens there")


def test_a_server_that_comes_later_is_found() -> None:
    address = f"127.0.0.1:{free_port()}"
    with linked(address) as links:
        with pytest.raises(TransportTimeout, match="nobody listens"):
            links.wait([links.ask(0, PULL)], timeout_s=0.3)
        asked = links.ask(0, PULL)
        with serving(Answers(lambda request: [changed(request)]), bind=address):
            links.wait([asked])
    assert isinstance(asked.replies[0], Changed)


def test_a_server_that_returns_is_asked_again() -> None:
    address = f"127.0.0.1:{free_port()}"
    with linked(address) as links:
        silent = Answers(lambda request: [Wait(number=request.number, reason="others are not here")])
        with serving(silent, bind=address):
            asked = links.ask(0, PULL)
            with pytest.raises(TransportTimeout, match="others are not here"):
                links.wait([links.ask(0, PULL)], timeout_s=0.4)
        assert not asked.done
        with serving(Answers(lambda request: [changed(request)]), bind=address):
            links.wait([asked])
        with pytest.raises(TransportTimeout, match="its connection broke"):
            links.wait([links.ask(0, PULL)], timeout_s=0.3)


def test_the_shard_that_is_missing_is_the_one_that_is_named() -> None:
    missing = f"127.0.0.1:{free_port()}"
    with serving(Answers(lambda request: [changed(request)])) as loop, linked([loop.address, missing]) as links:
        asked = [links.ask(0, PULL), links.ask(1, PULL)]
        with pytest.raises(TransportTimeout) as found:
            links.wait(asked, timeout_s=0.5)
    assert "shard 1" in str(found.value)
    assert "shard 0" not in str(found.value)


def test_what_listens_there_may_be_something_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(10.0)
        address = f"127.0.0.1:{other.getsockname()[1]}"

        def chat() -> None:
            for _ in range(100):
                try:
                    connection, _ = other.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(64))

        thread = threading.Thread(target=chat, daemon=True)
        thread.start()
        with linked(address, timeout_s=1.0) as links, pytest.raises(TransportTimeout, match="did not answer Pull"):
            ask(links, PULL)


def test_a_port_in_use_is_named() -> None:
    with serving(Answers(lambda request: [])) as loop, pytest.raises(TransportError, match="cannot listen on 127"):
        ServerLoop(Answers(lambda request: []), bind=loop.address, max_message_bytes=1000)


@pytest.mark.parametrize("address", ["here", "127.0.0.1", "127.0.0.1:x", ":80", "::1:80", "127.0.0.1:99999"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        linked(address).__enter__()


def test_it_listens_on_the_loopback_unless_told_otherwise() -> None:
    with pytest.raises(ConfigError, match="in the clear and from anybody"):
        ServerLoop(Answers(lambda request: []), bind="192.0.2.1:0", max_message_bytes=1000)


def test_closed_links() -> None:
    with linked("127.0.0.1:1") as links:
        asked = links.ask(0, PULL)
    with pytest.raises(TransportError, match="closed"):
        links.ask(0, PULL)
    with pytest.raises(TransportError, match="closed"):
        links.wait([asked])
    links.close()


# What a server says.


def test_a_refusal_names_the_field() -> None:
    answers = Answers(lambda request: [Refused(number=request.number, field="lr", reason="lr is NaN")])
    with (
        serving(answers) as loop,
        linked(loop.address) as links,
        pytest.raises(HandshakeError, match="refuses: lr is NaN") as found,
    ):
        ask(links, PULL)
    assert found.value.field == "lr"


def test_busy_is_asked_again_until_it_is_not() -> None:
    came = iter(range(100))
    answers = Answers(
        lambda request: (
            [Busy(number=request.number, reason="another one of your name")] if next(came) < 3 else [welcome(request)]
        )
    )
    with serving(answers) as loop, linked(loop.address) as links:
        assert isinstance(ask(links, hello_join())[0], Welcome)
    answers.reply = lambda request: [Busy(number=request.number, reason="another one of your name")]
    with (
        serving(answers) as loop,
        linked(loop.address) as links,
        pytest.raises(TransportTimeout, match="another one of your name"),
    ):
        links.wait([links.ask(0, hello_join())], timeout_s=0.5)


@pytest.mark.parametrize("kind", ["welcome", "unknown"])
def test_a_server_that_lost_its_state_is_found_out(kind: str) -> None:
    answers = Answers(lambda request: [welcome(request, run=7)])
    with serving(answers) as loop, linked(loop.address) as links:
        ask(links, hello_join())
        answers.reply = lambda request: [
            welcome(request, run=8) if kind == "welcome" else Unknown(number=request.number, run=8)
        ]
        with pytest.raises(HandshakeError, match="lost its state") as found:
            ask(links, hello_join())
        assert found.value.field == "run"
        links.runs[0] = None
        ask(links, hello_join())


def test_the_lease_is_renewed_while_the_worker_does_something_else() -> None:
    answers = Answers(
        lambda request: (
            [Alive(number=request.number, version=0)] if isinstance(request, Beat) else [welcome(request, lease_s=0.25)]
        )
    )
    with serving(answers) as loop, linked(loop.address) as links:
        ask(links, hello_join())
        until = time.monotonic() + 20.0
        while sum(isinstance(request, Beat) for request in answers.requests) < 5:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_a_heartbeat_gets_through_while_a_long_push_is_under_way() -> None:
    """At this rate the push takes over a second, and the lease is a quarter of one."""
    service = Service(lease_s=0.25)
    me = side(push="none")
    with serving(service) as loop, linked(loop.address, incarnation=me.incarnation, rate="4mbit") as links:
        join(links, me)
        long = me.push(gradients(me, torch.Generator()))
        with pytest.raises(HandshakeError, match="refuses"):  # such a body does not fit the table; but it came
            ask(links, dataclasses.replace(long, body=bytes(600_000)))
        assert service.status()["live"] == 1


def test_what_is_sent_and_received_is_counted() -> None:
    with serving(Answers(lambda request: [changed(request, bytes(700_000))])) as loop, linked(loop.address) as links:
        ask(links, Join(**WHO, hello={}, digest=b"", body=bytes(500_000)))
        assert 500_000 < links.bytes_sent < 503_000
        assert 700_000 < links.bytes_received < 703_000
        # A heartbeat may be on its way just now.
        until(lambda: loop.bytes_received == links.bytes_sent)
        until(lambda: loop.bytes_sent == links.bytes_received)


# Peers that are no workers.


def stranger(address: str) -> zmq.Socket[bytes]:
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(f"tcp://{address}")
    return socket


def frame(payload: bytes, **fields: int) -> list[bytes]:
    header = Header(
        **(
            {"kind": ASK, "run": 0, "epoch": 0, "incarnation": 1, "step": 1, "bucket": 0, "stage": 0, "chunk": 0}
            | {"sequence": 1, "length": len(payload), "total": len(payload)}
            | fields
        )
    )
    return [pack_header(header, digest_payload(payload)), payload]


def test_hostile_bytes_change_nothing() -> None:
    """Junk to the socket, junk in frames, damaged frames, long claims: whoever else asks is answered."""
    chance = random.Random(7)
    service = Service()
    with serving(service) as loop, linked(loop.address) as links:
        host, port = loop.address.split(":")
        for _ in range(5):
            with socket.create_connection((host, int(port)), timeout=5.0) as raw:
                raw.sendall(chance.randbytes(500))
        with stranger(loop.address) as junk:
            valid = frame(chance.randbytes(50))
            for i in range(300):
                kind = i % 6
                if kind == 0:
                    junk.send_multipart(
                        [chance.randbytes(chance.randrange(100)) for _ in range(chance.randrange(1, 5))]
                    )
                elif kind == 1:  # damaged somewhere
                    at = chance.randrange(HEADER_BYTES)
                    header = bytearray(valid[0])
                    header[at] ^= 1 << chance.randrange(8)
                    junk.send_multipart([bytes(header), valid[1]])
                elif kind == 2:  # a well-formed frame of junk
                    junk.send_multipart(frame(chance.randbytes(200), step=i))
                elif kind == 3:  # the beginning of a message that never ends
                    junk.send_multipart(frame(bytes(10), total=60 << 20, sequence=i))
                elif kind == 4:  # longer than is allowed
                    junk.send_multipart(frame(bytes(10), total=1 << 50))
                else:
                    junk.send_multipart(frame(bytes(10), chunk=3, total=100, sequence=i - 2))
            assert isinstance(ask(links, Look(number=0, worker="", incarnation=0))[0], Status)
            until = time.monotonic() + 20.0
            while loop.junk_frames < 200:
                assert time.monotonic() < until
                time.sleep(0.02)
            assert len(loop._inboxes) <= 1
        join(links, side())
    zmq.Context.instance().destroy(0)


def test_half_messages_of_strangers_are_bounded() -> None:
    loop = ServerLoop(Answers(lambda request: []), max_message_bytes=1 << 20)
    try:
        for i in range(1000):
            inbox = Inbox(ASK, 1 << 20)
            raw, payload = frame(bytes(100), total=1 << 20)
            place = inbox.header(raw)
            assert place is not None
            inbox.payload(memoryview(payload), 0.0)
            loop._inboxes[struct.pack("<I", i)] = inbox
            loop._bound_inboxes()
        assert len(loop._inboxes) <= 256
    finally:
        loop.close()


def test_a_peer_that_does_not_read_is_not_waited_for() -> None:
    """Its answers are dropped in the end; who reads is served in the meantime."""
    body = bytes(4 << 20)
    with serving(Answers(lambda request: [changed(request, body)])) as loop, linked(loop.address) as links:
        deaf = stranger(loop.address)
        for number in range(1, 60):
            deaf.send_multipart(frame(b"".join(pack(dataclasses.replace(PULL, number=number, worker="deaf")))))
        for _ in range(5):
            assert len(ask(links, PULL)[0].body) == len(body)
        assert all(len(peer.outbox) <= 8 for peer in list(loop._peers.values()))
        deaf.close(0)
    zmq.Context.instance().destroy(0)


def test_another_version_of_the_frames_is_named() -> None:
    with serving(Answers(lambda request: [])) as loop, stranger(loop.address) as other:
        header, payload = frame(b"")
        other.send_multipart([header[:4] + b"\x02" + header[5:], payload])
        assert other.poll(10_000)
        _, answer = other.recv_multipart()
        assert b"frames of version 2" in answer
    zmq.Context.instance().destroy(0)


def test_a_message_of_another_version_is_refused_by_name() -> None:
    with serving(Service()) as loop, stranger(loop.address) as other:
        other.send_multipart(frame(struct.pack("<I", 2) + b"\x91\x63" + bytes(2), step=77))
        assert other.poll(10_000)
        _, answer = other.recv_multipart()
        assert b"does not begin with the number of a kind" in answer
    zmq.Context.instance().destroy(0)
