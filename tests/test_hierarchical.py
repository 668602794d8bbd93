"""Ranks of hosts as threads: dense inside a host, compressed between hosts."""

from __future__ import annotations

import io
import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import attach, batch, parameters_of, small_net, train_step
from torch import nn

import gradcomp
from gradcomp import testing_transport
from gradcomp.transports.hierarchical import HierarchicalTransport
from gradcomp.transports.inproc import InprocTransport

HIERARCHIES = [(2, 2), (1, 4), (4, 1), (2, 3)]  # hosts, ranks of each
STEPS = 4


def run_hosts(
    hosts: int, ranks: int, function: Callable[[Any], Any], *, timeout_s: float = 20, **options: Any
) -> list[Any]:
    """As run_ranks, with a hierarchical transport for each rank."""
    level = f"inproc:hub={uuid.uuid4().hex},timeout_s={timeout_s}"
    transports = [
        HierarchicalTransport(
            rank=rank,
            world_size=hosts * ranks,
            ranks_per_host=ranks,
            **{"local": level, "between": level} | options,
        )
        for rank in range(hosts * ranks)
    ]
    return testing_transport.run_ranks(transports, function)


def outcomes(hosts: int, ranks: int, function: Callable[[Any], Any], **options: Any) -> list[Any]:
    """As run_hosts, with each rank's error in place of its result."""

    def caught(transport: Any) -> Any:
        try:
            return function(transport)
        except Exception as error:
            return error

    return run_hosts(hosts, ranks, caught, **options)


def trained(transport: Any, *, steps: int = STEPS, **options: Any) -> list[torch.Tensor]:
    torch.manual_seed(transport.rank)
    net = small_net(seed=transport.rank)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    with attach(net, optimizer, transport, **options) as sync:
        for step in range(steps):
            train_step(net, optimizer, sync.rank, step)
        sync.check_replicas()
    return parameters_of(net)


def assert_same(results: list[list[torch.Tensor]]) -> None:
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("hosts", "ranks"), HIERARCHIES)
@pytest.mark.parametrize("local_dtype", ["float32", "bfloat16"])
def test_uncompressed_equals_a_flat_exchange(hosts: int, ranks: int, local_dtype: str) -> None:
    flat = testing_transport.run_ranks(
        InprocTransport.world(hosts * ranks), lambda t: trained(t, compressor="none", exchange="all_gather")
    )
    results = run_hosts(hosts, ranks, lambda t: trained(t, compressor="none"), local_dtype=local_dtype)
    assert_same(results)
    precise = local_dtype == "float32" or ranks == 1
    torch.testing.assert_close(results[0], flat[0], rtol=0, atol=1e-5 if precise else 2e-2)
    assert precise == torch.allclose(results[0][0], flat[0][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("compressor", "exchange"),
    [("onebit:block=64", "all_gather"), ("fp16", "two_shot"), ("powersgd", "auto"), ("topk", "tree")],
)
def test_replicas_stay_bit_identical(compressor: str, exchange: str) -> None:
    results = run_hosts(3, 2, lambda t: trained(t, compressor=compressor, exchange=exchange))
    assert all(torch.isfinite(p).all() for p in results[0])
    assert_same(results)


@pytest.mark.parametrize(("hosts", "ranks"), HIERARCHIES)
@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
def test_what_is_not_applied_is_held_back_by_leaders(hosts: int, ranks: int, exchange: str) -> None:
    def rank_main(transport: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight = nn.Parameter(torch.zeros(160, 64))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        given, held = torch.zeros(160, 64), torch.zeros(160 * 64)
        generator = torch.Generator().manual_seed(transport.rank)
        options = {"compressor": "threshold:tau=0.03", "exchange": exchange, "reduction": "sum"}
        with attach(None, optimizer, transport, **options) as sync:
            for _ in range(6):
                gradient = 0.01 * torch.randn(160, 64, generator=generator)
                given += gradient
                optimizer.zero_grad()
                (weight * gradient).sum().backward()
                optimizer.step()
            states = sync.state_dict()["states"]
        assert bool(states) == (transport.rank % ranks == 0)
        for span, roles in states.get("group0.0", {}).items():
            start, stop = map(int, span.split(":"))
            for state in roles.values():
                held[start:stop] += state["residual"]
        return given, -weight.detach(), held.view(160, 64)

    results = run_hosts(hosts, ranks, rank_main)
    held = sum(result[2] for result in results)
    assert held.abs().max() > 0.001
    torch.testing.assert_close(sum(result[0] for result in results), results[0][1] + held, rtol=0, atol=1e-5)


@pytest.mark.parametrize("compressor", ["none", "topk:ratio=0.5", "powersgd"])
def test_parameters_unused_on_some_ranks(compressor: str) -> None:
    def rank_main(transport: Any) -> list[torch.Tensor | None]:
        weights = [nn.Parameter(torch.ones(8, 8)) for _ in range(6)]
        optimizer = torch.optim.SGD(weights, lr=0.1)
        # Nobody has the last; the others one, two (of one host, of two), three or four of the ranks.
        owners: list[tuple[int, ...]] = [(3,), (0, 1), (1, 3), (0, 1, 2), (0, 1, 2, 3), ()]
        with attach(None, optimizer, transport, compressor=compressor, reduction="sum", bucket_bytes=600):
            mine = [w for w, ranks in zip(weights, owners, strict=True) if transport.rank in ranks]
            torch.stack([w.sum() for w in mine]).sum().backward()
        return [w.grad for w in weights]

    for grads in run_hosts(2, 2, rank_main):
        assert grads.pop() is None
        for grad, count in zip(grads, (1, 2, 2, 3, 4), strict=True):
            assert grad is not None
            if compressor != "topk:ratio=0.5":
                torch.testing.assert_close(grad, torch.full((8, 8), float(count)))


@pytest.mark.parametrize("where", [0, 3])
@pytest.mark.parametrize("compressor", ["none", "threshold:tau=0.01", "powersgd"])
def test_a_nonfinite_gradient_reaches_all_ranks_and_no_residual(compressor: str, where: int) -> None:
    def rank_main(transport: Any) -> None:
        weight = nn.Parameter(torch.zeros(32, 8))
        optimizer = torch.optim.SGD([weight], lr=0.1)

        def backward(value: float) -> None:
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(transport.rank)
            gradient = 0.01 * torch.randn(32, 8, generator=generator)
            gradient[3, 3] = value
            (weight * gradient).sum().backward()

        with attach(None, optimizer, transport, compressor=compressor) as sync:
            backward(1.0)
            before = sync.state_dict()["states"]
            backward(float("inf") if transport.rank == where else 1.0)
            assert weight.grad is not None
            assert not torch.isfinite(weight.grad).all()
            assert sync.stats()["nonfinite_steps"] == (compressor != "none")  # nothing to be kept from harm there
            after = sync.state_dict()["states"]
            for name, spans in before.items():
                for span, roles in spans.items():
                    for role, state in roles.items():
                        for field, tensor in state.items():
                            assert torch.equal(tensor, after[name][span][role][field])
            backward(1.0)
            assert torch.isfinite(weight.grad).all()

    run_hosts(2, 2, rank_main)


def test_accumulation_and_the_step_hook() -> None:
    def rank_main(transport: Any) -> list[torch.Tensor]:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with attach(net, optimizer, transport, compressor="none", reduction="sum") as sync:
            for step in range(3):
                inputs, targets = batch(sync.rank, step)
                loss = nn.functional.cross_entropy(net(inputs), targets)
                if step < 2:
                    with sync.no_sync():
                        loss.backward()
                else:
                    loss.backward()
            return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    net = small_net()
    for rank in range(4):
        for step in range(3):
            inputs, targets = batch(rank, step)
            nn.functional.cross_entropy(net(inputs), targets).backward()
    expected = [p.grad for p in net.parameters()]
    for grads in run_hosts(2, 2, rank_main):
        torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)
    assert_same(run_hosts(2, 2, lambda t: trained(t, compressor="topk:ratio=0.1", when="step")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype: torch.dtype) -> None:
    """Gradients of a host are added up in float32, whatever they are."""

    def rank_main(transport: Any) -> torch.Tensor:
        weight = nn.Parameter(torch.zeros(64, 8, dtype=dtype))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        with attach(None, optimizer, transport, compressor="none", reduction="mean"):
            (weight * (1.0 if transport.rank == 0 else 2**-10)).sum().backward()
        assert weight.grad is not None
        return weight.grad

    for grad in run_hosts(1, 4, rank_main):
        # In the type itself the small ones would be lost one by one.
        assert torch.equal(grad, torch.full((64, 8), (1 + 3 * 2**-10) / 4).to(dtype))


@pytest.mark.parametrize("compressor", ["threshold:density=0.05", "qsgd:levels=7,bucket=64"])
def test_a_checkpoint_restores_a_run_bit_for_bit(compressor: str) -> None:
    def rank_main(transport: Any) -> tuple[list[torch.Tensor], bytes, list[torch.Tensor]]:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        with attach(net, optimizer, transport, compressor=compressor) as sync:
            for step in range(3):
                train_step(net, optimizer, sync.rank, step)
            file = io.BytesIO()
            torch.save([net.state_dict(), optimizer.state_dict(), sync.state_dict()], file)
            for step in range(3, 6):
                train_step(net, optimizer, sync.rank, step)
        return parameters_of(net), file.getvalue(), []

    def resumed(transport: Any) -> list[torch.Tensor]:
        net = small_net(seed=9)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        saved = torch.load(io.BytesIO(results[transport.rank][1]), weights_only=True)
        with attach(net, optimizer, transport, compressor=compressor) as sync:
            for target, state in zip((net, optimizer, sync), saved, strict=True):
                target.load_state_dict(state)
            for step in range(3, 6):
                train_step(net, optimizer, sync.rank, step)
        return parameters_of(net)

    results = run_hosts(2, 2, rank_main)
    assert_same([results[0][0], *run_hosts(2, 2, resumed)])


def test_what_all_ranks_say_to_each_other() -> None:
    """set_compressor, set_parameters, average, digest and buffers take the way over the leaders."""

    def rank_main(transport: Any) -> list[torch.Tensor]:
        net = small_net(seed=transport.rank)
        optimizer = torch.optim.SGD(list(net.parameters())[:4], lr=0.05)
        with attach(net, optimizer, transport, compressor="topk:ratio=0.1", buffers="average", digest_every=2) as sync:
            for step in range(3):
                train_step(net, optimizer, sync.rank, step)
            sync.set_compressor("threshold:density=0.05")
            train_step(net, optimizer, sync.rank, 3)
            optimizer.add_param_group({"params": list(net.parameters())[4:]})
            train_step(net, optimizer, sync.rank, 4)
            mean = sync.average(torch.full((3,), float(sync.rank)))
            assert torch.equal(mean, torch.full((3,), (sync.world_size - 1) / 2))
            with pytest.raises(gradcomp.HandshakeError) as refused:
                sync.set_compressor("none" if sync.rank == 3 else "onebit")
            assert refused.value.field == "compressor"
            net[4].weight.data[0, 0] += sync.rank == 4
            with pytest.raises(gradcomp.ReplicaMismatch, match=r"'4\.weight' on rank 4"):
                sync.check_replicas()
        return [*parameters_of(net)[:2], *(buffer.clone() for buffer in net.buffers())]

    assert_same(run_hosts(2, 3, rank_main))


@pytest.mark.parametrize("policy", ["broadcast", "average:every=2"])
def test_buffers(policy: str) -> None:
    def rank_main(transport: Any) -> list[torch.Tensor]:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        with attach(net, optimizer, transport, compressor="none", buffers=policy):
            for step in range(2):
                train_step(net, optimizer, transport.rank, step)
        return [buffer.clone() for buffer in net.buffers()]

    flat = testing_transport.run_ranks(InprocTransport.world(4), rank_main)
    results = run_hosts(2, 2, rank_main)
    assert_same(results)
    torch.testing.assert_close(results[0], flat[0], rtol=1e-4, atol=1e-5)


def test_only_leaders_cross() -> None:
    def rank_main(transport: Any) -> dict[str, Any]:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        with attach(net, optimizer, transport, compressor="topk:ratio=0.01") as sync:
            train_step(net, optimizer, sync.rank, 0)
            stats: dict[str, Any] = sync.stats()
        return stats

    for rank, stats in enumerate(run_hosts(2, 2, rank_main)):
        assert (stats["bytes_sent_between"] > 0) == (stats["packet_bytes"] > 0) == (rank % 2 == 0)
        assert (stats["bytes_received_between"] > 0) == (rank % 2 == 0)
        assert stats["bytes_sent"] > stats["bytes_sent_between"]
        assert stats["steps"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("local_dtype", ["float32", "bfloat16"])
def test_cuda_gradients(local_dtype: str) -> None:
    """Ranks share one device here; what is inside the host goes through host memory."""

    def rank_main(transport: Any) -> list[torch.Tensor]:
        net = small_net(seed=transport.rank).cuda()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        with attach(net, optimizer, transport, compressor="threshold:density=0.05") as sync:
            for step in range(STEPS):
                inputs, targets = batch(sync.rank, step)
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(inputs.cuda()), targets.cuda()).backward()
                optimizer.step()
            sync.check_replicas()
        return parameters_of(net)

    results = run_hosts(2, 2, rank_main, local_dtype=local_dtype)
    assert all(torch.isfinite(p).all() for p in results[0])
    assert_same(results)


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [0, 3])
def test_ranks_that_differ_are_refused_on_every_rank(odd: int) -> None:
    def rank_main(transport: Any) -> None:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        attach(net, optimizer, transport, compressor="none" if transport.rank == odd else "fp16")

    for error in outcomes(2, 2, rank_main):
        assert isinstance(error, gradcomp.HandshakeError)
        assert error.field == "compressor"


def test_hosts_that_differ_are_refused_on_every_rank() -> None:
    def rank_main(transport: Any) -> None:
        net = nn.Linear(8, 8 + transport.rank // 2)
        attach(net, torch.optim.SGD(net.parameters(), lr=0.05), transport)

    for error in outcomes(2, 2, rank_main):
        assert isinstance(error, gradcomp.HandshakeError)
        assert error.field == "tensors"
        assert "between hosts" in str(error)


@pytest.mark.parametrize("missing", [1, 2])
def test_a_rank_that_never_comes(missing: int) -> None:
    """A member keeps its host from starting, and a leader both; nobody waits for ever."""

    def rank_main(transport: Any) -> None:
        net = small_net()
        if transport.rank != missing:
            attach(net, torch.optim.SGD(net.parameters(), lr=0.05), transport)

    found = outcomes(2, 2, rank_main, timeout_s=1)
    assert found.pop(missing) is None
    assert all(isinstance(error, gradcomp.TransportError) for error in found)
    assert any(isinstance(error, gradcomp.TransportTimeout) for error in found)


@pytest.mark.parametrize("leaving", [0, 2, 3])
@pytest.mark.parametrize("compressor", ["none", "threshold:density=0.05"])
def test_a_rank_that_leaves_takes_all_others_along(leaving: int, compressor: str) -> None:
    def rank_main(transport: Any) -> None:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        with attach(net, optimizer, transport, compressor=compressor) as sync:
            for step in range(6):
                if step == 3 and transport.rank == leaving:
                    sync.close()
                    return
                train_step(net, optimizer, sync.rank, step)

    found = outcomes(2, 2, rank_main)
    assert found.pop(leaving) is None
    for error in found:
        assert isinstance(error, gradcomp.PeerLost)
    # The ranks next to it name it, by its number in the run.
    assert leaving in [error.peer for error in found]


def test_a_rank_that_stops_is_waited_for_only_so_long() -> None:
    gone = threading.Event()

    def rank_main(transport: Any) -> None:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        with attach(net, optimizer, transport):
            train_step(net, optimizer, transport.rank, 0)
            if transport.rank == 3:
                gone.wait(20)
                return
            try:
                train_step(net, optimizer, transport.rank, 1)
            finally:
                if transport.rank == 2:
                    gone.set()

    found = outcomes(2, 2, rank_main, timeout_s=1)
    assert found[3] is None
    assert isinstance(found[2], gradcomp.TransportTimeout)
    assert "inside host 1 (rank 0 is 2)" in str(found[2])
    assert all(isinstance(error, gradcomp.TransportError) for error in found[:2])


# -- options -----------------------------------------------------------------------------------------------------------


def test_the_exchange_and_its_config() -> None:
    exchange = gradcomp.hierarchical(local="gloo", between={"id": "zmq", "insecure": True}, exchange="two_shot")
    assert gradcomp.exchange(exchange.config()) == exchange
    assert (
        gradcomp.exchange('hierarchical:local=gloo,between={"id":"zmq","insecure":true},exchange=two_shot') == exchange
    )
    spec = 'hierarchical:local=gloo,between="zmq:rate=100mbit,insecure=true",local_dtype=bfloat16'
    transport = gradcomp.exchange(spec).transport(None)
    assert transport.levels is not None
    assert transport.levels.dtype == torch.bfloat16
    assert (transport.rank, transport.world_size, transport.levels.hosts) == (0, 1, 1)
    assert gradcomp.exchange(spec).transport("zmq:rate=100mbit,insecure=true").levels is not None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"local": "pigeon"}, "unknown transport 'pigeon'"),
        ({"local": "inproc", "between": "zmq:speed=1"}, "unknown option 'speed'"),
        ({"local": "inproc", "between": "zmq:rank=1"}, "'rank' is not to be given"),
        ({"local": "inproc", "between": "hierarchical"}, "cannot be one level"),
        ({"local": "inproc", "between": 7}, "between=7 is not allowed"),
        ({"local": "inproc", "exchange": "hierarchical"}, "two levels, no more"),
        ({"local": "inproc", "local_dtype": "int8"}, "one of float32, bfloat16"),
        ({"local": "inproc", "ranks_per_host": 0}, "ranks_per_host=0"),
        ({"local": "inproc", "ranks_per_host": 3}, "multiple of"),
    ],
)
def test_wrong_options(options: dict[str, Any], text: str) -> None:
    net = small_net()
    with pytest.raises(gradcomp.ConfigError, match=text):
        gradcomp.attach(
            torch.optim.SGD(net.parameters(), lr=0.1), exchange=gradcomp.exchange({"id": "hierarchical", **options})
        )


def test_a_transport_that_contradicts_is_refused() -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(gradcomp.ConfigError, match="leave transport out, or change between"):
        gradcomp.attach(optimizer, transport="inproc", exchange=gradcomp.hierarchical(local="inproc"))


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE is not set"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "must follow one another"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "3", "LOCAL_RANK": "1"}, "must run as many"),
        (
            {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "GROUP_WORLD_SIZE": "2"},
            "must run as many",
        ),
    ],
)
def test_hosts_come_from_the_environment(
    environment: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    exchange = gradcomp.hierarchical(local="inproc")
    with pytest.raises(gradcomp.ConfigError, match=text):
        exchange.transport(None)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    levels = exchange.transport(None).levels
    assert levels is not None
    assert (levels.host, levels.hosts, levels.local.rank, levels.between) == (1, 2, 1, None)


@pytest.mark.parametrize("exchange", ["two_shot", "tree"])
def test_leaders_that_compress_sums_resume_to_the_bit(exchange: str) -> None:
    """Leaders are numbered among themselves: the second host's is rank 2 of the run, and owner 1 of a shard."""

    def rank_main(transport: Any, states: Any) -> Any:
        weight = nn.Parameter(torch.zeros(160, 64))
        options = {"compressor": "topk:ratio=0.05", "exchange": exchange}
        with attach(None, torch.optim.SGD([weight], lr=1.0), transport, **options) as sync:
            if states is not None:
                sync.load_state_dicts(states)
            else:
                (
                    weight * torch.randn(160, 64, generator=torch.Generator().manual_seed(transport.rank))
                ).sum().backward()
            return sync.state_dict()["states"].get("group0.0", {}) if states is not None else sync.state_dict()

    saved = run_hosts(4, 2, lambda transport: rank_main(transport, None))
    sums = 0
    for rank, found in enumerate(run_hosts(4, 2, lambda transport: rank_main(transport, saved))):
        before = saved[rank]["states"].get("group0.0", {})
        assert {span: set(roles) for span, roles in found.items()} == {span: set(r) for span, r in before.items()}
        for span, roles in before.items():
            sums += "sum" in roles
            assert all(torch.equal(found[span][role]["residual"], roles[role]["residual"]) for role in roles)
    assert sums == 2
