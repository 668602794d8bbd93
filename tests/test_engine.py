"""The engine and the optimizer hook, on ranks that are threads."""

from __future__ import annotations

import io
import os
from typing import Any

import pytest
import torch
from ranks import attach, batch, outcomes, parameters_of, run_ranks, small_net, train_step
from torch import nn

import gradcomp

COMPRESSORS = [
    "none",
    "fp16",
    "bf16",
    "threshold:tau=0.01",
    "threshold:density=0.05",
    "onebit:block=64",
    "topk:ratio=0.05",
    "qsgd:levels=7,bucket=64",
]
EXCHANGES = ["all_gather", "two_shot", "tree", "auto"]
# `make soak` takes 200; a divergence shows within a few.
STEPS = int(os.environ.get("GRADCOMP_SOAK_STEPS", "30"))


def trained(transport: Any, steps: int, **options: Any) -> list[torch.Tensor]:
    torch.manual_seed(transport.rank)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 640), nn.ReLU(), nn.Linear(640, 10))  # two_shot cuts the first
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    with attach(net, optimizer, transport, **options) as sync:
        for step in range(steps):
            train_step(net, optimizer, sync.rank, step)
        sync.check_replicas()
    return parameters_of(net)


@pytest.mark.parametrize("world_size", [3, 4])
@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_replicas_stay_bit_identical(compressor: str, exchange: str, world_size: int) -> None:
    options = {"compressor": compressor, "exchange": exchange, "bucket_bytes": 1 << 20}
    first, *others = run_ranks(world_size, lambda t: trained(t, STEPS, **options))
    assert all(torch.isfinite(p).all() for p in first)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("when", ["backward", "step"])
def test_uncompressed_equals_the_mean_of_all_gradients(exchange: str, when: str) -> None:
    def rank_main(transport: Any) -> list[torch.Tensor]:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with attach(net, optimizer, transport, compressor="none", exchange=exchange, when=when) as sync:
            inputs, targets = batch(sync.rank, 0)
            nn.functional.cross_entropy(net(inputs), targets).backward()
            if when == "step":
                optimizer.step()
            return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    expected: list[torch.Tensor] = []
    for rank in range(3):
        net = small_net()
        inputs, targets = batch(rank, 0)
        nn.functional.cross_entropy(net(inputs), targets).backward()
        grads = [p.grad / 3 for p in net.parameters() if p.grad is not None]
        expected = [a + b for a, b in zip(expected, grads, strict=True)] if expected else grads
    for grads in run_ranks(3, rank_main):
        torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
@pytest.mark.parametrize("compressor", ["threshold:tau=0.01", "onebit:block=64", "topk:ratio=0.05"])
def test_what_is_not_applied_is_held_back(compressor: str, exchange: str) -> None:
    """Sum of all gradients == sum of all that was applied + all residuals, of ranks and of shard owners."""

    def rank_main(transport: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight = nn.Parameter(torch.zeros(160, 64))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        given = torch.zeros(160, 64)
        generator = torch.Generator().manual_seed(transport.rank)
        sync = attach(None, optimizer, transport, compressor=compressor, exchange=exchange, reduction="sum")
        for _ in range(10):
            gradient = 0.01 * torch.randn(160, 64, generator=generator)
            given += gradient
            optimizer.zero_grad()
            (weight * gradient).sum().backward()
            optimizer.step()
        held = torch.zeros(160 * 64)
        for span, roles in sync.state_dict()["states"]["group0.0"].items():
            start, stop = map(int, span.split(":"))
            for state in roles.values():
                held[start:stop] += state["residual"]
        sync.close()
        return given, -weight.detach(), held.view(160, 64)

    results = run_ranks(3, rank_main)
    given = sum(result[0] for result in results)
    held = sum(result[2] for result in results)
    torch.testing.assert_close(given, results[0][1] + held, rtol=0, atol=1e-5)


def test_default_exchange_picks_by_world_and_packet_size() -> None:
    from gradcomp.bucket import Unit

    auto = gradcomp.exchange("auto")

    def owners(compressor: str, world_size: int) -> set[int | None]:
        unit = Unit((0,), (1024, 1024), gradcomp.compressor(compressor))
        return {piece.owner for piece in auto.cut([unit], world_size)}

    assert owners("none", 2) == {None}
    assert owners("none", 4) == {0, 1, 2, 3}
    assert owners("threshold:density=0.001", 4) == {None}


def test_parameters_and_buffers_start_as_rank_zeros() -> None:
    def rank_main(transport: Any) -> list[torch.Tensor]:
        net = small_net(seed=transport.rank)
        net[1].running_mean.fill_(transport.rank)
        net[4].weight.requires_grad_(False)
        net[4].weight.data = net[4].weight.data.t().contiguous().t()  # not contiguous
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        with attach(net, optimizer, transport):
            return [*parameters_of(net), *(b.clone() for b in net.buffers())]

    expected = [*parameters_of(small_net(0)), *small_net(0).buffers()]
    expected[-3] = torch.zeros(4)
    for got in run_ranks(3, rank_main):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_empty_tensors_are_no_trouble() -> None:
    def rank_main(transport: Any) -> torch.Tensor:
        weight, empty = nn.Parameter(torch.full((8, 8), float(transport.rank))), nn.Parameter(torch.zeros(0, 4))
        with attach(None, torch.optim.SGD([weight, empty], lr=1.0), transport, compressor="topk:k=64"):
            (weight.sum() + empty.sum()).backward()
        assert weight.grad is not None
        return weight.detach() + weight.grad

    for got in run_ranks(2, rank_main):
        assert torch.equal(got, torch.ones(8, 8))


def test_no_sync_accumulates_locally() -> None:
    def rank_main(transport: Any) -> tuple[torch.Tensor, int]:
        weight = nn.Parameter(torch.zeros(4))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        with gradcomp.attach(optimizer, transport=transport, compressor="none") as sync:
            for _ in range(3):
                with sync.no_sync():
                    (weight * (sync.rank + 1)).sum().backward()
                assert weight.grad is not None
                assert torch.all(weight.grad % (sync.rank + 1) == 0)
            (weight * (sync.rank + 1)).sum().backward()
            return weight.grad, sync.stats()["steps"]

    for grad, steps in run_ranks(3, rank_main):
        torch.testing.assert_close(grad, torch.full((4,), 8.0))
        assert steps == 1


def two_heads(transport: Any, used: list[bool], compressor: str, exchange: str) -> tuple[Any, ...]:
    a, b = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8))
    bias = nn.Parameter(torch.ones(8))
    optimizer = torch.optim.SGD([a, b, bias], lr=1.0)
    options: dict[str, Any] = {"compressor": compressor, "exchange": exchange, "reduction": "sum"}
    with attach(None, optimizer, transport, **options):
        loss = a.sum() + ((b.sum() + bias.sum()) if used[transport.rank] else 0.0)
        loss.backward()
        return a.grad, b.grad, bias.grad


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
@pytest.mark.parametrize("compressor", ["none", "threshold:tau=0.5", "topk:k=64"])
def test_a_parameter_unused_on_one_rank_contributes_zeros(compressor: str, exchange: str) -> None:
    unit = 0.5 if compressor.startswith("threshold") else 1.0
    for a, b, bias in run_ranks(3, lambda t: two_heads(t, [True, False, True], compressor, exchange)):
        if exchange == "all_gather" or unit == 1.0:
            assert torch.equal(a, torch.full((8, 8), 3 * unit))
            assert torch.equal(b, torch.full((8, 8), 2 * unit))
        assert torch.equal(bias, torch.full((8,), 2.0))


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
@pytest.mark.parametrize("compressor", ["none", "threshold:tau=0.5"])
def test_a_parameter_unused_on_all_ranks_has_no_gradient(compressor: str, exchange: str) -> None:
    for a, b, bias in run_ranks(3, lambda t: two_heads(t, [False] * 3, compressor, exchange)):
        assert a is not None
        assert b is None
        assert bias is None


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
@pytest.mark.parametrize("compressor", ["threshold:tau=0.01", "threshold:density=0.1", "onebit:block=64", "topk:k=9"])
@pytest.mark.parametrize(("where", "value"), [("0.weight", float("nan")), ("6.bias", float("-inf"))])
def test_nonfinite_on_one_rank(compressor: str, exchange: str, where: str, value: float) -> None:
    """Every rank sees it, in many buckets or one, dense tensor or compressed, and no residual moves anywhere."""

    def rank_main(transport: Any) -> None:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        with attach(net, optimizer, transport, compressor=compressor, exchange=exchange) as sync:
            for step in range(3):
                train_step(net, optimizer, sync.rank, step)
            before = torch.save(sync.state_dict()["states"], saved := io.BytesIO()) or saved.getvalue()
            spoiled = dict(net.named_parameters())[where]
            handle = spoiled.register_hook(lambda g: torch.where(torch.arange(g.numel()).view_as(g) == 3, value, g))
            if sync.rank != 1:
                handle.remove()
            inputs, targets = batch(sync.rank, 3)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), targets).backward()
            assert spoiled.grad is not None
            assert not torch.isfinite(spoiled.grad).all()
            after = torch.save(sync.state_dict()["states"], saved := io.BytesIO()) or saved.getvalue()
            assert before == after
            assert sync.stats()["nonfinite_steps"] == 1
            handle.remove()
            for step in range(4, 7):  # the step was skipped; training goes on
                train_step(net, optimizer, sync.rank, step)
            assert all(torch.isfinite(p).all() for p in net.parameters())
            sync.check_replicas()

    run_ranks(3, rank_main)


def test_replica_mismatch_names_the_first_parameter() -> None:
    def rank_main(transport: Any) -> None:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        with attach(net, optimizer, transport, digest_every=2) as sync:
            train_step(net, optimizer, sync.rank, 0)
            if sync.rank == 2:
                with torch.no_grad():
                    net[6].bias[0] += 1e-6
                    net[4].weight[0, 0] += 1e-6
            train_step(net, optimizer, sync.rank, 1)

    for error in outcomes(3, rank_main):
        assert isinstance(error, gradcomp.ReplicaMismatch)
        assert error.parameter == "4.weight"
        assert error.ranks == (2,)
        assert "4.weight" in str(error)


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_state_dict_restores_a_run_bit_for_bit(compressor: str, exchange: str) -> None:
    def rank_main(transport: Any, resumed: bool) -> list[torch.Tensor]:
        net = small_net()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        with attach(net, optimizer, transport, compressor=compressor, exchange=exchange) as sync:
            for step in range(5):
                train_step(net, optimizer, sync.rank, step)
            if resumed:
                torch.save([net.state_dict(), optimizer.state_dict(), sync.state_dict()], file := io.BytesIO())
                for step in range(90, 93):
                    train_step(net, optimizer, sync.rank, step)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                net.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                sync.load_state_dict(saved[2])
            for step in range(5, 10):
                train_step(net, optimizer, sync.rank, step)
        return parameters_of(net)

    straight = run_ranks(3, lambda t: rank_main(t, False))
    resumed = run_ranks(3, lambda t: rank_main(t, True))
    for a, b in zip(straight, resumed, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_state_dict_of_another_run_is_refused() -> None:
    def rank_main(transport: Any) -> None:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        with attach(net, optimizer, transport, compressor="topk:ratio=0.1") as sync:
            train_step(net, optimizer, sync.rank, 0)
            good = sync.state_dict()
            for field, value in [
                ("format", 99),
                ("rank", 7),
                ("world_size", 5),
                ("compressor", '{"id": "none"}'),
                ("step", -1),
                ("states", []),
                ("states", {"other.weight": {}}),
                ("states", {"0.weight": {"0:3": {}}}),
                ("states", {"0.weight": {"0:36": {"other": {}}}}),
                ("states", {"0.weight": {"0:36": {"gradient": {"residual": 1.0}}}}),
            ]:
                with pytest.raises(gradcomp.StateError):
                    sync.load_state_dict(good | {field: value})
            sync.load_state_dict(good | {"states": {"0.weight": {"0:36": {"gradient": {"residual": torch.zeros(3)}}}}})
            if sync.world_size == 1:
                with pytest.raises(gradcomp.StateError, match=r"0\.weight"):
                    train_step(net, optimizer, sync.rank, 1)

    run_ranks(1, rank_main)


def test_stats_say_what_was_sent() -> None:
    def rank_main(transport: Any) -> dict[str, Any]:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        with attach(net, optimizer, transport, compressor="threshold:density=0.05", exchange="all_gather") as sync:
            for step in range(20):
                train_step(net, optimizer, sync.rank, step)
            return sync.stats()

    for stats in run_ranks(3, rank_main):
        elements = sum(p.numel() for p in small_net().parameters())
        assert stats["steps"] == 20
        assert stats["gradient_bytes"] == 20 * 4 * elements
        assert stats["ratio"] == stats["gradient_bytes"] / stats["packet_bytes"] > 1
        assert stats["bytes_sent"] >= 2 * stats["packet_bytes"]
        assert stats["bytes_received"] > 0
        assert 0.005 < stats["density"] < 0.5
        assert stats["tau"] > 0
        assert stats["residual_norm"] > 0
        assert stats["compress_ms"] > 0
        assert stats["decompress_ms"] > 0
        assert stats["wait_ms"] >= 0
        assert 0 <= stats["hidden_fraction"] <= 1
        assert set(stats["parameters"]) == {"0.weight", "4.weight", "6.weight"}


def test_average_is_the_mean_over_ranks() -> None:
    def rank_main(transport: Any) -> torch.Tensor:
        weight = nn.Parameter(torch.zeros(4))
        with gradcomp.attach(torch.optim.SGD([weight], lr=1.0), transport=transport) as sync:
            assert sync.average(torch.zeros(0)).shape == (0,)
            return sync.average(torch.tensor([[float(sync.rank), 1.0]]))

    for got in run_ranks(3, rank_main):
        assert torch.equal(got, torch.tensor([[1.0, 1.0]]))


def test_half_precision_and_strided_gradients() -> None:
    def rank_main(transport: Any) -> None:
        weight = nn.Parameter(torch.zeros(16, 64, dtype=torch.bfloat16))
        strided = nn.Parameter(torch.zeros(4, 8, 3, 3).contiguous(memory_format=torch.channels_last))
        optimizer = torch.optim.SGD([weight, strided], lr=1.0)
        with attach(None, optimizer, transport, compressor="topk:k=100000") as sync:
            ramp = torch.arange(288.0).view(4, 8, 3, 3)
            ((weight * (sync.rank + 1)).sum() + (strided * ramp * (sync.rank + 1)).sum()).backward()
            assert weight.grad is not None
            assert strided.grad is not None
            assert weight.grad.dtype == torch.bfloat16
            assert torch.all(weight.grad == 2)
            torch.testing.assert_close(strided.grad, 2 * ramp)

    run_ranks(3, rank_main)
