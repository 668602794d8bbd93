"""What ``gradcomp top`` shows: one frame. Names from logs are text, never markup or control characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gradcomp.integrations.following import FollowedRank, FollowedRun
from gradcomp.integrations.report import size
from gradcomp.integrations.report_data import STAGES, per_bin, stage_ms
from gradcomp.integrations.run_log import printable

__all__ = ["frame"]

_STYLES = {
    "data": "bright_black",
    "forward": "blue",
    "backward": "cyan",
    "waiting": "red",
    "applying": "magenta",
    "optimizer": "yellow",
}
_BAR = 36
_MOST_RANKS = 16
_MOST_LAYERS = 6
_BLOCKS = "▁▂▃▄▅▆▇█"


def frame(run: FollowedRun, *, stale_s: float) -> RenderableType:
    """The run as it is now.

    Args:
        stale_s: a rank that has written nothing for longer is marked.
    """
    parts: list[RenderableType] = [_title(run)]
    if not run.first.last:
        return Group(*parts, Text("no step yet", style="dim"))
    parts += [_progress(run), _numbers(run), Text(), _ranks(run, stale_s)]
    if run.first.layers:
        parts += [Text(), _layers(run.first)]
    return Group(*parts)


def _title(run: FollowedRun) -> Text:
    header, end = run.header, run.end
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(printable(header.get("label") or header.get("compressor")), style="bold")
    for key in ("task", "compressor", "transport", "exchange"):
        if header.get(key) is not None:
            text.append(f"  {printable(header[key])}", style="dim")
    if end is not None:
        failed = end.get("error")
        text.append(f"  failed: {printable(failed, 200)}" if failed else "  done", style="red" if failed else "green")
    return text


def _progress(run: FollowedRun) -> RenderableType:
    header, last = run.header, run.first.last
    planned = header.get("updates") or header.get("steps")
    done = last.get("version", 0) if "updates" in header else last["step"]
    epoch = f"epoch {last['epoch']:g}" if last.get("epoch") is not None else ""
    if epoch and header.get("epochs"):
        epoch += f"/{header['epochs']}"
    row = Table.grid(padding=(0, 2))
    what = "update" if "updates" in header else "step"
    if not planned:
        row.add_row(f"{what} {done}", epoch, f"{last['time_s']:.0f} s")
        return row
    rate = run.first.rate("version" if "updates" in header else "step")
    left = f"{max(0, planned - done) / rate:.0f} s left" if rate and run.end is None else ""
    bar = ProgressBar(total=planned, completed=min(done, planned), width=40)
    row.add_row(bar, f"{what} {done}/{planned}", epoch, f"{last['time_s']:.0f} s", left)
    return row


def _numbers(run: FollowedRun) -> RenderableType:
    first, last = run.first, run.first.last
    cells = {
        "accuracy": "-" if first.accuracy is None else f"{first.accuracy:.2f} %",
        "steps/s": f"{first.rate('step'):.2f}",
        "sent/s": size(max(0.0, first.rate("bytes_sent"))),
        "sent": size(last.get("bytes_sent") or 0),
        "ratio": f"{last.get('ratio') or 0:.1f}x",
        "density": f"{last.get('density') or 0:.2g}",
        "residual": f"{last.get('residual_norm') or 0:.3g}",
    }
    if last.get("hidden_fraction") is not None:
        cells["hidden"] = f"{100 * _mean(first, 'hidden_fraction'):.0f} %"
    shown = []
    if first.losses:
        tail = list(first.losses)[-50:]
        loss = Text("loss ", style="dim").append(f"{sum(tail) / len(tail):.4g} ", style="not dim")
        shown.append(loss.append(_curve(list(first.losses)), style="cyan not dim"))
    shown += [Text(f"{name} ", style="dim").append(value, style="not dim") for name, value in cells.items()]
    if last.get("nonfinite_steps"):
        shown.append(Text(f"{last['nonfinite_steps']:g} steps with NaN or Inf", style="red"))
    return Columns(shown, padding=(0, 3))


def _mean(rank: FollowedRank, key: str) -> float:
    values = [step[key] for step in rank.recent if step.get(key) is not None]
    return sum(values) / len(values) if values else 0.0


def _curve(values: Sequence[float], width: int = 24) -> str:
    points = per_bin(values, width)
    low, high = float(np.nanmin(points)), float(np.nanmax(points))
    span = (high - low) or 1.0
    return "".join(_BLOCKS[min(7, int(8 * (point - low) / span))] for point in points)


def _ranks(run: FollowedRun, stale_s: float) -> Table:
    """Where the milliseconds go; bars of one scale."""
    stages = {
        number: {stage: float(values.mean()) for stage, values in stage_ms(rank.recent).items()}
        for number, rank in sorted(run.ranks.items())
        if rank.recent
    }
    longest = max((sum(row.values()) for row in stages.values()), default=0.0) or 1.0
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("rank", justify="right")
    table.add_column("step", justify="right")
    table.add_column("a mean step", no_wrap=True)
    table.add_column("ms", justify="right")
    table.add_column("")
    for number, row in list(stages.items())[:_MOST_RANKS]:
        rank = run.ranks[number]
        silent = rank.silent_s
        note = Text(f"silent for {silent:.0f} s", style="red") if silent > stale_s else Text()
        table.add_row(str(number), str(rank.last["step"]), _bar(row, longest), f"{sum(row.values()):.1f}", note)
    if len(stages) > _MOST_RANKS:
        table.add_row("", "", Text(f"and {len(stages) - _MOST_RANKS} more", style="dim"))
    legend = Text()
    for stage in STAGES:
        legend.append(stage[0], style=f"{_STYLES[stage]} reverse").append(f"{stage[1:]} ", style=_STYLES[stage])
    table.add_row("", "", legend)
    missing = run.header["world_size"] - len(stages)
    if missing > 0 and run.header["rank"] == 0:
        table.add_row("", "", Text(f"no steps yet of {missing} more, or their logs are on other hosts", style="dim"))
    return table


def _bar(row: dict[str, float], longest: float) -> Text:
    """Each stage's first letter, as often as it takes: to be read without colors, too."""
    bar, end, drawn = Text(), 0.0, 0
    for stage in STAGES:
        end += row[stage]
        cells = round(_BAR * end / longest) - drawn
        bar.append(stage[0] * cells, style=f"{_STYLES[stage]} reverse")
        drawn += cells
    return bar


def _layers(rank: FollowedRank) -> Table:
    """Those that hold back most."""

    def held(item: tuple[str, dict[str, Any]]) -> float:
        norm = item[1].get("residual_norm")
        return norm if isinstance(norm, (int, float)) else 0.0

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("largest residuals")
    for name in ("residual", "density", "tau", "elements"):
        table.add_column(name, justify="right")
    for name, row in sorted(rank.layers.items(), key=held, reverse=True)[:_MOST_LAYERS]:
        numbers = [row.get(key) for key in ("residual_norm", "density", "tau")]
        cells = [f"{value:.3g}" if isinstance(value, (int, float)) else "-" for value in numbers]
        numel = row.get("numel")
        table.add_row(Text(printable(name, 48)), *cells, f"{numel:,}" if isinstance(numel, int) else "-")
    return table
