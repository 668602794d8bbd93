"""Ranks of hosts as threads: dense inside a host, compressed between hosts."""

from __future__ import annotations

import io
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


def run_hosts(hosts: int, ranks: int, function: Callable[[Any], Any], **options: Any) -> list[Any]:
    """As run_ranks, with a hierarchical transport for each rank."""
    name = uuid.uuid4().hex
    transports = [
        HierarchicalTransport(
            rank=rank,
            world_size=hosts * ranks,
            ranks_per_host=ranks,
            **{"local": f"inproc:hub={name},timeout_s=20", "between": f"inproc:hub={name},timeout_s=20"} | options,
        )
        for rank in range(hosts * ranks)
    ]
    return testing_transport.run_ranks(transports, function)


def hosts_outcomes(hosts: int, ranks: int, function: Callable[[Any], Any], **options: Any) -> list[Any]:
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
    ("compressor", "exchange"), [("onebit:block=64", "all_gather"), ("fp16", "two_shot"), ("powersgd", "auto")]
)
def test_replicas_stay_bit_identical(compressor: str, exchange: str) -> None:
    results = run_hosts(3, 2, lambda t: trained(t, compressor=compressor, exchange=exchange))
    assert all(torch.isfinite(p).all() for p in results[0])
    assert_same(results)


@pytest.mark.parametrize(("hosts", "ranks"), HIERARCHIES)
@pytest.mark.parametrize("exchange", ["all_gather", "two_shot"])
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


# -- failures ----------------------------------------------------------------------------------------------------------


def test_ranks_that_differ_are_told_on_every_rank() -> None:
    for odd in range(4):

        def rank_main(transport: Any, odd: int = odd) -> None:
            net = small_net()
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
            attach(net, optimizer, transport, compressor="none" if transport.rank == odd else "fp16")

        found = hosts_outcomes(2, 2, rank_main)
        # A host that is at one finds out between hosts; one that is not never gets there.
        assert all(isinstance(error, gradcomp.TransportError) for error in found), found
        same_host = [error for rank, error in enumerate(found) if rank // 2 == odd // 2]
        assert all(isinstance(error, gradcomp.HandshakeError) and error.field == "compressor" for error in same_host)
