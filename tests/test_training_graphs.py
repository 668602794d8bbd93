"""Backward passes that are not one plain pass over everything."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ranks import attach, outcomes, parameters_of, run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import Branches, Checkpointed, filled, noise, perceptron, sgd, zmq_world

import gradcomp
from gradcomp import testing_transport
from gradcomp.transports.zmq import ZmqTransport

COMPRESSORS = ["none", "threshold:tau=0.01"]


def trained(transport: Any, net: nn.Module, forward: Any, steps: int = 4, **options: Any) -> list[Tensor]:
    """``forward(net, inputs)`` trained for some steps."""
    optimizer = sgd(net)
    with attach(net, optimizer, transport, digest_every=1, **options) as sync:
        for step in range(steps):
            optimizer.zero_grad()
            forward(net, noise(sync.rank, step, 6, 12)).square().mean().backward()
            optimizer.step()
        assert sync.stats()["steps"] == steps
    return parameters_of(net)


def same(first: list[list[Tensor]], second: list[list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


class OnlyBlocks(Checkpointed):
    """All parameters are inside of checkpoints, and some of them are not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2, 2)

    def forward(self, inputs: Tensor, *, reentrant: bool = True) -> Tensor:
        for block in self.blocks:
            inputs = checkpoint(block, inputs, use_reentrant=reentrant)
        return inputs


class Nested(OnlyBlocks):
    """Checkpoints inside of a checkpoint."""

    def forward(self, inputs: Tensor, *, reentrant: bool = True) -> Tensor:
        def outer(hidden: Tensor) -> Tensor:
            return OnlyBlocks.forward(self, hidden, reentrant=reentrant)

        return torch.as_tensor(checkpoint(outer, inputs, use_reentrant=reentrant))


class TestCheckpoints:
    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # a checkpoint within one, in forward
    @pytest.mark.parametrize("leaf", [True, False])
    @pytest.mark.parametrize("kind", [Checkpointed, OnlyBlocks, Nested])
    def test_reentrant_or_not_changes_no_bit(self, kind: type[Checkpointed], leaf: bool) -> None:
        """The exchange ends with the outermost backward pass, not with a checkpoint's, and runs once."""

        def plain(net: nn.Module, inputs: Tensor) -> Tensor:
            for block in net.blocks:  # type: ignore[union-attr]
                inputs = block(inputs)
            return torch.as_tensor(net.last(inputs) if kind is Checkpointed else inputs)  # type: ignore[operator]

        def reentrant(net: nn.Module, inputs: Tensor) -> Tensor:
            inputs.requires_grad_()
            return torch.as_tensor(net(inputs if leaf else inputs * 1))

        ways = [plain, reentrant, lambda net, inputs: net(inputs, reentrant=False)]
        found = [
            run_ranks(
                2,
                lambda t, way=way: trained(t, filled(kind()), way, compressor="threshold:tau=0.01", bucket_bytes=256),
            )
            for way in ways
        ]
        assert same(found[0], found[1])
        assert same(found[0], found[2])

    def test_a_weight_in_two_reentrant_checkpoints_is_a_clear_error(self) -> None:
        """As with DistributedDataParallel: its gradient is complete after the second, but nothing tells."""

        def rank_main(transport: Any) -> None:
            layer = nn.Linear(12, 12)
            optimizer = sgd(layer)
            attach(layer, optimizer, transport)
            inputs = noise(transport.rank, 0, 6, 12).requires_grad_()
            for _ in range(2):
                inputs = checkpoint(layer, inputs, use_reentrant=True)
            inputs.sum().backward()

        errors = outcomes(2, rank_main)
        assert any("use_reentrant=False" in str(error) for error in errors)
        for error in errors:
            assert isinstance(error, gradcomp.GradientError | gradcomp.PeerLost)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_compiled_model_trains_as_it_does_without(compressor: str) -> None:
    def forward(net: nn.Module, inputs: Tensor) -> Tensor:
        return torch.as_tensor(torch.compile(net, backend="aot_eager")(inputs))

    # One rank: torch compiles in one thread at a time, and ranks are threads here.
    found = [[trained("inproc", perceptron(), way, compressor=compressor)] for way in (forward, lambda n, x: n(x))]
    assert same(*found)


def test_memory_formats_of_gradients_are_kept() -> None:
    def rank_main(transport: Any, memory_format: torch.memory_format) -> list[Tensor]:
        net = filled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 2), nn.Flatten()))
        net = net.to(memory_format=memory_format)
        optimizer = sgd(net)
        with attach(net, optimizer, transport, compressor="threshold:tau=0.01", digest_every=1) as sync:
            for step in range(3):
                optimizer.zero_grad()
                inputs = noise(sync.rank, step, 5, 3, 6, 6).contiguous(memory_format=memory_format)
                net(inputs).square().mean().backward()
                weight = net[0].weight
                assert weight.grad is not None
                assert weight.grad.stride() == weight.stride()
                optimizer.step()
        return parameters_of(net)

    last = run_ranks(2, lambda transport: rank_main(transport, torch.channels_last))
    first = run_ranks(2, lambda transport: rank_main(transport, torch.contiguous_format))
    assert same(last[:1], last[1:])
    for a, b in zip(last[0], first[0], strict=True):  # convolutions add up in another order
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_several_losses_over_one_graph(compressor: str) -> None:
    """Under no_sync but for the last: as one loss that is their sum."""

    def rank_main(transport: Any, apart: bool) -> list[Tensor]:
        net = perceptron()
        optimizer = sgd(net)
        with attach(net, optimizer, transport, compressor=compressor, digest_every=1) as sync:
            for step in range(3):
                optimizer.zero_grad()
                outputs = net(noise(sync.rank, step, 6, 12))
                losses = outputs.square().mean(), outputs.abs().mean()
                if apart:
                    with sync.no_sync():
                        losses[0].backward(retain_graph=True)
                    losses[1].backward()
                else:
                    sum(losses).backward()  # type: ignore[union-attr]
                optimizer.step()
            assert sync.stats()["steps"] == 3
        return parameters_of(net)

    apart, summed = (run_ranks(2, lambda t, way=way: rank_main(t, way)) for way in (True, False))
    assert same(apart[:1], apart[1:])
    for a, b in zip(apart[0], summed[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 if compressor == "none" else 3e-3)


def test_autograd_grad_exchanges_nothing_and_may_enter_a_loss() -> None:
    """A gradient penalty: the inner gradient stays this rank's, its loss is exchanged."""

    def rank_main(transport: Any) -> list[Tensor]:
        net = perceptron()
        optimizer = sgd(net)
        with attach(net, optimizer, transport, compressor="none", digest_every=1) as sync:
            for step in range(3):
                inputs = noise(sync.rank, step, 6, 12).requires_grad_()
                optimizer.zero_grad()
                outputs = net(inputs)
                found = torch.autograd.grad(outputs.sum(), [inputs, *net.parameters()], create_graph=True)
                assert sync.stats()["steps"] == step
                assert all(p.grad is None for p in net.parameters())
                (outputs.square().mean() + found[0].square().mean()).backward()
                optimizer.step()
        return parameters_of(net)

    found = run_ranks(2, rank_main)
    assert same(found[:1], found[1:])


def test_gradient_hooks_of_ones_own_come_before_the_exchange() -> None:
    def rank_main(transport: Any) -> Tensor:
        weight = nn.Parameter(torch.zeros(4))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        weight.register_hook(lambda grad: 2 * grad)
        with gradcomp.attach(optimizer, transport=transport, compressor="none"):
            (weight * (transport.rank + 1.0)).sum().backward()
        assert weight.grad is not None
        return weight.grad

    for grad in run_ranks(2, rank_main):
        assert torch.all(grad == 3.0)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_graph_of_the_gradients_themselves(compressor: str) -> None:
    def rank_main(transport: Any) -> list[Tensor]:
        net = perceptron()
        with attach(net, sgd(net), transport, compressor=compressor):
            net(noise(transport.rank, 0, 6, 12)).square().mean().backward(create_graph=True)
            found = [p.grad.detach().clone() for p in net.parameters() if p.grad is not None]
            net.zero_grad()  # parameters and gradients refer to each other
        return found

    found = run_ranks(2, rank_main)
    assert len(found[0]) == 4
    assert same(found[:1], found[1:])


class TestNoGradient:
    """A rank whose backward pass reaches no parameter never starts to exchange: the others wait for it."""

    def test_exchange_takes_part_without_a_gradient(self) -> None:
        def rank_main(transport: Any) -> list[Tensor]:
            net = perceptron()
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            with attach(net, optimizer, transport, compressor="none", digest_every=1) as sync:
                optimizer.zero_grad()
                if sync.rank == 0:
                    net(noise(0, 0, 6, 12)).square().mean().backward()
                else:
                    sync.exchange()  # what such a rank calls instead
                optimizer.step()
            return parameters_of(net)

        found = run_ranks(2, rank_main)
        assert same(found[:1], found[1:])

    def test_a_step_without_exchange_is_warned_of_once(self, caplog: pytest.LogCaptureFixture) -> None:
        def rank_main(transport: Any) -> None:
            net = perceptron()
            optimizer = sgd(net)
            with attach(net, optimizer, transport) as sync:
                for step in range(3):
                    with sync.no_sync():
                        net(noise(sync.rank, step, 6, 12)).sum().backward()
                    optimizer.step()

        caplog.set_level(logging.WARNING, "gradcomp")
        run_ranks(2, rank_main)
        assert sum("without an exchange" in record.message for record in caplog.records) == 2


def test_gradients_that_cannot_be_exchanged_are_refused() -> None:
    weight = nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    with pytest.raises(gradcomp.ConfigError, match="complex64"):
        gradcomp.attach(torch.optim.SGD([nn.Parameter(torch.zeros(2)), weight]), transport="inproc")


class Samples(torch.utils.data.IterableDataset[Tensor]):
    """A few rows, from another process."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from (noise(0, step, 12) for step in range(8))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")  # that is what is tested
def test_data_loader_workers_beside_a_zeromq_transport() -> None:
    """They are forks of a process that has sockets and threads: they must not touch these, nor take them down."""

    def rank_main(transport: Any) -> list[Tensor]:
        net = perceptron()
        optimizer = sgd(net)
        with attach(net, optimizer, transport, compressor="none", digest_every=1) as sync:
            for _ in range(2):  # workers come and go
                loader = torch.utils.data.DataLoader(Samples(), batch_size=4, num_workers=1 - sync.rank)
                for inputs in loader:
                    optimizer.zero_grad()
                    net(inputs).square().mean().backward()
                    optimizer.step()
            assert sync.stats()["steps"] == 4
        return parameters_of(net)

    found = testing_transport.run_ranks(zmq_world(), rank_main)
    assert same(found[:1], found[1:])


def test_two_exchanges_in_one_process() -> None:
    """Generator and discriminator, each with its own optimizer and transport, taking turns."""

    def rank_main(transport: Any) -> list[Tensor]:
        other = ZmqTransport(
            rank=transport.rank, world_size=2, master=transport.master, run="discriminator", timeout_s=30.0
        )
        maker, judge = filled(nn.Linear(3, 12), 1), filled(nn.Linear(12, 1), 2)
        optimizers = sgd(maker), sgd(judge)
        options = {"compressor": "threshold:tau=0.01", "digest_every": 1}
        with attach(maker, optimizers[0], transport, **options) as ours, attach(judge, optimizers[1], other, **options):
            for step in range(4):
                fake = maker(noise(ours.rank, step, 6, 3))
                optimizers[1].zero_grad()
                (judge(fake.detach()) - judge(noise(ours.rank, 100 + step, 6, 12))).mean().backward()
                optimizers[1].step()
                optimizers[0].zero_grad()
                judge.requires_grad_(False)
                (-judge(fake)).mean().backward()
                judge.requires_grad_(True)
                optimizers[0].step()
        return [*parameters_of(maker), *parameters_of(judge)]

    found = testing_transport.run_ranks(zmq_world(run="generator"), rank_main)
    assert same(found[:1], found[1:])


def test_a_layer_used_by_some_ranks_only_when_the_exchange_is_two_shot() -> None:
    def rank_main(transport: Any) -> list[Tensor]:
        net = filled(Branches())
        return trained(
            transport, net, lambda n, x: n(x, transport.rank % 2), compressor="topk:ratio=0.3", exchange="two_shot"
        )

    found = run_ranks(3, rank_main)
    assert same(found[:1] * 2, found[1:])
