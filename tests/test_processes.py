"""Training processes over ZeroMQ, and what the others see when one of them dies, stops or differs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zygote
from ports import free_port

DEADLINE_S = 90
# Rank 0..n-1 train until something goes wrong; each prints one line when training runs, one when it failed.
SCRIPT = """
import json, sys
import torch
from torch import nn
import gradcomp

torch.set_num_threads(1)
options = json.loads(sys.argv[1])
if "version" in options:
    import gradcomp.engine
    gradcomp.engine.__version__ = options["version"]
net = nn.Sequential(nn.Linear(64, options.get("width", 64)), nn.ReLU(), nn.Linear(options.get("width", 64), 4))
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
try:
    sync = gradcomp.attach(optimizer, model=net, transport="zmq:timeout_s=60", **options.get("attach", {}))
    step = 0
    while True:
        optimizer.zero_grad()
        net(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
        step += 1
        if step == 20:
            print(json.dumps({"running": True}), flush=True)
except gradcomp.GradcompError as error:
    field = getattr(error, "field", getattr(error, "peer", None))
    print(json.dumps({"error": type(error).__name__, "about": field, "text": str(error)}), flush=True)
"""


class Ranks:
    """Processes of one run."""

    def __init__(self, script: Path) -> None:
        self._script = script
        self._port = free_port()
        self.processes: list[zygote.Popen] = []

    def start(self, rank: int, world_size: int, **options: Any) -> None:
        env = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._port),
        }
        self.processes.append(
            zygote.Popen(
                [sys.executable, str(self._script), json.dumps(options)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )

    def line(self, rank: int) -> dict[str, Any]:
        stdout = self.processes[rank].stdout
        assert stdout is not None
        found: dict[str, Any] = json.loads(stdout.readline())
        return found

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    started = Ranks(script)
    watchdog = time.monotonic() + DEADLINE_S
    try:
        yield started
    finally:
        started.end()
        assert time.monotonic() < watchdog, "took too long"


def test_a_killed_worker_is_lost_on_all_others_and_nobody_hangs(ranks: Ranks) -> None:
    for rank in range(3):
        ranks.start(rank, 3)
    for rank in range(3):
        assert ranks.line(rank) == {"running": True}
    ranks.processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    for rank in (0, 2):
        found = ranks.line(rank)
        assert (found["error"], found["about"]) == ("PeerLost", 1)
        assert time.monotonic() - killed < 5.0  # the promise: noticed within 5 s
        assert ranks.processes[rank].wait(15.0) == 0  # and no hang at exit


def test_a_stopped_worker_is_lost_through_its_silence(ranks: Ranks) -> None:
    for rank in range(2):
        ranks.start(rank, 2)
    for rank in range(2):
        assert ranks.line(rank) == {"running": True}
    ranks.processes[1].send_signal(signal.SIGSTOP)
    found = ranks.line(0)
    assert (found["error"], found["about"]) == ("PeerLost", 1)
    assert ranks.processes[0].wait(15.0) == 0


@pytest.mark.parametrize(
    ("field", "odd"),
    [
        ("version", {"version": "9.9.9"}),
        ("tensors", {"width": 32}),
        ("compressor", {"attach": {"compressor": "onebit"}}),
    ],
)
def test_a_rank_that_differs_is_refused_everywhere(ranks: Ranks, field: str, odd: dict[str, Any]) -> None:
    for rank in range(3):
        ranks.start(rank, 3, **(odd if rank == 1 else {}))
    for rank in range(3):
        found = ranks.line(rank)
        assert (found["error"], found["about"]) == ("HandshakeError", field), found


def test_ranks_of_different_world_sizes_are_refused(ranks: Ranks) -> None:
    ranks.start(0, 2)
    ranks.start(1, 3)
    for rank in range(2):
        found = ranks.line(rank)
        assert (found["error"], found["about"]) == ("HandshakeError", "world_size"), found
