"""Parameters that come, go, freeze and are shared while training goes on."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from ranks import attach, outcomes, parameters_of, run_ranks
from torch import Tensor, nn
from training import Tied, filled, noise, perceptron, sgd

import gradcomp

COMPRESSORS = ["none", "threshold:tau=0.01", "onebit:block=64"]
EXCHANGES = ["all_gather", "two_shot", "tree"]


def step_of(net: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    optimizer.zero_grad()
    net(noise(rank, step, 6, 12)).square().mean().backward()
    optimizer.step()


def replicas(world_size: int, function: Any) -> list[Tensor]:
    """What all ranks return, which must be the same bits."""
    first, *others = run_ranks(world_size, function)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    return list(first)


class TestFreezing:
    @pytest.mark.parametrize("exchange", EXCHANGES)
    @pytest.mark.parametrize("compressor", COMPRESSORS)
    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_a_frozen_layer_costs_nothing_and_stays(self, compressor: str, exchange: str, set_to_none: bool) -> None:
        def rank_main(transport: Any) -> list[Tensor]:
            net = perceptron()
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            with attach(net, optimizer, transport, compressor=compressor, exchange=exchange, digest_every=1) as sync:
                sent = [0]
                for step in range(9):
                    frozen = 3 <= step < 6
                    net[0].requires_grad_(not frozen)  # type: ignore[operator]
                    optimizer.zero_grad(set_to_none=set_to_none)
                    before = parameters_of(net)
                    residual = sync.state_dict()["states"].get("0.weight")
                    net(noise(sync.rank, step, 6, 12)).square().mean().backward()
                    optimizer.step()
                    same = [torch.equal(a, b) for a, b in zip(before, parameters_of(net), strict=True)]
                    assert same == [frozen, frozen, False, False]
                    assert set_to_none is False or (net[0].weight.grad is None) == frozen  # type: ignore[index]
                    if frozen:  # what is held back waits until it is unfrozen
                        assert str(sync.state_dict()["states"].get("0.weight")) == str(residual)
                    sent.append(sync.stats()["packet_bytes"])
                each = [b - a for a, b in itertools.pairwise(sent)]
                assert max(each[3:6]) < min(each[:3] + each[6:])
            return parameters_of(net)

        replicas(2, rank_main)

    @pytest.mark.parametrize("compressor", COMPRESSORS)
    def test_frozen_when_attached_and_unfrozen_later(self, compressor: str) -> None:
        def rank_main(transport: Any) -> list[Tensor]:
            net = perceptron()
            net[0].requires_grad_(False)  # type: ignore[operator]
            optimizer = sgd(net)
            with attach(net, optimizer, transport, compressor=compressor, digest_every=1) as sync:
                for step in range(6):
                    if step == 3:
                        net[0].requires_grad_(True)  # type: ignore[operator]
                    step_of(net, optimizer, sync.rank, step)
                    assert (net[0].weight.grad is None) == (step < 3)  # type: ignore[index]
            return parameters_of(net)

        found = replicas(2, rank_main)
        if compressor != "none":
            return
        net = perceptron()  # one process on the union of the data: equal batches, so the mean of means is the mean
        optimizer = sgd(net)
        for step in range(6):
            net[0].requires_grad_(step >= 3)  # type: ignore[operator]
            optimizer.zero_grad()
            net(torch.cat([noise(rank, step, 6, 12) for rank in range(2)])).square().mean().backward()
            optimizer.step()
        for ours, expected in zip(found, net.parameters(), strict=True):
            torch.testing.assert_close(ours, expected.detach(), rtol=1e-5, atol=1e-6)


class TestGroups:
    @pytest.mark.parametrize("when", ["backward", "step"])
    @pytest.mark.parametrize("with_model", [True, False])
    @pytest.mark.parametrize("compressor", COMPRESSORS)
    def test_a_group_added_in_mid_run_is_exchanged_from_then_on(
        self, compressor: str, with_model: bool, when: str
    ) -> None:
        def rank_main(transport: Any) -> list[Tensor]:
            net = perceptron()
            with torch.no_grad():
                net[0].weight += transport.rank  # type: ignore[index, operator]
            optimizer = torch.optim.SGD(net[2].parameters(), lr=0.1, momentum=0.9)  # type: ignore[index]
            options = {"compressor": compressor, "when": when, "digest_every": 1}
            with attach(net if with_model else None, optimizer, transport, **options) as sync:
                for step in range(3):
                    step_of(net, optimizer, sync.rank, step)
                held = sync.stats()["residual_norm"]
                optimizer.add_param_group({"params": list(net[0].parameters()), "lr": 0.05})  # type: ignore[index]
                assert sync.stats()["residual_norm"] == held
                for step in range(3, 6):
                    step_of(net, optimizer, sync.rank, step)
                assert len(sync.stats()["compressors"]) == 4
            return parameters_of(net)

        replicas(2, rank_main)

    def test_residuals_of_those_that_stay_are_kept(self) -> None:
        """Nothing is lost on the way: what was computed is what was applied, and what is held back."""
        lr, steps = 0.5, 6

        def rank_main(transport: Any) -> list[Tensor]:
            first, second = (nn.Parameter(torch.zeros(40, 3)) for _ in range(2))
            total = torch.zeros(40, 3)
            optimizer = torch.optim.SGD([first], lr=lr)
            with attach(None, optimizer, transport, compressor="topk:ratio=0.1") as sync:
                for step in range(steps):
                    if step == 3:
                        optimizer.add_param_group({"params": [second]})
                    optimizer.zero_grad()
                    grad = noise(sync.rank, step, 40, 3)
                    total += grad
                    ((first + second) * grad).sum().backward()
                    optimizer.step()
                states = sync.state_dict()["states"]
                residual = states["group0.0"]["0:120"]["gradient"]["residual"]
            return [total, residual.view(40, 3), first.detach()]

        ranks = run_ranks(2, rank_main)
        computed, held = (sum(rank[i] for rank in ranks) for i in range(2))
        torch.testing.assert_close(ranks[0][2] * (-2 / lr) + held, computed, rtol=1e-4, atol=1e-5)

    def test_another_models_parameters_are_refused_and_the_group_is_taken_back(self) -> None:
        def rank_main(transport: Any) -> list[Tensor]:
            net = perceptron()
            optimizer = sgd(net)
            with attach(net, optimizer, transport, digest_every=1) as sync:
                step_of(net, optimizer, sync.rank, 0)
                with pytest.raises(gradcomp.ConfigError, match="model=Sequential"):
                    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(4))]})
                assert len(optimizer.param_groups) == 1
                step_of(net, optimizer, sync.rank, 1)
            return parameters_of(net)

        replicas(2, rank_main)

    def test_ranks_that_add_different_groups_are_refused_and_go_on(self) -> None:
        def rank_main(transport: Any) -> list[Tensor]:
            net = perceptron()
            optimizer = torch.optim.SGD(net[2].parameters(), lr=0.1)  # type: ignore[index]
            with attach(net, optimizer, transport, digest_every=1) as sync:
                more = net[0].weight if sync.rank else net[0].bias  # type: ignore[index]
                with pytest.raises(gradcomp.HandshakeError) as caught:
                    optimizer.add_param_group({"params": [more]})
                assert caught.value.field == "tensors"
                assert len(optimizer.param_groups) == 1
                step_of(net, optimizer, sync.rank, 1)
                assert len(sync.stats()["compressors"]) == 2
                # Nothing stands in the way of trying again.
                optimizer.add_param_group({"params": list(net[0].parameters())})  # type: ignore[index]
                step_of(net, optimizer, sync.rank, 2)
            return parameters_of(net)

        replicas(2, rank_main)

    def test_during_a_step_it_is_refused(self) -> None:
        def rank_main(transport: Any) -> None:
            net = perceptron()
            optimizer = torch.optim.SGD(net[2].parameters(), lr=0.1)  # type: ignore[index]
            more = {"params": list(net[0].parameters())}  # type: ignore[index]
            with attach(net, optimizer, transport, bucket_bytes=4):
                hidden = torch.tanh(net[0](noise(transport.rank, 0, 6, 12)))  # type: ignore[index]
                # Backward comes here when the layer behind it has its gradients: its buckets have left.
                hidden.register_hook(lambda _: optimizer.add_param_group(more))
                net[2](hidden).square().mean().backward()  # type: ignore[index]

        for error in outcomes(2, rank_main):
            assert isinstance(error, gradcomp.ConfigError | gradcomp.PeerLost)
        assert any("a step is under way" in str(error) for error in outcomes(2, rank_main))

    def test_more_than_was_agreed_on_is_refused(self) -> None:
        """Without model= nobody could know at the start how much would come."""

        def rank_main(transport: Any) -> None:
            net = perceptron()
            optimizer = sgd(net)
            with attach(None, optimizer, transport):
                with pytest.raises(gradcomp.ConfigError, match="were agreed on"):
                    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2048, 4096))]})
                assert len(optimizer.param_groups) == 1
                step_of(net, optimizer, transport.rank, 0)

        run_ranks(2, rank_main)

    def test_detach_gives_the_optimizer_its_own_method_back(self) -> None:
        net = perceptron()
        optimizer = torch.optim.SGD(net[2].parameters(), lr=0.1)  # type: ignore[index]
        sync = attach(net, optimizer, "inproc")
        assert "add_param_group" in vars(optimizer)
        sync.detach()
        assert "add_param_group" not in vars(optimizer)
        optimizer.add_param_group({"params": list(net[0].parameters())})  # type: ignore[index]
        step_of(net, optimizer, 0, 0)
        assert sync.stats()["steps"] == 0


class TestShared:
    @pytest.mark.parametrize("with_model", [True, False])
    @pytest.mark.parametrize("compressor", COMPRESSORS)
    def test_a_tied_weight_is_exchanged_once(self, compressor: str, with_model: bool) -> None:
        def rank_main(transport: Any) -> list[Tensor]:
            net = filled(Tied())
            optimizer = sgd(net)
            options = {"compressor": compressor, "digest_every": 1}
            with attach(net if with_model else None, optimizer, transport, **options) as sync:
                for step in range(4):
                    words = torch.arange(6) * (sync.rank + 2 + step) % 11
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(net(words), words).backward()
                    optimizer.step()
                assert sync.stats()["gradient_bytes"] == 4 * 4 * sum(p.numel() for p in net.parameters())
            assert net.decoder.weight is net.embedding.weight  # type: ignore[union-attr]
            return parameters_of(net)

        replicas(2, rank_main)
