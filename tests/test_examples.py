"""The examples that are scripts run as their first lines say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import zygote

ROOT = Path(__file__).parents[1]


def torchrun(script: str, *arguments: str, workers: int = 2) -> str:
    """What an example prints, run by torchrun on this machine."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    done = zygote.run(
        [sys.executable, *command, str(ROOT / "examples" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("more", [(), ("--transport", "zmq")])
def test_the_ddp_script(more: tuple[str, ...]) -> None:
    printed = torchrun("ddp_hook.py", "--epochs", "2", *more)
    result = json.loads(printed.splitlines()[-1])
    assert result["steps"] == 2 * (1400 // 2 // 16)
    assert result["accuracy"] > 50
    assert result["ratio"] > 10


def objects(text: str) -> list[dict[str, Any]]:
    """All JSON objects in it: torchrun's workers write lines and their ends by themselves, so two may come on one."""
    found, decoder = [], json.JSONDecoder()
    while text := text.strip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("downpour.py", ("--n-push", "2", "--n-fetch", "2", "--warm-start", "5")),
        ("softsync.py", ("--staleness-aware",)),
    ],
)
def test_the_scripts_with_servers(script: str, options: tuple[str, ...]) -> None:
    results = objects(torchrun(script, "--epochs", "3", *options))
    assert sorted(result["rank"] for result in results) == [0, 1]
    for result in results:
        assert result["updates"] >= 3 * (1400 // 16) // 2
        assert result["accuracy"] > 40
        if result.get("steps") == 1:
            continue  # it came when the other was done, and has pushed nothing: that takes two steps
        assert result["ratio"] > 30
        assert result["pull_ratio"] > 30
