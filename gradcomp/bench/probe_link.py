"""What the link between ranks carries, asked of the transport itself: latency and bandwidth of every pair, and of all.

Messages grow until they take long enough to be timed, one right after the other, so that a shaped link has saved up
nothing; what it lets through at once shows when it has rested. Of several times the least counts: what disturbs one
only makes it longer.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradcomp.bench.meeting import Meeting
from gradcomp.forecast import Link
from gradcomp.interfaces import Slot, Transport

__all__ = ["MAX_MESSAGE_BYTES", "LinkProbe", "probe_link"]

MAX_MESSAGE_BYTES = 16 << 20
_LEAST_BYTES = 16 << 10
_ENOUGH_S = 0.06  # of one pair
_ENOUGH_TOGETHER_S = 0.25
_SMALL = bytes(64)
_REPEATS = 3
_MOST_CORES_OF_A_SHAPED_LINK = 0.3
_MOST_REST_S = 0.5
_AT_ONCE = 8  # of up to so many ranks one pair at a time has the network to itself


@dataclass(frozen=True, kw_only=True)
class LinkProbe:
    """What was found; rows are senders, and a rank's own entry is 0.

    Attributes:
        latency_s: one way, half of a small message's round trip.
        bytes_per_s: one pair at a time.
        together_bytes_per_s: of each rank, all sending to all others.
        burst_bytes: what a rank got through before the link slowed it down.
        cpu_s_per_byte, cpu_s_per_message: core time of a rank that sends and receives as much.
    """

    latency_s: list[list[float]]
    bytes_per_s: list[list[float]]
    together_bytes_per_s: list[float]
    burst_bytes: float
    cpu_s_per_byte: float
    cpu_s_per_message: float

    def link(self) -> Link:
        """The slowest rank's, for all wait for it."""
        together = min(self.together_bytes_per_s)
        pairs = [rate for row in self.bytes_per_s for rate in row if rate]
        slowest = min(pairs)
        return Link(
            latency_s=max(max(row) for row in self.latency_s),
            bytes_per_s=together,
            cpu_s_per_byte=self.cpu_s_per_byte,
            cpu_s_per_message=self.cpu_s_per_message,
            # One pair that has the network to itself is slower than all together only if each connection is limited.
            stream_bytes_per_s=slowest if slowest < 0.8 * together else None,
            # Where cores are what limits the rate, being faster for once is chance.
            burst_bytes=self.burst_bytes if self.cpu_s_per_byte * together < _MOST_CORES_OF_A_SHAPED_LINK else 0.0,
        )


def probe_link(meeting: Meeting) -> LinkProbe:
    """Probe every pair, and all at once; every rank must call it, and gets what all of them found.

    Raises:
        TransportError: a rank is gone, or nothing came in time.
    """
    transport = meeting.transport
    if transport is None or meeting.world_size < 2:
        raise ValueError("there is no link to probe: this rank is alone")
    payload = bytes(MAX_MESSAGE_BYTES)
    size = meeting.world_size
    latency_s, bytes_per_s = [0.0] * size, [0.0] * size
    for measure, results in ((_latency, latency_s), (_bandwidth, bytes_per_s)):
        for turn in _turns(size):
            meeting.begin()
            number = meeting.next_turn()
            for sender, receiver in turn:
                if meeting.rank == sender:
                    results[receiver] = measure(transport, receiver, number, payload)
                elif meeting.rank == receiver:
                    _answer(transport, sender, number)
    cpu_s_per_message = _small_messages(meeting, transport)
    rate, burst_bytes, cpu_s_per_byte = _together(meeting, transport, payload)
    found = meeting.gather([latency_s, bytes_per_s, rate, burst_bytes, cpu_s_per_byte, cpu_s_per_message])
    latencies, rates, together, bursts, per_byte, per_message = zip(*found, strict=True)
    return LinkProbe(
        latency_s=list(latencies),
        bytes_per_s=list(rates),
        together_bytes_per_s=list(together),
        burst_bytes=min(bursts),
        cpu_s_per_byte=statistics.median(per_byte),
        cpu_s_per_message=statistics.median(per_message),
    )


def _turns(size: int) -> list[list[tuple[int, int]]]:
    """Which pairs are probed at the same time, both ways: one, or of many ranks all that do not meet."""
    if size <= _AT_ONCE:
        return [[(a, b)] for a in range(size) for b in range(size) if a != b]
    # The circle method: one rank stays, the others move on by one place in each round.
    ring = list(range(size + size % 2))
    rounds = []
    for _ in range(len(ring) - 1):
        pairs = [(ring[i], ring[-1 - i]) for i in range(len(ring) // 2)]
        pairs = [(a, b) for a, b in pairs if max(a, b) < size]
        rounds += [pairs, [(b, a) for a, b in pairs]]
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds


def _answer(transport: Transport, sender: int, number: int) -> None:
    """Say that a message is here, until an empty one comes."""
    index, nbytes = 0, 1
    while nbytes:
        nbytes = len(transport.wait([transport.recv(sender, Slot(number, index, 0))])[0])
        transport.send(sender, Slot(number, index, 1), [_SMALL])
        index += 1


def _round_trip_s(transport: Transport, peer: int, slot: Slot, data: memoryview) -> float:
    answer = transport.recv(peer, slot._replace(stage=1))
    start = time.perf_counter()
    transport.send(peer, slot, [data])
    transport.wait([answer])
    return time.perf_counter() - start


def _latency(transport: Transport, peer: int, number: int, payload: bytes) -> float:
    data = memoryview(_SMALL)
    took = [_round_trip_s(transport, peer, Slot(number, i, 0), data) for i in range(20)]
    _round_trip_s(transport, peer, Slot(number, 20, 0), data[:0])
    return min(took) / 2


def _bandwidth(transport: Transport, peer: int, number: int, payload: bytes) -> float:
    index = 0

    def takes_s(nbytes: int) -> float:
        nonlocal index
        index += 1
        return _round_trip_s(transport, peer, Slot(number, index - 1, 0), memoryview(payload)[:nbytes])

    nbytes, took_s = _grow(takes_s, _ENOUGH_S)
    took_s = min(took_s, takes_s(nbytes), takes_s(nbytes))
    latency_s = _round_trip_s(transport, peer, Slot(number, index, 0), memoryview(b""))
    return nbytes / max(took_s - latency_s, 0.5 * took_s)


def _grow(takes_s: Callable[[int], float], enough_s: float) -> tuple[int, float]:
    """The first size that takes long enough, or the largest there is; and how long it took."""
    nbytes = _LEAST_BYTES
    while (took_s := takes_s(nbytes)) < enough_s and nbytes < MAX_MESSAGE_BYTES:
        nbytes *= 2
    return nbytes, took_s


def _small_messages(meeting: Meeting, transport: Transport) -> float:
    """Core time of a rank, for each small message that it sends while it receives another."""
    rounds, others = 50, meeting.others()
    meeting.begin()
    start_s = time.process_time()
    for _ in range(rounds):
        _exchange(transport, others, Slot(meeting.next_turn(), 0, 0), memoryview(_SMALL))
    return (time.process_time() - start_s) / (rounds * len(others))


def _together(meeting: Meeting, transport: Transport, payload: bytes) -> tuple[float, float, float]:
    """What this rank sends to all others while all do: bytes a second, the burst, and core time a byte."""
    others = meeting.others()

    def takes_s(nbytes: int) -> float:
        meeting.begin()
        start_s = time.perf_counter()
        _exchange(transport, others, Slot(meeting.next_turn(), 0, 0), memoryview(payload)[:nbytes])
        return float(max(meeting.gather(time.perf_counter() - start_s)))  # all go on, or none

    nbytes, first_s = _grow(takes_s, _ENOUGH_TOGETHER_S)
    start_cpu_s = time.process_time()
    took_s = min(first_s, *(takes_s(nbytes) for _ in range(_REPEATS)))
    per_byte = (time.process_time() - start_cpu_s) / (_REPEATS * nbytes * len(others))
    rested_s = math.inf
    for _ in range(_REPEATS):
        time.sleep(min(took_s, _MOST_REST_S))
        rested_s = min(rested_s, takes_s(nbytes))
    rate = nbytes * len(others) / took_s
    return rate, max(took_s - rested_s, 0.0) * rate, per_byte


def _exchange(transport: Transport, others: Sequence[int], slot: Slot, data: memoryview) -> None:
    incoming = [transport.recv(peer, slot) for peer in others]
    for peer in others:
        transport.send(peer, slot, [data])
    transport.wait(incoming)
