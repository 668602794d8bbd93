"""Every transport through the same checks, and what is common to all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from ports import free_port

import gradcomp.registry
from gradcomp.errors import ConfigError, HandshakeError, PacketError, PeerLost, TransportError, TransportTimeout
from gradcomp.interfaces import Slot, Transport
from gradcomp.testing_transport import check_transport, run_ranks
from gradcomp.transports.inproc import InprocTransport
from gradcomp.transports.mailbox import Mailbox
from gradcomp.transports.torch_distributed import GlooTransport, NcclTransport
from gradcomp.transports.zmq import ZmqTransport

MASTER = f"127.0.0.1:{free_port()}"


def _inproc(world_size: int) -> list[Transport]:
    return list(InprocTransport.world(world_size))


_runs = itertools.count()


def _zmq(**options: object) -> Callable[[int], list[Transport]]:
    def make(world_size: int) -> list[Transport]:
        # A run of its own: the worlds of these checks have different sizes.
        shared = {"world_size": world_size, "master": MASTER, "timeout_s": 20.0, "run": f"run{next(_runs)}", **options}
        return [ZmqTransport.from_options(shared | {"rank": rank}) for rank in range(world_size)]

    return make


WORLDS = {
    "inproc": _inproc,
    "zmq-tcp": _zmq(),
    "zmq-ipc": _zmq(ipc=True),
    "zmq-paced": _zmq(rate="2gbit"),
    "gloo": lambda world_size: list(GlooTransport.world(world_size, timeout_s=20.0)),
    "nccl": lambda world_size: list(NcclTransport.world(world_size, timeout_s=20.0)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.gpu if name == "nccl" else ()) for name in WORLDS]
)
def test_conformance(name: str) -> None:
    check_transport(WORLDS[name])


@pytest.mark.parametrize("name", ["inproc", "zmq", "gloo", "nccl"])
def test_registry_builds_it_and_config_builds_it_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    first = gradcomp.registry.transport(f"{name}:timeout_s=7")
    again = gradcomp.registry.transport(first.config())
    assert type(again) is type(first)
    assert again.config() == first.config() == {**first.config(), "id": name, "timeout_s": 7}


@pytest.mark.parametrize(
    ("cls", "options", "named"),
    [
        (InprocTransport, {"rank": 2, "world_size": 2}, "rank=2"),
        (InprocTransport, {"world_size": 0}, "world_size=0"),
        (InprocTransport, {"hub": ""}, "hub=''"),
        (ZmqTransport, {"rank": -1, "world_size": 2}, "rank=-1"),
        (ZmqTransport, {"timeout_s": 0}, "timeout_s=0"),
        (ZmqTransport, {"silence_s": 0}, "silence_s=0"),
        (ZmqTransport, {"insecure": "yes"}, "insecure='yes'"),
        (ZmqTransport, {"ipc": 1}, "ipc=1"),
        (ZmqTransport, {"rate": "fast"}, "rate='fast'"),
        (ZmqTransport, {"rate": 10}, "rate=10"),
        (ZmqTransport, {"address": "example.org"}, "address='example.org'"),
        (ZmqTransport, {"address": "0.0.0.0"}, "address='0.0.0.0'"),
        (ZmqTransport, {"master": "localhost"}, "master='localhost'"),
        (ZmqTransport, {"run": ""}, "run=''"),
        (ZmqTransport, {"rte": "1mbit"}, "'rte'"),
    ],
)
def test_wrong_options_are_named(cls: type[Transport], options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        cls.from_options({"rank": 0, "world_size": 1} | options)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
    ],
)
def test_a_wrong_environment_is_named(environment: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=named):
        ZmqTransport()


def test_rank_and_world_size_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert (ZmqTransport().rank, ZmqTransport().world_size) == (3, 5)
    assert (ZmqTransport(rank=1).rank, ZmqTransport(rank=1).world_size) == (1, 5)


def test_inproc_names_the_ranks_that_never_came() -> None:
    transports = InprocTransport.world(3, timeout_s=0.2)

    def body(transport: Transport) -> None:
        with pytest.raises(TransportTimeout, match="rank 2 did not come"):
            transport.connect({}, max_message_bytes=100)

    run_ranks(transports[:2], body)


def test_an_inproc_hub_serves_one_world_after_another() -> None:
    for _ in range(2):
        world = [InprocTransport(rank=rank, world_size=2, hub="again") for rank in range(2)]

        def body(transport: Transport) -> None:
            transport.connect({}, max_message_bytes=100)
            transport.all_gather(Slot(0, 0, 0), b"x")

        run_ranks(world, body)


@pytest.mark.parametrize("name", ["inproc", "zmq-tcp", "gloo"])
def test_a_peer_far_ahead_is_cut_off(name: str) -> None:
    def body(transport: Transport) -> None:
        transport.connect({}, max_message_bytes=1000, max_unclaimed_bytes=10_000)
        if transport.rank == 0:
            with pytest.raises(PeerLost, match="nobody asked for") as found:
                transport.wait([transport.recv(1, Slot(99, 0, 0))])
            assert found.value.peer == 1
        else:
            for bucket in range(20):
                transport.send(0, Slot(0, bucket, 0), [bytes(1000)])

    run_ranks(WORLDS[name](2), body)


SLOT = Slot(3, 2, 1)


def test_mailbox_gives_the_same_incoming_until_it_is_here() -> None:
    box = Mailbox(0, 1.0)
    first = box.claim(1, SLOT)
    assert box.claim(1, SLOT) is first
    box.expect(1, SLOT, 3)
    box.deliver(1, SLOT, memoryview(b"abc"))
    assert first.done
    assert bytes(first.result()) == b"abc"


def test_mailbox_counts_what_nobody_asked_for() -> None:
    box = Mailbox(0, 1.0)
    box.max_unclaimed_bytes = 5000
    box.expect(1, SLOT, 3000)
    with pytest.raises(PacketError, match="second message"):
        box.expect(1, SLOT, 1)
    with pytest.raises(PacketError, match="nobody asked"):
        box.expect(1, Slot(4, 0, 0), 1000)
    box.expect(2, Slot(4, 0, 0), 1000)  # another peer has an allowance of its own
    box.claim(1, SLOT)  # asked for half way: it no longer counts
    box.expect(1, Slot(4, 0, 0), 3000)


def test_mailbox_result_waits_and_times_out() -> None:
    with pytest.raises(TransportTimeout, match="rank 1 for step 3, bucket 2, stage 1"):
        Mailbox(0, 0.05).claim(1, SLOT).result()


def test_mailbox_keeps_what_came_before_a_loss() -> None:
    box = Mailbox(0, 1.0)
    box.expect(1, SLOT, 1)
    box.deliver(1, SLOT, memoryview(b"x"))
    box.lose(1, PeerLost("gone", peer=1))
    assert bytes(box.claim(1, SLOT).result()) == b"x"
    late = box.claim(1, Slot(9, 0, 0))
    assert late.failed
    with pytest.raises(PeerLost, match="gone"):
        late.result()
    box.fail(TransportError("closed"))
    with pytest.raises(TransportError, match="closed"):
        box.claim(2, SLOT).result()


def test_inproc_ranks_of_different_world_sizes_are_refused() -> None:
    def meet(rank: int, world_size: int) -> str:
        transport = InprocTransport(rank=rank, world_size=world_size, hub="sizes", timeout_s=20.0)
        with pytest.raises(HandshakeError) as caught:
            transport.connect({"version": "1"}, max_message_bytes=10)
        return caught.value.field

    with ThreadPoolExecutor() as pool:
        found = [pool.submit(meet, 0, 2), pool.submit(meet, 1, 3)]
        assert [future.result(10.0) for future in found] == ["world_size", "world_size"]
