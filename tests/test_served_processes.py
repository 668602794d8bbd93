"""Parameter servers and workers as processes: trained by the command line, killed, and started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from ports import free_port
from zygote import Popen, run

DEADLINE_S = 120.0

TASK = """
import torch
from torch import nn
from gradcomp.integrations.tasks import Task

def task(*, lr: float = 0.2) -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, 20, generator=generator)
    targets = (inputs[:, :10].sum(1) > 0).long()
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return Task(
        model=model,
        loss=nn.functional.cross_entropy,
        optimizer=optimizer,
        train_data=(inputs[:400], targets[:400]),
        test_data=(inputs[400:], targets[400:]),
        batch_size=10,
        epochs=4,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 2),
    )
"""

WORKER = """
import json, sys, time
import torch
import gradcomp

class Constant(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(40, 50))

net, steps = Constant(), int(sys.argv[2])
optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
exchange = {"id": "server", "addresses": sys.argv[1], "mode": "async", "worker": "a", "pull": "none", "timeout_s": 60.0}
with gradcomp.attach(optimizer, model=net, exchange=exchange, compressor="none") as sync:
    while sync.step < steps:
        optimizer.zero_grad()
        net.weight.sum().backward()
        optimizer.step()
        print(json.dumps({"step": sync.step, "version": sync.version}), flush=True)
        time.sleep(0.005)
    print(json.dumps({"weight": [net.weight.min().item(), net.weight.max().item()]}), flush=True)
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_train_starts_servers_and_workers(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    command = ["train", "task.py", "--workers", "2", "--servers", "2", "--mode", "ssp:staleness=2", "--json", "--quiet"]
    done = run(
        [sys.executable, "-m", "gradcomp", *command, "--compressor", "threshold:density=0.1", "--log", "run.jsonl"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["accuracy"] > 80
    assert 160 <= summary["updates"] <= 164  # four epochs of 40 batches, and what was on its way
    assert summary["ratio"] > 1
    assert summary["pull_ratio"] > 1
    assert set(map(int, summary["staleness"])) <= set(range(6))
    rows = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert len(rows) == summary["steps"]
    assert rows[0]["lr"] == 0.2
    assert rows[-1]["lr"] == pytest.approx(0.02)
    assert sum("accuracy" in row for row in rows) == 4


@contextmanager
def process(*arguments: str) -> Iterator[Popen]:
    """One that is killed at the end, if it is still there."""
    with Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


def read_until(worker: Popen, version: int) -> dict[str, Any]:
    assert worker.stdout is not None
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        line = worker.stdout.readline()
        assert line, "the worker has ended"
        found: dict[str, Any] = json.loads(line)
        if found.get("version", version) >= version:
            return found
    raise AssertionError("not there in time")


def test_servers_and_workers_that_are_killed_come_back(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    address = f"127.0.0.1:{free_port()}"
    server = ("-m", "gradcomp", "server", "--bind", address, "--state", str(tmp_path / "state"), "--lease-s", "1")
    worker = (str(tmp_path / "worker.py"), address, "200")
    with ExitStack() as stack:
        first = stack.enter_context(process(*server, "--quiet"))
        training = stack.enter_context(process(*worker))
        read_until(training, 20)
        first.kill()
        second = stack.enter_context(process(*server, "--quiet"))
        read_until(training, 60)  # it has only waited
        training.kill()
        second.kill()
        stack.enter_context(process(*server, "--quiet"))
        again = stack.enter_context(process(*worker))
        begun = read_until(again, 0)
        assert begun["step"] >= 60
        *_, last = [json.loads(line) for line in again.stdout or ()]
        assert again.wait(DEADLINE_S) == 0
        assert last == {"weight": [-200.0, -200.0]}  # each of 200 gradients was applied once
