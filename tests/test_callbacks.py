"""Callbacks: who is told what and when, and what becomes of one that fails."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks, small_net, train_step
from served import Hub, connect
from test_served_processes import TASK

import gradcomp
from gradcomp.callbacks import Callback, Callbacks
from gradcomp.errors import ConfigError
from gradcomp.integrations.callbacks import JsonlCallback, LoggingCallback, TensorBoardCallback
from gradcomp.integrations.run_log import open_run
from gradcomp.integrations.run_options import RunOptions
from gradcomp.integrations.tasks import Task
from gradcomp.integrations.watch import Watch
from gradcomp.integrations.worker import train

STAGES = ("step_ms", "forward_ms", "backward_ms", "optimizer_ms", "exposed_ms", "wait_ms")


class Heard(Callback):
    """Writes down what it hears; fails where it is told to."""

    def __init__(self, fails_in: str = "") -> None:
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self._fails_in = fails_in

    def _hear(self, what: str, told: Mapping[str, Any]) -> None:
        self.heard.append((what, dict(told)))
        if what == self._fails_in:
            raise ValueError("the dashboard is down")

    def on_start(self, info: Mapping[str, Any]) -> None:
        self._hear("start", info)

    def on_step(self, record: Mapping[str, Any]) -> None:
        self._hear("step", record)

    def on_epoch(self, record: Mapping[str, Any]) -> None:
        self._hear("epoch", record)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._hear("end", summary)

    @property
    def order(self) -> list[str]:
        return [what for what, _ in self.heard]


def test_one_that_fails_is_named_once_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    before, broken, after = Heard(), Heard("step"), Heard()
    callbacks = Callbacks([before, broken, after])
    callbacks.start({})
    for step in (1, 2):
        callbacks.step({"step": step})
    callbacks.end({})
    assert before.order == after.order == ["start", "step", "step", "end"]
    assert broken.order == ["start", "step"]
    [record] = caplog.records
    assert record.getMessage() == "Heard failed in on_step, and is told nothing more"
    assert "the dashboard is down" in caplog.text
    assert not callbacks


def test_on_step_is_all_that_a_callback_must_have() -> None:
    class Steps(Callback):
        def on_step(self, record: Mapping[str, Any]) -> None:
            steps.append(record["step"])

    steps: list[int] = []
    callbacks = Callbacks([Steps()])
    callbacks.start({})
    callbacks.step({"step": 1})
    callbacks.epoch({})
    callbacks.end({})
    assert steps == [1]


@pytest.mark.parametrize("overlap", ["backward", "forward"])
def test_a_loop_of_ones_own(tmp_path: Path, overlap: str) -> None:
    def rank(transport: Any) -> Heard:
        heard, net = Heard(), small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        sync = gradcomp.attach(
            optimizer, model=net, compressor="topk:ratio=0.1", transport=transport, overlap=overlap,
            dense=lambda name, p: p.dim() < 2,
        )  # fmt: skip
        with sync:
            log = JsonlCallback(tmp_path / "run.jsonl", rank=sync.rank)
            told = Watch(sync, optimizer, [heard, log], every=3, layers_every=2, task="mine")
            for step in range(7):
                train_step(net, optimizer, sync.rank, step)
                told.note(loss=float(step), time_s=-1.0)
            told.epoch(1, loss=0.5)
        return heard

    first, second = run_ranks(2, rank)
    assert first.order == second.order == ["start", "step", "step", "epoch", "step", "end"]
    start, *steps, end = [told for what, told in first.heard if what != "epoch"]
    assert (start["rank"], start["world_size"], start["task"]) == (0, 2, "mine")
    assert (start["compressor"], start["transport"], start["exchange"]) == ("topk:ratio=0.1", "inproc", "auto")
    assert [step["step"] for step in steps] == [3, 6, 7]
    assert [step["loss"] for step in steps] == [1.0, 4.0, 6.0]  # noted after the step: of the one before
    assert all(step["time_s"] > 0 and step["residual_norm"] > 0 for step in steps)
    assert [set(step.get("layers", {})) for step in steps] == [{"0.weight", "4.weight", "6.weight"}, set(), {
        "0.weight", "4.weight", "6.weight"}]  # fmt: skip
    row = steps[0]["layers"]["4.weight"]
    assert row.keys() == {"density", "numel", "residual_norm", "compressor"}
    assert (row["numel"], row["compressor"]) == (512, "topk:ratio=0.1")
    norms = [row["residual_norm"] for row in steps[0]["layers"].values()]
    assert sum(norm**2 for norm in norms) == pytest.approx(steps[0]["residual_norm"] ** 2)
    assert [("compressors" in step) for step in steps] == [True, False, False]
    assert end["steps"] == 7
    run = open_run(tmp_path / "run.jsonl")
    assert [len(run.steps[rank]) for rank in (0, 1)] == [3, 3]
    assert run.end is not None


def test_they_hear_of_a_failure() -> None:
    def fail(transport: Any, heard: Heard) -> None:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with gradcomp.attach(optimizer, model=net, transport=transport) as sync:
            Watch(sync, optimizer, [heard])
            raise ZeroDivisionError("oh")

    heard = Heard()
    with pytest.raises(ZeroDivisionError):
        run_ranks(1, lambda transport: fail(transport, heard))
    assert heard.heard[-1] == ("end", {"error": "ZeroDivisionError: oh"})


def test_lines_of_logging(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    callback = LoggingCallback(every=2, logger="mine")
    callback.on_start({"rank": 0, "world_size": 2, "compressor": "topk"})
    for step in (1, 2, 3):
        callback.on_step({"step": step, "loss": 0.5, "bytes_sent": 2000, "ratio": 10.0, "exposed_ms": 1.0})
    callback.on_epoch({"epoch": 1, "accuracy": 97.123})
    callback.on_end({"error": "ValueError: oh"})
    assert [record.getMessage() for record in caplog.records] == [
        "rank 0 of 2: compressor topk, transport -, exchange -",
        "step 1: loss 0.5, sent 2.00 kB, ratio 10.0x, 1.0 ms not hidden",
        "step 3: loss 0.5, sent 2.00 kB, ratio 10.0x, 1.0 ms not hidden",
        "epoch 1, accuracy 97.12",
        "the run failed: ValueError: oh",
    ]
    with pytest.raises(ConfigError, match="every=0 is not allowed"):
        LoggingCallback(every=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = TensorBoardCallback(tmp_path, rank=1)
    callback.on_start({"rank": 1, "task": "mine"})
    layers = {"fc.weight": {"density": 0.25, "numel": 4, "compressor": "topk"}}
    for step in (1, 2):
        callback.on_step({"step": step, "loss": 0.5 / step, "layers": layers})
    callback.on_end({})
    events = EventAccumulator(str(tmp_path / "rank1"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "layers/density/fc.weight"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


# -- gradcomp train ----------------------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    (tmp_path / "task.py").write_text(TASK)
    return str(tmp_path / "task.py")


def test_the_log_of_a_worker(task: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    options = RunOptions(task=task, log=str(path), log_layers=5, epochs=2, quiet=True, compressor="topk", seed=3)
    summary = train(options)
    run = open_run(path)
    assert run.header["steps"] == summary.steps == len(run.first)
    expected = {"rank": 0, "world_size": 1, "task": task, "compressor": "topk", "transport": "zmq", "exchange": "auto"}
    assert expected.items() <= run.header.items()
    assert run.header["seed"] == 3
    assert {"gradcomp", "torch", "python"} == run.header["versions"].keys()
    assert [step["step"] for step in run.first if "accuracy" in step] == [summary.steps // 2, summary.steps]
    assert [step["step"] % 5 for step in run.first if "layers" in step] == [1] * -(-summary.steps // 5)
    for step in run.first:
        assert all(step[key] >= 0 for key in STAGES)
        assert step["forward_ms"] + step["backward_ms"] + step["optimizer_ms"] <= step["step_ms"]
    assert sum(step["step_ms"] for step in run.first) == pytest.approx(1000 * summary.train_s)
    assert run.end is not None
    assert run.end["accuracy"] == summary.accuracy


def test_the_log_of_a_worker_with_a_server(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(2)
    connect(monkeypatch, hub)
    path = tmp_path / "run.jsonl"
    server = ",".join(hub.addresses)
    summary = train(RunOptions(task=task, log=str(path), epochs=1, quiet=True, server=server, mode="async"))
    run = open_run(path)
    assert run.header["updates"] == summary.updates
    assert run.header["exchange"] == "server, async"
    assert run.first[-1]["version"] == summary.updates
    assert run.first[-1]["accuracy"] == summary.accuracy
    for step in run.first:
        assert all(step[key] >= 0 for key in STAGES)
        assert step["exposed_ms"] >= step["wait_ms"]
        assert "hidden_fraction" not in step
    assert run.end is not None
    assert run.end["updates"] == summary.updates


def test_a_run_that_fails_says_so_in_its_log(task: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    source = TASK.replace("def task(", "def once(") + FAILING
    Path(task).write_text(source)
    with pytest.raises(RuntimeError, match="no more"):
        train(RunOptions(task=task, log=str(path), quiet=True))
    run = open_run(path)
    assert len(run.first) == 2
    assert run.end == {"error": "RuntimeError: no more"}


FAILING = """

import dataclasses

def task():
    given, left = once(), [1, 1]
    def loss(outputs, targets):
        if not left:
            raise RuntimeError("no more")
        left.pop()
        return torch.nn.functional.cross_entropy(outputs, targets)
    return dataclasses.replace(given, loss=loss)
"""


def test_a_task_brings_callbacks_of_its_own() -> None:
    net = small_net()
    data = (torch.zeros(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64))
    fields: dict[str, Any] = {"model": net, "loss": torch.nn.functional.cross_entropy, "batch_size": 4, "epochs": 1}
    fields |= {"optimizer": torch.optim.SGD(net.parameters()), "train_data": data, "test_data": data}
    assert len(Task(**fields, callbacks=[Heard()]).callbacks) == 1
    with pytest.raises(ConfigError, match="callbacks must be gradcomp Callbacks; got str"):
        Task(**fields, callbacks=["wandb"])


def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no/run\.jsonl: No such file"):
        JsonlCallback(tmp_path / "no" / "run.jsonl", rank=0)


def test_every_line_is_json_for_everybody(task: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    train(RunOptions(task=task, log=str(path), epochs=1, quiet=True))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
