"""Worker processes, for real: they train, and when one fails the run says which and why."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zygote

from gradcomp.integrations.worker import RunOptions, train, work

ROOT = Path(__file__).parents[1]
DEADLINE_S = 60

TASK = """
import os, signal
import torch
from torch import nn
from gradcomp.integrations.tasks import Task

def loss(outputs, targets):
    if os.environ.get("RANK") == "1" and FAIL:
        FAIL()
    return nn.functional.cross_entropy(outputs, targets)

def raise_error():
    raise LookupError("no such thing")

FAIL = None

def task(*, fail: str = "") -> Task:
    global FAIL
    FAIL = {"": None, "raise": raise_error, "kill": lambda: os.kill(os.getpid(), signal.SIGKILL)}[fail]
    inputs = torch.randn(96, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    targets = (inputs.mean((1, 2, 3)) > 0).long()
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))
    return Task(
        model=model,
        loss=loss,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
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


def environment() -> dict[str, str]:
    """This process's, without torchrun's variables, and with the package where it may not be installed."""
    ours = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
    return ours | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return zygote.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
def test_one_worker_needs_no_network_and_repeats_itself(task_file: str, tmp_path: Path) -> None:
    logs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for log in logs:
        summary = train(RunOptions(task=task_file, epochs=3, seed=3, quiet=True, log=str(log)))
        assert (summary.steps, summary.workers) == (24, 1)
        assert summary.bytes_sent == 0
    first, second = ([json.loads(line) for line in log.read_text().splitlines()] for log in logs)
    assert [line["step"] for line in first] == list(range(1, 25))
    assert [line["loss"] for line in first] == [line["loss"] for line in second]
    assert ["accuracy" in line for line in first] == ([False] * 7 + [True]) * 3
    assert {"epoch", "time_s", "lr", "bytes_sent", "ratio", "density", "compress_ms", "wait_ms"} <= set(first[0])


@pytest.mark.usefixtures("alone")
def test_too_few_samples_are_refused(task_file: str) -> None:
    with pytest.raises(ValueError, match="64 training samples are less than one batch of 65 for each of 1 workers"):
        train(RunOptions(task=task_file, batch_size=65, quiet=True))


def test_two_workers_train(task_file: str, tmp_path: Path) -> None:
    done = run("-m", "gradcomp", "train", task_file, "--workers=2", "--log=run.jsonl", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert summary["workers"] == 2
    assert summary["steps"] == len(lines) == 8
    assert summary["accuracy"] == lines[-1]["accuracy"]
    assert lines[-1]["bytes_sent"] > lines[0]["bytes_sent"] > 0
    assert "threshold: epoch 2/2" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_task_that_raises_on_one_rank_is_named_with_its_traceback(task_file: str, tmp_path: Path) -> None:
    done = run("-m", "gradcomp", "train", task_file, "--workers=2", "--set=fail=raise", folder=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert 'tiny.py", line' in done.stderr
    assert done.stderr.endswith("rank 1 failed: LookupError: no such thing\n")


def test_a_killed_worker_is_named(task_file: str, tmp_path: Path) -> None:
    done = run("-m", "gradcomp", "train", task_file, "--workers=2", "--set=fail=kill", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("gradcomp: rank 1 failed: killed by SIGKILL\n")
    assert "Traceback" not in done.stderr


def test_an_interrupt_ends_the_workers(task_file: str, tmp_path: Path) -> None:
    arguments = ["-m", "gradcomp", "train", task_file, "--workers=2", "--epochs=100000", "--log=run.jsonl", "--quiet"]
    process = zygote.Popen(
        [sys.executable, *arguments], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not ((tmp_path / "run.jsonl").is_file() and (tmp_path / "run.jsonl").stat().st_size):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "no step within the deadline"
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert [line for line in err.splitlines() if "interrupted" in line] == ["gradcomp: interrupted"]
    assert "Traceback" not in err
    size = (tmp_path / "run.jsonl").stat().st_size
    time.sleep(0.5)
    assert (tmp_path / "run.jsonl").stat().st_size == size, "a worker is still training"


@pytest.mark.usefixtures("alone")
def test_a_worker_by_itself_prints_its_result_and_explains_its_failure(
    task_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert work(RunOptions(task=task_file, epochs=1, quiet=True)) == 0
    assert capsys.readouterr().out.startswith("compressor  workers  accuracy")
    assert work(RunOptions(task=task_file, batch_size=65, quiet=True)) == 2
    assert capsys.readouterr().err.startswith("rank 0 failed: task ")
    assert work(RunOptions(task=task_file, settings=("fail=explode",), quiet=True)) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("rank 0 failed: KeyError: 'explode'\n")


def test_an_existing_script_trains_under_torchrun(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    script = str(ROOT / "examples" / "train_existing.py")
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    accuracy = [float(found) for found in re.findall(r"epoch 15  loss [\d.]+  accuracy ([\d.]+) %", done.stdout)]
    assert len(accuracy) == 2, done.stdout
    assert accuracy[0] == accuracy[1], "replicas differ"
    assert accuracy[0] > 90


def test_the_existing_script_is_ordinary() -> None:
    lines = (ROOT / "examples" / "train_existing.py").read_text().partition('"""\n\n')[2].splitlines()
    assert sum("gradcomp" in line or "sync" in line for line in lines) == sum("# +" in line for line in lines) == 3


def test_the_readmes_plug_in_keeps_the_contract(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [block] = [block for block in blocks if "check_compressor" in block]
    (tmp_path / "plug_in.py").write_text(block)
    assert "Byte" in runpy.run_path(str(tmp_path / "plug_in.py"))  # it ends with check_compressor(Byte())


@pytest.mark.usefixtures("alone")
def test_the_documented_task_trains(tmp_path: Path) -> None:
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "WORKERS.md").read_text(), re.DOTALL)
    (tmp_path / "documented.py").write_text(block)
    summary = train(RunOptions(task=str(tmp_path / "documented.py"), settings=("lr=0.05", "width=32"), quiet=True))
    assert summary.steps == 250
    assert summary.accuracy > 80
