"""Parameter servers in this process: real services, and links to them that lose nothing and need no network."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import gradcomp
from gradcomp.errors import HandshakeError, TransportTimeout
from gradcomp.server import changes
from gradcomp.server.links import Asked, Links
from gradcomp.server.protocol import (
    Acked,
    Busy,
    Message,
    Push,
    Refused,
    Reply,
    Request,
    Wait,
    pack,
    unpack,
)
from gradcomp.server.service import Service

LEASE_S = 60.0  # nobody sends heartbeats here


class Hub:
    """Some services, one a shard, and who is connected to them.

    Attributes:
        log: all requests as they came, by shard.
    """

    def __init__(self, shards: int = 1, *, lease_s: float = LEASE_S) -> None:
        self.services = [Service(lease_s=lease_s) for _ in range(shards)]
        self.addresses = [f"127.0.0.1:{1000 + i}" for i in range(shards)]
        self.arrival = threading.Condition()
        self.links: dict[bytes, FakeLinks] = {}
        self.log: list[tuple[int, Request]] = []

    def values(self, name: str, shape: torch.Size) -> torch.Tensor:
        """What the servers hold of a parameter."""
        flat = torch.full([shape.numel()], torch.nan)
        for service in self.services:
            assert service._run is not None
            shard = service._run.shard
            for row, values in zip(shard.table.rows, changes.rows_of(shard.table, shard.values), strict=True):
                if row.name == name:
                    flat[row.start : row.stop] = values
        return flat.view(shape)

    def send(self, shard: int, request: Request, sender: bytes) -> None:
        """As if it had come from the network: packed, unpacked, handled, and the replies likewise."""
        with self.arrival:
            arrived = _through(request)
            assert isinstance(arrived, Request)
            self.log.append((shard, arrived))
            self._deliver(shard, self.services[shard].handle(arrived, sender, time.monotonic()))

    def tick(self) -> None:
        with self.arrival:
            for shard, service in enumerate(self.services):
                self._deliver(shard, service.tick(time.monotonic()))

    def restart(self, shard: int) -> None:
        """Another service with the state of this one, as after a kill."""
        with self.arrival:
            state = self.services[shard].state_dict()
            self.services[shard] = Service(lease_s=LEASE_S)
            self.services[shard].load_state_dict(state, time.monotonic())
            for links in self.links.values():
                links.send_again(shard)

    def replace(self, shard: int) -> None:
        """A service that knows nothing."""
        with self.arrival:
            self.services[shard] = Service(lease_s=LEASE_S)

    def forget(self) -> None:
        """Let all leases run out."""
        with self.arrival:
            for shard, service in enumerate(self.services):
                self._deliver(shard, service.tick(time.monotonic() + 2 * LEASE_S))

    def _deliver(self, shard: int, replies: Sequence[tuple[bytes, Reply]]) -> None:
        for sender, reply in replies:
            arrived = _through(reply)
            assert isinstance(arrived, Reply)
            if sender in self.links:
                self.links[sender].receive(shard, arrived)
        self.arrival.notify_all()


def _through(message: Message) -> Message:
    return unpack(b"".join(bytes(part) for part in pack(message)))


class FakeLinks(Links):
    """See :class:`gradcomp.server.links.Links`."""

    def __init__(self, hub: Hub, *, worker: str, incarnation: int, timeout_s: float) -> None:
        self._hub = hub
        self._timeout_s = timeout_s
        self._sender = f"{worker} {incarnation}".encode()
        self._asked: dict[tuple[int, int], Asked] = {}
        self._number = 0
        self._sent = self._received = 0
        self.runs = [None] * len(hub.services)
        hub.links[self._sender] = self

    @property
    def bytes_sent(self) -> int:
        return self._sent

    @property
    def bytes_received(self) -> int:
        return self._received

    def ask(self, shard: int, request: Request) -> Asked:
        with self._hub.arrival:
            self._number += 1
            asked = Asked(shard=shard, request=dataclasses.replace(request, number=self._number))
            self._asked[shard, self._number] = asked
        self._sent += sum(len(part) for part in pack(asked.request))
        self._hub.send(shard, asked.request, self._sender)
        return asked

    def send_again(self, shard: int) -> None:
        for asked in list(self._asked.values()):
            if asked.shard == shard and not asked.done:
                self._hub.send(shard, asked.request, self._sender)

    def receive(self, shard: int, reply: Reply) -> None:
        asked = self._asked.get((shard, reply.number))
        if asked is None or asked.done:
            return
        self._received += sum(len(part) for part in pack(reply))
        if isinstance(reply, (Wait, Busy)):
            asked.waiting = reply.reason
            return
        if any(type(known) is type(reply) for known in asked.replies):
            return
        asked.replies.append(reply)
        asked.done = not (isinstance(asked.request, Push) and asked.request.pull and isinstance(reply, Acked))

    def wait(self, asked: Sequence[Asked], *, timeout_s: float | None = None) -> None:
        end = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        asked_again = time.monotonic()
        while not all(one.done for one in asked):
            with self._hub.arrival:
                self._hub.arrival.wait(0.02)
            self._hub.tick()
            if time.monotonic() > asked_again + 0.1:  # who was busy may not be any more
                asked_again = time.monotonic()
                for shard in {one.shard for one in asked if not one.done and not isinstance(one.request, Push)}:
                    self.send_again(shard)
            if time.monotonic() > end:
                late = [one for one in asked if not one.done]
                raise TransportTimeout(f"no answer to {late}")
        for one in asked:
            self._asked.pop((one.shard, one.request.number), None)
            for reply in one.replies:
                if isinstance(reply, Refused):
                    raise HandshakeError(reply.reason, field=reply.field, peer=one.shard)

    def close(self) -> None:
        self._hub.links.pop(self._sender, None)


def connect(monkeypatch: Any, hub: Hub) -> None:
    """From now on whoever attaches to a server meets ``hub``'s."""

    def made(addresses: Sequence[str], *, worker: str, incarnation: int, timeout_s: float, **_: Any) -> FakeLinks:
        assert list(addresses) == hub.addresses
        return FakeLinks(hub, worker=worker, incarnation=incarnation, timeout_s=timeout_s)

    monkeypatch.setattr("gradcomp.registry.links_class", lambda: made)


def run_workers(count: int, function: Callable[[int], Any], *, deadline_s: float = 30.0) -> list[Any]:
    """``function(number)`` in as many threads; their results, or the error that came first."""
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def main(number: int) -> None:
        try:
            results[number] = function(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=main, args=(number,), daemon=True) for number in range(count)]
    end = time.monotonic() + deadline_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "not done in time"
    return results


def attach(
    hub: Hub, net: nn.Module, optimizer: torch.optim.Optimizer, worker: int, workers: int, **options: Any
) -> Any:
    """:func:`gradcomp.attach` for small nets. Options of the exchange and of attach, mixed."""
    server = {"id": "server", "addresses": hub.addresses, "worker": str(worker), "workers": workers, "timeout_s": 20.0}
    for name in ("mode", "pull", "delay", "timeout_s", "retry"):
        if name in options:
            server[name] = options.pop(name)
    options = {"dense": gradcomp.DenseRule(min_numel=0, min_dim=2), "compressor": "none"} | options
    return gradcomp.attach(optimizer, exchange=server, model=net, **options)
