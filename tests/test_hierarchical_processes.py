"""Hosts of several processes: Gloo or unix-domain sockets inside, ZeroMQ between; and hosts in network namespaces."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from namespaces import ip, two_hosts
from ports import free_port
from zygote import Popen

DEADLINE_S = 240  # four processes import torch first, perhaps on a busy machine
SCRIPT = """
import json, os, sys
import torch
from torch import nn
import gradcomp

torch.set_num_threads(1)
torch.manual_seed(int(os.environ["RANK"]))
options = json.loads(sys.argv[1])
net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
try:
    with gradcomp.attach(
        optimizer, model=net, compressor="topk:ratio=0.02", exchange=gradcomp.hierarchical(**options["exchange"])
    ) as sync:
        for step in range(options["steps"]):
            optimizer.zero_grad()
            net(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
            if step == 10:
                print(json.dumps({"running": True}), flush=True)
        sync.check_replicas()
        print(json.dumps(sync.stats()), flush=True)
except gradcomp.GradcompError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}), flush=True)
"""


def start(
    script: Path, rank: int, *, master: str, port: int, prefix: tuple[str, ...] = (), steps: int = 20, **exchange: Any
) -> Popen:
    """One of 2 x 2 ranks."""
    torchrun = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2, "GROUP_WORLD_SIZE": 2}
    env = os.environ | {name: str(value) for name, value in torchrun.items()}
    env |= {"MASTER_ADDR": master, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    options = json.dumps({"exchange": exchange, "steps": steps})
    return Popen([*prefix, sys.executable, str(script), options], env=env, stdout=subprocess.PIPE, text=True)


def line(process: Popen) -> dict[str, Any]:
    assert process.stdout is not None
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def processes() -> Iterator[list[Popen]]:
    """Started by the test; ended here, and after the deadline, which ends what the test reads from them, too."""
    started: list[Popen] = []
    deadline = threading.Timer(DEADLINE_S, lambda: [process.kill() for process in started])
    deadline.start()
    yield started
    deadline.cancel()
    for process in started:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def test_processes(script: Path, processes: list[Popen]) -> None:
    port = free_port()
    exchange = {"local": "gloo:timeout_s=60", "between": "zmq:timeout_s=60", "local_dtype": "bfloat16"}
    processes += [start(script, rank, master="127.0.0.1", port=port, **exchange) for rank in range(4)]
    for rank, process in enumerate(processes):
        assert line(process) == {"running": True}
        stats = line(process)
        assert stats["steps"] == 20, stats
        assert (stats["bytes_sent_between"] > 0) == (rank % 2 == 0)


def test_a_process_that_is_killed_takes_all_others_along(script: Path, processes: list[Popen]) -> None:
    port = free_port()
    exchange = {"local": "zmq:ipc=true,timeout_s=30", "between": "gloo:timeout_s=30"}
    processes += [start(script, rank, master="127.0.0.1", port=port, steps=10**9, **exchange) for rank in range(4)]
    for process in processes:
        assert line(process) == {"running": True}
    processes[3].send_signal(signal.SIGKILL)
    for process in processes[:3]:
        found = line(process)
        assert found["error"] in ("PeerLost", "TransportError"), found


# -- network namespaces ------------------------------------------------------------------------------------------------


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces, 10.79.0.1 and 10.79.0.2, with 200 Mb/s between them."""
    with two_hosts("gchier", "10.79.0", "200mbit") as names:
        yield names


def crossed_bytes(host: str) -> int:
    """What went out over its link."""
    (link,) = json.loads(ip("-n", host, "-s", "-j", "link", "show", "eth0"))
    return int(link["stats64"]["tx"]["bytes"])


@pytest.mark.root
def test_two_hosts_of_two_ranks(script: Path, processes: list[Popen], hosts: list[str]) -> None:
    steps = 40
    exchange = {"local": "gloo:timeout_s=60", "between": "zmq:insecure=true,timeout_s=60"}
    for rank in range(4):
        prefix = ("ip", "netns", "exec", hosts[rank // 2])
        processes.append(start(script, rank, master="10.79.0.1", port=29546, prefix=prefix, steps=steps, **exchange))
    found = []
    for process in processes:
        assert line(process) == {"running": True}
        found.append(line(process))
    for rank, stats in enumerate(found):
        assert stats["steps"] == steps, stats
        # A member's bytes stay inside: its gradients alone, uncompressed, are far more than all that crossed.
        assert (stats["bytes_sent_between"] > 0) == (rank % 2 == 0)
        assert stats["bytes_sent"] >= stats["gradient_bytes"] or rank % 2 == 0
    for host, leader, member in ((hosts[0], found[0], found[1]), (hosts[1], found[2], found[3])):
        # What the leader counts, TCP's own part, and the rendezvous of both ranks.
        assert leader["bytes_sent_between"] <= crossed_bytes(host) < 1.5 * leader["bytes_sent_between"] + 100_000
        assert crossed_bytes(host) < member["bytes_sent"]
