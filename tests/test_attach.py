"""What :func:`gradcomp.attach` refuses, by name, and what happens when it ends."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from ranks import attach, outcomes, run_ranks, small_net
from torch import nn

import gradcomp


def test_a_sparse_gradient_is_refused_and_the_others_hear_of_it() -> None:
    def rank_main(transport: Any) -> None:
        table = nn.Embedding(10, 4, sparse=transport.rank == 1)
        optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
        attach(table, optimizer, transport)
        table(torch.tensor([1, 2])).sum().backward()

    errors = outcomes(3, rank_main)
    assert isinstance(errors[1], gradcomp.GradientError)
    assert "'weight'" in str(errors[1])
    for rank in (0, 2):
        assert isinstance(errors[rank], gradcomp.PeerLost)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("compressor", {"compressor": "topk"}),
        ("exchange", {"exchange": "two_shot"}),
        ("reduction", {"reduction": "sum"}),
        ("when", {"when": "step"}),
        ("bucket_bytes", {"bucket_bytes": 4096}),
        ("digest_every", {"digest_every": 7}),
        ("tensors", {"dense": gradcomp.DenseRule(min_numel=10**6)}),
    ],
)
def test_ranks_that_differ_are_refused(field: str, options: dict[str, Any]) -> None:
    def rank_main(transport: Any) -> None:
        net = small_net()
        attach(net, torch.optim.SGD(net.parameters(), lr=1.0), transport, **(options if transport.rank == 1 else {}))

    for error in outcomes(3, rank_main):
        assert isinstance(error, gradcomp.HandshakeError)
        assert error.field == field
        assert field in str(error)


def test_ranks_with_different_models_are_refused() -> None:
    def rank_main(transport: Any) -> None:
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5 if transport.rank == 2 else 4))
        attach(net, torch.optim.SGD(net.parameters(), lr=1.0), transport)

    for error in outcomes(3, rank_main):
        assert isinstance(error, gradcomp.HandshakeError)
        assert error.field == "tensors"
        assert "tensor 2" in str(error)


def test_ranks_with_different_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import gradcomp.engine

    versions = iter(["0.1.0", "0.2.0"])
    real = gradcomp.engine.GradientExchange._hello

    def rank_main(transport: Any) -> None:
        net = small_net()
        attach(net, torch.optim.SGD(net.parameters(), lr=1.0), transport)

    monkeypatch.setattr(
        gradcomp.engine.GradientExchange,
        "_hello",
        lambda self: real(self) | {"version": next(versions)},
    )
    for error in outcomes(2, rank_main):
        assert isinstance(error, gradcomp.HandshakeError)
        assert error.field == "version"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compressor": "zip"}, "unknown compressor 'zip'; available: .*threshold"),
        ({"compressor": "threshold:tua=1"}, "unknown option 'tua'.*tau"),
        ({"compressor": "threshold:tau=-1"}, "tau=-1"),
        ({"compressor": {"tau": 1}}, "'id'"),
        ({"compressor": 3}, "3 is not a spec"),
        ({"exchange": "ring"}, "unknown exchange 'ring'"),
        ({"transport": "pigeon"}, "unknown transport 'pigeon'"),
        ({"reduction": "median"}, "reduction='median'.*mean, sum"),
        ({"when": "later"}, "when='later'"),
        ({"bucket_bytes": 0}, "bucket_bytes=0"),
        ({"digest_every": -1}, "digest_every=-1"),
        ({"model": nn.Linear(2, 2)}, "model=Linear"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(4))], lr=1.0)
    with pytest.raises(gradcomp.ConfigError, match=message):
        gradcomp.attach(optimizer, **({"transport": "inproc:rank=0,world_size=1,hub=bad"} | options))


def test_nothing_to_exchange_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(4), requires_grad=False)
    with pytest.raises(gradcomp.ConfigError, match="no parameters"):
        gradcomp.attach(torch.optim.SGD([weight], lr=1.0), transport="inproc:rank=0,world_size=1,hub=none")


def test_detach_leaves_a_loop_that_trains_locally() -> None:
    def rank_main(transport: Any) -> torch.Tensor:
        weight = nn.Parameter(torch.zeros(4))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        sync = gradcomp.attach(optimizer, transport=transport, compressor="none")
        sync.detach()
        sync.close()
        (weight * (transport.rank + 1)).sum().backward()
        assert weight.grad is not None
        return weight.grad

    for rank, grad in enumerate(run_ranks(2, rank_main)):
        assert torch.all(grad == rank + 1)


def test_use_after_close_is_an_error() -> None:
    def rank_main(transport: Any) -> None:
        weight = nn.Parameter(torch.zeros(4))
        sync = gradcomp.attach(torch.optim.SGD([weight], lr=1.0), transport=transport)
        sync.close()
        with pytest.raises(gradcomp.TransportError):
            weight.sum().backward()

    run_ranks(2, rank_main)


def test_a_rank_that_stays_away_is_named() -> None:
    def rank_main(transport: Any) -> None:
        weight = nn.Parameter(torch.zeros(4))
        sync = gradcomp.attach(torch.optim.SGD([weight], lr=1.0), transport=transport)
        if transport.rank == 0:
            with pytest.raises(gradcomp.TransportTimeout, match="rank 1"):
                weight.sum().backward()
        else:
            time.sleep(2.0)
        sync.close()

    run_ranks(2, rank_main, timeout_s=0.5)
