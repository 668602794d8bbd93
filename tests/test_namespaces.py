"""Two hosts with addresses of their own, as network namespaces on one bridge-less link."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import two_hosts
from zygote import Popen

pytestmark = pytest.mark.root

DEADLINE_S = 90
SCRIPT = """
import json, sys
import torch
from torch import nn
import gradcomp

torch.set_num_threads(1)
torch.manual_seed(int(sys.argv[1]))
net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
try:
    with gradcomp.attach(optimizer, model=net, compressor="topk:ratio=0.1", transport=sys.argv[2]) as sync:
        for step in range(20):
            optimizer.zero_grad()
            net(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
        sync.check_replicas()
        print(json.dumps({"steps": sync.stats()["steps"], "received": sync.stats()["bytes_received"]}))
except gradcomp.ConfigError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces, 10.78.0.1 and 10.78.0.2."""
    with two_hosts("gctest", "10.78.0") as names:
        yield names


def run_on(hosts: list[str], script: Path, transport: str) -> list[dict[str, object]]:
    processes = [
        Popen(
            ["ip", "netns", "exec", host, sys.executable, str(script), str(rank), transport],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "10.78.0.1", "MASTER_PORT": "29544"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, host in enumerate(hosts)
    ]
    try:
        return [json.loads(process.communicate(timeout=DEADLINE_S)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_two_hosts_train_together(hosts: list[str], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    for result in run_on(hosts, script, "zmq:insecure=true,timeout_s=30"):
        assert result["steps"] == 20
        assert int(str(result["received"])) > 0


def test_an_address_others_can_reach_needs_insecure(hosts: list[str], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    for result in run_on(hosts, script, "zmq:timeout_s=30"):
        assert "insecure" in str(result["error"])
