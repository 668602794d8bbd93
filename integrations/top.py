"""``gradcomp top``: a run that writes a log, live in the terminal. It only reads files: start and stop it at will."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gradcomp.errors import ConfigError, WorkerFailed
from gradcomp.integrations.following import FollowedRun
from gradcomp.options import check_number

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """``gradcomp top``; returns the exit status.

    Raises:
        ConfigError: an option, rich is missing, a damaged log, or one that is not there in time.
        WorkerFailed: the run failed.
    """
    parser = argparse.ArgumentParser(prog="gradcomp top", description="Watch a run that writes a log.")
    parser.add_argument("log", metavar="LOG", help="rank 0's; those of other ranks are found beside it")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument("--every", type=float, metavar="S", default=1.0, help="look so often; default: %(default)s")
    parser.add_argument(
        "--wait", type=float, metavar="S", default=60.0, help="how long for the log to appear; default: %(default)s"
    )
    parser.add_argument(
        "--stale", type=float, metavar="S", default=30.0, help="mark ranks silent for so long; default: %(default)s"
    )
    arguments = parser.parse_args(argv)
    check_number("top", "every", arguments.every, at_least=0.05)
    check_number("top", "wait", arguments.wait, at_least=0)
    check_number("top", "stale", arguments.stale, above=0)
    try:
        import rich  # noqa: F401
    except ImportError:
        raise ConfigError("rich is not installed: pip install 'gradcomp[watch]'") from None
    path = Path(arguments.log)
    _wait_for(path, arguments.wait)
    run = FollowedRun(path)
    if arguments.once:
        _show_once(run, arguments.stale)
    else:
        _follow(run, every_s=arguments.every, stale_s=arguments.stale)
    if run.end is not None and "error" in run.end:
        raise WorkerFailed(f"the run failed: {run.end['error']}")
    return 0


def _wait_for(path: Path, wait_s: float) -> None:
    """Until there is something in the file."""
    deadline = time.monotonic() + wait_s
    said = False
    while not (path.exists() and path.stat().st_size):
        if time.monotonic() >= deadline:
            raise ConfigError(f"{path}: nothing there after {wait_s:g} s")
        if not said:
            print(f"waiting for {path}", file=sys.stderr, flush=True)
            said = True
        time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))


def _show_once(run: FollowedRun, stale_s: float) -> None:
    from rich.console import Console

    from gradcomp.integrations.top_frame import frame

    run.read()
    Console(highlight=False).print(frame(run, stale_s=stale_s))


def _follow(run: FollowedRun, *, every_s: float, stale_s: float) -> None:
    """Until the run has ended."""
    from rich.console import Console
    from rich.live import Live

    from gradcomp.integrations.top_frame import frame

    run.read()
    with Live(frame(run, stale_s=stale_s), console=Console(highlight=False), auto_refresh=False) as live:
        while run.end is None:
            time.sleep(every_s)
            run.read()
            live.update(frame(run, stale_s=stale_s), refresh=True)
