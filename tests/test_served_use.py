"""What goes wrong with a parameter server, and what is said of it."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
from ports import free_port
from ranks import run_ranks, small_net, train_step
from served import Hub, attach, connect
from torch import nn

import gradcomp
from gradcomp.exchanges.server import Server
from gradcomp.integrations.run_options import RunOptions


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    connect(monkeypatch, hub)
    return hub


def sgd(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), **({"lr": 0.1} | options))


def test_a_spec_says_all_there_is_to_say() -> None:
    spec = 'server:addresses=["a:5000","b:5001"],mode="async:n_push=4,n_fetch=2",pull=topk:ratio=0.01,workers=3,delay=1'
    kind = gradcomp.exchange(spec)
    assert isinstance(kind, Server)
    assert kind.addresses == ["a:5000", "b:5001"]
    assert kind.mode == {"id": "async", "n_push": 4, "n_fetch": 2, "warm_start": 0, "staleness_aware": False}
    assert kind.pull == {"id": "topk", "ratio": 0.01, "k": None}
    assert gradcomp.exchange(kind.config()) == kind
    one = gradcomp.exchange("server:addresses=localhost:5000,mode=ssp:staleness=3")
    assert isinstance(one, Server)
    assert one.addresses == ["localhost:5000"]
    assert one.chosen_mode.config()["staleness"] == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "addresses"),
        ({"addresses": []}, "addresses"),
        ({"addresses": "here"}, "addresses"),
        ({"addresses": ["a:70000"]}, "addresses"),
        ({"mode": "lazy"}, "mode"),
        ({"mode": "ssp:staleness=-1"}, "staleness"),
        ({"pull": "nothing"}, "nothing"),
        ({"workers": 0}, "workers"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"delay": 2}, "delay"),
        ({"delay": 1}, "delay=1 is not allowed with mode sync"),
        ({"worker": ""}, "worker"),
        ({"color": 1}, "color"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], named: str) -> None:
    given = {"id": "server"} | ({"addresses": "a:1"} if options and "addresses" not in options else {}) | options
    with pytest.raises(gradcomp.ConfigError, match=named):
        gradcomp.exchange(given)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"transport": "zmq"}, "transport"),
        ({"when": "step"}, "when"),
        ({"buffers": "average"}, "buffers"),
        ({"bucket_bytes": 1 << 20}, "bucket_bytes"),
        ({"digest_every": 1}, "digest_every"),
        ({"reduction": "max"}, "reduction"),
        ({"pull": "adaptive:clip=5"}, "pull=Adaptive"),
    ],
)
def test_what_attach_does_not_take_with_a_server(hub: Hub, options: dict[str, Any], named: str) -> None:
    net = small_net()
    with pytest.raises((gradcomp.ConfigError, gradcomp.HandshakeError), match=named):
        attach(hub, net, sgd(net), 0, 1, **options)


class Own(torch.optim.SGD):
    pass


@pytest.mark.parametrize("make", [torch.optim.LBFGS, Own, torch.optim.SparseAdam])
def test_optimizers_a_server_does_not_run(hub: Hub, make: Any) -> None:
    net = small_net()
    with pytest.raises(gradcomp.ConfigError, match=rf"{make.__name__}.*must be one of SGD"):
        attach(hub, net, make(net.parameters()), 0, 1)


def test_a_learning_rate_that_is_no_number(hub: Hub) -> None:
    net = small_net()
    optimizer = sgd(net)
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(gradcomp.ConfigError, match="lr"):
        attach(hub, net, optimizer, 0, 1)


def test_a_server_is_for_attach_alone() -> None:
    spec = "server:addresses=127.0.0.1:5000"

    def rank_main(transport: Any) -> None:
        net = small_net()
        with pytest.raises(gradcomp.ConfigError, match="no ranks that meet"):
            gradcomp.GradientExchange(
                list(net.named_parameters()),
                compressor=gradcomp.compressor("none"),
                transport=transport,
                exchange=gradcomp.exchange(spec),
            )

    run_ranks(1, rank_main)


def test_closures_and_new_groups_are_refused(hub: Hub) -> None:
    net = small_net()
    with attach(hub, net, optimizer := sgd(net), 0, 1):
        train_step(net, optimizer, 0, 0)
        with pytest.raises(gradcomp.ConfigError, match="closure"):
            optimizer.step(lambda: 0.0)
        with pytest.raises(gradcomp.ConfigError, match="add_param_group"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        assert len(optimizer.param_groups) == 1
        train_step(net, optimizer, 0, 1)


def test_a_fused_optimizer_with_a_scaler_is_refused(hub: Hub) -> None:
    net = small_net()
    scaler = torch.amp.GradScaler("cpu")
    with attach(hub, net, optimizer := sgd(net, fused=True), 0, 1, scaler=scaler):
        scaler.scale(net(torch.ones(2, 1, 4, 4)).sum()).backward()
        with pytest.raises(gradcomp.ConfigError, match="fused=False"):
            scaler.step(optimizer)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"compressor": "topk"}, "tensors"),
        ({"pull": "topk"}, "tensors"),
        ({"mode": "async"}, "mode"),
        ({"reduction": "sum"}, "reduction"),
        ({"workers": 3}, "workers"),
    ],
)
def test_workers_that_differ_are_refused(hub: Hub, options: dict[str, Any], field: str) -> None:
    net, other = small_net(), small_net()
    workers = options.pop("workers", 2)
    with attach(hub, net, sgd(net), 0, 2):
        with pytest.raises(gradcomp.HandshakeError, match=field) as caught:
            attach(hub, other, sgd(other), 1, workers, **options)
        assert caught.value.field == field


def test_another_model_and_another_optimizer_are_refused(hub: Hub) -> None:
    net, other = small_net(), nn.Linear(3, 3)
    with attach(hub, net, sgd(net), 0, 2):
        with pytest.raises(gradcomp.HandshakeError, match="tensors"):
            attach(hub, other, sgd(other), 1, 2)
        with pytest.raises(gradcomp.HandshakeError, match="optimizer"):
            attach(hub, net, torch.optim.Adam(net.parameters()), 1, 2)
        with attach(hub, again := small_net(), sgd(again, lr=0.3, momentum=0.5), 1, 2):
            pass  # numbers may differ: they travel with each push


def test_two_workers_of_one_name(hub: Hub) -> None:
    net, other = small_net(), small_net()
    with attach(hub, net, sgd(net), 0, 2), pytest.raises(gradcomp.TransportTimeout, match="another worker '0'"):
        attach(hub, other, sgd(other), 0, 2, timeout_s=0.3)


@pytest.mark.parametrize(("retry", "least_s"), [(True, 1.0), (False, 0.0)])
def test_no_server_there(retry: bool, least_s: float) -> None:
    net = small_net()
    exchange = {"id": "server", "addresses": f"127.0.0.1:{free_port()}", "timeout_s": 3.0, "retry": retry}
    begun = time.monotonic()
    with pytest.raises(gradcomp.TransportTimeout, match="nobody listens there"):
        gradcomp.attach(sgd(net), model=net, exchange=exchange)
    assert time.monotonic() - begun > least_s


def test_checkpoints_of_ranks_are_refused(hub: Hub, tmp_path: Any) -> None:
    net = small_net()
    with attach(hub, net, sgd(net), 0, 1) as sync:
        with pytest.raises(gradcomp.ConfigError, match="--state"):
            gradcomp.save_checkpoint(tmp_path, sync)
        with pytest.raises(gradcomp.ConfigError, match="--state"):
            gradcomp.load_checkpoint(tmp_path, sync)


def test_a_worker_that_has_left_is_gone(hub: Hub) -> None:
    net = small_net()
    sync = attach(hub, net, optimizer := sgd(net), 0, 1)
    sync.close()
    sync.close()
    with pytest.raises(gradcomp.TransportError, match="left"):
        train_step(net, optimizer, 0, 0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mode": "async"}, "--mode async is not allowed without --server"),
        ({"server": "a:1", "exchange": "two_shot"}, "--exchange two_shot is not allowed with --server"),
        ({"server": "a:1", "transport": "zmq"}, "--transport zmq is not allowed"),
        ({"server": "a"}, "addresses"),
        ({"slow": "1:2"}, "RANK=SECONDS"),
    ],
)
def test_command_lines_that_contradict_themselves(options: dict[str, Any], named: str) -> None:
    with pytest.raises(gradcomp.ConfigError, match=re.escape(named)):
        RunOptions(task="gradcomp.examples.tasks.digits", **options).check()
