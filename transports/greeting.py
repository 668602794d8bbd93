"""Waiting for every other rank's hello, and comparing it with one's own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from gradcomp.errors import PacketError, TransportError, TransportTimeout
from gradcomp.handshake import Hello, compare, unpack
from gradcomp.transports.mailbox import Mailbox

__all__ = ["greet"]

_GRACE_S = 2.0  # for the hello that explains why another rank left


class _Peer(Protocol):
    @property
    def hello(self) -> bytes | None: ...


def greet(
    hello: Hello, peers: Mapping[int, _Peer], names: Mapping[int, str], mailbox: Mailbox, deadline: float
) -> None:
    """Wait for everybody's hello. One that differs outranks a peer that left: it is why that one left.

    Args:
        names: what to call each peer if it does not say anything.

    Raises:
        HandshakeError: a hello that differs; names the first field.
        TransportTimeout: names the ranks from which none came.
    """
    rank = mailbox.rank
    waiting = set(peers)
    lost_since: float | None = None
    with mailbox.arrival:
        while True:
            for peer in sorted(waiting):
                said = peers[peer].hello
                if said is not None:
                    waiting.discard(peer)
                    try:
                        theirs = unpack(said)
                    except PacketError as error:
                        raise TransportError(f"rank {rank}: hello of rank {peer}: {error}") from None
                    compare(hello, theirs, rank=rank, peer=peer)
            if not waiting:
                return
            now = time.monotonic()
            lost = [error for error in map(mailbox.lost, peers) if error is not None]
            if lost and lost_since is None:
                lost_since = now
            until = deadline if lost_since is None else min(deadline, lost_since + _GRACE_S)
            if now >= until:
                if lost:
                    raise lost[0]
                silent = ", ".join(names[peer] for peer in sorted(waiting))
                raise TransportTimeout(f"rank {rank}: no hello from rank {silent} within {mailbox.timeout_s:g} s")
            mailbox.arrival.wait(until - now)
