"""Logs: what is read of whole ones, of ones that are being written, and of damaged ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from logs import END, HEADER, step, write

from gradcomp.errors import ConfigError
from gradcomp.integrations.callbacks import JsonlCallback, rank_path
from gradcomp.integrations.report_data import layer_grid, rank_times, stage_ms
from gradcomp.integrations.run_log import LogReader, open_run, series


def test_each_rank_has_a_file_beside_the_first() -> None:
    assert rank_path("logs/run.jsonl", 0) == Path("logs/run.jsonl")
    assert rank_path("logs/run.jsonl", 12) == Path("logs/run.rank12.jsonl")
    assert rank_path("run", 1) == Path("run.rank1")


def test_a_run_is_read_with_all_its_ranks(tmp_path: Path) -> None:
    run = open_run(write(tmp_path / "run.jsonl"))
    assert sorted(run.steps) == [0, 1]
    assert [len(steps) for steps in run.steps.values()] == [40, 40]
    assert run.header["task"] == "digits.py"
    assert run.end == END
    assert run.missing == []
    assert series(run.first, "accuracy")[19::20] == [45.0, 90.0]
    assert math.isnan(series(run.first, "accuracy")[0])


def test_ranks_that_are_missing_or_of_another_run_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", header={"world_size": 4}, ranks=3)
    other = tmp_path / "run.rank2.jsonl"
    other.write_text(other.read_text().replace('"seed": 0', '"seed": 1'))
    run = open_run(path)
    assert run.missing == [2, 3]
    assert run.strange == [other]


def test_a_last_line_without_its_end_is_left_for_later(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", end=None, rest='{"st')
    reader = LogReader(path)
    assert len(reader.read()) == 40
    assert reader.cut_off
    with path.open("a") as file:
        file.write('ep": 41, "time_s": 2.0}\n{"step": 42, "time_s": 2.1')
    assert [line["step"] for line in reader.read()] == [41]
    assert reader.end is None
    with path.open("a") as file:
        file.write(', "end": {"accuracy": 90.0}}\n')
    assert [line["step"] for line in reader.read()] == [42]
    assert reader.end == {"accuracy": 90.0}
    assert not reader.cut_off


def test_a_file_that_is_begun_anew_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl")
    reader = LogReader(path)
    reader.read()
    write(path, header={"seed": 1}, steps=[step(1)], end=None)
    assert [line["step"] for line in reader.read()] == [1]
    assert reader.header["seed"] == 1
    assert reader.end is None


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"step": 3,', "it is not JSON"),
        ("\0\0\0", "it is not JSON"),
        ("[1]", "it is not a JSON object"),
        ('{"step": 3}', "a number time_s"),
        ('{"end": "well"}', "end must be an object"),
        ('{"step": "3", "time_s": 1}', "an integer step"),
        ('{"step": 3, "time_s": 1, "loss": "low"}', "loss is 'low'; it must be a number or null"),
        ('{"step": 3, "time_s": 1, "layers": [1]}', "layers must be an object of objects"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = write(tmp_path / "run.jsonl", steps=[step(1), step(2)], end=None, rest=line + "\n")
    with pytest.raises(ConfigError, match=r"run\.jsonl, line 3 is damaged: ") as error:
        open_run(path)
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is empty"),
        ('{"step": 1}\n', 'line 1 is damaged: it has no "run"'),
        (json.dumps({"run": HEADER | {"rank": 0, "format": 9}}) + "\n", "of format 9; this version reads format 1"),
        (json.dumps({"run": HEADER | {"rank": 2}}) + "\n", "rank is 2 and world_size 2"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "run.jsonl").write_text(text)
    with pytest.raises(ConfigError) as error:
        open_run(tmp_path / "run.jsonl")
    assert why in str(error.value)
    assert "run.jsonl" in str(error.value)


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.jsonl: No such file"):
        open_run(tmp_path / "run.jsonl")


def test_what_json_does_not_have_is_written_as_null(tmp_path: Path) -> None:
    log = JsonlCallback(tmp_path / "run.jsonl", rank=0)
    log.on_start(HEADER | {"rank": 0})
    log.on_step(step(1, loss=math.nan, layers={"a": {"tau": math.inf, "density": 0.5}}))
    log.on_end({"steps": 1})
    run = open_run(tmp_path / "run.jsonl")
    assert run.first[0]["loss"] is None
    assert run.first[0]["layers"]["a"] == {"tau": None, "density": 0.5}
    assert run.end == {"steps": 1}


def test_stages_add_up_to_the_step() -> None:
    stages = stage_ms([step(1), step(2, wait_ms=50.0)])
    assert sum(stages.values()).tolist() == [40.0, 40.0]  # type: ignore[union-attr]
    assert stages["waiting"].tolist() == [5.0, 6.0]  # no more than training stood still
    assert stages["applying"].tolist() == [1.0, 0.0]
    assert stages["data"].tolist() == [2.0, 2.0]


def test_who_is_slowest(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl")
    slow = [step(number, backward_ms=40.0, step_ms=60.0) for number in range(1, 31)]
    slow[0]["run"] = HEADER | {"rank": 1}
    rank_path(path, 1).write_text("".join(json.dumps(line) + "\n" for line in slow))
    first, second = rank_times(open_run(path))
    assert (first.slowest, second.slowest) == (0.0, 1.0)  # of the steps that both have
    assert (first.own, second.own) == (pytest.approx(35.0), pytest.approx(55.0))


def test_layers_over_time_come_in_the_models_order(tmp_path: Path) -> None:
    run = open_run(write(tmp_path / "run.jsonl"))
    grid = layer_grid(run, "residual_norm", columns=3)
    assert grid is not None
    assert grid.layers == ["fc1.weight", "fc2.weight"]
    assert grid.values.tolist() == [[3.0, 3.0], [5.0, 5.0]]  # four values in two columns
    assert grid.times_s.tolist() == pytest.approx([0.44, 1.24])
    assert layer_grid(run, "rows") is None
