"""Step time of DistributedDataParallel with gradcomp's hook, beside plain DDP and torch's own fp16 and bf16 hooks.

Run it on every rank, with rank and world size in the environment as torchrun sets them:

    torchrun --nproc-per-node 4 -m gradcomp.bench.ddp_hooks --model vgg11 --compressor threshold:density=0.001 onebit

One run takes a step of each kind in turn, all ranks starting together; a ratio counts only between steps of the same
minute. Rank 0 prints medians, how many times faster than DDP's float32 each is, and what share of the time on the wire
backward hid.
"""

# No "from __future__ import annotations": DDP looks at a hook's annotations, which must be types.
import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import gradcomp
from gradcomp.bench.step_time import MODELS, batch_for, step
from gradcomp.engine import GradientExchange

__all__ = ["TORCH_HOOKS", "main"]


def _bf16(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """torch's hook under another name: by its own, DDP refuses it without NCCL, although Gloo can do it."""
    return default_hooks.bf16_compress_hook(state, bucket)  # type: ignore[arg-type]


_STAGES = ("hidden_fraction", "compress_ms", "wait_ms", "decompress_ms", "ratio")
TORCH_HOOKS = {"fp16": default_hooks.fp16_compress_hook, "bf16": _bf16}


class _Method:
    """A model of its own, trained one way."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.times_s: list[float] = []
        self.stats: list[dict[str, float]] = []
        self.sync: GradientExchange | None = None
        torch.manual_seed(0)
        self.model = DistributedDataParallel(
            MODELS[options.model]().to(options.device),
            bucket_cap_mb=options.bucket_cap_mb,
            gradient_as_bucket_view=options.gradient_as_bucket_view,
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        if name in TORCH_HOOKS:
            self.model.register_comm_hook(None, TORCH_HOOKS[name])
        elif name not in ("compute", "fp32"):
            self.sync = gradcomp.integrations.ddp.register(
                self.model,
                name,
                _apart(options.transport, name),
                exchange=options.exchange,
                bucket_bytes=int(options.bucket_cap_mb * 2**20),
                digest_every=0,
            )

    def run(self, inputs: Tensor, targets: Tensor) -> None:
        """One step."""
        context = self.model.no_sync() if self.name == "compute" else nullcontext()
        step(self.model, self.optimizer, inputs, targets, context)


def _apart(transport: str | None, name: str) -> gradcomp.Transport | None:
    """A transport for each method: over ZeroMQ, as runs of different names."""
    if transport is None:
        return None
    spec = f"{transport}{',' if ':' in transport else ':'}run={json.dumps(name)}"
    return gradcomp.transport(spec if transport.startswith("zmq") else transport)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; prints on rank 0."""
    parser = argparse.ArgumentParser(prog="gradcomp bench ddp-hooks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="vgg11")
    parser.add_argument(
        "--compressor", nargs="+", default=["threshold:density=0.001", "onebit", "powersgd:rank=2"], metavar="SPEC"
    )
    parser.add_argument("--transport", help="of gradcomp's packets; default: DDP's own process group")
    parser.add_argument("--exchange", default="auto")
    parser.add_argument("--backend", default="gloo", help="of DDP's process group")
    parser.add_argument("--bucket-cap-mb", type=float, default=25.0, help="of DDP's buckets and ours; default: 25")
    parser.add_argument("--gradient-as-bucket-view", action="store_true", help="DDP's option, for every method")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one GPU a rank, by local rank")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each kind")
    parser.add_argument("--warm-up", type=int, default=4, help="steps of each kind before those")
    parser.add_argument("--threads", type=int, default=1, help="torch threads a rank")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise gradcomp.ConfigError("--device=cuda is not allowed: this machine has no CUDA device that torch can use")
    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    inputs, targets = batch_for(options.model, options.batch_size, options.device)
    dist.init_process_group(options.backend)
    methods = [_Method(name, options) for name in ("compute", "fp32", *TORCH_HOOKS, *options.compressor)]
    for round_number in range(options.warm_up + options.steps):
        for method in methods:
            dist.barrier()
            if options.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            method.run(inputs, targets)
            if options.device == "cuda":
                torch.cuda.synchronize()
            if round_number >= options.warm_up:
                method.times_s.append(time.perf_counter() - start)
                if method.sync is not None:
                    stats = method.sync.stats()
                    method.stats.append({key: stats[key] for key in _STAGES})
    if dist.get_rank() == 0:
        _report(options, methods)
    dist.barrier()
    for method in methods:
        if method.sync is not None:
            method.sync.close()
    dist.destroy_process_group()
    return 0


def _report(options: argparse.Namespace, methods: list[_Method]) -> None:
    medians = {method.name: statistics.median(method.times_s) * 1e3 for method in methods}
    rows = [
        {
            "method": method.name,
            "step_ms": round(medians[method.name], 1),
            "faster_than_fp32": round(medians["fp32"] / medians[method.name], 2),
            "times_compute": round(medians[method.name] / medians["compute"], 2),
            **{key: round(statistics.median(row[key] for row in method.stats), 3) for key in _STAGES if method.stats},
        }
        for method in methods
    ]
    if options.json:
        numel = sum(p.numel() for p in methods[0].model.parameters())
        print(json.dumps({"model": options.model, "parameters": numel, "methods": rows}), flush=True)
        return
    print(
        f"{'method':28}" + "".join(f"{key:>17}" for key in ("step_ms", "faster_than_fp32", "times_compute", *_STAGES))
    )
    for row in rows:
        print(f"{row['method']:28}" + "".join(f"{value:>17}" for value in [*row.values()][1:]), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
