"""Parameter servers in threads or processes, and workers by hand that talk to them over the network."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from server_sides import Side

from gradcomp.server.messages import Acked, Changed, Empty, Leave, Push, Reply, Request, Unknown, Welcome
from gradcomp.transports.server_link import ServerLinks
from gradcomp.transports.server_loop import Handler, ServerLoop

MAX_MESSAGE_BYTES = 64 << 20


@contextmanager
def serving(handler: Handler, **options: Any) -> Iterator[ServerLoop]:
    """A loop in a thread."""
    loop = ServerLoop(handler, **({"max_message_bytes": MAX_MESSAGE_BYTES} | options))
    stop = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            while not stop.is_set():
                loop.turn(0.05)
        except BaseException as error:
            failed.append(error)
        finally:
            loop.close()

    thread = threading.Thread(target=run, name="server", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        stop.set()
        thread.join(10.0)
    assert not thread.is_alive()
    assert not failed, failed


@contextmanager
def linked(addresses: str | Sequence[str], **options: Any) -> Iterator[ServerLinks]:
    """A worker's links."""
    defaults = {"worker": "a", "incarnation": 1, "timeout_s": 20.0, "max_message_bytes": MAX_MESSAGE_BYTES}
    links = ServerLinks([addresses] if isinstance(addresses, str) else addresses, **(defaults | options))
    try:
        yield links
    finally:
        links.close()


def ask(links: ServerLinks, request: Request, *, shard: int = 0) -> list[Reply]:
    """Ask, and wait for it."""
    asked = links.ask(shard, request)
    links.wait([asked])
    return asked.replies


def join(links: ServerLinks, side: Side) -> Welcome:
    """Join, and set up if it must be."""
    (reply,) = ask(links, side.join())
    if isinstance(reply, Empty):
        (reply,) = ask(links, side.setup())
    assert isinstance(reply, Welcome), reply
    side.take(reply)
    return reply


def side(name: str = "a", **options: Any) -> Side:
    """One worker's side of a tiny model."""
    torch.manual_seed(0)
    parameters = [torch.zeros(8, 5, requires_grad=True), torch.zeros(5, requires_grad=True)]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    return Side(optimizer, name=name, incarnation=secrets.randbits(40), **options)


def gradients(of: Side, generator: torch.Generator) -> list[torch.Tensor]:
    return [torch.randn(row.shape, generator=generator) for row in of.table.rows]


def work(
    address: str,
    name: str,
    pushes: int,
    *,
    seed: int,
    acknowledged: Callable[[Push, Acked], None] = lambda push, acked: None,
    **options: Any,
) -> Side:
    """A worker's life: it joins, pushes so often, and leaves; where it was forgotten it joins again."""
    me = side(name, **options)
    generator = torch.Generator().manual_seed(seed)
    with linked(address, worker=name, incarnation=me.incarnation, timeout_s=60.0) as links:
        join(links, me)
        while me.sequence < pushes:
            push = me.push(gradients(me, generator))
            while True:
                replies = ask(links, push)
                if isinstance(replies[0], Acked):
                    assert replies[0].sequence == push.sequence
                    acknowledged(push, replies[0])
                if not isinstance(replies[-1], Unknown):
                    break
                join(links, me)
                if isinstance(replies[0], Acked):
                    replies = ask(links, me.pull())
                    break
            assert isinstance(replies[-1], Changed), replies
            me.take(replies[-1])
        ask(links, Leave(number=0, worker=name, incarnation=me.incarnation))
    return me


def in_threads(bodies: Sequence[Callable[[], object]], *, deadline_s: float) -> None:
    """Run all at once; raises the first error."""
    errors: list[BaseException] = []

    def run(body: Callable[[], object]) -> None:
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    until = time.monotonic() + deadline_s
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "not done in time"


def same(a: Any, b: Any) -> bool:
    """Whether two states are, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
