"""Processes over ``gloo``: with the default group and without it, and what the others see when one goes wrong."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_processes import DEADLINE_S, Ranks

# Each rank prints one line when training runs, one when it is done or failed.
SCRIPT = """
import json, sys, time
import torch
import torch.distributed as dist
from torch import nn
import gradcomp
from gradcomp.transports.torch_distributed import TorchTransport

torch.set_num_threads(1)
options = json.loads(sys.argv[1])

def say(**line):
    print(json.dumps(line), flush=True)

transport = options.get("transport", "gloo:timeout_s=60")
if options.get("init"):
    dist.init_process_group("gloo")
if "members" in options:
    members = dist.new_group(options["members"])
    if dist.get_rank() not in options["members"]:
        time.sleep(0.5)
        dist.barrier()
        say(done="elsewhere")
        sys.exit()
    transport = TorchTransport(group=members, timeout_s=60)
if options.get("absent"):
    sys.stdin.read()
net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
try:
    sync = gradcomp.attach(optimizer, model=net, transport=transport, digest_every=5, **options.get("attach", {}))
    for step in range(1, options.get("steps", 10**9) + 1):
        optimizer.zero_grad()
        net(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
        if options.get("init") and step % 3 == 0:
            dist.all_reduce(torch.ones(5000), async_op=True)  # the user's own, at any moment
        if step == 20:
            say(running=True)
    sync.close()
    if "members" in options:
        dist.barrier()
    say(done=[float(parameter.sum()) for parameter in net.parameters()], ranks=sync.world_size)
except gradcomp.GradcompError as error:
    say(error=type(error).__name__, about=getattr(error, "field", getattr(error, "peer", None)), text=str(error))
"""


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    started = Ranks(script)
    # A rank that hangs: its end makes whoever reads from it fail.
    watchdog = threading.Timer(DEADLINE_S / 2, lambda: [process.kill() for process in started.processes])
    watchdog.start()
    yield started
    watchdog.cancel()
    started.end()


@pytest.mark.parametrize("init", [True, False])
def test_replicas_stay_equal_with_a_default_group_and_without(ranks: Ranks, init: bool) -> None:
    for rank in range(2):
        ranks.start(rank, 2, init=init, steps=20)
    for rank in range(2):
        assert ranks.line(rank) == {"running": True}
    first, second = (ranks.line(rank) for rank in range(2))
    assert "done" in first, first
    assert first == second
    for process in ranks.processes:
        assert process.wait(15.0) == 0


def test_a_group_of_some_ranks(ranks: Ranks) -> None:
    for rank in range(3):
        ranks.start(rank, 3, init=True, members=[0, 2], steps=5)
    found = [ranks.line(rank) for rank in range(3)]
    assert found[0] == found[2]
    assert (found[0]["ranks"], found[1]) == (2, {"done": "elsewhere"})
    for process in ranks.processes:
        assert process.wait(15.0) == 0


@pytest.mark.parametrize("init", [True, False])
def test_a_killed_rank_is_lost_on_all_others_and_nobody_hangs(ranks: Ranks, init: bool) -> None:
    for rank in range(3):
        ranks.start(rank, 3, init=init, attach={"compressor": "threshold" if init else "none"})
    for rank in range(3):
        assert ranks.line(rank) == {"running": True}
    ranks.processes[1].send_signal(signal.SIGKILL)
    for rank in (0, 2):
        found = ranks.line(rank)
        assert (found["error"], found["about"]) == ("PeerLost", 1), found
        ranks.processes[rank].wait(30.0)


def test_a_stopped_rank_times_out(ranks: Ranks) -> None:
    for rank in range(2):
        ranks.start(rank, 2, transport="gloo:timeout_s=5")
    for rank in range(2):
        assert ranks.line(rank) == {"running": True}
    ranks.processes[1].send_signal(signal.SIGSTOP)
    found = ranks.line(0)
    assert found["error"] == "TransportTimeout", found
    assert "rank 1" in found["text"]
    assert ranks.processes[0].wait(30.0) == 0


def test_a_rank_that_differs_is_refused_everywhere(ranks: Ranks) -> None:
    for rank in range(2):
        ranks.start(rank, 2, init=True, attach={"compressor": "onebit"} if rank else {})
    for rank in range(2):
        found = ranks.line(rank)
        assert (found["error"], found["about"]) == ("HandshakeError", "compressor"), found


@pytest.mark.parametrize("init", [True, False])
def test_a_rank_that_never_comes_is_named(ranks: Ranks, init: bool) -> None:
    for rank in range(2):
        ranks.start(rank, 2, init=init, absent=rank == 1, transport="gloo:timeout_s=3")
    found = ranks.line(0)
    assert found["error"] == "TransportTimeout", found
    assert "rank 1" in found["text"] or "a rank did not come" in found["text"]
