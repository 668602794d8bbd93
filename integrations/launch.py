"""Standalone workers on this machine: started, watched and explained.

The processes are ``gradcomp worker TASK``, started by torch's elastic launcher exactly as ``torchrun --standalone``
starts them, with its rendezvous on loopback. Each worker that fails leaves an error file; :func:`launch` reads them all
and reports the failure the others followed from, not the one that happened to be noticed first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradcomp.errors import GradcompError, PeerLost, TransportTimeout, WorkerFailed
from gradcomp.options import check_integer

__all__ = ["Failure", "follow_parent", "launch", "record_failure", "threads_per_worker"]

MAX_WORKERS = 1024
WORKER = ("-m", "gradcomp", "worker", "--launched")
_ELASTIC = "torch.distributed.elastic"


def threads_per_worker(workers: int) -> int:
    """Cores for each of ``workers`` on this machine, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)


def launch(worker_arguments: Sequence[str], *, workers: int, program: Sequence[str] = WORKER) -> None:
    """Run ``gradcomp worker`` with ``worker_arguments`` in ``workers`` processes until all are done.

    Args:
        program: another one, as Python's own arguments; it tells of failures with :func:`record_failure`.

    OMP_NUM_THREADS is set to the cores divided by the workers, unless it is set already.

    Raises:
        ConfigError: ``workers`` is not an integer in 1..1024.
        WorkerFailed: a worker ended with an error; says which rank and why. The others have been ended.
        KeyboardInterrupt: interrupted; all workers have been ended.
    """
    check_integer("train", "workers", workers, at_least=1, at_most=MAX_WORKERS)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="gradcomp-") as folder, _surroundings(workers):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=workers,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        command = [*program, *worker_arguments]
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            ended = {rank: failure.exitcode for rank, failure in error.failures.items()}
            raise WorkerFailed(explain(read_failures(Path(folder)), ended)) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None


@contextlib.contextmanager
def _surroundings(workers: int) -> Iterator[None]:
    """What the launcher needs from this process, put back afterwards: environment, signal handlers, log level."""
    before = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # They log what we are about to say in one line; each has a level of its own.
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith(_ELASTIC)]
    levels = [logger.level for logger in loggers]
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_worker(workers)))
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        os.environ.clear()
        os.environ.update(before)
        for number, handler in handlers.items():
            with contextlib.suppress(ValueError, TypeError):  # not the main thread: none was replaced
                signal.signal(number, handler)


@dataclass(frozen=True)
class Failure:
    """Why one worker ended.

    Attributes:
        summary: one line.
        details: the traceback, or "" where one line says it all.
        follows: whether it is what a worker sees when *another* one fails.
    """

    rank: int
    time_s: float
    summary: str
    details: str
    follows: bool

    @property
    def headline(self) -> str:
        """The summary, with the rank named once."""
        return (
            self.summary
            if self.summary.startswith(f"rank {self.rank}:")
            else f"rank {self.rank} failed: {self.summary}"
        )


def record_failure(error: BaseException, rank: int) -> Failure:
    """Describe ``error``, and leave it in the file where :func:`launch` and torchrun look for it."""
    own = isinstance(error, GradcompError)
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    failure = Failure(
        rank=rank,
        time_s=time.time(),
        summary=" ".join(str(error).split()) if own else f"{type(error).__name__}: {error}".partition("\n")[0],
        details="" if own else "".join(lines).rstrip(),
        follows=isinstance(error, (PeerLost, TransportTimeout)),
    )
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        record: dict[str, Any] = {
            "message": {
                "message": failure.summary,
                "extraInfo": {"py_callstack": "".join(lines), "timestamp": str(int(failure.time_s))},
            },
            "gradcomp": vars(failure),
        }
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(record))
    return failure


def read_failures(folder: Path) -> list[Failure]:
    failures = []
    for path in folder.rglob("error.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            failures.append(Failure(**json.loads(path.read_text())["gradcomp"]))
    return failures


def explain(failures: Sequence[Failure], ended: dict[int, int]) -> str:
    """What to tell the user: the root cause on one line, then its traceback if it is not an error of ours."""
    told = {failure.rank for failure in failures}
    causes = sorted((f for f in failures if not f.follows), key=lambda f: f.time_s)
    silent = sorted(rank for rank in ended if rank not in told)
    if causes:
        first = causes[0]
    elif silent:
        return f"rank {silent[0]} failed: {_describe_exit(ended[silent[0]])}"
    elif failures:
        first = min(failures, key=lambda f: f.time_s)
    else:
        return "a worker failed and left no message"
    return "\n".join(filter(None, (first.headline, first.details)))


def _describe_exit(code: int) -> str:
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"killed by {name}"
    return f"exit status {code}, and it left no message"


def follow_parent() -> None:
    """End this process when its parent is gone: a launcher that is killed leaves no workers behind."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="gradcomp-follow-parent").start()
