"""torch.amp.GradScaler: its scale is divided out before compression, and a step one rank must skip all skip."""

from __future__ import annotations

import io
import itertools
import logging
import math
from typing import Any

import pytest
import torch
from ranks import attach, outcomes, parameters_of, run_ranks
from torch import Tensor, nn
from training import filled, noise, sgd

import gradcomp

COMPRESSORS = [
    *(spec for spec in gradcomp.available_compressors() if spec not in ("scheduled", "fp16")),
    "threshold:tau=0.02",
    "threshold:density=0.1",
    "signsgd:variant=majority,scale=0.01",
    'scheduled:stages=[[2,"topk:ratio=0.1"]],then="threshold:tau=0.02"',
]
EXCHANGES = ["all_gather", "two_shot", "tree"]


def saved(sync: Any) -> bytes:
    torch.save(sync.state_dict()["states"], file := io.BytesIO())
    return file.getvalue()


def network() -> nn.Module:
    """Large enough for two_shot to cut the first layer."""
    return filled(nn.Sequential(nn.Linear(24, 400), nn.Tanh(), nn.Linear(400, 4)))


def train(
    transport: Any, scaler: Any, *, steps: int = 5, micro_steps: int = 1, options: Any = None, optimizer: Any = sgd
) -> tuple[list[Tensor], bytes]:
    net = network()
    trainer = optimizer(net)
    given = {"digest_every": 1} | (options or {})
    with attach(net, trainer, transport, scaler=scaler, **given) as sync:
        for step in range(steps):
            trainer.zero_grad()
            for micro in range(micro_steps):
                loss = net(noise(sync.rank, 7 * step + micro, 6, 24)).square().mean()
                syncing = micro == micro_steps - 1
                with torch.enable_grad() if syncing else sync.no_sync():
                    (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                trainer.step()
            else:
                scaler.step(trainer)
                scaler.update()
        return parameters_of(net), saved(sync)


def scaler_of(scale: float = 4096.0, growth_interval: int = 1000) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)


def both(options: dict[str, Any], scaler: dict[str, Any] | None = None, **how: Any) -> tuple[Any, Any]:
    """What two ranks end with, without a scaler and with one."""
    without = run_ranks(2, lambda transport: train(transport, None, options=options, **how))
    scaled = run_ranks(2, lambda transport: train(transport, scaler_of(**(scaler or {})), options=options, **how))
    return without, scaled


def assert_same(without: Any, scaled: Any) -> None:
    for (ours, residuals), (theirs, their_residuals) in zip(without, scaled, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert residuals == their_residuals


class TestScaleIsDividedOut:
    @pytest.mark.parametrize("exchange", EXCHANGES)
    @pytest.mark.parametrize("compressor", COMPRESSORS)
    def test_a_power_of_two_changes_no_bit(self, compressor: str, exchange: str) -> None:
        assert_same(*both({"compressor": compressor, "exchange": exchange}))

    @pytest.mark.parametrize("compressor", ["none", "powersgd:rank=2", "randomk:ratio=0.1"])
    def test_in_an_all_reduce_too(self, compressor: str) -> None:
        assert_same(*both({"compressor": compressor, "exchange": "all_reduce"}))

    @pytest.mark.parametrize("compressor", ["threshold:tau=0.02", "onebit"])
    def test_while_the_scale_grows_and_over_micro_steps(self, compressor: str) -> None:
        assert_same(*both({"compressor": compressor}, {"growth_interval": 1}, micro_steps=3))

    @pytest.mark.parametrize("compressor", ["fp16", "threshold:tau=0.02", "topk:ratio=0.1"])
    def test_another_scale_changes_roundings(self, compressor: str) -> None:
        without, scaled = both({"compressor": compressor}, {"scale": 1000.0}, steps=3)
        for (ours, _), (theirs, _) in zip(without, scaled, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("kind", ["fused", "foreach"])
    def test_optimizers_that_unscale_by_themselves(self, kind: str) -> None:
        def optimizer(net: nn.Module) -> torch.optim.Optimizer:
            return sgd(net, **{kind: True})

        options = {"compressor": "threshold:tau=0.02"}
        for (ours, residuals), (theirs, their_residuals) in zip(*both(options, optimizer=optimizer), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert len(residuals) == len(their_residuals)

    def test_what_waits_for_a_compressor_without_residual_is_sent_in_its_own_units(self) -> None:
        def rank_main(transport: Any, scaler: Any) -> Tensor:
            weight = nn.Parameter(torch.zeros(4, 4))
            optimizer = torch.optim.SGD([weight], lr=1.0)
            options = {"compressor": "threshold:tau=1.0", "dense": lambda *_: False}
            with gradcomp.attach(optimizer, transport=transport, scaler=scaler, **options) as sync:
                for spec in ("threshold:tau=1.0", "none"):
                    sync.set_compressor(spec)
                    optimizer.zero_grad()
                    loss = (weight * 0.25 * (sync.rank + 1)).sum()
                    (loss if scaler is None else scaler.scale(loss)).backward()
                    if scaler is None:
                        optimizer.step()
                    else:
                        scaler.step(optimizer)
                        scaler.update()
            return weight.detach()

        for make in (lambda: None, scaler_of):  # each rank has its own
            for weight in run_ranks(2, lambda transport, make=make: rank_main(transport, make())):
                assert torch.all(weight == -0.75)  # both steps' means, none of it lost


class TestNonfinite:
    @pytest.mark.parametrize(("where", "value"), [("0.weight", math.inf), ("2.bias", math.nan), ("0.bias", -math.inf)])
    @pytest.mark.parametrize(
        ("compressor", "exchange"),
        [
            *itertools.product(["threshold:density=0.05", "onebit", "powersgd:rank=1"], EXCHANGES),
            ("powersgd:rank=1", "all_reduce"),
        ],
    )
    def test_one_rank_makes_all_skip(self, compressor: str, where: str, value: float, exchange: str) -> None:
        def rank_main(transport: Any) -> list[float]:
            net, scaler = network(), scaler_of(1024.0)
            optimizer = sgd(net)
            spoiled = dict(net.named_parameters())[where]
            scales = []
            with attach(
                net, optimizer, transport, scaler=scaler, compressor=compressor, exchange=exchange, digest_every=1
            ) as sync:
                for step in range(6):
                    before, residuals = parameters_of(net), saved(sync)
                    handle = spoiled.register_hook(lambda g: g.index_fill(0, torch.tensor([1]), value))
                    if not (step == 3 and sync.rank == 1):
                        handle.remove()
                    optimizer.zero_grad()
                    scaler.scale(net(noise(sync.rank, step, 6, 24)).square().mean()).backward()
                    if step % 2:
                        scaler.unscale_(optimizer)
                        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                    scaler.step(optimizer)
                    scaler.update()
                    handle.remove()
                    same = [torch.equal(a, b) for a, b in zip(before, parameters_of(net), strict=True)]
                    assert all(same) == (step == 3)
                    assert (saved(sync) == residuals) == (step == 3)
                    scales.append(scaler.get_scale())
                assert sync.stats()["nonfinite_steps"] == 1
                sync.check_replicas()
            assert all(p.isfinite().all() for p in net.parameters())
            return scales

        for scales in run_ranks(3, rank_main):
            assert scales == [1024.0] * 3 + [512.0] * 3

    def test_half_precision_parameters_are_refused_by_the_scaler_itself(self) -> None:
        def rank_main(transport: Any) -> None:
            net, scaler = network().half(), scaler_of(16.0)
            optimizer = sgd(net)
            with attach(net, optimizer, transport, scaler=scaler) as sync:
                scaler.scale(net(noise(sync.rank, 0, 6, 24).half()).square().mean()).backward()
                with pytest.raises(ValueError, match="FP16"):
                    scaler.step(optimizer)

        run_ranks(2, rank_main)


class TestMistakes:
    def test_exchanging_before_the_step_is_refused(self) -> None:
        weight = nn.Parameter(torch.zeros(4))
        with pytest.raises(gradcomp.ConfigError, match="when='step'"):
            gradcomp.attach(torch.optim.SGD([weight]), when="step", scaler=scaler_of())

    def test_ranks_whose_scales_differ_are_refused(self) -> None:
        def rank_main(transport: Any) -> None:
            net = network()
            attach(net, sgd(net), transport, scaler=scaler_of() if transport.rank else None)

        for error in outcomes(2, rank_main):
            assert isinstance(error, gradcomp.HandshakeError)
            assert error.field == "loss_scale"

    @pytest.mark.parametrize(
        ("compressor", "given", "warned"),
        [("threshold", False, True), ("threshold", True, False), ("none", False, False)],
    )
    def test_a_scaler_that_was_not_given_is_noticed(
        self, compressor: str, given: bool, warned: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        net, scaler = network(), scaler_of()
        optimizer = sgd(net)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps step() once more
        caplog.set_level(logging.WARNING, "gradcomp")
        with attach(net, optimizer, "inproc", compressor=compressor, scaler=scaler if given else None) as sync:
            for step in range(2):
                optimizer.zero_grad()
                scaler.scale(net(noise(sync.rank, step, 6, 24)).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
        assert sum("scaler=scaler" in record.message for record in caplog.records) == warned
