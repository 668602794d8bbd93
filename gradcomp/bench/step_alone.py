"""What exchange costs one machine: a step whose packets go to itself over ZeroMQ, beside the same step without us.

One rank, so that nothing waits for a link or for others: gradients are compressed, packets go to the host, through a
socket on loopback and back to the device, are checked, and become the gradients. Beside it a copy of the network that
gradcomp never saw. Rows of both alternate; each row is timed as a whole, the device idle at either end.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

import gradcomp
from gradcomp.bench.machine import describe_machine
from gradcomp.bench.networks import MODELS, batch_for
from gradcomp.bench.timeline import Timeline
from gradcomp.bench.to_itself import ToItself, ToItselfTransport
from gradcomp.errors import ConfigError

__all__ = ["main"]

_STAGES = ("compress_ms", "wait_ms", "decompress_ms", "exposed_ms", "density")


class _Training:
    """A network, its optimizer and a batch, which is the same in every step."""

    def __init__(self, model: nn.Module, images: Tensor, targets: Tensor, precision: str) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self._images, self._targets, self._precision = images, targets, precision

    def step(self, watch: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext()) -> None:
        with (
            watch("forward"),
            torch.autocast(self._images.device.type, torch.bfloat16, enabled=self._precision == "bf16"),
        ):
            loss = nn.functional.cross_entropy(self.model(self._images), self._targets)
        with watch("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        with watch("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()


def _seconds(step: Callable[[], None], steps: int, device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _wait_for(device)
    return (time.perf_counter() - start) / steps


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gradcomp bench step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet50")
    parser.add_argument("--batch", type=int, default=64, help="images a step; default: %(default)s")
    parser.add_argument("--compressor", action="append", metavar="SPEC", help="repeatable; default: threshold")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), default="float32", help="of the network")
    parser.add_argument("--bucket-mb", type=float, default=25.0, help="MiB of gradients a bucket; default: 25")
    parser.add_argument("--rows", type=int, default=10, help="timed rows of steps of each kind; default: %(default)s")
    parser.add_argument("--in-a-row", type=int, default=5, metavar="N", help="steps a row; default: %(default)s")
    parser.add_argument("--warm-up", type=int, default=2, help="rows before those; default: %(default)s")
    parser.add_argument("--threads", type=int, help="torch threads; default: as many as torch takes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--profile", metavar="FILE", help="draw when what ran in one step (.png), with one compressor")
    options = parser.parse_args(argv)
    for name in ("batch", "rows", "in_a_row"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(options, name)} is not allowed; at least 1 is")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device=cuda is not allowed: this machine has no CUDA device that torch can use")
    options.compressor = options.compressor or ["threshold:density=0.001"]
    if options.profile and len(options.compressor) > 1:
        raise ConfigError(f"--profile draws one step, and there are {len(options.compressor)} compressors")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print a table, or one JSON object.

    Raises:
        ConfigError: an option that is not allowed.
    """
    options = _options(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.precision == "tf32"
    logging.getLogger("gradcomp").setLevel(logging.ERROR)  # one rank is meant here
    torch.manual_seed(0)
    images, targets = batch_for(options.model, options.batch, options.device)
    model = MODELS[options.model]().to(options.device)
    rows = [_measure(spec, copy.deepcopy(model), model, images, targets, options) for spec in options.compressor]
    result = {
        "machine": describe_machine(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "model": options.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": options.batch,
        "precision": options.precision,
        "rows": rows,
    }
    if options.json:
        print(json.dumps(result))
        return 0
    print(f"{options.model}, {result['parameters']:,} parameters, batch {options.batch}, {options.precision}")
    print(f"on {result['device']}; milliseconds a step, medians of {options.rows} rows of {options.in_a_row}\n")
    print(f"{'compressor':32} {'without':>9} {'with':>9} {'times':>7} {'KiB sent':>10}")
    for row in rows:
        print(
            f"{row['compressor']:32} {row['alone_ms']:9.2f} {row['gradcomp_ms']:9.2f} {row['times_alone']:7.3f} "
            f"{row['packet_kib']:10,.1f}"
        )
    return 0


def _measure(
    spec: str, ours: nn.Module, theirs: nn.Module, images: Tensor, targets: Tensor, options: argparse.Namespace
) -> dict[str, object]:
    exchanged = _Training(ours, images, targets, options.precision)
    alone = _Training(theirs, images, targets, options.precision)
    timeline = Timeline(images.device)
    with gradcomp.attach(
        exchanged.optimizer,
        model=ours,
        compressor=spec,
        transport=ToItselfTransport(),
        exchange=ToItself(watch=timeline.watch),
        bucket_bytes=int(options.bucket_mb * 2**20),
        digest_every=0,
    ) as sync:
        times: dict[str, list[float]] = {"alone": [], "gradcomp": []}
        stages: list[dict[str, float]] = []
        for number in range(options.warm_up + options.rows):
            for kind, training in (("alone", alone), ("gradcomp", exchanged)):
                seconds = _seconds(training.step, options.in_a_row, images.device)
                if number >= options.warm_up:
                    times[kind].append(seconds)
            stages.append({key: value for key, value in sync.stats().items() if key in _STAGES})
        if options.profile:
            with timeline.recorded():
                exchanged.step(timeline.watch)
            timeline.draw(options.profile, f"{options.model}, {spec}: one step")
        stats = sync.stats()
    medians = {kind: statistics.median(values) * 1e3 for kind, values in times.items()}
    return {
        "compressor": spec,
        **{f"{kind}_ms": round(value, 3) for kind, value in medians.items()},
        "times_alone": round(medians["gradcomp"] / medians["alone"], 4),
        "ratio": stats["ratio"],
        "packet_kib": stats["packet_bytes"] / stats["steps"] / 1024,
        **{key: round(statistics.median(row[key] for row in stages), 4) for key in stages[-1]},
    }


if __name__ == "__main__":
    raise SystemExit(main())
