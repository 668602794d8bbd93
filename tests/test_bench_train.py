"""``gradcomp bench train``: methods, runs that are kept, what several seeds come to, and runs for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gradcomp.bench import train
from gradcomp.bench.counters import wire_bytes
from gradcomp.bench.train_methods import Method, merge_settings, parse_method, parse_methods
from gradcomp.bench.train_pictures import draw_curve, draw_progress
from gradcomp.bench.train_results import Point, Results, Run, seconds_to, summarize
from gradcomp.cli import main
from gradcomp.errors import ConfigError, WorkerFailed

DEADLINE_S = 400
TASK = """
import torch
from torch import nn
from gradcomp.integrations.tasks import Task

def task(*, lr: float = 0.1) -> Task:
    inputs = torch.randn(96, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    targets = (inputs.mean((1, 2, 3)) > 0).long()
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))
    return Task(
        model=model,
        loss=nn.functional.cross_entropy,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        train_data=(inputs[:64], targets[:64]),
        test_data=(inputs[64:], targets[64:]),
        batch_size=8,
        epochs=2,
    )
"""


@pytest.fixture
def task_file(tmp_path: Path) -> str:
    path = tmp_path / "tiny.py"
    path.write_text(TASK)
    return str(path)


def made(*accuracies: float, epoch_s: float = 2.0, epoch_bytes: float | None = 1e6, ratio: float = 1.0) -> Run:
    """A run that reached these accuracies, epoch by epoch."""
    points = tuple(
        Point(i, i * epoch_s, None if epoch_bytes is None else i * epoch_bytes, accuracy)
        for i, accuracy in enumerate(accuracies, 1)
    )
    sent = points[-1].bytes_sent
    return Run(points=points, steps=10, bytes_sent=sent, bytes_received=sent, ratio=ratio)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("none", Method(name="none", spec="none")),
        ("topk:ratio=0.01", Method(name="topk:ratio=0.01", spec="topk:ratio=0.01")),
        ("@rules.json", Method(name="@rules.json", spec="@rules.json")),
        ("half=ddp:fp16", Method(name="half", spec="ddp:fp16")),
        (
            "ours=threshold:tau=1e-3,clip=2;exchange=tree:arity=4;transport=zmq:insecure=true;set:lr=0.1;set:width=8",
            Method(
                name="ours",
                spec="threshold:tau=1e-3,clip=2",
                exchange="tree:arity=4",
                transport="zmq:insecure=true",
                settings=("lr=0.1", "width=8"),
            ),
        ),
        (
            "none; servers=2; mode=async",
            Method(name="none; servers=2; mode=async", spec="none", servers=2, mode="async"),
        ),
    ],
)
def test_methods_are_read(text: str, method: Method) -> None:
    assert parse_method(text) == method


def test_what_a_method_says_of_itself() -> None:
    assert parse_method("a=ddp:fp16").hook == "fp16"
    assert [parse_method(text).family for text in ("ddp:fp32", "topk:k=3", "@a:b.json")] == ["ddp", "topk", "@a:b.json"]
    assert parse_method("onebit").hook is None
    assert merge_settings(["lr=1"], ["lr=2"]) == ("lr=2",)


def test_a_seed_may_be_a_fold() -> None:
    bench = train.Bench(task="sentences", settings=("fold={seed}", "lr=1"), workers=2)
    assert [bench.options(Method(name="none", spec="none"), seed).settings for seed in (0, 7)] == [
        ("fold=0", "lr=1"),
        ("fold=7", "lr=1"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ddp", "ddp:fp32, ddp:fp16, ddp:bf16"),
        ("ddp:int8", "ddp:int8 is not allowed"),
        ("ddp:fp32;exchange=tree", "takes no exchange"),
        ("none;tree", "'tree' is not KEY=VALUE"),
        ("none;exhange=tree", "unknown key 'exhange'; it has exchange, transport"),
        ("none;mode=async;mode=sync", "mode is given twice"),
        ("none;servers=many", "servers=many is not allowed"),
        ("none;set:epochs=3", "all methods see the same samples"),
    ],
)
def test_methods_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_method(text)


def test_names_are_told_apart() -> None:
    with pytest.raises(ConfigError, match=r"two methods are called 'none'; .* NAME=SPEC"):
        parse_methods(["none", "none"])


def test_runs_are_kept_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results = Results(str(path))
    results.add({"seed": 0, "spec": "none"}, made(50.0, 60.0))
    results.add({"seed": 1, "spec": "none"}, "a bad day")
    with path.open("a") as file:
        file.write('{"of": {"seed": 2')  # ended in the middle of a line
    again = Results(str(path))
    assert again.run({"spec": "none", "seed": 0}) == made(50.0, 60.0)
    assert again.run({"seed": 1, "spec": "none"}) is None
    assert again.error({"seed": 1, "spec": "none"}) == "a bad day"
    again.add({"seed": 1, "spec": "none"}, made(70.0))
    assert again.error({"seed": 1, "spec": "none"}) is None
    assert Results(str(path)).run({"seed": 1, "spec": "none"}) == made(70.0)
    path.write_text('{"step": 3}\n')
    with pytest.raises(ConfigError, match="line 1 is no run of this benchmark"):
        Results(str(path))


def test_what_seeds_come_to() -> None:
    dense = [made(90.0, 96.0), made(92.0, 98.0)]
    fast = [made(80.0, 95.0, epoch_s=0.5, epoch_bytes=1e4), made(70.0, 91.0, epoch_s=0.7, epoch_bytes=1e4)]
    row = summarize("fast", fast, 1, dense=dense, target=92.0)
    assert row.accuracy == pytest.approx((93.0, 8**0.5, 2))
    assert row.against_dense == pytest.approx(-4.0)
    assert row.to_target == (1.0, 0.0, 1)
    assert row.epoch_s == pytest.approx(0.6)
    assert row.traffic == pytest.approx(100.0)
    cells = row.cells(92.0)
    assert cells["runs"] == "2, 1 failed"
    assert cells["s to 92.0 %"] == "1.0, 1 of 2"
    assert summarize("fast", fast, 0, dense=dense, target=99.0).cells(99.0)["s to 99.0 %"] == "not reached, 0 of 2"
    assert set(summarize("none", [], 2).cells(92.0)) == set(cells)
    assert seconds_to(dense[1], 92.0) == 2.0
    assert seconds_to(dense[0], 96.5) is None


def test_bytes_of_a_run_are_the_kernels_where_it_counted(tmp_path: Path) -> None:
    lines = [
        {"kind": "run"},
        {"step": 1, "epoch": 1, "time_s": 0.5, "bytes_sent": 100},
        {"step": 2, "epoch": 1, "time_s": 1.0, "bytes_sent": 200, "accuracy": 50.0, "new": []},
        {"step": 4, "epoch": 2, "time_s": 2.0, "bytes_sent": 400, "accuracy": 60.0},
    ]
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 4, "bytes_sent": 410, "bytes_received": 5, "ratio": 2}))
    assert [point.bytes_sent for point in train._read_run(tmp_path, counted=False).points] == [None, None]
    assert train._read_run(tmp_path, counted=True).bytes_sent == 410
    for rank, sent in enumerate((400, 800)):
        (tmp_path / f"rank{rank}.json").write_text(json.dumps({"bytes_sent": sent, "bytes_received": 7}))
    run = train._read_run(tmp_path, counted=True)
    assert run.points == (Point(1, 1.0, 300.0, 50.0), Point(2, 2.0, 600.0, 60.0))
    assert (run.steps, run.bytes_sent, run.bytes_received) == (4, 600, 7)


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    texts = ["none", *(f"topk:ratio={share}" for share in (0.1, 0.01)), "onebit", "ddp:fp16", "qsgd"]
    methods = parse_methods(texts)
    runs = {m.name: [made(80.0 + i, 90.0 + i + s, ratio=2.0**i) for s in (0, 1)] for i, m in enumerate(methods[:-2])}
    runs |= {"ddp:fp16": [made(81.0, 91.0, epoch_bytes=None)], "qsgd": []}
    progress, curve = tmp_path / "progress.png", tmp_path / "curve.png"
    draw_progress(runs, str(progress), title="tiny", target=90.0)
    draw_curve(methods, runs, str(curve), title="tiny", dense="none")
    for path in (progress, curve):
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"--png x\.png: there is no finished run"):
        draw_progress({"none": []}, "x.png", title="tiny")
    with pytest.raises(ConfigError, match=r"--curve .*nowhere"):
        draw_curve(methods, runs, str(tmp_path / "nowhere" / "x.png"), title="tiny")


def test_runs_take_turns_and_are_not_repeated(
    task_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[tuple[str, int]] = []
    broken = {("topk", 1)}

    def pretend(self: train.Bench, method: Method, seed: int, lab: object) -> Run:
        done.append((method.name, seed))
        if (method.name, seed) in broken:
            raise WorkerFailed("rank 1 failed: a bad day")
        return made(90.0, 97.0 if method.spec == "none" else 95.0 + seed)

    def bench(seeds: str, *more: str) -> tuple[int, dict[str, Any]]:
        done.clear()
        common = ["bench", "train", task_file, "--methods", "none", "topk", "--set", "lr=0.3"]
        kept = ["--results", str(tmp_path / "results.jsonl"), "--json"]
        status = main([*common, "--seeds", seeds, *kept, *more])
        return status, json.loads(capsys.readouterr().out)

    monkeypatch.setattr(train.Bench, "run", pretend)
    status, found = bench("0,1")
    assert (status, done) == (1, [("none", 0), ("topk", 0), ("none", 1), ("topk", 1)])
    assert found["methods"][1]["errors"] == ["rank 1 failed: a bad day"]
    broken.clear()
    status, found = bench("0,1,2")
    assert (status, done) == (0, [("topk", 1), ("none", 2), ("topk", 2)])
    assert (found["dense"], found["target"]) == ("none", pytest.approx(0.95 * 97))
    assert found["methods"][1]["accuracy"] == {"mean": 96.0, "deviation": 1.0, "runs": 3}
    assert bench("2", "--target", "96.5")[1]["target"] == 96.5
    assert done == []
    assert bench("2", "--epochs", "1")[0] == 0
    assert done == [("none", 2), ("topk", 2)]  # not the same runs
    assert bench("2", "--methods", "topk")[1]["methods"][0]["against_dense"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "nope"], "method nope: .*nope"),
        (["--methods", "none;set:width=3"], "unknown option 'width'"),
        (["--methods", "none;servers=0"], "servers=0 is not allowed"),
        (["--methods", "none;mode=async"], "--mode async is not allowed without"),
        (["--methods", "onebit", "--target", "0.9"], "name that method with --dense"),
        (["--dense", "fp16"], "--dense fp16 is not one of the methods: none, "),
        (["--workers", "0"], "workers=0 is not allowed"),
        (["--png", "nowhere/x.png"], "--png nowhere/x.png: its folder does not exist"),
        (["--results", "nowhere/x.jsonl"], "--results nowhere/x.jsonl"),
        (["--rate", "fast"], "rate='fast' is not allowed"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(task_file: str, arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train.main([task_file, *arguments])


@pytest.mark.parametrize("seeds", ["", "a", "0;1"])
def test_bad_seeds(seeds: str, task_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main([task_file, "--seeds", seeds])
    assert "--seeds" in capsys.readouterr().err


def test_an_interface_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"no network interface nope0|byte counters are not to be had"):
        wire_bytes("nope0")


def run(task_file: str, *arguments: str) -> tuple[int, dict[str, dict[str, Any]], str]:
    """The status, the rows by method, and what went to standard error, of a benchmark for real."""
    ours = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    command = [
        sys.executable,
        "-m",
        "gradcomp",
        "bench",
        "train",
        task_file,
        "--workers",
        "2",
        "--seeds",
        "3",
        "--json",
    ]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [*command, *arguments],
        env=ours | {"PYTHONPATH": os.pathsep.join(filter(None, (root, ours.get("PYTHONPATH"))))},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, {row["method"]: row for row in json.loads(done.stdout)["methods"]}, done.stderr


def test_two_workers_over_loopback_train_as_ddp_does(task_file: str, tmp_path: Path) -> None:
    kept = tmp_path / "results.jsonl"
    status, rows, said = run(task_file, "--methods", "none", "ddp:fp32", "--epochs=1", f"--results={kept}")
    assert status == 0, said
    assert "2/2  ddp:fp32, seed 3: accuracy" in said
    assert "Warning" not in said
    # Two gradients come to the same mean in whatever order they are added.
    assert rows["none"]["accuracy"] == rows["ddp:fp32"]["accuracy"]
    assert rows["none"]["bytes_sent"] > 4 * 4 * (36 * 64)
    assert rows["ddp:fp32"]["bytes_sent"] is None
    assert [len(json.loads(line)["run"]["points"]) for line in kept.read_text().splitlines()] == [1, 1]


@pytest.mark.root
def test_hosts_of_a_lab_are_counted_by_one_meter(task_file: str) -> None:
    status, rows, said = run(task_file, "--methods", "none", "ddp:fp16", "--rate=100mbit", "--epochs=1")
    assert status == 0, said
    for row, value_bytes in ((rows["none"], 4), (rows["ddp:fp16"], 2)):
        gradients = 4 * value_bytes * (36 * 64 + 64 * 5 + 2)
        assert gradients < row["bytes_sent"] < 2 * gradients + 50_000
