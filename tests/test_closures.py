"""L-BFGS and other optimizers whose step computes gradients itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import attach, batch, outcomes, parameters_of, run_ranks
from torch import Tensor, nn

import gradcomp
from gradcomp.errors import ConfigError

STEPS = 4


def smooth_net() -> nn.Sequential:
    """Without BatchNorm, so that halves of a batch are independent; with tanh, so that rounding stays rounding."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 10))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def lbfgs(net: nn.Module, line_search: str | None, max_iter: int = 4) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(
        net.parameters(), lr=1.0 if line_search else 0.1, max_iter=max_iter, history_size=5, line_search_fn=line_search
    )


def train(net: nn.Module, optimizer: Any, ranks: list[int], *, as_float: bool = False, scale: float = 1.0) -> Tensor:
    """``STEPS`` steps on the batches of these ranks together; returns what ``step`` did at last."""
    inputs = torch.cat([batch(rank, 0)[0] for rank in ranks])
    targets = torch.cat([batch(rank, 0)[1] for rank in ranks])

    def closure() -> Any:
        optimizer.zero_grad()
        loss = scale * nn.functional.cross_entropy(net(inputs), targets)
        loss.backward()
        return loss.item() if as_float else loss

    for step in range(STEPS):
        result = optimizer.step(closure) if step % 2 else optimizer.step(closure=closure)
    return torch.as_tensor(result).detach()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_lbfgs_is_that_of_one_process_on_all_data(world_size: int, line_search: str | None, reduction: str) -> None:
    def rank_main(transport: Any) -> tuple[list[Tensor], Tensor]:
        net = smooth_net()
        optimizer = lbfgs(net, line_search)
        with attach(net, optimizer, transport, compressor="none", reduction=reduction, digest_every=1) as sync:
            scale = 1.0 if reduction == "mean" else 1 / world_size
            loss = train(net, optimizer, [sync.rank], as_float=sync.rank == 1, scale=scale)
        return parameters_of(net), loss

    alone = smooth_net()
    loss_alone = train(alone, lbfgs(alone, line_search), list(range(world_size)))
    results = run_ranks(world_size, rank_main)
    for parameters, loss in results:
        assert all(torch.equal(a, b) for a, b in zip(parameters, results[0][0], strict=True))
        torch.testing.assert_close(loss, loss_alone, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(parameters, parameters_of(alone), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize(
    ("spec", "exchange"),
    [
        ("fp16", "auto"),
        ("bf16", "two_shot"),
        ("powersgd:rank=2", "auto"),
        ("powersgd:rank=2", "two_shot"),
        ("powersgd:dense_steps=8", "all_reduce"),
        ("randomk:ratio=0.5", "all_gather"),
        ("randomk:ratio=1", "all_reduce"),
    ],
)
def test_ranks_decide_alike_with_casts_and_linear_compressors(
    spec: str, line_search: str | None, exchange: str
) -> None:
    def rank_main(transport: Any) -> tuple[list[Tensor], int]:
        net = smooth_net()
        optimizer = lbfgs(net, line_search, max_iter=3)
        with attach(net, optimizer, transport, compressor=spec, exchange=exchange, digest_every=1):
            train(net, optimizer, [transport.rank])
        return parameters_of(net), optimizer.state[optimizer.param_groups[0]["params"][0]]["func_evals"]

    (first, evaluations), *others = run_ranks(3, rank_main)
    assert all(p.isfinite().all() for p in first)
    for parameters, count in others:
        assert count == evaluations
        assert all(torch.equal(a, b) for a, b in zip(parameters, first, strict=True))


def test_the_loss_falls() -> None:
    def rank_main(transport: Any, spec: str) -> float:
        net = smooth_net()
        optimizer = lbfgs(net, "strong_wolfe", max_iter=8)
        with attach(net, optimizer, transport, compressor=spec) as sync:
            train(net, optimizer, [sync.rank])
            inputs, targets = batch(sync.rank, 0)
            return float(sync.average(nn.functional.cross_entropy(net(inputs), targets)))

    dense = run_ranks(2, lambda t: rank_main(t, "none"))
    low_rank = run_ranks(2, lambda t: rank_main(t, "powersgd:rank=4,dense_steps=5"))
    assert dense[0] < 0.05
    assert low_rank[0] < 1.0


@pytest.mark.parametrize(
    "compressor",
    [
        "threshold",
        "onebit",
        "qsgd",
        "scheduled",
        {"rules": [{"name": "*weight", "compressor": "topk"}], "default": "none"},
        {"rules": [{"name": "*weight", "compressor": "none"}], "default": "topk"},
    ],
)
def test_lbfgs_refuses_what_it_cannot_work_with(compressor: Any) -> None:
    def rank_main(transport: Any) -> None:
        net = smooth_net()
        attach(net, lbfgs(net, None), transport, compressor=compressor)

    for error in outcomes(2, rank_main):
        assert isinstance(error, ConfigError)
        assert "LBFGS" in str(error)
        assert "linear compressor" in str(error)


def test_lbfgs_refuses_a_later_compressor_and_stays_as_it_is() -> None:
    def rank_main(transport: Any) -> None:
        net = smooth_net()
        optimizer = lbfgs(net, "strong_wolfe")
        with attach(net, optimizer, transport, compressor="none") as sync:
            with pytest.raises(ConfigError, match="'topk' is not for LBFGS"):
                sync.set_compressor("topk")
            sync.set_compressor('scheduled:stages=[[3,"none"]],then="powersgd"')
            train(net, optimizer, [sync.rank])
            sync.check_replicas()

    run_ranks(2, rank_main)


def test_lbfgs_needs_gradients_within_backward() -> None:
    net = smooth_net()
    with pytest.raises(ConfigError, match="LBFGS, which computes gradients anew"):
        gradcomp.attach(lbfgs(net, None), compressor="none", transport="inproc", when="step")


def test_detach_takes_the_closure_back() -> None:
    def rank_main(transport: Any) -> float:
        net = smooth_net()
        optimizer = lbfgs(net, None, max_iter=1)
        sync = attach(net, optimizer, transport, compressor="none")
        sync.detach()
        return float(train(net, optimizer, [transport.rank]))

    first, second = run_ranks(2, rank_main)
    assert first != second


def test_step_without_a_closure_is_the_optimizers_own_error() -> None:
    def rank_main(transport: Any) -> None:
        net = smooth_net()
        optimizer = lbfgs(net, None)
        with attach(net, optimizer, transport, compressor="none"), pytest.raises(TypeError):
            optimizer.step()

    run_ranks(1, rank_main)


def test_other_optimizers_take_closures_as_they_are() -> None:
    def rank_main(transport: Any) -> tuple[list[Tensor], float]:
        net = smooth_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with attach(net, optimizer, transport, compressor="onebit:block=64", digest_every=1) as sync:
            return parameters_of(net), float(train(net, optimizer, [sync.rank]))

    (first, loss), (second, other_loss) = run_ranks(2, rank_main)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert loss != other_loss  # each rank's own


def test_a_closure_after_the_exchange_is_refused() -> None:
    def rank_main(transport: Any) -> None:
        net = smooth_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with attach(net, optimizer, transport, compressor="none", when="step") as sync:
            before = parameters_of(net)
            with pytest.raises(ConfigError, match='when="backward"'):
                train(net, optimizer, [sync.rank])
            assert all(torch.equal(a, b) for a, b in zip(before, parameters_of(net), strict=True))
            nn.functional.cross_entropy(net(batch(sync.rank, 0)[0]), batch(sync.rank, 0)[1]).backward()
            optimizer.step(closure=None)
            sync.check_replicas()

    run_ranks(2, rank_main)
