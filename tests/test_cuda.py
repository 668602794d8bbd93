"""Gradients on a CUDA device: the bits of the CPU, on a stream of their own. Where there is none, the CPU stands in."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import free_port
from ranks import attach, parameters_of, run_ranks
from torch import Tensor, nn
from training import filled, noise, sgd, zmq_world

import gradcomp
from gradcomp import testing_transport
from gradcomp.compressors.randomk import _choose
from gradcomp.driver import Driver
from gradcomp.errors import GradientError
from gradcomp.gradients import ViewedGradients
from gradcomp.hosts import HostSums
from gradcomp.lanes import Lane, _say_not_locked, page_locked, to_device, to_host
from gradcomp.products import Product, Products
from gradcomp.telemetry import StepRecord
from gradcomp.work import BucketWork

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
COMPRESSORS = [
    *(spec for spec in gradcomp.available_compressors() if spec != "scheduled"),
    "threshold:tau=0.5",
    "signsgd:variant=majority",
    'scheduled:stages=[[1,"topk:ratio=0.1"]],then="onebit"',
]
# Their products are a library's: the last bit of what is sent may differ. What is decoded must not.
PRODUCTS = ("powersgd", "dct")
SIZES = [(37, 129), (1,)]


def grads_of(device: str, shape: tuple[int, ...], steps: int = 3) -> list[Tensor]:
    return [noise(0, step, *shape).to(device) for step in range(steps)]


@pytest.mark.parametrize("device", DEVICES)
class TestSameBitsAsOnTheCpu:
    @pytest.mark.parametrize("shape", SIZES)
    @pytest.mark.parametrize("spec", [spec for spec in COMPRESSORS if spec not in PRODUCTS])
    def test_packets_and_states(self, device: str, spec: str, shape: tuple[int, ...]) -> None:
        codec = gradcomp.compressor(spec)
        states = [codec.new_state(grads_of(d, shape, 1)[0]) for d in ("cpu", device)]
        for mine, theirs in zip(grads_of("cpu", shape), grads_of(device, shape), strict=True):
            packets = codec.compress(mine, states[0]), codec.compress(theirs, states[1])
            assert packets[1].device.type == device
            assert packets[0].to_bytes() == packets[1].to_bytes()
            for field, tensor in states[0].items():
                assert torch.equal(tensor, states[1][field].cpu()), field

    @pytest.mark.parametrize("spec", COMPRESSORS)
    def test_what_is_decoded(self, device: str, spec: str) -> None:
        codec = gradcomp.compressor(spec)
        grad = grads_of("cpu", SIZES[0], 1)[0]
        packet = codec.compress(grad, codec.new_state(grad))
        data = bytearray(packet.to_bytes())
        there = gradcomp.Packet.from_bytes(data, numel=grad.numel(), device=device)
        out, theirs = noise(1, 0, grad.numel()), noise(1, 0, grad.numel()).to(device)
        for scale in (1.0, 0.25):
            codec.decompress_add(packet, out, scale)
            codec.decompress_add(there, theirs, scale)
            assert torch.equal(out, theirs.cpu())

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    @pytest.mark.parametrize("spec", COMPRESSORS)
    def test_nonfinite(self, device: str, spec: str, value: float) -> None:
        codec = gradcomp.compressor(spec)
        grad = grads_of(device, SIZES[0], 1)[0]
        state = codec.new_state(grad)
        before = {field: tensor.clone() for field, tensor in state.items()}
        grad[3, 4] = value
        assert not codec.decompress(codec.compress(grad, state)).isfinite().all()
        for field, tensor in state.items():
            assert torch.equal(tensor.nan_to_num(7.0), before[field].nan_to_num(7.0)), field

    def test_to_the_host_and_back(self, device: str) -> None:
        tensor = torch.arange(1000, device=device, dtype=torch.uint8)
        host = to_host(tensor)
        assert host.device.type == "cpu"
        assert host.is_pinned() == (device == "cuda")
        assert torch.equal(to_device(host, device), tensor)


def test_where_no_memory_can_be_locked(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    real = torch.empty

    def refuse(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return real(*size, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    _say_not_locked.cache_clear()
    for _ in range(2):
        assert bytes(page_locked(memoryview(b"abc")).tolist()) == b"abc"
    [record] = caplog.records
    assert "out of memory" in record.message


def over_zmq(function: Callable[[Any], Any]) -> list[Any]:
    found: list[Any] = testing_transport.run_ranks(zmq_world(), function)
    return found


def network(device: str) -> nn.Module:
    """Large enough for two_shot to cut the first layer."""
    return filled(nn.Sequential(nn.Linear(24, 400), nn.Tanh(), nn.Linear(400, 4))).to(device)


def train(
    transport: Any,
    device: str,
    steps: int = 8,
    *,
    scaler: Any = None,
    set_to_none: bool = True,
    in_step: Callable[[], None] = lambda: None,
    **options: Any,
) -> list[Tensor]:
    net = network(device)
    optimizer = sgd(net)
    given = {"digest_every": 1, "compressor": "threshold:tau=0.02", "bucket_bytes": 4096} | options
    with attach(net, optimizer, transport, scaler=scaler, **given) as sync:
        for step in range(steps):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = net(noise(sync.rank, step, 16, 24).to(device)).square().mean()
            in_step()
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        sync.check_replicas()
    return [p.cpu() for p in parameters_of(net)]


def assert_equal(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
class TestRanks:
    @pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree", "all_reduce"])
    @pytest.mark.parametrize("run", [lambda function: run_ranks(2, function), over_zmq], ids=["inproc", "zmq"])
    @pytest.mark.parametrize("spec", ["none", "threshold:tau=0.5", "onebit:block=64", "powersgd:rank=2"])
    def test_one_on_the_device_and_one_on_the_cpu(
        self, device: str, spec: str, run: Callable[..., Any], exchange: str
    ) -> None:
        """They speak the same bytes, and end with the same gradients to the last bit."""
        if exchange == "all_reduce" and spec not in ("none", "powersgd:rank=2"):
            exchange = "auto"

        def rank_main(transport: Any) -> list[Tensor]:
            where = device if transport.rank == 0 else "cpu"
            weights = [nn.Parameter(torch.zeros(shape, device=where)) for shape in ((200, 90), (7,), (33, 5))]
            optimizer = torch.optim.SGD(weights, lr=1.0)
            found: list[Tensor] = []
            options = {"compressor": spec, "exchange": exchange, "bucket_bytes": 1024, "digest_every": 0}
            with attach(None, optimizer, transport, **options):
                for step in range(4):
                    optimizer.zero_grad()
                    grads = [noise(transport.rank, step, *w.shape).to(where) for w in weights]
                    sum((w * g).sum() for w, g in zip(weights, grads, strict=True)).backward()  # type: ignore[union-attr]
                    found += [w.grad.cpu() for w in weights if w.grad is not None]
            return found

        first, second = run(rank_main)
        assert len(first) == 12
        assert_equal([first], [second])

    @pytest.mark.parametrize("spec", ["none", "topk:ratio=0.05"])
    def test_messages_that_move_as_one(self, device: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whether payloads go to the host one by one or in one copy, and back: not a bit changes."""
        as_it_is = run_ranks(2, lambda transport: train(transport, device, 3, compressor=spec))
        monkeypatch.setattr(gradcomp.message, "joins", lambda _: device == "cpu")
        assert_equal(run_ranks(2, lambda transport: train(transport, device, 3, compressor=spec)), as_it_is)

    def test_two_on_one_device_a_hundred_steps_as_if_one_thing_came_after_the_other(
        self, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Memory of gradients, packets and sums is freed and used again all the time, by two streams each."""
        overlapped = run_ranks(2, lambda transport: train(transport, device, 100), timeout_s=60.0)
        assert_equal(overlapped[:1], overlapped[1:])

        def in_order(self: Lane, _: torch.device) -> None:
            self._device, self._stream = torch.device(device), None

        monkeypatch.setattr(Lane, "__init__", in_order)
        wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        assert_equal(
            run_ranks(2, lambda transport: train(transport, device, 100, in_step=wait), timeout_s=60.0), overlapped
        )

    @pytest.mark.parametrize("spec", ["none", "threshold:density=0.05", "topk:ratio=0.05", "onebit"])
    def test_gradients_that_are_kept_from_step_to_step(self, device: str, spec: str) -> None:
        made = run_ranks(2, lambda transport: train(transport, device, compressor=spec))
        kept = run_ranks(2, lambda transport: train(transport, device, compressor=spec, set_to_none=False))
        assert_equal(made, kept)

    def test_a_scaler_changes_no_bit(self, device: str) -> None:
        def rank_main(transport: Any) -> list[Tensor]:
            scaler = torch.amp.GradScaler(device, init_scale=4096.0, growth_interval=3)
            return train(transport, device, scaler=scaler)

        assert_equal(run_ranks(2, rank_main), run_ranks(2, lambda transport: train(transport, device)))

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_a_scaler_skips_on_all_ranks(self, device: str, value: float, fused: bool) -> None:
        def rank_main(transport: Any) -> float:
            net = network(device)
            optimizer = sgd(net, fused=fused)
            scaler = torch.amp.GradScaler(device, init_scale=1024.0)
            with attach(net, optimizer, transport, scaler=scaler, compressor="onebit", digest_every=1) as sync:
                for step in range(3):
                    optimizer.zero_grad()
                    inputs = noise(sync.rank, step, 16, 24).to(device)
                    if (sync.rank, step) == (1, 1):
                        inputs[0, 0] = value
                    before, held = parameters_of(net), sync.stats()["residual_norm"]
                    scaler.scale(net(inputs).square().mean()).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    same = [torch.equal(a, b) for a, b in zip(before, parameters_of(net), strict=True)]
                    assert all(same) == (step == 1)
                    assert (sync.stats()["residual_norm"] == held) == (step == 1)
            return float(scaler.get_scale())

        assert run_ranks(2, rank_main) == [512.0, 512.0]

    def test_buffers_and_metrics(self, device: str) -> None:
        def rank_main(transport: Any) -> Tensor:
            net = filled(nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6))).to(device)
            with attach(net, sgd(net), transport, compressor="none", buffers="average") as sync:
                net(noise(sync.rank, 0, 16, 12).to(device)).square().mean().backward()
                assert sync.average(torch.ones((), device=device) * sync.rank) == 0.5
            return torch.as_tensor(net[1].running_mean).cpu()

        first, second = run_ranks(2, rank_main)
        assert torch.equal(first, second)


def places() -> Iterator[Any]:
    """Compressor, and the devices of two ranks; without a GPU just enough to keep the test itself alive."""
    for spec in COMPRESSORS:
        if spec != "auto":  # it is one of the others
            for where in (("cuda", "cuda"), ("cuda", "cpu")):
                yield pytest.param(spec, where, marks=pytest.mark.gpu)
    for spec in ("factors", "dgc"):
        yield pytest.param(spec, ("cpu", "cpu"))


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot"])
@pytest.mark.parametrize(("spec", "where"), list(places()))
def test_ranks_agree_over_zmq(spec: str, where: tuple[str, str], exchange: str) -> None:
    """To the last bit of every sum and parameter, whatever the devices; digests say so too."""

    def rank_main(transport: Any) -> list[Tensor]:
        net = network(where[transport.rank])
        # What is subtracted is not multiplied: a device that fuses the two would round it in another way.
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        found: list[Tensor] = []
        options = {"compressor": spec, "exchange": exchange, "bucket_bytes": 4096, "digest_every": 1}
        with attach(net, optimizer, transport, **options) as sync:
            for step in range(4):
                optimizer.zero_grad()
                inputs = noise(sync.rank, step, 16, 24).to(where[sync.rank])
                (0.01 * net(inputs).square().mean()).backward()
                found += [p.grad.cpu() for p in net.parameters() if p.grad is not None]
                optimizer.step()
            found += [p.cpu() for p in parameters_of(net)]
        return found

    first, second = over_zmq(rank_main)
    assert len(first) == 20
    assert_equal([first], [second])


class TestStreams:
    def test_ranks_that_are_threads_run_their_own_backward_passes(self) -> None:
        """On one GPU a thread of torch's would else run all of them, and wait in one for the other."""
        assert run_ranks(2, lambda _: torch.autograd.is_multithreading_enabled()) == [False, False]
        assert torch.autograd.is_multithreading_enabled()

    def test_after_an_error_the_training_waits_for_what_was_queued_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        joined: list[Lane] = []
        monkeypatch.setattr(Lane, "join", lambda self: joined.append(self))

        def rank_main(transport: Any) -> None:
            transport.connect({}, max_message_bytes=1)
            driver = Driver(transport, Lane(torch.device("cpu")))

            def fails() -> Iterator[Any]:
                raise GradientError("no")
                yield

            driver.submit(fails(), StepRecord())  # type: ignore[arg-type]
            for wait in (driver.drain, lambda: driver.wait_until(lambda: False)):
                with pytest.raises(GradientError):
                    wait()
            driver.stop()

        run_ranks(1, rank_main)
        assert len(joined) == 2

    def test_factors_from_inside_a_host_are_marked_as_used_between_hosts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are let go of there while the next bucket is added up inside, on a stream of its own."""
        used: list[Tensor] = []
        monkeypatch.setattr(gradcomp.hosts, "uses", lambda *tensors: used.extend(tensors))
        product = Product(torch.ones(2, 3), torch.ones(2, 4))
        sums = HostSums(ViewedGradients([], Products()), {0: product})
        assert sums.product(1, torch.ones(3, 4), 0, 12) is None
        assert sums.product(0, torch.ones(3, 4), 0, 12) is not None
        assert [tensor.data_ptr() for tensor in used] == [tensor.data_ptr() for tensor in product]

    @pytest.mark.gpu
    def test_a_random_choice_that_another_stream_makes_is_waited_for(self) -> None:
        device = torch.device("cuda", 0)
        for step in range(2, 6):
            expected = _choose(1, step, 100_000, 1000, torch.device("cpu"))
            first, second = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            for stream in (first, second):
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(2_000_000)
                    found = [part.clone() for part in _choose(1, step, 100_000, 1000, device)]
                    # Copied to the host by the stream that read it, which knows nothing of the other one.
                    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))

    def test_on_the_cpu_there_is_none(self) -> None:
        lane = Lane(torch.device("cpu"))
        assert lane.mark() is None
        with lane.after(None):
            pass
        lane.join()

    @pytest.mark.gpu
    def test_the_exchange_has_one_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = set()
        real = BucketWork.encode

        def encode(self: Any, pieces: Any) -> Any:
            seen.add(torch.cuda.current_stream().cuda_stream)
            return real(self, pieces)

        monkeypatch.setattr(BucketWork, "encode", encode)
        run_ranks(2, lambda transport: train(transport, "cuda", 2, exchange="all_gather"))
        assert seen
        assert torch.cuda.default_stream().cuda_stream not in seen

    @pytest.mark.gpu
    def test_what_is_queued_waits_for_the_mark_and_join_for_what_is_queued(self) -> None:
        lane = Lane(torch.device("cuda", 0))
        source, copied = torch.zeros(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
        for round_ in range(1, 20):
            torch.cuda._sleep(2_000_000)  # what comes next is late
            source.fill_(round_)
            with lane.after(lane.mark()):
                torch.cuda._sleep(2_000_000)
                copied.copy_(source)
            lane.join()
            assert bool((copied + 0 == round_).all())

    @pytest.mark.gpu
    def test_backward_on_a_stream_of_the_users(self) -> None:
        def rank_main(transport: Any) -> list[Tensor]:
            with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                return train(transport, "cuda", 20)

        assert_equal(run_ranks(2, rank_main), run_ranks(2, lambda transport: train(transport, "cuda", 20)))


SYNC_BATCH_NORM = """
import sys
import torch
from torch import nn
import gradcomp

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).cuda()
net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
with gradcomp.attach(optimizer, model=net, compressor="none", transport="zmq:timeout_s=60", digest_every=1) as sync:
    for step in range(3):
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(batch[rank::2].cuda()).square().mean().backward()
        optimizer.step()
torch.save({name: tensor.cpu() for name, tensor in net.state_dict().items()}, f"{folder}/{rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.gpu
def test_sync_batch_norm_is_batch_norm_over_the_union_of_the_batches(tmp_path: Path) -> None:
    """torch has it on CUDA only; its statistics go over the process group, the gradients over ours."""
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", SYNC_BATCH_NORM]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=env | {"RANK": str(rank)}) for rank in range(2)
    ]
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        net(torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).cuda()).square().mean().backward()
        optimizer.step()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, tensor in net.state_dict().items():
        assert torch.equal(found[0][name], found[1][name]), name
        torch.testing.assert_close(found[0][name], tensor.cpu(), rtol=1e-4, atol=1e-5)
