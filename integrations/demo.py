"""``gradcomp demo``: a CNN learns digits over slow links, with dense gradients and with compressed ones."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradcomp.errors import ConfigError
from gradcomp.integrations.launch import launch
from gradcomp.integrations.report import size, table
from gradcomp.integrations.report_data import accuracies
from gradcomp.integrations.run_log import open_run
from gradcomp.integrations.worker import RunOptions

__all__ = ["demo"]

TASK = "gradcomp.examples.tasks.digits"
TRANSPORT = "zmq:rate=100mbit"
WORKERS = 4
RUNS = (("dense", "none"), ("threshold", "threshold:density=0.002"))

ABOUT = """\
Four worker processes train a LeNet-style CNN (383,306 parameters) on scikit-learn's digits. They talk ZeroMQ over
links paced to 100 Mbit/s: first with dense float32 gradients, then with gradients compressed by
`threshold:density=0.002`. Same seed, same samples, same hyper-parameters.
"""


@dataclass(frozen=True)
class _Run:
    label: str
    result: dict[str, Any]
    curve: list[tuple[float, float]]  # seconds of training, accuracy in percent


def demo(*, out: str, seed: int = 0) -> None:
    """Train twice, print a table of both and write a picture of accuracy against time to ``out``.

    Raises:
        ConfigError: a package the demo needs is missing, or ``out`` cannot be written.
        WorkerFailed: a worker failed.
    """
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the demo needs {' and '.join(missing)}: pip install 'gradcomp[demo]'")
    if not Path(out).resolve().parent.is_dir():
        raise ConfigError(f"--out {out}: its folder does not exist")
    print(ABOUT, flush=True)
    runs = [_train(label, compressor, seed) for label, compressor in RUNS]
    print()
    print(_compare(runs))
    print(
        "\nTime is training time: start-up and evaluation are left out of both. Sent: by one worker, headers included."
    )
    _draw(runs, out)
    print(f"Accuracy against time: {out}")


def _train(label: str, compressor: str, seed: int) -> _Run:
    with tempfile.TemporaryDirectory(prefix="gradcomp-") as folder:
        log, summary = Path(folder, "run.jsonl"), Path(folder, "summary.json")
        options = RunOptions(
            task=TASK,
            compressor=compressor,
            transport=TRANSPORT,
            seed=seed,
            log=str(log),
            summary=str(summary),
            label=label.ljust(max(len(name) for name, _ in RUNS)),
        )
        options.check()
        launch(options.to_arguments(), workers=WORKERS)
        curve = [(step["time_s"], step["accuracy"]) for step in accuracies(open_run(log))]
        return _Run(label, json.loads(summary.read_text()), curve)


def _compare(runs: list[_Run]) -> str:
    dense = runs[0].result
    rows = []
    for run in runs:
        result = run.result
        rows.append(
            {
                "gradients": run.label,
                "accuracy": f"{result['accuracy']:.1f} %",
                "time": f"{result['train_s']:.1f} s",
                "steps/s": f"{result['steps'] / result['train_s']:.1f}",
                "sent": size(result["bytes_sent"]),
                "less traffic": f"{dense['bytes_sent'] / result['bytes_sent']:.0f}x",
                "speed-up": f"{dense['train_s'] / result['train_s']:.1f}x",
            }
        )
    return table(rows)


def _draw(runs: list[_Run], out: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for run in runs:
        sent = size(run.result["bytes_sent"])
        axes.plot(*zip(*run.curve, strict=True), marker="o", markersize=3, label=f"{run.label}, {sent} sent per worker")
    axes.set_xlabel("training time in seconds")
    axes.set_ylabel("test accuracy in percent")
    axes.set_title(f"Digits, {WORKERS} workers, links of 100 Mbit/s")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out {out}: {error}") from None
