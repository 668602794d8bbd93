"""``gradcomp report``: one self-contained HTML page of a run's logs, and its pictures as PNG files.

Nothing on the page is loaded from anywhere, nothing runs, and what the logs say is shown as text.
"""

from __future__ import annotations

import argparse
import base64
import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from gradcomp.errors import ConfigError
from gradcomp.integrations.report import size
from gradcomp.integrations.report_data import accuracies, rank_times
from gradcomp.integrations.report_figures import Picture, compare, look_at
from gradcomp.integrations.run_log import Run, open_run

__all__ = ["main", "page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #f4f5f7; margin: 0; }
main { max-width: 1040px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 24px; margin: 8px 0 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 8px; overflow-wrap: anywhere; }
section { background: #fff; border: 1px solid #e1e4e8; border-radius: 8px; padding: 14px 18px; margin: 14px 0; }
section h3 { margin: 0 0 4px; font-size: 16px; }
p { margin: 4px 0 10px; color: #555; }
img { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 12px; border-bottom: 1px solid #eee; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: #555; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 8px 0; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
.note { color: #8a4b00; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_ABOUT = ("task", "settings", "compressor", "transport", "exchange", "overlap", "world_size", "seed", "epochs")
_ABOUT_MORE = ("batch_size", "device", "host", "started", "versions")


def main(argv: Sequence[str]) -> int:
    """``gradcomp report``; returns the exit status.

    Raises:
        ConfigError: a log that is not there, is empty or is damaged, or a page that cannot be written.
    """
    parser = argparse.ArgumentParser(prog="gradcomp report", description="Make an HTML page of the logs of runs.")
    parser.add_argument("logs", nargs="+", metavar="LOG", help="rank 0's, of one run or of several to compare")
    parser.add_argument("--out", metavar="FILE", help="the page; default: the first log's name with .html")
    parser.add_argument("--png-dir", metavar="DIR", help="write the pictures there, too")
    arguments = parser.parse_args(argv)
    runs = [open_run(path) for path in arguments.logs]
    out = Path(arguments.out) if arguments.out is not None else Path(arguments.logs[0]).with_suffix(".html")
    with warnings.catch_warnings():
        # A letter that the font does not have, or a means of nothing: neither is worth a word.
        warnings.simplefilter("ignore")
        shared = compare(runs)
        own = [look_at(run) for run in runs]
        try:
            out.write_text(page(runs, shared, own), encoding="utf-8")
            if arguments.png_dir is not None:
                _write_pictures(Path(arguments.png_dir), runs, shared, own)
        except OSError as error:
            raise ConfigError(f"{error.filename or out}: {error.strerror or error}") from None
    print(out)
    return 0


def page(runs: Sequence[Run], shared: Sequence[Picture], own: Sequence[Sequence[Picture]]) -> str:
    """The page.

    Args:
        shared: pictures of all runs.
        own: those of each.
    """
    title = "gradcomp: " + ", ".join(_name(run) for run in runs)
    parts = [f"<h1>{escape(title)}</h1>", _section("Result", "", _results(runs)), *map(_picture, shared)]
    for run, pictures in zip(runs, own, strict=True):
        if len(runs) > 1:
            parts.append(f"<h2>{escape(_name(run))}</h2>")
        parts.append(_section("What was run", "", _about(run) + _notes(run)))
        parts += map(_picture, pictures)
        if any(run.steps.values()):
            parts.append(_section("Who held up whom", _STRAGGLERS, _stragglers(run)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


_STRAGGLERS = (
    "Own work: what a mean step took but for waiting. Slowest: in which share of the steps its own work took longest."
)


def _name(run: Run) -> str:
    return str(run.header.get("label") or run.header.get("compressor") or run.path.stem)


def _section(title: str, caption: str, inside: str) -> str:
    said = f"<p>{escape(caption)}</p>" if caption else ""
    return f"<section><h3>{escape(title)}</h3>{said}{inside}</section>"


def _picture(picture: Picture) -> str:
    drawn = io.BytesIO()
    picture.figure.savefig(drawn, format="svg", metadata={"Date": None})
    picture.figure.set_layout_engine("none")  # it is where it should be: a PNG need not find that out again
    data = base64.b64encode(drawn.getvalue()).decode("ascii")
    image = f'<img alt="{escape(picture.title)}" src="data:image/svg+xml;base64,{data}">'
    return _section(picture.title, picture.caption, image)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f'<div class="wide"><table>{line(head, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


def _results(runs: Sequence[Run]) -> str:
    head = ("run", "workers", "accuracy", "best", "loss", "steps", "time", "steps/s", "sent", "received", "ratio")
    return _table(head, (_result(run) for run in runs))


def _result(run: Run) -> list[str]:
    last = run.first[-1] if run.first else {}
    found = [step["accuracy"] for step in accuracies(run)]
    steps, time_s = last.get("step", 0), last.get("time_s", 0.0)
    losses = [step["loss"] for step in run.first if step.get("loss") is not None]
    tail = losses[-max(1, len(losses) // 50) :]
    return [
        _name(run),
        str(run.header["world_size"]),
        f"{found[-1]:.2f} %" if found else "-",
        f"{max(found):.2f} %" if found else "-",
        f"{sum(tail) / len(tail):.4g}" if tail else "-",
        str(steps),
        f"{time_s:.1f} s",
        f"{steps / time_s:.2f}" if time_s else "-",
        size(last.get("bytes_sent") or 0),
        size(last.get("bytes_received") or 0),
        f"{last.get('ratio') or 0:.1f}x",
    ]


def _about(run: Run) -> str:
    rows = []
    for key in (*_ABOUT, *_ABOUT_MORE):
        value = run.header.get(key)
        if value in (None, [], ""):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        rows.append(f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd>")
    changes = [step for step in run.first if "compressors" in step]
    for step in changes:
        found: dict[str, int] = {}
        for spec in dict(step["compressors"]).values():
            found[str(spec)] = found.get(str(spec), 0) + 1
        used = ", ".join(f"{spec} ({count})" for spec, count in found.items())
        where = "compressors of parameters" if len(changes) == 1 else f"compressors from step {step['step']}"
        rows.append(f"<dt>{where}</dt><dd>{escape(used)}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _notes(run: Run) -> str:
    """What a reader should know before believing it all."""
    notes = []
    if run.end is None:
        steps = run.first[-1]["step"] if run.first else 0
        notes.append(f"The run had not ended when this page was made: the log stops at step {steps}.")
    elif "error" in run.end:
        notes.append(f"The run failed: {run.end['error']}")
    if run.missing:
        ranks = ", ".join(map(str, run.missing[:20])) + (", ..." if len(run.missing) > 20 else "")
        notes.append(f"No log was found of rank {ranks}; ranks on other hosts leave theirs there.")
    notes += [f"{path.name} is of another run, and was left out." for path in run.strange]
    nonfinite = run.first[-1].get("nonfinite_steps") if run.first else 0
    if nonfinite:
        notes.append(f"In {nonfinite:g} steps a gradient was not finite.")
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _stragglers(run: Run) -> str:
    def number(value: float, unit: str = "") -> str:
        return "-" if math.isnan(value) else f"{value:.1f}{unit}"

    head = ("rank", "steps", "own work", "waiting", "compress", "decompress", "hidden", "slowest")
    rows = []
    for row in rank_times(run):
        times = (row.own, row.stages["waiting"], row.compress, row.decompress)
        shares = (100 * row.hidden, 100 * row.slowest)
        cells = [number(value, " ms") for value in times] + [number(value, " %") for value in shares]
        rows.append([str(row.rank), str(row.steps), *cells])
    return _table(head, rows)


def _write_pictures(
    folder: Path, runs: Sequence[Run], shared: Sequence[Picture], own: Sequence[Sequence[Picture]]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for picture in shared:
        picture.figure.savefig(folder / f"{picture.name}.png", dpi=150)
    for number, (run, pictures) in enumerate(zip(runs, own, strict=True), 1):
        prefix = "" if len(runs) == 1 else f"{number}-{re.sub(r'[^A-Za-z0-9.-]+', '_', run.path.stem)}-"
        for picture in pictures:
            picture.figure.savefig(folder / f"{prefix}{picture.name}.png", dpi=150)
