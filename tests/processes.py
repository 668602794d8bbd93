"""Processes in tests: ranks of a script, each of which prints JSON lines, under one deadline; or any, one by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import zygote
from ports import free_port

ROOT = Path(__file__).resolve().parent.parent

PRELUDE = """
import json, os, sys
import torch
torch.set_num_threads(1)
RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
OPTIONS = json.loads(sys.argv[1])

def say(**fields):
    print(json.dumps(fields), flush=True)
"""


def run_script(
    body: str,
    world_size: int,
    *,
    options: Mapping[str, Any] | None = None,
    local_world_size: int | None = None,
    may_die: Container[int] = (),
    deadline_s: float = 120.0,
) -> list[list[dict[str, Any]]]:
    """Run ``body`` (after PRELUDE) as every rank at once, as torchrun would.

    Args:
        options: what the script finds in OPTIONS.
        local_world_size: ranks a host, for LOCAL_RANK; all of them if None.
        may_die: ranks that may fail.
        deadline_s: for all of it, in seconds.

    Returns:
        For each rank, the lines it said.

    Raises:
        AssertionError: a rank failed, with what it wrote to stderr, or was not done in time.
    """
    port = free_port()
    local = world_size if local_world_size is None else local_world_size
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "ranks.py"
        script.write_text(PRELUDE + body)
        processes = []
        for rank in range(world_size):
            env = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank % local),
                "LOCAL_WORLD_SIZE": str(local),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            arguments = [sys.executable, str(script), json.dumps(dict(options or {}))]
            with (Path(folder) / f"out{rank}").open("w") as out, (Path(folder) / f"err{rank}").open("w") as err:
                processes.append(zygote.Popen(arguments, env=env, stdout=out, stderr=err))
        end = time.monotonic() + deadline_s
        try:
            for process in processes:
                process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            stuck = [rank for rank, process in enumerate(processes) if process.poll() is None]
            for process in processes:
                process.kill()
                process.wait()
        errors = {
            rank: (Path(folder) / f"err{rank}").read_text()[-3000:]
            for rank, process in enumerate(processes)
            if process.returncode and rank not in may_die
        }
        assert not errors, f"ranks not done in time: {stuck}\n" + "\n".join(f"rank {r}: {e}" for r, e in errors.items())
        return [
            [json.loads(line) for line in (Path(folder) / f"out{rank}").read_text().splitlines()]
            for rank in range(world_size)
        ]


class Process:
    """A process of Python whose output is kept in a file; it runs at the root of the repository."""

    def __init__(self, log: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | dict(environment or {})
        with log.open("a") as out:
            self.process = zygote.Popen(
                [sys.executable, *arguments], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def until(what: Callable[[], bool], deadline_s: float = 180.0) -> None:
    end = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)
