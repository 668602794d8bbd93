"""Pictures of ``gradcomp bench train``: accuracy against time and bytes, and accuracy against the compression ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gradcomp.bench.train_methods import Method
from gradcomp.bench.train_results import Run, Spread, spread
from gradcomp.errors import ConfigError
from gradcomp.integrations.curves import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_curve", "draw_progress"]

_WIDE = 5.0  # fast methods are one line up the edge when others take so many times longer: a logarithmic axis
_STYLES = ("-", "--", "-.", ":")  # ten colours each


def draw_progress(
    runs: Mapping[str, Sequence[Run]], path: str, *, title: str, target: float | None = None, option: str = "--png"
) -> None:
    """Accuracy against seconds, and against bytes sent: a line a method, the mean of its runs with their deviation.

    Raises:
        ConfigError: no matplotlib, no runs, or the picture cannot be written.
    """
    if not any(runs.values()):
        raise ConfigError(f"{option} {path}: there is no finished run to draw")
    figure = new_figure(12, 5)
    figure.suptitle(title)
    times, traffic = figure.subplots(1, 2, sharey=True)
    seconds = [run.train_s for found in runs.values() for run in found]
    scale = "log" if max(seconds) > _WIDE * min(seconds) else "linear"
    times.set(xlabel="seconds of training", xscale=scale, ylabel="test accuracy in percent")
    traffic.set(xlabel="bytes sent by a rank", xscale="log")
    for number, (name, found) in enumerate((name, found) for name, found in runs.items() if found):
        look = f"C{number % 10}", _STYLES[number // 10 % len(_STYLES)]
        # Runs of a method have the same epochs; a server's may end one apart.
        epochs = list(zip(*(run.points for run in found), strict=False))
        accuracy = [spread(point.accuracy for point in points) for points in epochs]
        _line(times, [spread(p.seconds for p in points).mean for points in epochs], accuracy, name, look)
        counted = [[p.bytes_sent for p in points if p.bytes_sent is not None] for points in epochs]
        if all(counted):
            _line(traffic, [spread(values).mean for values in counted], accuracy, name, look)
    for axes in (times, traffic):
        if target is not None:
            axes.axhline(target, color="gray", linewidth=1, linestyle=":")
        axes.grid(alpha=0.3)
    figure.legend(*times.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    save_figure(figure, path, option)


def _line(axes: Axes, x: Sequence[float], accuracy: Sequence[Spread], name: str, look: tuple[str, str]) -> None:
    means = [value.mean for value in accuracy]
    color, style = look
    axes.plot(x, means, color=color, linestyle=style, marker="o", markersize=3, label=name)
    low = [value.mean - value.deviation for value in accuracy]
    high = [value.mean + value.deviation for value in accuracy]
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def draw_curve(
    methods: Sequence[Method], runs: Mapping[str, Sequence[Run]], path: str, *, title: str, dense: str | None = None
) -> None:
    """Final accuracy against the compression ratio: a line a compressor, the dense method as a band across.

    Args:
        methods: whose settings of one compressor are joined by a line.
        runs: by method's name.
        dense: name of the dense method.

    Raises:
        ConfigError: no matplotlib, no runs, or the picture cannot be written.
    """
    if not any(runs.values()):
        raise ConfigError(f"--curve {path}: there is no finished run to draw")
    families: dict[str, list[tuple[float, Spread]]] = {}
    for method in methods:
        found = runs.get(method.name)
        if found and method.name != dense:
            point = (spread(run.ratio for run in found).mean, spread(run.accuracy for run in found))
            families.setdefault(method.family, []).append(point)
    figure = new_figure(8, 5)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes = figure.add_subplot(
        xlabel="float32 bytes for each byte sent", ylabel="test accuracy in percent", xscale="log", title=title
    )
    if dense is not None and runs.get(dense):
        band = spread(run.accuracy for run in runs[dense])
        axes.axhspan(band.mean - band.deviation, band.mean + band.deviation, color="gray", alpha=0.2, linewidth=0)
        axes.axhline(band.mean, color="gray", linewidth=1, label=f"{dense} (dense)")
    for number, (family, points) in enumerate(families.items()):
        points.sort(key=lambda point: point[0])
        axes.errorbar(
            [ratio for ratio, _ in points],
            [accuracy.mean for _, accuracy in points],
            yerr=[accuracy.deviation for _, accuracy in points],
            color=f"C{number % 10}",
            linestyle=_STYLES[number // 10 % len(_STYLES)],
            marker="o",
            markersize=4,
            capsize=2,
            label=family,
        )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    save_figure(figure, path, "--curve")
