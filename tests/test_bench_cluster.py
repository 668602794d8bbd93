"""``gradcomp bench cluster``: a small run on real namespaces, and what it makes of results and of failures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradcomp.bench import cluster, lab
from gradcomp.bench.cluster_rank import COMPUTE
from gradcomp.bench.cluster_report import draw, finish, show
from gradcomp.cli import main
from gradcomp.errors import ConfigError, WorkerFailed

FAULTY = '''
import os
from dataclasses import dataclass
from typing import ClassVar

from gradcomp.compressors.cast import NoCompression


@dataclass(frozen=True, kw_only=True)
class Faulty(NoCompression):
    """Fails on one rank, some steps on."""

    id: ClassVar[str] = "faulty"
    calls: ClassVar[int] = 0

    def prepare(self, grad, state):
        Faulty.calls += 1
        if Faulty.calls > 12 and os.environ.get("RANK") == "1":
            raise ArithmeticError("no more")
        return super().prepare(grad, state)
'''


def measured(name: str, step_ms: float = 20.0, **more: Any) -> dict[str, Any]:
    counts = {"steps": 2, "sent_bytes": 1000, "received_bytes": 1200, "cpu_s": 0.1, "times_ms": [step_ms] * 2}
    return {"method": name, "step_ms": step_ms, "compute_ms": 10.0, "times_compute": step_ms / 10, **counts, **more}


ROWS = [
    measured(COMPUTE, 10.0),
    measured("ddp:fp32", 400.0),
    measured("onebit/two_shot", 12.0, hidden_fraction=0.5, ratio=31.0),
    {"method": "faulty", "error": "rank 1: ArithmeticError: no more"},
]


@pytest.mark.root
def test_a_small_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "faulty_codec.py").write_text(FAULTY)
    info = tmp_path / "faulty_codec-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-codec\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gradcomp.compressors]\nfaulty = faulty_codec:Faulty\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the ranks
    cluster.registry._found.cache_clear()
    try:
        arguments = ["--hosts", "2", "--model", "tiny", "--rates", "20mbit,100mbit", "--steps", "3", "--ddp", "bf16"]
        arguments += ["--overlap", "forward", "--in-a-row", "2"]
        methods = ["--compressors", "faulty", "none", "--method", "topk/all_gather/gloo"]
        picture = ["--json", "--png", str(tmp_path / "cluster.png")]
        assert main(["bench", "cluster", *arguments, *methods, *picture]) == 0
    finally:
        cluster.registry._found.cache_clear()
    result = json.loads(capsys.readouterr().out)
    assert result["methods"]["none"]["transport"]["insecure"] is True
    rows = {(row["rate"], row["method"]): row for row in result["rows"]}
    assert list(dict.fromkeys(rate for rate, _ in rows)) == ["100mbit", "20mbit"]
    assert len(rows["100mbit", "faulty"]["times_ms"]) == 3
    assert rows["20mbit", "faulty"]["error"].startswith("rank ")  # and others went on
    for rate in ("100mbit", "20mbit"):
        compute, ddp = rows[rate, COMPUTE], rows[rate, "ddp:bf16"]
        dense, sparse = rows[rate, "none"], rows[rate, "topk/all_gather/gloo"]
        for row in (compute, ddp, dense, sparse):
            assert len(row["times_ms"]) == 3
            assert row["steps"] == 6
            assert row["cpu_s"] > 0
        # Of two ranks each sends the other everything, once.
        numel = result["parameters"]
        assert 4 * numel < dense["sent_bytes"] < 4.6 * numel
        assert 2 * numel < ddp["sent_bytes"] < 2.4 * numel
        assert 0 < compute["sent_bytes"] < sparse["sent_bytes"] < numel
        assert dense["ratio"] == pytest.approx(1, rel=0.01)
        assert sparse["ratio"] > 10
        assert "hidden_fraction" in dense
        assert "hidden_fraction" not in ddp
    assert (tmp_path / "cluster.png").read_bytes().startswith(b"\x89PNG")


class FakeLab:
    """Hosts whose rank 0 says what it is told to say; a run may end after it."""

    def __init__(self, lines: list[dict[str, Any]], failure: str | None = None) -> None:
        self.lines, self.failure = lines, failure
        self.rates: list[str | None] = []
        self.runs: list[list[str]] = []

    def __call__(self, hosts: int, burst_bytes: int | None) -> FakeLab:
        return self

    def __enter__(self) -> FakeLab:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_rate(self, rate: str | None) -> None:
        self.rates.append(rate)

    def run(self, command: list[str], *, listener: Callable[[str], None], **options: Any) -> None:
        self.runs.append(json.loads(command[-1])["rates"])
        listener("[Gloo] connected")
        for line in self.lines:
            listener(json.dumps(line))
        if self.failure:
            raise WorkerFailed(self.failure)


def test_a_table_a_rate_as_they_come(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fast, slow = ({"rate": rate, "rows": ROWS} for rate in ("1gbit", "10mbit"))
    hosts = FakeLab([{"wants": "1gbit"}, fast, {"wants": "10mbit"}, slow])
    monkeypatch.setattr(cluster, "Lab", hosts)
    assert cluster.main(["--rates", "10mbit,1gbit"]) == 0
    assert hosts.rates == [None, "1gbit", "10mbit"]
    out = capsys.readouterr().out
    assert out.index("1 Gb/s") < out.index("10 Mb/s")
    assert "faulty: rank 1: ArithmeticError: no more" in out
    anew = FakeLab([])
    monkeypatch.setattr(cluster, "Lab", anew)
    cluster.main(["--rates", "10mbit,1gbit", "--anew", "--at-once", "3"])
    assert anew.runs == [["1gbit"]] * 2 + [["10mbit"]] * 2  # five methods in two runs


def test_a_run_that_ends_keeps_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"wants": "1gbit"}, {"rate": "1gbit", "rows": ROWS}, {"wants": "10mbit"}]
    monkeypatch.setattr(cluster, "Lab", FakeLab(lines, "python -m x: rank 2 ended with status -9\nout of memory"))
    assert cluster.main(["--rates", "1gbit,10mbit", "--ddp", "fp32", "--method", "onebit/two_shot", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)["rows"]
    assert [row["method"] for row in rows] == [row["method"] for row in ROWS] + ["ddp:fp32", "onebit/two_shot"]
    assert {row["error"] for row in rows[-2:]} == {"the run ended: rank 2 ended with status -9"}
    assert "out of memory" in err
    monkeypatch.setattr(cluster, "Lab", FakeLab([], "python: rank 0 ended with status 1\n"))
    assert cluster.main(["--rates", "1gbit"]) == 1


def test_methods_that_do_not_fit_go_into_several_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {f"m{i}": {} for i in range(5)}
    options = SimpleNamespace(at_once=None, hosts=4)
    monkeypatch.setattr(cluster, "free_memory_bytes", lambda: 24 << 30)
    assert cluster._groups(names, 10**6, options) == [names]
    assert [len(group) for group in cluster._groups(names, 9 * 10**7, options)] == [2, 2, 1]
    assert "5 methods in 3 runs" in capsys.readouterr().err
    assert len(cluster._groups(names, 10**10, options)) == 5
    assert [len(group) for group in cluster._groups(names, 10**6, SimpleNamespace(at_once=3, hosts=4))] == [3, 2]


def test_what_is_combined() -> None:
    words = ["--compressors", "onebit", "none", "--exchanges", "auto", "two_shot", "--method", "dgc/tree/gloo"]
    ways = cluster._ways(cluster._parser().parse_args([*words, "--ddp", "none"]))
    assert list(ways) == ["onebit", "onebit/two_shot", "none", "none/two_shot", "dgc/tree/gloo"]
    assert ways["none"] == {"compressor": "none", "exchange": "auto", "transport": "zmq"}
    assert list(cluster._ways(cluster._parser().parse_args(["--method", "fp16/auto/gloo", "--ddp", "fp32,bf16"]))) == [
        "ddp:fp32",
        "ddp:bf16",
        "fp16/auto/gloo",
    ]


def test_the_table() -> None:
    rows = [finish(row, "10mbit", 1e7) for row in ROWS]
    assert rows[0]["link_used"] == pytest.approx(0.096)
    head, _, compute, ddp, ours, faulty, why = show(rows).splitlines()
    assert head.split()[:4] == ["method", "step", "x", "compute"]
    assert compute.split()[:4] == ["compute", "only", "10.0", "ms"]
    assert ddp.split()[:5] == ["ddp:fp32", "400.0", "ms", "40.00", "-"]
    assert ours.split()[:5] == ["onebit/two_shot", "12.0", "ms", "1.20", "50%"]
    assert faulty.split()[1] == "failed"
    assert why == "faulty: rank 1: ArithmeticError: no more"


def test_a_picture(tmp_path: Path) -> None:
    rows = [finish(row, rate, bits) for rate, bits in (("10mbit", 1e7), ("1gbit", 1e9)) for row in ROWS]
    result = {"model": "vgg11", "parameters": 9_200_000, "hosts": 4, "rows": rows}
    draw(result, str(tmp_path / "all.png"))
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    draw(result | {"rows": rows[-1:]}, str(tmp_path / "nothing.png"))  # all failed
    with pytest.raises(ConfigError, match="--png"):
        draw(result, str(tmp_path / "no" / "where.png"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hosts", "1"], "hosts=1"),
        (["--steps", "1"], "steps=1"),
        (["--in-a-row", "0"], "in_a_row=0"),
        (["--budget-s", "0"], "budget_s=0"),
        (["--rates", "fast"], "rate='fast'"),
        (["--compressors", "nope"], "nope"),
        (["--exchanges", "server:addresses=10.0.0.1:1"], "'server' is not allowed"),
        (["--transports", "inproc"], "'inproc' is not allowed"),
        (["--transports", "zmq:speed=1"], "unknown option 'speed'"),
        (["--method", "a/b/c/d"], "COMPRESSOR/EXCHANGE/TRANSPORT"),
        (["--ddp", "fp8"], "ddp='fp8'"),
        (["--png", "no/such/folder/x.png"], "no such folder"),
    ],
)
def test_bad_options(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        cluster.main(arguments)


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(lab.os, "geteuid", lambda: 1000)
    assert main(["bench", "cluster"]) == 2
    assert "need root" in capsys.readouterr().err
