"""How far a run is, on standard error: a bar on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

__all__ = ["Progress"]


class Progress:
    """Rank 0's voice. To be closed as a context manager.

    Args:
        label: what it starts with.
        steps: how many steps the run will take.
    """

    def __init__(self, *, label: str, steps: int, quiet: bool) -> None:
        self._label, self._quiet = label, quiet
        self._bar: Any = None
        if quiet or not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            print("for a progress bar: pip install 'gradcomp[demo]'", file=sys.stderr)
            return
        self._bar = tqdm(total=steps, desc=label, unit="step", leave=True, dynamic_ncols=True, ascii=" #")

    def step(self) -> None:
        """A step is over."""
        if self._bar is not None:
            self._bar.update(1)

    def epoch(self, *, epoch: int, epochs: int, loss: float, accuracy: float, train_s: float) -> None:
        """Show how an epoch ended."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"epoch {epoch}/{epochs}, loss {loss:.3f}, accuracy {accuracy:.1f} %")
        elif not self._quiet:
            text = f"{self._label}: epoch {epoch}/{epochs}  loss {loss:.3f}  accuracy {accuracy:.1f} %  {train_s:.1f} s"
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
