"""What is particular to transports over process groups: which groups, sums, tensors from device to device."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import attach, batch, parameters_of, run_ranks, small_net, train_step
from torch import Tensor

import gradcomp
from gradcomp import testing_transport
from gradcomp.errors import ConfigError, PacketError, PeerLost, TransportError, TransportTimeout
from gradcomp.exchanges.auto import Auto
from gradcomp.interfaces import MY_TURN, Slot, Transport
from gradcomp.transports.group_collectives import PendingSum
from gradcomp.transports.group_frames import BYE, DATA, FRAME_BYTES, HELLO, NO_SLOT, Frame, Outgoing
from gradcomp.transports.mailbox import Mailbox
from gradcomp.transports.torch_distributed import GlooTransport, NcclTransport, TorchTransport

TIMEOUT_S = 20.0


def gloo_world(size: int, **options: Any) -> list[Transport]:
    return list(GlooTransport.world(size, **({"timeout_s": TIMEOUT_S} | options)))


def run_gloo(size: int, function: Callable[[Any], Any], **options: Any) -> list[Any]:
    return testing_transport.run_ranks(gloo_world(size, **options), function)


def connect(transport: Transport) -> None:
    transport.connect({"version": "1"}, max_message_bytes=1 << 20)


# -- training --------------------------------------------------------------------------------------------------------


def trained(options: dict[str, Any], steps: int = 4) -> Callable[[Any], tuple[list[Tensor], dict[str, Any]]]:
    def rank_main(transport: Any) -> tuple[list[Tensor], dict[str, Any]]:
        net = small_net(transport.rank)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        with attach(net, optimizer, transport, digest_every=3, **options) as sync:
            for step in range(steps):
                train_step(net, optimizer, sync.rank, step)
            return parameters_of(net), sync.stats()

    return rank_main


@pytest.mark.parametrize(
    ("compressor", "exchange", "payloads"),
    [
        *itertools.product(
            ["none", "threshold:density=0.1", "powersgd:rank=2"], ["all_gather", "two_shot", "tree"], ["device"]
        ),
        ("threshold:density=0.1", "two_shot", "host"),
    ],
)
def test_trains_to_the_bits_of_inproc(compressor: str, exchange: str, payloads: str) -> None:
    options = {"compressor": compressor, "exchange": exchange}
    expected = run_ranks(3, trained(options))
    found = run_gloo(3, trained(options), payloads=payloads)
    for (mine, _), (theirs, _) in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("compressor", ["none", "powersgd:rank=2", "randomk:ratio=0.2"])
def test_linear_compressors_ride_the_all_reduce(compressor: str, size: int) -> None:
    expected = run_ranks(size, trained({"compressor": compressor, "exchange": "all_reduce"}))
    found = run_gloo(size, trained({"compressor": compressor, "exchange": "auto"}))
    for mine, stats in found:
        assert all(torch.equal(a, b) for a, b in zip(mine, found[0][0], strict=True))  # the same bits on all ranks
        for a, b in zip(mine, expected[0][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert stats["bytes_sent"] > 0


def test_auto_asks_the_transport_and_ranks_must_agree() -> None:
    assert Auto().on(GlooTransport.world(2)[0]) == Auto(native_sums=True)
    assert Auto(native_sums=False).on(GlooTransport.world(2)[0]) == Auto(native_sums=False)
    assert gradcomp.exchange(Auto(native_sums=True).config()) == Auto(native_sums=True)
    with pytest.raises(ConfigError, match="native_sums"):
        Auto(native_sums=1)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree", "auto"])
@pytest.mark.parametrize("compressor", ["none", "threshold:density=0.1", "powersgd:rank=2"])
def test_nccl_trains_to_the_same_replicas(compressor: str, exchange: str) -> None:
    def rank_main(transport: Any) -> list[Tensor]:
        device = torch.device("cuda", transport.rank)
        torch.cuda.set_device(device)
        net = small_net().to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        with attach(net, optimizer, transport, compressor=compressor, exchange=exchange, digest_every=1) as sync:
            for step in range(4):
                inputs, targets = batch(sync.rank, step)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(inputs.to(device)), targets.to(device)).backward()
                optimizer.step()
        return [parameter.cpu() for parameter in parameters_of(net)]

    found = testing_transport.run_ranks(NcclTransport.world(2, timeout_s=TIMEOUT_S), rank_main)
    for a, b in zip(found[0], found[1], strict=True):
        assert torch.equal(a, b)


# -- sums and swaps --------------------------------------------------------------------------------------------------


def finish(transport: Transport, slot: Slot, mine: Tensor) -> Tensor:
    """Run an all-reduce as the driver does."""
    steps = transport.all_reduce(slot, mine, one_trip=False)
    try:
        assert next(steps) is MY_TURN
        while True:
            transport.wait(next(steps))
    except StopIteration as end:
        total: Tensor = end.value
        return total


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_are_the_same_bits_everywhere_and_leave_mine_alone(size: int) -> None:
    lengths = [0, 1, 2, 1000, 100_003]

    def body(transport: Transport) -> list[Tensor]:
        connect(transport)
        assert transport.adds_up
        totals = []
        for step, length in enumerate(lengths):
            mine = torch.randn(length, generator=torch.Generator().manual_seed(transport.rank))
            before = mine.clone()
            totals.append(finish(transport, Slot(step, 0, 0), mine))
            assert torch.equal(mine, before)
        assert transport.bytes_sent >= 2 * (size - 1) * 4 * sum(lengths) // size
        with pytest.raises(ValueError, match="float32"):
            finish(transport, Slot(99, 0, 0), torch.zeros(3, dtype=torch.float64))
        return totals

    for totals in (results := run_gloo(size, body)):
        assert all(torch.equal(a, b) for a, b in zip(totals, results[0], strict=True))
    expected = sum(torch.randn(1000, generator=torch.Generator().manual_seed(rank)) for rank in range(size))
    torch.testing.assert_close(results[0][3], expected)


def test_a_sum_ends_when_a_rank_leaves_instead() -> None:
    seen = threading.Barrier(2)

    def body(transport: Transport) -> None:
        connect(transport)
        finish(transport, Slot(0, 0, 0), torch.ones(10))
        if transport.rank == 2:
            return  # run_ranks closes it
        with pytest.raises(PeerLost) as found:
            finish(transport, Slot(1, 0, 0), torch.ones(10))
        assert found.value.peer == 2
        seen.wait(TIMEOUT_S)  # or the one would see the other leave

    run_gloo(3, body)


def test_a_rank_may_leave_once_it_has_its_sum() -> None:
    def body(transport: Transport) -> Tensor:
        connect(transport)
        return finish(transport, Slot(0, 0, 0), torch.full((200_000,), float(transport.rank)))

    for _ in range(5):
        for total in run_gloo(4, body):
            assert torch.all(total == 6)


def test_a_sum_that_a_rank_never_comes_to_times_out() -> None:
    done = threading.Event()

    def body(transport: Transport) -> None:
        connect(transport)
        if transport.rank == 1:
            done.wait(TIMEOUT_S)
            return
        steps = transport.all_reduce(Slot(0, 0, 0), torch.ones(10), one_trip=True)
        next(steps)
        with pytest.raises(TransportTimeout, match="rank 1"):
            transport.wait(next(steps), timeout_s=0.2)
        transport.close()  # does not hang on it
        done.set()

    run_gloo(2, body)


def test_tensors_are_swapped_with_some_peers_or_none() -> None:
    def body(transport: Transport) -> None:
        connect(transport)
        rank = transport.rank
        assert transport.carries(torch.device("cpu"))
        # Rank r sends r * 1000 + peer + 1 bytes to each higher rank, and hears from each lower one.
        outgoing = {peer: torch.full((1000 * rank + peer + 1,), rank, dtype=torch.uint8) for peer in range(rank + 1, 3)}
        incoming = {peer: torch.empty(1000 * peer + rank + 1, dtype=torch.uint8) for peer in range(rank)}
        transport.swap_tensors(outgoing, incoming)
        for peer, tensor in incoming.items():
            assert torch.all(tensor == peer)

    run_gloo(3, body, payloads="device")


def test_a_swap_names_the_rank_that_left() -> None:
    def body(transport: Transport) -> None:
        connect(transport)
        if transport.rank == 0:
            with pytest.raises(PeerLost) as found:
                transport.swap_tensors({}, {1: torch.empty(10, dtype=torch.uint8)})
            assert found.value.peer == 1

    run_gloo(2, body, payloads="device")


def test_what_the_backend_calls_does_not_hold_the_group() -> None:
    """Gloo's thread lets go of it last, perhaps; a group that ends on its own thread waits for itself, and aborts."""

    class Future:
        def add_done_callback(self, callback: Callable[[Any], None]) -> None:
            callbacks.append(callback)

        def value(self) -> None:
            raise RuntimeError("broken off\nand so on")

    class Work:
        def get_future(self) -> Future:
            return Future()

    class Group:
        def allreduce(self, tensors: list[Tensor], options: Any) -> Work:
            return Work()

    callbacks: list[Callable[[Any], None]] = []
    group = Group()
    ended = weakref.ref(group)
    courier: Any = SimpleNamespace(links={1: SimpleNamespace(group=group, finished=1)}, finished=0)
    pending = PendingSum(group, torch.zeros(3), Mailbox(0, TIMEOUT_S), courier)
    [part] = pending.parts(Slot(0, 0, 0))
    assert not part.done
    callbacks[0](Future())
    assert part.failed
    with pytest.raises(TransportError, match=r"the all-reduce failed: broken off$"):
        part.result()
    del group, courier, pending, part
    gc.collect()
    assert ended() is None


# -- which group -----------------------------------------------------------------------------------------------------


def test_config_has_no_group() -> None:
    transport = GlooTransport.world(2, timeout_s=7)[1]
    assert transport.config() == {"id": "gloo", "timeout_s": 7, "payloads": "auto"}
    assert (transport.rank, transport.world_size) == (1, 2)
    with pytest.raises(ConfigError, match="unknown option 'group'"):
        gradcomp.transport("gloo:group=1")


def test_a_group_made_by_hand_is_used_itself() -> None:
    store = dist.HashStore()

    def make(rank: int) -> None:
        groups[rank] = dist.ProcessGroupGloo(store, rank, 2)

    groups: dict[int, Any] = {}
    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)

    def body(transport: Transport) -> None:
        connect(transport)
        assert torch.all(finish(transport, Slot(0, 0, 0), torch.ones(3)) == 2)
        assert [bytes(one) for one in transport.all_gather(Slot(1, 0, 0), b"x")] == [b"x", b"x"]

    testing_transport.run_ranks([TorchTransport(group=groups[rank], timeout_s=TIMEOUT_S) for rank in range(2)], body)
    with pytest.raises(ConfigError, match="cannot carry both nccl"):
        NcclTransport(group=groups[0])._source.make("nccl", 1.0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"group": "world"}, "group='world'"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"payloads": "gpu"}, "payloads='gpu'"),
        ({}, "process group is not initialised"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        TorchTransport(**options)


def test_nccl_refuses_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    net = small_net()
    with pytest.raises(ConfigError, match=r"cpu tensors.*nccl for cuda.*gloo or zmq"):
        gradcomp.attach(torch.optim.SGD(net.parameters(), lr=0.1), model=net, transport="nccl")


def test_ranks_that_never_came_are_named() -> None:
    def body(transport: Transport) -> None:
        with pytest.raises(TransportTimeout, match="rank 2 did not come"):
            connect(transport)

    testing_transport.run_ranks(gloo_world(3, timeout_s=1.0)[:2], body)


# -- frames ----------------------------------------------------------------------------------------------------------


def frame(kind: int = DATA, slot: Slot = NO_SLOT, payload: bytes = b"") -> bytearray:
    return bytearray(Outgoing([payload]).tensors(kind, slot)[0].numpy().tobytes())


@pytest.mark.parametrize("nbytes", [0, 1, 4068, 4069, 100_000])
def test_a_message_survives_its_frames(nbytes: int) -> None:
    payload = torch.randint(0, 256, (nbytes,), dtype=torch.uint8).numpy().tobytes()
    first, *rest = Outgoing([payload[: nbytes // 3], payload[nbytes // 3 :]]).tensors(DATA, Slot(1 << 40, 1 << 31, 255))
    assert first.numel() == FRAME_BYTES
    found = Frame.unpack(first.numpy().data, 100_000)
    assert (found.kind, found.slot, found.total) == (DATA, Slot(1 << 40, 1 << 31, 255), nbytes)
    assert found.start + b"".join(part.numpy().tobytes() for part in rest) == payload


@pytest.mark.parametrize(
    ("at", "value", "kind", "says"),
    [
        (0, b"XXXX", DATA, "magic"),
        (4, b"\x09", DATA, "version 9"),
        (5, b"\x00", DATA, "kind 0"),
        (5, b"\x05", DATA, "kind 5"),
        (7, b"\x01", DATA, "reserved"),
        (20, (1001).to_bytes(8, "little"), DATA, "is over 1000"),
        (20, (1 << 63).to_bytes(8, "little"), HELLO, "is over"),
        (20, b"\x01", BYE, "is over 0"),
    ],
)
def test_a_wrong_frame_is_refused(at: int, value: bytes, kind: int, says: str) -> None:
    data = frame(kind)
    data[at : at + len(value)] = value
    with pytest.raises(PacketError, match=says):
        Frame.unpack(memoryview(data), 1000)


def test_a_rank_that_breaks_the_protocol_is_cut_off() -> None:
    told = threading.Event()

    def body(transport: Any) -> None:
        connect(transport)
        transport.all_gather(Slot(0, 0, 0), b"all here")
        if transport.rank == 1:
            transport._max_message_bytes = 1 << 30  # what no honest rank does
            transport.send(0, Slot(1, 0, 0), [bytes(2 << 20)])
        with pytest.raises(PeerLost, match=r"cut off|cut this rank off") as found:
            transport.wait([transport.recv(1 - transport.rank, Slot(1, 0, 0))])
        assert found.value.peer == 1 - transport.rank
        if transport.rank == 1:
            told.set()
        assert told.wait(TIMEOUT_S)  # rank 0 must not leave before: its end of the line would go with it

    run_gloo(2, body)
