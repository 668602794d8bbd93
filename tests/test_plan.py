"""``gradcomp plan``: its probes on ranks that are threads, clusters that are not there, and its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

import gradcomp
from gradcomp import cli
from gradcomp.bench import plan
from gradcomp.bench.meeting import Meeting
from gradcomp.bench.plan_methods import Bench, Method, best_of, mix
from gradcomp.bench.plan_report import checked_table, report
from gradcomp.bench.probe_codecs import probe_codecs, take_samples
from gradcomp.bench.probe_link import MAX_MESSAGE_BYTES, LinkProbe, probe_link
from gradcomp.bench.probe_model import ModelProbe, Workload, load_workload, probe_model
from gradcomp.errors import ConfigError
from gradcomp.forecast import CodecCost, Link
from gradcomp.rules import Rules, choose

TASK = """
import torch
from gradcomp.integrations.tasks import Task

def task(*, width: int = 64) -> Task:
    data = torch.randn(64, 32), torch.randint(0, 4, (64,))
    model = torch.nn.Sequential(torch.nn.Linear(32, width), torch.nn.ReLU(), torch.nn.Linear(width, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Task(model=model, loss=torch.nn.functional.cross_entropy, optimizer=optimizer, train_data=data,
                test_data=data, batch_size=16, epochs=1)
"""


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "little.py"
    path.write_text(TASK)
    return str(path)


def _connected(transport: Any) -> Any:
    transport.connect({"probe": 1}, max_message_bytes=MAX_MESSAGE_BYTES, max_unclaimed_bytes=4 * MAX_MESSAGE_BYTES)
    return transport


def test_the_link_is_probed_between_all_pairs() -> None:
    def probe(transport: Any) -> LinkProbe:
        return probe_link(Meeting(_connected(transport)))

    found = run_ranks(3, probe, timeout_s=60.0)
    assert found[0] == found[1] == found[2]
    for a in range(3):
        for b in range(3):
            assert (found[0].latency_s[a][b] > 0) == (found[0].bytes_per_s[a][b] > 0) == (a != b)
    assert found[0].link().bytes_per_s == min(found[0].together_bytes_per_s)


def test_many_ranks_are_probed_in_pairs_that_do_not_meet() -> None:
    from gradcomp.bench.probe_link import _turns

    for size in (9, 12):
        turns = _turns(size)
        assert sorted(pair for turn in turns for pair in turn) == [
            (a, b) for a in range(size) for b in range(size) if a != b
        ]
        for turn in turns:
            ranks = [rank for pair in turn for rank in pair]
            assert len(ranks) == len(set(ranks))


def test_the_network_is_probed_while_it_trains(task: str) -> None:
    workload = load_workload(task, batch_size=16, settings=["width=100"])
    found = probe_model(workload, Meeting(None), steps=3)
    names = [name for name, _ in workload.named_parameters]
    assert sorted(found.parameter_ready_s) == sorted(names) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert 0 <= found.parameter_ready_s["2.weight"] <= found.parameter_ready_s["0.weight"]
    assert found.cores > 0
    assert found.ranks_here == 1


def test_codecs_are_probed_on_the_networks_own_gradients(task: str) -> None:
    samples = take_samples(load_workload(task, batch_size=16, settings=["width=2048"]))
    assert [grads[0].shape for grads in samples] == [(64, 32), (2048, 32)]
    codecs = [gradcomp.compressor(spec) for spec in ("none", "fp16", "threshold", "onebit", "powersgd:rank=2")]
    none, fp16, threshold, onebit, powersgd = probe_codecs(codecs, samples, Meeting(None)).values()
    assert none.bytes_per_element == 4
    assert fp16.bytes_per_element == 2
    assert threshold.bytes_per_element < 0.2
    assert 0.125 <= onebit.bytes_per_element < 0.2
    assert powersgd.bytes_per_element == 0
    assert powersgd.bytes_per_side == pytest.approx(8, rel=0.02)
    assert powersgd.rounds == 2
    assert none.rounds == 1


def _bench(rate: float, *, ready_s: float = 0.1, world_size: int = 4) -> Bench:
    named = [(f"{i}.weight", torch.nn.Parameter(torch.empty(500, 500))) for i in range(2)]
    model = ModelProbe(
        forward_s=0.05,
        backward_s=0.1,
        optimizer_s=0.0,
        parameter_ready_s={"1.weight": 0.01, "0.weight": ready_s},
        cores=4.0,
        thread_cores=1.0,
        machine_cores=4.0,
        compute_cores=1.0,
        ranks_here=1,
        wall_s=0.15,
        copy_s_per_element=0.0,
    )
    costs = {
        "none": CodecCost(decode_s_per_element=1e-9),
        "fp16": CodecCost(decode_s_per_element=1e-9, bytes_per_element=2.0),
        "onebit": CodecCost(encode_s=2e-3, bytes_per_element=0.13),
    }
    link = Link(latency_s=1e-4, bytes_per_s=rate)
    return Bench(named=named, model=model, costs=costs, link=link, world_size=world_size, bucket_bytes=1_000_000)


METHODS = [Method(compressor, "auto") for compressor in ("none", "fp16", "onebit")]


def test_dense_wins_where_the_link_is_fast() -> None:
    bench = _bench(1e10)
    predictions, _ = bench.predict_all(METHODS)
    found = mix(bench, best_of(predictions))
    assert found.prediction.method.compressor == "none"
    assert found.rules is None


def test_of_methods_about_as_fast_the_one_that_loses_least_is_taken() -> None:
    bench = _bench(2e8)
    predictions, _ = bench.predict_all(METHODS)
    assert [p.method.compressor for p in predictions] == ["onebit", "fp16", "none"]
    assert best_of(predictions).method.compressor == "fp16"


def test_what_is_hidden_goes_dense_and_the_rest_does_not() -> None:
    bench = _bench(2e7)
    predictions, _ = bench.predict_all(METHODS)
    assert [p.method.compressor for p in predictions] == ["onebit", "fp16", "none"]
    found = mix(bench, best_of(predictions))
    assert [bucket.compressor for bucket in found.buckets] == ["none", "onebit"]
    assert isinstance(found.rules, Rules)
    assert found.prediction.plan.specs == {"1.weight": "none", "0.weight": "onebit"}
    assert found.prediction.step_s <= 1.005 * predictions[0].step_s


def test_methods_that_cannot_be_had_are_named() -> None:
    predictions, refused = _bench(1e9).predict_all([Method("onebit", "all_reduce"), Method("none", "all_reduce")])
    assert [p.method.compressor for p in predictions] == ["none"]
    assert "not linear" in refused[Method("onebit", "all_reduce")]


def test_a_cluster_that_is_not_there(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = tmp_path / "rules.json"
    command = ["plan", "--model", task, "--set", "width=512", "--workers", "16", "--bandwidth", "1mbit"]
    command += ["--compressors", "none,threshold:density=0.01,powersgd", "--rules", str(rules)]
    assert cli.main([*command, "--topology", "hosts:4", "--exchanges", "auto,two_shot", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["world_size"] == 16
    assert len(found["methods"]) == 6
    assert found["link"]["mbit_per_s"] == pytest.approx(1 / 4 * 15 / 12)
    steps = [row["step_ms"] for row in found["methods"]]
    assert steps == sorted(steps)
    assert found["best"]["compressor"] != "none"
    choose(f"@{rules}")
    assert report(found).splitlines()[-1].strip().startswith("gradcomp.attach(optimizer, model=model, compressor=")

    assert cli.main([*command[:-2], "--cores", "1"]) == 0
    text = capsys.readouterr().out
    assert "16 ranks, 1.00 cores a rank" in text
    assert "Dense takes" in text


def test_ranks_plan_together(task: str) -> None:
    def run(transport: Any) -> Any:
        options = plan.options_from(["--model", task, "--compressors", "none,onebit"])
        return plan.plan_for(options, load_workload(task, batch_size=16), transport)

    found, *others = run_ranks(2, run, timeout_s=60.0)
    assert others == [None]
    assert len(found["pairs"]["bytes_per_s"]) == 2
    assert len(found["methods"]) == 2
    assert "one pair" in report(found)


def test_forecasts_are_put_beside_what_was_measured() -> None:
    row = {"compressor": "none", "exchange": "auto", "step_ms": 110.0, "measured_ms": 100.0}
    result = {
        "rate": "1gbit",
        "profile": {"compute_ms": 50.0},
        "methods": [row | {"measured_compute_ms": 51.0, "error": 0.1, "error_then": -0.02}],
    }
    *_, last = checked_table([result]).splitlines()
    assert last.startswith("median error 10.0% of 1 points, at most 10.0%")
    assert last.endswith(" 2.0%, 2.0%")


def test_a_forecast_for_the_cores_that_were_left() -> None:
    bench = _bench(1e8)
    assert bench.when_computing_took(0.15) == bench
    busy = bench.when_computing_took(0.3)
    assert busy.model.thread_cores == pytest.approx(0.5)
    assert busy.predict(METHODS[0]).forecast.compute_s == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--workers N"),
        (["--workers", "4"], "--bandwidth"),
        (["--bandwidth", "1gbit"], "--workers"),
        (["--workers", "1", "--bandwidth", "1gbit"], "workers=1"),
        (["--workers", "4", "--bandwidth", "fast"], "rate='fast'"),
        (["--workers", "4", "--bandwidth", "1gbit", "--check"], "--check"),
        (["--workers", "4", "--bandwidth", "1gbit", "--topology", "ring"], "topology='ring'"),
        (["--workers", "4", "--bandwidth", "1gbit", "--topology", "hosts:4"], "one host"),
        (["--workers", "4", "--bandwidth", "1gbit", "--compressors", "zip"], "zip"),
        (["--workers", "4", "--bandwidth", "1gbit", "--exchanges", "mail"], "mail"),
        (["--workers", "4", "--bandwidth", "1gbit", "--model", "lenet"], "lenet"),
        (["--lab", "2", "--rates", "fast"], "rate='fast'"),
    ],
)
def test_what_cannot_be_planned_is_said(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["plan", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_commas_separate_specs_and_their_options() -> None:
    assert plan.specs("none,dgc:ratio=0.001,momentum=0.9,qsgd:levels=4") == [
        "none",
        "dgc:ratio=0.001,momentum=0.9",
        "qsgd:levels=4",
    ]


@pytest.mark.root
def test_forecast_and_measured_in_a_lab(task: str) -> None:
    command = [sys.executable, "-m", "gradcomp", "plan", "--lab", "2", "--rates", "20mbit", "--model", task]
    command += ["--check", "--steps", "2", "--compressors", "none,threshold", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=110, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rate"] == "20mbit"
    assert found["world_size"] == 2
    assert all(row["measured_ms"] > 0 for row in found["methods"])
    assert 5 < found["link"]["mbit_per_s"] < 40


def test_a_workload_takes_a_step(task: str) -> None:
    workload: Workload = load_workload(task, batch_size=16)
    before = [tensor.detach().clone() for _, tensor in workload.named_parameters]
    workload.step()
    assert any(not torch.equal(a, b) for a, (_, b) in zip(before, workload.named_parameters, strict=True))


def test_networks_have_no_options() -> None:
    with pytest.raises(ConfigError, match="no options"):
        load_workload("vgg11", batch_size=1, settings=["width=3"])
