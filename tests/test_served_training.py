"""The worker's loop with a parameter server: when a run is over, and where a worker that comes back begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from served import Hub, connect
from test_served_processes import TASK

import gradcomp
from gradcomp.integrations.run_options import RunOptions
from gradcomp.integrations.served_training import batches_per_update
from gradcomp.integrations.worker import train
from gradcomp.server.modes import mode


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(2)
    connect(monkeypatch, hub)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    return hub


@pytest.fixture
def options(hub: Hub, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "task.py").write_text(TASK)
    return {"task": str(tmp_path / "task.py"), "server": ",".join(hub.addresses), "quiet": True}


@pytest.mark.parametrize(
    ("spec", "batches"),
    [
        ("sync", 4),
        ("sync:backup=1", 4),
        ("async", 1),
        ("async:n_push=3", 3),
        ("ssp", 1),
        ("softsync", 4),
        ("softsync:n=3", 1),
        ("softsync:n=9", 1),
    ],
)
def test_what_an_update_is_made_of(spec: str, batches: int) -> None:
    assert batches_per_update(mode(spec), 4) == batches


@pytest.mark.parametrize("spec", ["sync", "async:n_push=2,n_fetch=2", "ssp"])
def test_a_worker_that_comes_back_does_the_rest(options: dict[str, Any], spec: str) -> None:
    first = train(RunOptions(**options, mode=spec, epochs=2))
    assert first.steps == 80
    rest = train(RunOptions(**options, mode=spec, epochs=5))
    assert rest.steps == 120
    assert rest.updates == 200 // batches_per_update(mode(spec), 1)
    assert rest.accuracy > 80
    late = train(RunOptions(**options, mode=spec, epochs=5))
    assert late.steps == 0
    assert late.accuracy == pytest.approx(rest.accuracy, abs=2.0)


def test_the_summary_tells_what_came_back(options: dict[str, Any]) -> None:
    summary = train(RunOptions(**options, epochs=1))
    assert summary.exchange == "server, sync"
    assert summary.staleness == {0: 80}  # of two shards
    assert "pull ratio" in summary.table()
    assert '"staleness": {"0": 80}' in summary.json()


def test_a_run_that_diverged_ends(options: dict[str, Any]) -> None:
    with pytest.raises(gradcomp.GradientError, match="diverged"):
        train(RunOptions(**options, mode="async", settings=("lr=1e10",)))
