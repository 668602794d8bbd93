"""The contract of :class:`gradcomp.interfaces.Transport` as checks that any transport can be put through."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from gradcomp.errors import HandshakeError, PeerLost, TransportError, TransportTimeout
from gradcomp.interfaces import Buffer, Slot, Transport

__all__ = ["check_transport", "run_ranks"]

T = TypeVar("T")
World = Callable[[int], list[Transport]]

_MIB = 1 << 20
_MAX_MESSAGE_BYTES = 8 * _MIB
_HELLO: Mapping[str, str | int | bytes] = {"version": "1", "model": "m", "tensors": b"12345678"}
_DEADLINE_S = 30.0


def check_transport(make_world: World) -> None:
    """Check everything :class:`gradcomp.interfaces.Transport` promises.

    Args:
        make_world: gives the transports of a new world of that many ranks, not yet connected. They are run in threads.

    Raises:
        AssertionError: names the promise that is not kept.
    """
    for check in (
        _check_world_of_one,
        _check_all_gather,
        _check_slots_in_any_order,
        _check_concurrent_senders,
        _check_parts,
        _check_receiver_owns_its_bytes,
        _check_timeout,
        _check_refusal,
        _check_leaving,
        _check_closing,
        _check_misuse,
    ):
        _run(check, make_world)


def _run(check: Callable[[World], None], make_world: World) -> None:
    try:
        check(make_world)
    except Exception as error:
        raise AssertionError(f"{check.__name__.removeprefix('_check_')}: {error}") from error


def run_ranks(
    transports: Sequence[Transport], body: Callable[[Transport], T], *, deadline_s: float = _DEADLINE_S
) -> list[T]:
    """Run ``body`` for every transport in a thread of its own, and close them all.

    Each thread runs its own backward passes. Else all on one GPU were run by a single thread of torch's: a rank that
    waits in the end of its pass for the others would keep them from ever coming to theirs.

    Returns:
        What the bodies returned, in the order of ``transports``.

    Raises:
        AssertionError: one was not done after ``deadline_s``.
        Exception: what a body raised; PeerLost only if none raised anything else.
    """
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def run(index: int) -> None:
        try:
            with torch.autograd.set_multithreading_enabled(False):
                results[index] = body(transports[index])
        except BaseException as error:
            errors[index] = error
        finally:
            transports[index].close()

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(transports))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + deadline_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    # Not what the others saw when the first one left.
    for error in sorted(errors.values(), key=lambda error: isinstance(error, PeerLost)):
        raise error
    stuck = [transports[i].rank for i, thread in enumerate(threads) if thread.is_alive()]
    _expect(not stuck, f"ranks {stuck} are not done after {deadline_s:g} s")
    return [results[i] for i in range(len(transports))]


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _raises(kind: type[Exception], call: Callable[[], object], what: str) -> Exception:
    try:
        call()
    except kind as error:
        return error
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__}, not {kind.__name__}: {error}") from error
    raise AssertionError(f"{what} did not raise {kind.__name__}")


def _connect(transport: Transport) -> None:
    transport.connect(_HELLO, max_message_bytes=_MAX_MESSAGE_BYTES)


def _payload(rank: int, seed: int, nbytes: int) -> bytes:
    return np.random.default_rng([rank, seed]).bytes(nbytes)


def _peers(transport: Transport) -> list[int]:
    return [peer for peer in range(transport.world_size) if peer != transport.rank]


def _check_world_of_one(make_world: World) -> None:
    def body(transport: Transport) -> None:
        _connect(transport)
        _expect((transport.rank, transport.world_size) == (0, 1), "a world of one is rank 0 of 1")
        found = transport.all_gather(Slot(0, 0, 0), b"mine")
        _expect([bytes(one) for one in found] == [b"mine"], "a world of one gathers its own payload")

    run_ranks(make_world(1), body)


def _check_all_gather(make_world: World) -> None:
    # The last one is small: who has all of it knows that the others have all before it, so it was sent and counted.
    sizes = [0, 1, 100_000, _MIB - 1, _MIB, _MIB + 1, 5 * _MIB, 0]

    def body(transport: Transport) -> tuple[int, int]:
        _connect(transport)
        for step, nbytes in enumerate(sizes):
            found = transport.all_gather(Slot(step, 0, 0), _payload(transport.rank, step, nbytes))
            for rank, one in enumerate(found):
                _expect(isinstance(one, memoryview) and one.contiguous, "a message is a contiguous memoryview")
                _expect(one == _payload(rank, step, nbytes), f"{nbytes} bytes from rank {rank} came changed")
        return transport.bytes_sent, transport.bytes_received

    for sent, received in run_ranks(make_world(3), body):
        _expect(sent >= 2 * sum(sizes), f"bytes_sent is {sent} after sending {2 * sum(sizes)} bytes")
        _expect(received >= 2 * sum(sizes), f"bytes_received is {received} after {2 * sum(sizes)} bytes")
        _expect(max(sent, received) < 2.1 * sum(sizes), "the byte counters count more than went over the wire")


def _check_slots_in_any_order(make_world: World) -> None:
    slots = [Slot(step, bucket, stage) for step in (0, 1, 1 << 40) for bucket in (0, 7, 1 << 31) for stage in (0, 255)]

    def body(transport: Transport) -> None:
        _connect(transport)
        order = random.Random(transport.rank)
        asked = order.sample(slots, len(slots))
        early = [transport.recv(peer, slot) for slot in asked[:9] for peer in _peers(transport)]
        for slot in order.sample(slots, len(slots)):
            for peer in _peers(transport):
                transport.send(peer, slot, [repr((transport.rank, slot)).encode()])
        transport.wait(early)
        late = [transport.recv(peer, slot) for slot in asked[9:] for peer in _peers(transport)]
        transport.wait(late)
        for incoming in early + late:
            _expect(incoming.done and not incoming.failed, "a message that is here is done and has not failed")
            _expect(bytes(incoming.result()) == repr((incoming.peer, incoming.slot)).encode(), "slots are mixed up")

    run_ranks(make_world(3), body)


def _check_concurrent_senders(make_world: World) -> None:
    threads, messages = 4, 25

    def body(transport: Transport) -> None:
        _connect(transport)

        def send(bucket: int) -> None:
            for step in range(messages):
                for peer in _peers(transport):
                    transport.send(peer, Slot(step, bucket, 0), [_payload(transport.rank, bucket, 1000 * step)])

        senders = [threading.Thread(target=send, args=(bucket,)) for bucket in range(threads)]
        for sender in senders:
            sender.start()
        for bucket in range(threads):
            for step in range(messages):
                incoming = [transport.recv(peer, Slot(step, bucket, 0)) for peer in _peers(transport)]
                for peer, one in zip(_peers(transport), transport.wait(incoming), strict=True):
                    _expect(one == _payload(peer, bucket, 1000 * step), "messages of several threads are mixed up")
        for sender in senders:
            sender.join()

    run_ranks(make_world(3), body)


def _check_parts(make_world: World) -> None:
    parts: list[Buffer] = [b"head", memoryview(bytes(3 * _MIB)), b"", b"x" * 100, bytearray(200_000), b"tail"]

    def body(transport: Transport) -> None:
        _connect(transport)
        peer = 1 - transport.rank
        for step in range(3):
            transport.send(peer, Slot(step, 0, 0), parts[step:])
            (found,) = transport.wait([transport.recv(peer, Slot(step, 0, 0))])
            _expect(found == b"".join(parts[step:]), "a message is not the concatenation of its parts")

    run_ranks(make_world(2), body)


def _check_receiver_owns_its_bytes(make_world: World) -> None:
    def body(transport: Transport) -> None:
        _connect(transport)
        mine = bytearray(_payload(transport.rank, 0, 200_000))
        found = transport.all_gather(Slot(0, 0, 0), mine)[1 - transport.rank]
        before = bytes(found)
        transport.all_gather(Slot(1, 0, 0), b"both have it")
        mine[:] = bytes(len(mine))
        transport.all_gather(Slot(2, 0, 0), b"both have changed theirs")
        _expect(found == before, "a message received shares memory with its sender")

    run_ranks(make_world(2), body)


def _check_timeout(make_world: World) -> None:
    def body(transport: Transport) -> None:
        _connect(transport)
        if transport.rank == 0:
            transport.send(1, Slot(0, 0, 0), [b"from 0"])
        if transport.rank == 1:
            incoming = [transport.recv(peer, Slot(0, 0, 0)) for peer in (0, 2)]
            error = _raises(
                TransportTimeout, lambda: transport.wait(incoming, timeout_s=0.5), "waiting for what never comes"
            )
            _expect("rank 2" in str(error), f"a timeout must name the missing rank; it says {error}")
            _expect(incoming[0].done and not incoming[1].done, "only the missing message is not done")
        transport.all_gather(Slot(1, 0, 0), b"still works")

    run_ranks(make_world(3), body)


def _check_refusal(make_world: World) -> None:
    for odd in (0, 2):

        def body(transport: Transport, odd: int = odd) -> tuple[str, float]:
            hello = dict(_HELLO) | ({"model": "another"} if transport.rank == odd else {})
            begin = time.monotonic()
            error = _raises(
                HandshakeError,
                lambda: transport.connect(hello, max_message_bytes=_MAX_MESSAGE_BYTES),
                f"rank {transport.rank}: connecting although rank {odd} said something else",
            )
            return getattr(error, "field", ""), time.monotonic() - begin

        for field, took_s in run_ranks(make_world(3), body):
            _expect(field == "model", f"a refusal names field {field!r}, not 'model'")
            _expect(took_s < 10, f"a refusal took {took_s:.1f} s")


def _check_leaving(make_world: World) -> None:
    def body(transport: Transport) -> None:
        _connect(transport)
        if transport.rank == 2:
            for peer in _peers(transport):
                transport.send(peer, Slot(0, 0, 0), [b"before it left"])
            transport.close()
            return
        awaited = transport.recv(2, Slot(9, 0, 0))
        error = _raises(PeerLost, lambda: transport.wait([awaited]), "waiting for a rank that left")
        _expect(getattr(error, "peer", None) == 2, "PeerLost.peer is not the rank that left")
        _expect(awaited.done and awaited.failed, "what a lost peer never sent is done, and failed")
        found = transport.wait([transport.recv(2, Slot(0, 0, 0))])
        _expect(found == [b"before it left"], "what a rank sent before it left must stay readable")
        _raises(PeerLost, lambda: transport.wait([transport.recv(2, Slot(1, 0, 0))]), "asking a rank that left")
        _raises(PeerLost, lambda: transport.send(2, Slot(1, 0, 0), [b""]), "sending to a rank that left")
        other = 1 - transport.rank
        transport.send(other, Slot(1, 0, 0), [b"we are still here"])
        transport.wait([transport.recv(other, Slot(1, 0, 0))])

    run_ranks(make_world(3), body)


def _check_closing(make_world: World) -> None:
    def body(transport: Transport) -> None:
        _connect(transport)
        peer = 1 - transport.rank
        transport.all_gather(Slot(0, 0, 0), b"both are here")
        if transport.rank == 0:
            closer = threading.Timer(0.1, transport.close)
            closer.start()
            _raises(
                TransportError, lambda: transport.wait([transport.recv(peer, Slot(1, 0, 0))]), "closing while waiting"
            )
            closer.join()
        transport.close()
        transport.close()
        _raises(TransportError, lambda: transport.send(peer, Slot(2, 0, 0), [b""]), "sending after close")
        _raises(TransportError, lambda: transport.recv(peer, Slot(2, 0, 0)), "receiving after close")
        _raises(TransportError, lambda: _connect(transport), "connecting after close")

    run_ranks(make_world(2), body)


def _check_misuse(make_world: World) -> None:
    def body(transport: Transport) -> None:
        peer = 1 - transport.rank
        _raises(TransportError, lambda: transport.send(peer, Slot(0, 0, 0), [b""]), "sending before connect")
        _raises(TransportError, lambda: transport.recv(peer, Slot(0, 0, 0)), "receiving before connect")
        _connect(transport)
        _raises(TransportError, lambda: _connect(transport), "connecting twice")
        for wrong in (transport.rank, 2, -1):
            _raises(ValueError, partial(transport.send, wrong, Slot(0, 0, 0), [b""]), f"sending to {wrong}")
            _raises(ValueError, partial(transport.recv, wrong, Slot(0, 0, 0)), f"receiving from {wrong}")
        for slot in (Slot(-1, 0, 0), Slot(0, 1 << 32, 0), Slot(0, 0, 256)):
            _raises(ValueError, partial(transport.send, peer, slot, [b""]), f"sending to {slot}")
        too_long = bytes(_MAX_MESSAGE_BYTES + 1)
        _raises(ValueError, lambda: transport.send(peer, Slot(0, 0, 0), [too_long]), "sending too long a message")
        transport.all_gather(Slot(0, 0, 0), b"still works")

    run_ranks(make_world(2), body)
