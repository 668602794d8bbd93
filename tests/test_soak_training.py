"""A soak: digits trained through a parameter server, while servers and workers are killed all the time."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from ports import free_port
from processes import Process, until

from gradcomp.errors import GradcompError
from gradcomp.integrations.serve import look

KILLS = int(os.environ.get("GRADCOMP_SOAK_KILLS", "0"))
WORKERS = 4
UPDATES = 12 * WORKERS * 21  # of 12 epochs, with whole batches of 16 of each worker's share of 1,400 samples
TASK = ["examples/tasks/digits.py", "--set", "lr=0.05", "--compressor", "threshold:density=0.01", "--mode", "async"]


def updates(address: str) -> int:
    """How many the server has made; -1 while it is not there."""
    try:
        return int(look(address, timeout_s=1.0).get("updates", -1))
    except GradcompError:
        return -1


@pytest.mark.skipif(not KILLS, reason="takes minutes: make soak, or GRADCOMP_SOAK_KILLS=50")
def test_training_reaches_the_accuracy_of_an_undisturbed_run(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    found = [train(tmp_path / str(kills), kills) for kills in (0, KILLS)]
    print(f"accuracy {found[0]:.2f} % undisturbed, {found[1]:.2f} % with {KILLS} + {KILLS} kills")
    assert found[1] > found[0] - 1.0


def train(folder: Path, kills: int) -> float:
    """The accuracy, in percent, after the server was killed so many times, and workers likewise."""
    folder.mkdir()
    address = f"127.0.0.1:{free_port()}"

    def serve() -> Process:
        options = ["--checkpoint-s", "5", "--lease-s", "1", "--quiet", "--state", str(folder / "state")]
        return Process(folder / "server.log", "-m", "gradcomp", "server", "--bind", address, *options)

    def work(rank: int) -> Process:
        environment = {"RANK": str(rank), "WORLD_SIZE": str(WORKERS)}
        arguments = ["worker", *TASK, "--server", address, "--json", "--quiet"]
        return Process(folder / f"worker-{rank}.log", "-m", "gradcomp", *arguments, environment=environment)

    running = {"server": serve()} | {str(rank): work(rank) for rank in range(WORKERS)}
    recovered_s: dict[str, list[float]] = {"server": [], "worker": []}
    try:
        for kill in range(2 * kills):
            until(lambda at=kill: updates(address) >= UPDATES * at // (2 * kills + 10) + 1)
            # Rank 0 evaluates, and says what comes out: it is killed like the others, but not at the end.
            name = "server" if kill % 2 else str(kill // 2 % WORKERS)
            before = updates(address)
            running[name].end(signal.SIGKILL)
            began_s = time.monotonic()
            running[name] = serve() if name == "server" else work(int(name))
            until(lambda count=before: updates(address) > count)
            recovered_s["server" if kill % 2 else "worker"].append(time.monotonic() - began_s)
        for rank in range(WORKERS):
            until(lambda at=rank: running[str(at)].process.poll() is not None)
            assert running[str(rank)].process.returncode == 0, running[str(rank)].said[-3000:]
        assert updates(address) >= UPDATES
        running["server"].end(signal.SIGTERM)
    finally:
        for process in running.values():
            process.close()
    for whose, seconds in recovered_s.items():
        if seconds:
            middle, most = sorted(seconds)[len(seconds) // 2], max(seconds)
            print(f"{whose} killed: next update after {middle:.1f} s, at most {most:.1f} s")
    accuracy = re.findall(r'"accuracy": ([0-9.]+)', running["0"].said)
    return float(accuracy[-1])
