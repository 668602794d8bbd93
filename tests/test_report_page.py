"""The report: one page that needs nothing else, whatever the logs say."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from logs import step, write

from gradcomp import cli
from gradcomp.integrations import report_page
from gradcomp.integrations.report_figures import compare, look_at
from gradcomp.integrations.report_page import page
from gradcomp.integrations.run_log import open_run

pytest.importorskip("matplotlib", reason="pictures need matplotlib")


def report(*arguments: object) -> str:
    assert cli.main(["report", *map(str, arguments)]) == 0
    out = next(Path(str(a)).with_suffix(".html") for a in arguments if str(a).endswith(".jsonl"))
    return out.read_text(encoding="utf-8")


def test_the_page_holds_all_it_needs(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl")
    html = report(path, "--png-dir", tmp_path / "pictures")
    images = re.findall(r'src="([^"]*)"', html)
    assert len(images) == 5
    for image in images:
        head, _, data = image.partition(",")
        assert head == "data:image/svg+xml;base64"
        drawn = base64.b64decode(data).decode()
        assert "</svg>" in drawn
        assert not re.search(r'href="(?!#|data:)', drawn)
    assert not re.search(r"(src|href)=\"(https?:)?//", html)
    assert "<script" not in html
    assert "default-src 'none'" in html
    for text in ("90.00 %", "threshold (2), none (1)", "40.00 kB", "250.0x", "Layer by layer", "Who held up whom"):
        assert text in html
    pictures = sorted(picture.name for picture in (tmp_path / "pictures").iterdir())
    assert pictures == ["compression.png", "layers.png", "learning.png", "milliseconds.png", "ranks.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "pictures").iterdir())


def test_what_a_log_says_is_text(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>$\\frac{$ \x1b[2J\n_%"
    row = {"density": 0.1, "tau": 0.1, "residual_norm": 1.0, "compressor": bad}
    odd = {"layers": {bad: row, "_x": row}, "compressors": {bad: bad}, "loss": None, "nonfinite_steps": 7}
    steps = [step(number, **odd) for number in range(1, 9)]
    header = dict.fromkeys(("label", "task", "compressor", "exchange", "host"), bad)
    path = write(tmp_path / "run.jsonl", header=header | {"settings": [bad]}, steps=steps, end={"error": bad})
    html = report(path)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 5
    assert "In 7 steps a gradient was not finite" in html


def test_runs_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = look_at(open_run(write(tmp_path / "any.jsonl")))[-1:]  # drawing them all takes long
    monkeypatch.setattr(report_page, "look_at", lambda run: one)
    dense = write(tmp_path / "dense.jsonl", header={"label": "dense"})
    sparse = write(tmp_path / "sparse.jsonl", header={"label": "sparse"})
    html = report(dense, sparse, "--out", tmp_path / "dense.html", "--png-dir", tmp_path)
    assert "<h1>gradcomp: dense, sparse</h1>" in html
    assert html.count("<img") == 2 + 2
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "1-dense-ranks.png",
        "2-sparse-ranks.png",
        "compression.png",
        "learning.png",
    ]


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    run = open_run(write(tmp_path / "run.jsonl", end=None, ranks=1, rest='{"step"'))
    html = page([run], [], [[]])
    assert "the log stops at step 40" in html
    assert "No log was found of rank 1" in html


def test_a_run_that_came_to_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", steps=[], end={"error": "no data"})
    html = report(path)
    assert "The run failed: no data" in html
    assert "<img" not in html
    bare = open_run(write(path, steps=[{"step": 1, "time_s": 0.1}], end=None))
    assert [picture.name for picture in [*compare([bare]), *look_at(bare)]] == ["learning", "compression"]


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "no.jsonl")]) == 2
    assert "no.jsonl: No such file" in capsys.readouterr().err
    path = write(tmp_path / "run.jsonl", steps=[])
    assert cli.main(["report", str(path), "--out", str(tmp_path / "no" / "run.html")]) == 2
    assert "run.html: No such file" in capsys.readouterr().err
