"""The command line: what it lists, what it refuses before any worker is started, and how failures are explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gradcomp
from gradcomp import cli
from gradcomp.errors import ConfigError, GradcompError, PeerLost, WorkerFailed
from gradcomp.integrations import launch as launching
from gradcomp.integrations import serve as serving
from gradcomp.integrations.launch import Failure, record_failure, threads_per_worker
from gradcomp.integrations.progress import Progress
from gradcomp.integrations.report import Summary, size
from gradcomp.integrations.worker import RunOptions

TASK = "def task(*, lr: float = 0.1): ...\n"


@pytest.fixture
def task_file(tmp_path: Path) -> str:
    path = tmp_path / "tiny.py"
    path.write_text(TASK)
    return str(path)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """What would have been launched."""
    calls: list[tuple[list[str], int]] = []
    monkeypatch.setattr(launching, "launch", lambda arguments, *, workers: calls.append((list(arguments), workers)))
    return calls


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"gradcomp {gradcomp.__version__}\n"


def test_every_compressor_is_listed_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compressors"]) == 0
    out = capsys.readouterr().out
    for name in gradcomp.available_compressors():
        assert f"\n{name} " in f"\n{out}"
    assert "density=0.001" in out


def test_a_command_is_needed() -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compressor", "treshold"], "unknown compressor 'treshold'; available: adaptive, auto, bf16,"),
        (["--compressor", "threshold:tua=1"], "threshold: unknown option 'tua'"),
        (["--compressor", "threshold:density=2"], "density=2 is not allowed"),
        (["--transport", "carrier-pigeon"], "unknown transport 'carrier-pigeon'"),
        (
            ["--exchange", "ring"],
            "unknown exchange 'ring'; available: all_gather, all_reduce, auto, hierarchical, server, tree, two_shot",
        ),
        (["--set", "lr=fast"], "lr=fast is not allowed; it must be float"),
        (["--set", "width=3"], "unknown option 'width'; it has lr"),
        (["--epochs", "0"], "epochs=0 is not allowed"),
        (["--batch-size=-1"], "batch_size=-1 is not allowed"),
        (["--seed=-1"], "seed=-1 is not allowed"),
        (["--log", "/no/such/folder/run.jsonl"], "its folder does not exist"),
    ],
)
def test_bad_options_are_refused_before_any_worker_starts(
    arguments: list[str],
    message: str,
    task_file: str,
    launched: list[tuple[list[str], int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["train", task_file, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("gradcomp: ")
    assert message in err
    assert err.count("\n") == 1
    assert launched == []


@pytest.mark.parametrize("workers", [0, -3, 5000])
def test_a_silly_number_of_workers_is_refused(workers: int, task_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", task_file, f"--workers={workers}"]) == 2
    assert f"workers={workers} is not allowed" in capsys.readouterr().err


@pytest.mark.parametrize(("source", "message"), [("x = 1\n", "must define a function task()"), ("(\n", "SyntaxError")])
def test_a_bad_task_file_is_refused(
    source: str,
    message: str,
    tmp_path: Path,
    launched: list[tuple[list[str], int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.py").write_text(source)
    assert cli.main(["train", str(tmp_path / "bad.py")]) == 2
    assert message in capsys.readouterr().err
    assert cli.main(["train", str(tmp_path / "missing.py")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert launched == []


def test_workers_are_told_what_train_was_told(
    task_file: str, launched: list[tuple[list[str], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--set", "lr=1e-3", "--compressor=topk:ratio=0.01", "--transport=zmq:rate=1gbit", "--exchange=two_shot"]
    given += ["--epochs=3", "--batch-size=8", "--seed=7", "--log=run.jsonl", "--json", "--quiet", "--label=a b"]
    given += ["--log-layers=3", "--tensorboard=boards"]
    given += ["--overlap=forward"]
    assert cli.main(["train", task_file, *given, "--workers=3"]) == 0
    [(arguments, workers)] = launched
    assert workers == 3
    seen: list[RunOptions] = []
    monkeypatch.setattr("gradcomp.integrations.worker.work", lambda options, *, launched: seen.append(options) or 0)
    assert cli.main(["worker", *arguments]) == 0
    assert seen == [
        RunOptions(
            task=task_file,
            settings=("lr=1e-3",),
            compressor="topk:ratio=0.01",
            transport="zmq:rate=1gbit",
            exchange="two_shot",
            overlap="forward",
            epochs=3,
            batch_size=8,
            seed=7,
            log="run.jsonl",
            log_layers=3,
            tensorboard="boards",
            json=True,
            quiet=True,
            label="a b",
        )
    ]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("no"), 2, "gradcomp: no\n"),
        (WorkerFailed("rank 1 failed: no"), 1, "gradcomp: rank 1 failed: no\n"),
        (WorkerFailed("rank 1 failed: no\nits\ntraceback"), 1, "its\ntraceback\ngradcomp: rank 1 failed: no\n"),
        (KeyboardInterrupt(), 130, "gradcomp: interrupted\n"),
    ],
)
def test_exit_status(
    error: BaseException,
    status: int,
    message: str,
    task_file: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(arguments: list[str], *, workers: int) -> None:
        raise error

    monkeypatch.setattr(launching, "launch", fail)
    assert cli.main(["train", task_file]) == status
    assert capsys.readouterr().err == message


# -- failures ----------------------------------------------------------------------------------------------------------


def failure(rank: int, time_s: float, *, follows: bool = False, details: str = "") -> Failure:
    return Failure(rank=rank, time_s=time_s, summary=f"summary {rank}", details=details, follows=follows)


@pytest.mark.parametrize(
    ("failures", "ended", "message"),
    [
        # the cause is told, though those it took with it were seen first
        ([failure(0, 1.0, follows=True), failure(1, 2.0, details="trace")], {0: 1}, "rank 1 failed: summary 1\ntrace"),
        ([failure(2, 1.0), failure(1, 2.0)], {1: 1, 2: 1}, "rank 2 failed: summary 2"),
        ([failure(0, 1.0, follows=True)], {0: 1, 1: -9}, "rank 1 failed: killed by SIGKILL"),
        ([], {3: 7}, "rank 3 failed: exit status 7, and it left no message"),
        ([failure(0, 2.0, follows=True), failure(1, 1.0, follows=True)], {0: 1, 1: 1}, "rank 1 failed: summary 1"),
    ],
)
def test_the_root_cause_is_told(failures: list[Failure], ended: dict[int, int], message: str) -> None:
    assert launching.explain(failures, ended) == message


def test_a_failure_is_left_for_the_launcher_and_for_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "attempt_0" / "1" / "error.json"
    path.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        recorded = record_failure(error, 1)
    assert recorded.headline == "rank 1 failed: ValueError: two"
    assert "in test_a_failure" in recorded.details
    assert not recorded.follows
    assert launching.read_failures(tmp_path) == [recorded]
    assert json.loads(path.read_text())["message"]["extraInfo"]["py_callstack"].startswith("Traceback")


def test_our_own_errors_take_one_line_and_lost_peers_are_consequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert record_failure(GradcompError("no"), 2).details == ""
    lost = record_failure(PeerLost("rank 0: rank 1 is gone", peer=1), 0)
    assert lost.follows
    assert lost.headline == "rank 0: rank 1 is gone"


def test_cores_are_shared_out() -> None:
    assert threads_per_worker(1) >= 1
    assert threads_per_worker(1000) == 1


# -- reports -----------------------------------------------------------------------------------------------------------


def test_the_summary_is_a_table_or_json() -> None:
    summary = Summary(
        rank=0,
        task="t",
        compressor="none",
        transport="zmq",
        exchange="auto",
        workers=2,
        seed=0,
        accuracy=98.7654,
        steps=10,
        train_s=4.0,
        bytes_sent=15_000_000,
        bytes_received=15_000_000,
        ratio=1.0,
    )
    head, rule, row = summary.table().splitlines()
    assert head.split() == [
        "compressor",
        "workers",
        "accuracy",
        "steps",
        "time",
        "steps/s",
        "sent/step",
        "received/step",
        "ratio",
    ]
    assert set(rule) == {"-", " "}
    assert row.split() == ["none", "2", "98.77", "%", "10", "4.0", "s", "2.50", "1.50", "MB", "1.50", "MB", "1.0x"]
    assert json.loads(summary.json())["accuracy"] == 98.7654
    assert size(999) == "999 B"


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(label="run", steps=1, quiet=False) as progress:
        progress.step()
        progress.epoch(epoch=1, epochs=2, loss=0.5, accuracy=90.0, train_s=1.25)
    assert capsys.readouterr().err == "run: epoch 1/2  loss 0.500  accuracy 90.0 %  1.2 s\n"
    with Progress(label="run", steps=1, quiet=True) as progress:
        progress.epoch(epoch=1, epochs=2, loss=0.5, accuracy=90.0, train_s=1.25)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint-updates", "0"], "checkpoint_updates=0 is not allowed"),
        (["--lease-s", "0"], "lease_s=0.0 is not allowed"),
        (["--bind", "nowhere"], "it must be HOST:PORT"),
        (["--bind", "0.0.0.0:0"], "address must be one that peers can connect to"),
        (["--bind", "192.0.2.1:0"], "in the clear and from anybody"),
        (["--rate", "fast"], "rate='fast' is not allowed"),
    ],
)
def test_a_server_refuses_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["server", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_status_of_a_server_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving.look, "__kwdefaults__", {"timeout_s": 0.3})
    assert cli.main(["server", "--status", "127.0.0.1:1"]) == 1
    assert "did not answer Look within 0.3 s: nobody listens there" in capsys.readouterr().err
