"""Compressors side by side: passes over memory to encode and to decode, bytes sent, and what is lost.

One pass is ``r.add_(g)`` over vectors of the same length, alternating with what is measured: the least that any encoder
with error feedback can do. Encoding is ``compress`` with its state; decoding is reading the bytes, checking them, and
adding what they say. With ``--model`` both go over all tensors of a network, a packet each, those that an exchange
sends as they are included; a pass then is over all of them as one vector. Every compressor that is installed is
measured, those of other packages too. ``--beside-torch`` adds what comes nearest in torch's own operations. On CUDA its
events tell the time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

import gradcomp
from gradcomp.bench import gradients, torch_codecs, torch_hook
from gradcomp.bench.codec_rows import Row, measure, measure_hook, measure_torch
from gradcomp.bench.codec_tensors import Layout
from gradcomp.bench.networks import MODELS
from gradcomp.errors import ConfigError
from gradcomp.kernels import native, triton

__all__ = ["main"]


def _table(rows: Sequence[Row]) -> str:
    head = (
        "compressor",
        "elements",
        "encode",
        "decode-add",
        "pass ms",
        "bytes/el.",
        "ratio",
        "bits/index",
        "entropy",
        "rel. error",
    )
    lines = [
        (
            row.compressor,
            f"{row.numel:,}",
            f"{row.encode_passes:.2f}",
            f"{row.decode_passes:.2f}",
            f"{row.pass_ms:.3g}",
            f"{row.bytes_per_element:.4f}",
            f"{row.ratio:.1f}",
            "" if row.index_bits is None else f"{row.index_bits:.2f}",
            "" if row.entropy_bits is None else f"{row.entropy_bits:.2f}",
            f"{row.relative_error:.3f}",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [head, *lines]
    )


def _draw(rows: Sequence[Row], path: str, threads: int) -> None:
    """A picture: ratio against passes, a point a compressor, at the largest size measured."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("--png needs matplotlib: pip install 'gradcomp[demo]'") from error
    numel = max(row.numel for row in rows)
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        xlabel="encode + decode-add, passes over memory",
        ylabel="float32 bytes for each byte sent",
        title=f"{numel:,} float32, {threads} thread{'s' if threads > 1 else ''}",
        xscale="log",
        yscale="log",
    )
    largest = sorted((row for row in rows if row.numel == numel), key=lambda row: row.ratio)
    for i, row in enumerate(largest):
        x = row.encode_passes + row.decode_passes
        axes.plot(x, row.ratio, "o", color="C0")
        # Above and below in turn: neighbours have much the same ratio.
        axes.annotate(
            row.compressor, (x, row.ratio), xytext=(4, (3, -9)[i % 2]), textcoords="offset points", fontsize=7
        )
    axes.grid(True, which="both", alpha=0.2)
    figure.savefig(path, dpi=120)


def _sizes(text: str) -> list[int]:
    try:
        found = [int(float(part)) for part in text.split(",")]
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, like 1e4,1e6") from error
    if any(size < 1 for size in found):
        raise argparse.ArgumentTypeError(f"{text!r}: sizes must be at least 1")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print a table, or one JSON object.

    Raises:
        ConfigError: an unknown compressor, or gradients that cannot be had.
    """
    parser = argparse.ArgumentParser(prog="gradcomp bench codecs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--compressor", action="append", metavar="SPEC", help="repeatable; default: all that are installed"
    )
    parser.add_argument("--sizes", "--numel", type=_sizes, help="elements, like 1e4,1e6,25e6; default: 1e6")
    parser.add_argument("--model", choices=sorted(MODELS), help="all tensors of this network, in place of --sizes")
    parser.add_argument("--gradients", metavar="FILE", help="saved ones (--save); default: noise of changing size")
    parser.add_argument("--task", metavar="TASK", help="take gradients from this task after some steps of training")
    parser.add_argument("--set", dest="settings", metavar="KEY=VALUE", action="append", default=[], help="for the task")
    parser.add_argument("--save", metavar="FILE", help="save the task's gradients (.npy) for --gradients")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--beside-torch", action="store_true", help="measure torch's own operations as well")
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--png", metavar="FILE", help="draw ratio against passes")
    options = parser.parse_args(argv)
    if options.repeats < 1 or options.threads < 1:
        raise ConfigError(f"--repeats={options.repeats} and --threads={options.threads} must be at least 1")
    if options.model and options.sizes:
        raise ConfigError(f"--model={options.model} has a size of its own: leave out --sizes")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device=cuda is not allowed: this machine has no CUDA device that torch can use")
    torch.set_num_threads(options.threads)
    source, found = "noise", None
    if options.task:
        source, found = options.task, gradients.from_task(options.task, options.settings)
        if options.save:
            gradients.save(options.save, found)
    elif options.gradients:
        source, found = options.gradients, gradients.load(options.gradients)
    elif options.save or options.settings:
        raise ConfigError("--save and --set are about the gradients of a --task, and there is none")
    specs = options.compressor or [name for name in gradcomp.available_compressors() if name != "auto"]
    rows = []
    layouts = [Layout.of_model(options.model)] if options.model else map(Layout.matrix, options.sizes or [10**6])
    for layout in layouts:
        numel, where = layout.numel, torch.device(options.device)
        steps = gradients.draw(numel) if found is None else gradients.stretch(found, numel)
        steps = steps.to(where)
        of = f"{numel:,} elements" + (f" of {layout.name}" if layout.name else "")
        for spec in specs:
            print(f"{spec}, {of}", file=sys.stderr)
            rows.append(measure(spec, steps, options.repeats, layout))
        for name in torch_codecs.CODECS if options.beside_torch else ():
            print(f"{name}, {of}", file=sys.stderr)
            rows.append(measure_torch(name, steps, options.repeats, layout))
        if options.beside_torch and layout.name and torch_hook.can_run(where):
            print(f"{torch_hook.NAME}, {of}", file=sys.stderr)
            rows.append(measure_hook(steps, options.repeats, layout))
    if options.device == "cuda":
        level = "Triton" if triton.enabled() else "torch"
    else:
        level = native.LEVEL if native.enabled() else "torch"
    if options.json:
        result = {
            "threads": options.threads,
            "device": options.device,
            "kernels": level,
            "gradients": source,
            "rows": [asdict(row) for row in rows],
        }
        print(json.dumps(result))
    else:
        print(f"{options.threads} thread(s), kernels: {level}, gradients: {source}")
        print(_table(rows))
    if options.png:
        _draw(rows, options.png, options.threads)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
