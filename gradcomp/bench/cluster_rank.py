"""One rank of ``gradcomp bench cluster``: takes steps of all methods in turn, at one rate of the links after another.

Whoever starts it (:mod:`gradcomp.bench.cluster`) shapes the links: rank 0 prints ``{"wants": RATE}``, waits until a
file says that they have that rate, and prints what was measured at it. Models and transports are made before that, at
full speed: to send all first parameters over a slow link would take longer than all the steps.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import gradcomp
from gradcomp.bench.methods import TORCH_HOOKS, Method, transport_for
from gradcomp.bench.step_time import MODELS, batch_for

__all__ = ["COMPUTE", "Job", "main", "make"]

COMPUTE = "compute only"
_LEAST_ROWS = 2
# Of the budget: for the steps before those that are timed, and the most that a row of steps may take.
_WARM_UP_SHARE, _ROW_SHARE = 0.5, 0.25
_ERROR_BYTES = 300
# So long may ``auto`` try its candidates before its steps are timed: the longest race there can be is shorter.
_MOST_TRIALS, _TRIALS_IN_A_ROW = 400, 4


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a rank is asked to do.

    Attributes:
        ways: each method by name: ``{"ddp": HOOK}``, or its compressor, exchange and transport.
        rates: of the links, one after the other.
        in_a_row: steps of a method, before it is the next one's turn; fewer where they take long.
        steps: rows of them that are timed, of each method at each rate, at most.
        warm_up: steps before those, at most.
        budget_s: that the timed ones may take; two rows are timed in any case.
        overlap: as for attach.
        timeout_s: for one step, and for what ranks say to each other.
        folder: where a file ``rate<i>`` says that the links have the i-th rate.
        device: whose bytes are counted.
    """

    model: str
    ways: Mapping[str, Mapping[str, Any]]
    rates: Sequence[str]
    batch_size: int
    in_a_row: int
    steps: int
    warm_up: int
    budget_s: float
    overlap: str
    bucket_mb: float
    threads: int
    timeout_s: float
    folder: str = ""
    device: str = "eth0"

    def to_argument(self) -> str:
        """The argument of :func:`main`."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class _Used:
    """What this host used so far, as the kernel counts."""

    sent_bytes: int
    received_bytes: int
    cpu_s: float

    @classmethod
    def now(cls, device: str) -> _Used:
        for line in Path("/proc/self/net/dev").read_text().splitlines():
            name, _, counts = line.partition(":")
            if name.strip() == device:
                fields = counts.split()
                used = resource.getrusage(resource.RUSAGE_SELF)
                return cls(int(fields[8]), int(fields[0]), used.ru_utime + used.ru_stime)
        raise gradcomp.ConfigError(f"this host has no network device {device!r}")


class _Ranks:
    """What ranks say to each other between steps, over a group of their own."""

    def __init__(self, timeout_s: float) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def meet(self) -> None:
        """Returns on all ranks at about the same time."""
        self.most(0.0)

    def most(self, *numbers: float) -> list[float]:
        """The largest of all ranks' numbers."""
        found = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        return found.tolist()

    def all(self, mine: Tensor) -> list[Tensor]:
        """Every rank's tensor; all have one shape."""
        found = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(found, mine, group=self._group)
        return found

    def first_error(self, error: BaseException | None) -> str | None:
        """What went wrong on the first rank where something did."""
        if not self.most(float(error is not None))[0]:
            return None
        text = "" if error is None else f"{type(error).__name__}: {error}".partition("\n")[0]
        mine = torch.zeros(_ERROR_BYTES, dtype=torch.uint8)
        data = text.encode()[:_ERROR_BYTES]
        mine[: len(data)] = torch.frombuffer(bytearray(data or b" "), dtype=torch.uint8)[: len(data)]
        texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in self.all(mine)]
        return next((f"rank {rank}: {text}" for rank, text in enumerate(texts) if text), "failed without a word")


class _Way:
    """One method, and what its steps at one rate took."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.method: Method | None = None
        self.error: str | None = None
        self.start_rate()

    def start_rate(self) -> None:
        self.in_a_row, self.done = 1, False
        self.rounds: list[int] = []
        self.used: list[_Used] = []
        if self.method is not None:
            self.method.times_s.clear()
            self.method.stats.clear()

    @property
    def is_undecided(self) -> bool:
        """Whether it is ``auto``, still trying its candidates: the same on all ranks."""
        sync = None if self.method is None else self.method.sync
        return sync is not None and "auto" in (stats := sync.stats()) and stats["auto"]["choice"] is None

    def row(self, compute_s: Mapping[int, float], over_ranks: Sequence[Tensor]) -> dict[str, Any]:
        """What there is to say; times are of the slowest rank."""
        if self.method is None or self.error is not None:
            return {"method": self.name, "error": self.error}
        times_s, steps = self.method.times_s, self.in_a_row * len(self.method.times_s)
        step_s, alone_s = statistics.median(times_s), statistics.median(compute_s[i] for i in self.rounds)
        stages = self.method.stages()
        hosts = torch.stack(list(over_ranks))
        row: dict[str, Any] = {
            "method": self.name,
            "steps": steps,
            "in_a_row": self.in_a_row,
            "step_ms": round(step_s * 1e3, 3),
            "compute_ms": round(alone_s * 1e3, 3),
            "times_compute": round(step_s / alone_s, 4),
            "sent_bytes": round(float(hosts[:, 0].max()) / steps),
            "received_bytes": round(float(hosts[:, 1].max()) / steps),
            "cpu_s": round(float(hosts[:, 2].sum()) / steps, 5),
            "times_ms": [round(seconds * 1e3, 3) for seconds in times_s],
        }
        if stages and self.method.sync is not None:
            first, last = self.method.stats[0], self.method.stats[-1]
            gradients, packets = (last[key] - first[key] for key in ("gradient_bytes", "packet_bytes"))
            row |= {key: round(value, 4) for key, value in stages.items()}
            row["density"] = statistics.median(stats["density"] for stats in self.method.stats)
            row["ratio"] = round(gradients / packets, 2) if packets else None
            row |= {key: value for key, value in self.method.sync.stats().items() if key == "auto"}  # what it came to
        return row


def make(job: Job, name: str) -> Method:
    """Make a method: all ranks together.

    Raises:
        GradcompError: there is none such, or the ranks did not meet.
        RuntimeError: what torch says.
    """
    torch.manual_seed(0)
    net = MODELS[job.model]()
    if name == COMPUTE:
        return Method(name, net)
    spec = job.ways[name]
    if "ddp" in spec:
        # Groups of their own: one method's failure must not end the others.
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=job.timeout_s))
        model = DistributedDataParallel(net, process_group=group, bucket_cap_mb=job.bucket_mb)
        if spec["ddp"] in TORCH_HOOKS:
            model.register_comm_hook(group, TORCH_HOOKS[spec["ddp"]])
        return Method(name, model)
    method = Method(name, net)
    method.sync = gradcomp.attach(
        method.optimizer,
        model=net,
        compressor=spec["compressor"],
        exchange=spec["exchange"],
        transport=transport_for(spec["transport"], name),
        overlap=job.overlap,
        bucket_bytes=int(job.bucket_mb * 2**20),
        digest_every=0,
    )
    return method


class _Bench:
    def __init__(self, job: Job) -> None:
        self.job, self.ranks = job, _Ranks(job.timeout_s)
        torch.manual_seed(1 + self.ranks.rank)  # other data on each rank, so that other gradients are large there
        self._inputs, self._targets = batch_for(job.model, job.batch_size)
        self.compute = _Way(COMPUTE)
        self.ways = [self.compute, *(_Way(name) for name in job.ways)]

    def make_all(self) -> None:
        for way in self.ways:
            error: Exception | None = None
            try:
                way.method = make(self.job, way.name)
            except Exception as failed:
                error = failed
            self._settle(way, error)
        if self.compute.error is not None:
            raise gradcomp.WorkerFailed(f"the model takes no step by itself: {self.compute.error}")

    def measure(self) -> list[dict[str, Any]]:
        """All methods at the rate that the links have now."""
        for way in self.ways:
            way.start_rate()
            self._warm_up(way)
        compute_s: dict[int, float] = {}
        for number in range(self.job.steps):
            if all(way.done for way in self._others()) and number >= _LEAST_ROWS:
                break
            for way in self.ways:
                if way.error is None and not way.done:
                    self._time(way, number)
            if self.compute.method is None:
                raise gradcomp.WorkerFailed(f"the model takes no step by itself: {self.compute.error}")
            compute_s[number] = self.compute.method.times_s[-1]
        rows = []
        for way in self.ways:
            sums = [[used.sent_bytes, used.received_bytes, used.cpu_s] for used in way.used] or [[0.0] * 3]
            mine = torch.tensor(sums, dtype=torch.float64).sum(0)
            rows.append(way.row(compute_s, self.ranks.all(mine)))
        return rows

    def _others(self) -> list[_Way]:
        return [way for way in self.ways[1:] if way.error is None]

    def _warm_up(self, way: _Way) -> None:
        """One step at least; how long it takes says how many there will be in a row."""
        taken, spent_s = 0, 0.0
        while way.error is None and (not taken or taken < self.job.warm_up):
            count = min(way.in_a_row, max(1, self.job.warm_up - taken))
            seconds, _ = self._take(way, count)
            taken, spent_s = taken + count, spent_s + seconds
            fit = int(_ROW_SHARE * self.job.budget_s / (seconds / count))
            way.in_a_row = max(1, min(self.job.in_a_row, fit))
            if spent_s > _WARM_UP_SHARE * self.job.budget_s:
                break
        while way.error is None and taken < _MOST_TRIALS and way.is_undecided:
            self._take(way, _TRIALS_IN_A_ROW)
            taken += _TRIALS_IN_A_ROW

    def _time(self, way: _Way, number: int) -> None:
        seconds, used = self._take(way, way.in_a_row)
        if way.error is not None or way.method is None:
            return
        way.method.note(seconds / way.in_a_row)
        way.rounds.append(number)
        way.used.append(used)
        times_s = way.method.times_s
        if way is not self.compute and len(times_s) >= _LEAST_ROWS:
            way.done = way.in_a_row * (sum(times_s) + statistics.mean(times_s)) > self.job.budget_s

    def _take(self, way: _Way, count: int) -> tuple[float, _Used]:
        """Steps of all ranks together: how long they took the slowest, and what this host used for them."""
        assert way.method is not None
        error: Exception | None = None
        self.ranks.meet()
        before, start = _Used.now(self.job.device), time.perf_counter()
        try:
            for _ in range(count):
                way.method.run(self._inputs, self._targets)
            if way.method.sync is not None:
                way.method.sync.wait()
        except Exception as failed:
            error = failed
        (seconds,) = self.ranks.most(time.perf_counter() - start)
        after = _Used.now(self.job.device)  # now all have received what was sent
        self._settle(way, error)
        return seconds, _Used(
            after.sent_bytes - before.sent_bytes,
            after.received_bytes - before.received_bytes,
            after.cpu_s - before.cpu_s,
        )

    def _settle(self, way: _Way, error: Exception | None) -> None:
        """Ranks agree on whether a method goes on."""
        way.error = self.ranks.first_error(error)
        if way.error is not None and way.method is not None:
            with contextlib.suppress(Exception):
                way.method.close()
            way.method = None


def _wait_for_rate(job: Job, index: int) -> None:
    """Until the links have it."""
    told, end = Path(job.folder) / f"rate{index}", time.monotonic() + job.timeout_s
    while not told.exists():
        if time.monotonic() > end:
            raise gradcomp.WorkerFailed(f"nobody set the links to {job.rates[index]} within {job.timeout_s:g} s")
        time.sleep(0.01)


def main(argv: Sequence[str] | None = None) -> int:
    """Be one rank, with rank and world size in the environment as torchrun sets them; argument: a :class:`Job`."""
    (argument,) = sys.argv[1:] if argv is None else argv
    job = Job(**json.loads(argument))
    torch.set_num_threads(job.threads)
    logging.getLogger("gradcomp").setLevel(logging.ERROR)
    dist.init_process_group("gloo", timeout=timedelta(seconds=job.timeout_s))
    bench = _Bench(job)
    bench.make_all()
    for index, rate in enumerate(job.rates):
        bench.ranks.meet()
        if bench.ranks.rank == 0:
            print(json.dumps({"wants": rate}), flush=True)
        _wait_for_rate(job, index)
        rows = bench.measure()
        if bench.ranks.rank == 0:
            print(json.dumps({"rate": rate, "rows": rows}), flush=True)
    bench.ranks.meet()
    sys.stdout.flush()
    os._exit(0)  # what a method that failed left behind waits for nobody


if __name__ == "__main__":
    raise SystemExit(main())
