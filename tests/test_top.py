"""`gradcomp top`: frames of logs, and when it ends."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
from logs import step, write

from gradcomp import cli

pytest.importorskip("rich", reason="the live view needs rich")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def top(*arguments: object) -> int:
    return cli.main(["top", *map(str, arguments)])


def test_one_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert top(write(tmp_path / "run.jsonl"), "--once") == 0
    out = capsys.readouterr().out
    for text in (
        "digits.py",
        "done",
        "step 40/40",
        "epoch 2/2",
        "accuracy 90.00 %",
        "steps/s 25.00",
        "sent/s 25.00 kB",
    ):
        assert text in out
    assert "ddfffffffffbb" in out
    rows = [line.split() for line in out.splitlines()]
    assert [row[:2] for row in rows if row and row[0] in ("0", "1")] == [["0", "40"], ["1", "40"]]
    assert [row[:2] for row in rows if row and row[0].startswith("fc")] == [["fc2.weight", "5"], ["fc1.weight", "3"]]


def test_silent_and_missing_ranks_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "run.jsonl", header={"world_size": 3}, end=None)
    os.utime(tmp_path / "run.rank1.jsonl", (time.time() - 100, time.time() - 100))
    assert top(path, "--once", "--stale", "60") == 0
    out = capsys.readouterr().out
    assert out.count("silent for") == 1
    assert "silent for 10" in out
    assert "no steps yet of 1 more" in out


def test_what_a_log_says_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = "[red]x[/red]\x1b[2J"
    steps = [step(1, layers={bad: {"residual_norm": 1.0}})]
    path = write(tmp_path / "run.jsonl", header={"label": bad, "task": bad}, steps=steps, end={"error": bad})
    assert top(path, "--once") == 1
    out, err = capsys.readouterr()
    assert "\x1b" not in out
    assert out.count("[red]x[/red][2J") == 4
    assert "the run failed" in err


def test_a_run_with_a_server_counts_updates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [step(number, version=3 * number) for number in range(1, 11)]
    assert top(write(tmp_path / "run.jsonl", header={"updates": 60}, steps=steps), "--once") == 0
    assert "update 30/60" in capsys.readouterr().out


def test_it_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    found: list[int] = []
    watching = threading.Thread(target=lambda: found.append(top(path, "--every", "0.05", "--wait", "30")), daemon=True)
    watching.start()
    write(path, steps=[step(1)], end=None)
    with path.open("a") as file:
        file.write(json.dumps(step(2) | {"end": {}}) + "\n")
    watching.join(30)
    assert found == [0]
    assert "done" in capsys.readouterr().out


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert top(tmp_path / "no.jsonl", "--wait", "0") == 2
    assert "no.jsonl: nothing there after 0 s" in capsys.readouterr().err
    (tmp_path / "run.jsonl").write_text("a picture\n")
    assert top(tmp_path / "run.jsonl", "--once") == 2
    assert "line 1 is damaged" in capsys.readouterr().err
    assert top(tmp_path / "run.jsonl", "--every", "0") == 2
    assert "every=0.0 is not allowed" in capsys.readouterr().err
