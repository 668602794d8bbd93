"""Accuracy over a run: as its log tells it, and what pictures of it have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradcomp.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["evaluated_steps", "new_figure", "save_figure"]


def evaluated_steps(log: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that have an accuracy, each the last step of an epoch; other lines are passed over."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if "step" in record and "accuracy" in record]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no display.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("pictures need matplotlib: pip install 'gradcomp[demo]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str, option: str) -> None:
    """Write a figure where ``option`` of the command line asked for it.

    Raises:
        ConfigError: it cannot be written there.
    """
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option} {path}: {error}") from None
