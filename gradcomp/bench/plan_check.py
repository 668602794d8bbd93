"""Forecasts beside what is measured: on the ranks that are here, or in a lab of network namespaces at several rates."""

from __future__ import annotations

import json
import logging
import statistics
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import gradcomp
from gradcomp.bench.lab import Lab
from gradcomp.bench.plan_methods import Method
from gradcomp.bench.probe_model import Workload
from gradcomp.errors import WorkerFailed

__all__ = ["Measured", "in_lab", "measure"]

_LAB_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Measured:
    """Medians of this rank; ``core_s``: core time that a step takes more than one without exchange."""

    step_s: float
    compute_s: float
    core_s: float
    sent_bytes: float


def measure(
    workload: Workload,
    method: Method,
    *,
    transport: str | None,
    bucket_bytes: int,
    overlap: str = "backward",
    steps: int = 8,
    warm_up: int = 3,
) -> Measured:
    """Attach and take some steps, each beside one without exchange; on all ranks alike."""
    logging.getLogger("gradcomp").setLevel(logging.ERROR)  # steps without an exchange are meant here
    times: dict[str, list[float]] = {"compute": [], "exchange": []}
    cores: dict[str, list[float]] = {kind: [] for kind in times}
    in_a_row = 4 if overlap == "forward" else 1
    with gradcomp.attach(
        workload.optimizer,
        model=workload.model,
        compressor=method.compressor,
        exchange=method.exchange,
        transport=transport,
        bucket_bytes=bucket_bytes,
        overlap=overlap,
        digest_every=0,
    ) as sync:
        before = 0
        for number in range(warm_up + steps):
            if number == warm_up:
                before = sync.stats()["bytes_sent"]
            for kind, took in times.items():
                sync.average(torch.zeros(1))  # all ranks start the step together
                start_s, start_core_s = time.perf_counter(), time.process_time()
                for _ in range(in_a_row):
                    with sync.no_sync() if kind == "compute" else nullcontext():
                        workload.step()
                sync.wait()
                if number >= warm_up:
                    took.append((time.perf_counter() - start_s) / in_a_row)
                    cores[kind].append((time.process_time() - start_core_s) / in_a_row)
        sent = (sync.stats()["bytes_sent"] - before) / (steps * in_a_row)
    return Measured(
        step_s=statistics.median(times["exchange"]),
        compute_s=statistics.median(times["compute"]),
        core_s=statistics.median(cores["exchange"]) - statistics.median(cores["compute"]),
        sent_bytes=sent,
    )


def in_lab(hosts: int, rates: Sequence[str], arguments: Sequence[str]) -> Generator[dict[str, Any], None, None]:
    """Run ``gradcomp plan ARGUMENTS --json`` on as many hosts, once at each rate.

    Yields:
        What rank 0 printed, with its rate.

    Raises:
        ConfigError: there can be no lab here.
        WorkerFailed: a rank failed.
    """
    command = [sys.executable, "-m", "gradcomp.bench.plan", *arguments, "--json"]
    for rate in rates:
        with Lab(hosts, rate) as lab:
            lines = lab.run(command, timeout_s=_LAB_TIMEOUT_S)[0].splitlines()
        if not lines:
            raise WorkerFailed(f"{' '.join(command)}: rank 0 printed nothing")
        result: Mapping[str, Any] = json.loads(lines[-1])
        yield {"rate": rate, **result}
