"""One rank of a run that ``gradcomp bench train`` starts: gradcomp's worker or DDP, beside the kernel's meter."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gradcomp.bench.counters import wire_bytes
from gradcomp.errors import ConfigError, WorkerFailed
from gradcomp.integrations import worker
from gradcomp.integrations.launch import follow_parent, record_failure
from gradcomp.integrations.run_options import RunOptions

__all__ = ["Assignment", "main"]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What every rank of a run is told.

    Attributes:
        options: of the worker; rank 0 writes log and summary.
        hook: ``fp32``, ``fp16`` or ``bf16`` for DDP, None for gradcomp.
        interface: whose bytes are counted; None: nobody counts.
        folder: each rank R writes what it counted to ``rankR.json`` there, and why it failed to ``rankR/error.json``.
        timeout_s: for all of it.
    """

    options: RunOptions
    hook: str | None
    interface: str | None
    folder: str
    timeout_s: float

    def json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Assignment:
        fields = json.loads(text)
        options = fields.pop("options")
        return Assignment(options=RunOptions(**(options | {"settings": tuple(options["settings"])})), **fields)


def main(argv: Sequence[str] | None = None) -> int:
    """Be the rank that the environment says, with an Assignment as JSON; returns the exit status."""
    assignment = Assignment.from_json((sys.argv[1:] if argv is None else argv)[0])
    rank, folder = int(os.environ["RANK"]), Path(assignment.folder)
    follow_parent()
    # torch's launcher sets it; in a lab nobody else does.
    failures = os.environ.setdefault("TORCHELASTIC_ERROR_FILE", str(folder / f"rank{rank}" / "error.json"))
    Path(failures).parent.mkdir(parents=True, exist_ok=True)
    _end_after(assignment.timeout_s, rank)
    interface = assignment.interface
    count = None if interface is None else _since_now(interface)
    if assignment.hook is None:
        status = worker.work(assignment.options, launched=True)
    else:
        status = _train_with_ddp(assignment.options, assignment.hook, count, rank)
    if status == 0 and count is not None:
        sent, received = count()
        (folder / f"rank{rank}.json").write_text(json.dumps({"bytes_sent": sent, "bytes_received": received}))
    return status


def _since_now(interface: str) -> Callable[[], tuple[int, int]]:
    sent_before, received_before = wire_bytes(interface)

    def count() -> tuple[int, int]:
        sent, received = wire_bytes(interface)
        return sent - sent_before, received - received_before

    return count


def _train_with_ddp(options: RunOptions, hook: str, count: Callable[[], tuple[int, int]] | None, rank: int) -> int:
    import torch.distributed as dist

    from gradcomp.bench.train_ddp import train_with_ddp

    try:
        summary = train_with_ddp(options, hook, count)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        record_failure(error, rank)
        return 2 if isinstance(error, ConfigError) else 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank == 0 and options.summary is not None:
        Path(options.summary).write_text(summary.json())
    return 0


def _end_after(timeout_s: float, rank: int) -> None:
    def end() -> None:
        record_failure(WorkerFailed(f"rank {rank}: was not done within {timeout_s:g} s"), rank)
        os._exit(1)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    raise SystemExit(main())
