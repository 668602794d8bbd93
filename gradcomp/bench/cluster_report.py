"""What ``gradcomp bench cluster`` found: as a table, and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gradcomp.bench.cluster_rank import COMPUTE
from gradcomp.errors import ConfigError
from gradcomp.integrations.curves import new_figure
from gradcomp.integrations.report import size, table

__all__ = ["draw", "finish", "show", "show_rate"]

Row = Mapping[str, Any]


def finish(row: Row, rate: str, bits_per_s: float) -> dict[str, Any]:
    """A row of one rate with that rate, and with the share of the link that the busiest host used."""
    found = {"rate": rate, "bits_per_s": bits_per_s, **row}
    if not row.get("error"):
        most = max(row["sent_bytes"], row["received_bytes"])
        found["link_used"] = round(8 * most / bits_per_s / (row["step_ms"] * 1e-3), 4)
    return found


def show(rows: Sequence[Row]) -> str:
    """Rows of one rate, as a table; what failed, below it."""
    lines = [table([_cells(row) for row in rows])]
    lines += [f"{row['method']}: {row['error']}" for row in rows if row.get("error")]
    return "\n".join(lines)


def _cells(row: Row) -> dict[str, str]:
    failed = bool(row.get("error"))

    def cell(key: str, form: str) -> str:
        value = row.get(key)
        return "-" if value is None else form.format(value)

    return {
        "method": row["method"],
        "step": "failed" if failed else f"{row['step_ms']:,.1f} ms",
        "x compute": cell("times_compute", "{:.2f}"),
        "hidden": cell("hidden_fraction", "{:.0%}"),
        "sent/step": "-" if failed else size(row["sent_bytes"]),
        "received/step": "-" if failed else size(row["received_bytes"]),
        "link used": cell("link_used", "{:.0%}"),
        "CPU/step": cell("cpu_s", "{:.3f} s"),
        "ratio": cell("ratio", "{:,.1f}x"),
        "steps": cell("steps", "{}"),
    }


def show_rate(bits_per_s: float) -> str:
    """A rate for people.

    >>> show_rate(1e7), show_rate(2.5e9)
    ('10 Mb/s', '2.5 Gb/s')
    """
    for unit, factor in (("Gb/s", 1e9), ("Mb/s", 1e6)):
        if bits_per_s >= factor:
            return f"{bits_per_s / factor:g} {unit}"
    return f"{bits_per_s / 1e3:g} kb/s"


def draw(result: Mapping[str, Any], path: str) -> None:
    """A picture: step time against bandwidth, both logarithmic, a line a method; compute only is the floor.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    rows = [row for row in result["rows"] if not row.get("error")]
    figure = new_figure(10, 5.6)
    axes = figure.add_subplot(
        xlabel="bandwidth of each host's link",
        ylabel="step, in milliseconds",
        title=f"{result['model']}, {result['parameters'] / 1e6:.3g} M parameters, {result['hosts']} hosts",
        xscale="log",
        yscale="log",
    )
    floor = _line([row for row in rows if row["method"] == COMPUTE])
    axes.plot(*floor, color="black", linestyle=":", linewidth=1.5, label=COMPUTE)
    if floor[1]:
        axes.fill_between(floor[0], 1e-9, floor[1], color="black", alpha=0.06, linewidth=0)
        axes.set_ylim(bottom=min(row["step_ms"] for row in rows) / 1.5, top=max(row["step_ms"] for row in rows) * 1.5)
    names = dict.fromkeys(row["method"] for row in rows if row["method"] != COMPUTE)
    lines = {name: _line([row for row in rows if row["method"] == name]) for name in names}
    for i, (name, line) in enumerate(sorted(lines.items(), key=lambda item: -item[1][1][0])):
        axes.plot(
            *line,
            marker="so^vD*"[i % 6],
            markersize=5,
            color=f"C{i % 10}",
            linestyle="--" if name.startswith("ddp:") else "-",
            linewidth=1.4,
            label=name.replace("ddp:", "DDP over Gloo, "),
        )
    ticks = sorted({row["bits_per_s"] for row in rows})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda bits, _: show_rate(bits)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=40))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="both", alpha=0.2)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--png {path}: {error}") from None


def _line(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Bandwidths and step times; where a method was measured more than once, the median."""
    times: dict[float, list[float]] = {}
    for row in rows:
        times.setdefault(row["bits_per_s"], []).append(row["step_ms"])
    found = sorted(times)
    return found, [statistics.median(times[bits]) for bits in found]
