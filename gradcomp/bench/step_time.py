"""Step time of a network under compressed exchange, as a multiple of the same step without any exchange.

Run it on every rank, with rank and world size in the environment as torchrun sets them:

    torchrun --nproc-per-node 4 -m gradcomp.bench.step_time --model dense --compressor threshold:density=0.001

One run alternates, step by step: compute only (no exchange), compressed, and with ``--beside-ddp`` plain
DistributedDataParallel over Gloo; a ratio counts only between steps of the same minute. Rank 0 prints medians. With
``--overlap forward`` a step goes on during the next one, so several of a kind are timed in a row, and what is still in
flight at their end is waited for.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradcomp
from gradcomp.bench.networks import MODELS, batch_for

__all__ = ["MODELS", "batch_for", "main", "step"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; prints on rank 0."""
    parser = argparse.ArgumentParser(prog="gradcomp bench step-time", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="dense")
    parser.add_argument("--compressor", default="threshold:density=0.001")
    parser.add_argument("--transport", help="default: zmq, or what the exchange brings")
    parser.add_argument("--exchange", default="auto")
    parser.add_argument("--overlap", choices=("backward", "forward"), default="backward")
    parser.add_argument("--in-a-row", type=int, metavar="N", help="steps of a kind; default: 1, with forward 5")
    parser.add_argument("--bucket-mb", type=float, default=25.0, help="MiB of gradients a bucket; default: 25")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="timed steps, or rows of steps, of each kind")
    parser.add_argument("--warm-up", type=int, default=4, help="steps of each kind before those")
    parser.add_argument("--threads", type=int, default=1, help="torch threads a rank")
    parser.add_argument("--beside-ddp", action="store_true", help="time DistributedDataParallel over Gloo as well")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    in_a_row = options.in_a_row or (5 if options.overlap == "forward" else 1)
    torch.set_num_threads(options.threads)
    logging.getLogger("gradcomp").setLevel(logging.ERROR)  # steps without an exchange are meant here
    torch.manual_seed(0)
    inputs, targets = batch_for(options.model, options.batch_size)
    model = MODELS[options.model]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradcomp.attach(
        optimizer,
        model=model,
        compressor=options.compressor,
        transport=options.transport,
        exchange=options.exchange,
        overlap=options.overlap,
        bucket_bytes=int(options.bucket_mb * 2**20),
        digest_every=0,
    ) as sync:
        kinds: dict[str, Callable[[], None]] = {
            "compute": lambda: step(model, optimizer, inputs, targets, sync.no_sync()),
            "gradcomp": lambda: step(model, optimizer, inputs, targets, nullcontext()),
        }
        if options.beside_ddp:
            dist.init_process_group("gloo")
            other = DistributedDataParallel(MODELS[options.model]())
            other_optimizer = torch.optim.SGD(other.parameters(), lr=0.01)
            kinds["ddp"] = lambda: step(other, other_optimizer, inputs, targets, nullcontext())
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        stages: list[dict[str, float]] = []
        for round_number in range(options.warm_up + options.steps):
            for kind, run in kinds.items():
                sync.average(torch.zeros(1))  # all ranks start the step together
                start = time.perf_counter()
                for _ in range(in_a_row):
                    run()
                sync.wait()
                if round_number >= options.warm_up:
                    times[kind].append((time.perf_counter() - start) / in_a_row)
            if round_number >= options.warm_up:
                stats = sync.stats() if sync.rank == 0 else {}
                stages.append({key: stats[key] for key in _STAGES if key in stats})
        if sync.rank == 0:
            _report(options, model, times, stages, sync.stats())
        if options.beside_ddp:
            dist.barrier()
            dist.destroy_process_group()
    return 0


_STAGES = ("compress_ms", "wait_ms", "decompress_ms", "hidden_fraction", "density")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, context: object) -> None:
    """One step of training within ``context``."""
    with context:  # type: ignore[attr-defined]
        nn.functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()  # which is when a parameter server's workers push and pull
    optimizer.zero_grad()


def _report(
    options: argparse.Namespace,
    model: nn.Module,
    times: dict[str, list[float]],
    stages: list[dict[str, float]],
    stats: dict[str, object],
) -> None:
    medians = {kind: statistics.median(values) * 1e3 for kind, values in times.items()}
    result: dict[str, object] = {
        "model": options.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "compressor": options.compressor,
        "transport": options.transport,
        "exchange": options.exchange,
        "overlap": options.overlap,
        "ratio": stats["ratio"],
        "bytes": {key: value for key, value in stats.items() if key.startswith("bytes_")},
        "step_ms": {kind: round(value, 2) for kind, value in medians.items()},
        "times_compute": {kind: round(value / medians["compute"], 3) for kind, value in medians.items()},
    }
    result |= {key: round(statistics.median(row[key] for row in stages), 4) for key in _STAGES}
    if options.json:
        print(json.dumps(result), flush=True)
        return
    for key, value in result.items():
        print(f"{key:18} {value}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
