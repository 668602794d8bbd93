"""Compressors side by side: passes over memory to encode and to decode, bytes sent, and what is lost.

One pass is ``r.add_(g)`` over vectors of the same length, alternating with what is measured: the least that any encoder
with error feedback can do. Encoding is ``compress`` with its state; decoding is reading the bytes, checking them, and
adding what they say. Every compressor that is installed is measured, those of other packages too. ``--beside-torch``
adds what comes nearest in torch's own operations. On CUDA its events tell the time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import gradcomp
from gradcomp.bench import gradients, torch_codecs
from gradcomp.errors import ConfigError
from gradcomp.kernels import native, triton
from gradcomp.marks import Mark
from gradcomp.packet import Coding, Kind, Packet

__all__ = ["main"]

_LEAST_S = 2e-3  # shorter calls are repeated until they take so long


@dataclass(frozen=True)
class Row:
    """What was measured of one compressor at one size.

    Attributes:
        encode_passes, decode_passes: medians, in passes of ``r.add_(g)`` of the same run.
        pass_ms: median time of those passes, in milliseconds.
        copy_ms: median time of copying the gradient, on the device it is on, in milliseconds.
        bytes_per_element: of the packet, its header included.
        ratio: bytes of the gradient as float32, for each byte sent.
        index_bits: bits spent on each position (and sign) of a sparse packet; entropy_bits: the least there can be for
            so many at random positions. None where there are none.
        relative_error: of one packet, ``|gradient - decoded| / |gradient|``; 0 nothing is lost, 1 all of it.
    """

    compressor: str
    numel: int
    encode_passes: float
    decode_passes: float
    pass_ms: float
    copy_ms: float
    bytes_per_element: float
    ratio: float
    index_bits: float | None
    entropy_bits: float | None
    relative_error: float


def measure(spec: str, rows: Tensor, repeats: int) -> Row:
    """Measure one compressor on gradients of several steps, float32 [steps, numel], where they lie.

    On CUDA packets stay there: decoding is checking and adding them, without the way through host memory.

    Raises:
        ConfigError: an unknown compressor or option.
    """
    compressor = gradcomp.compressor(spec)
    numel = rows.shape[1]
    grads = [row.view(_matrix(numel)) for row in rows]
    relative_error = _relative_error(compressor, grads[0])
    state = compressor.new_state(grads[0])
    compressor.seed_state(state, parameter="weight", rank=0)
    for grad in grads:  # thresholds find their level
        packet = compressor.compress(grad, state)
    out, one, other = torch.zeros_like(rows[0]), torch.zeros_like(rows[0]), grads[0].view(-1)
    on_device = rows.device.type != "cpu"
    turn = 0

    def encode() -> None:
        nonlocal packet, turn
        turn += 1
        packet = compressor.compress(grads[turn % len(grads)], state)

    def decode() -> None:
        if on_device:
            received = Packet.from_parts(packet.header(), packet.payload, numel=numel)
        else:
            received = Packet.from_bytes(data, numel=numel)
        compressor.decompress_add(received, out)

    def one_pass() -> None:
        one.add_(other)

    def one_copy() -> None:
        one.copy_(other)

    encode_passes, pass_ms = _in_passes(encode, one_pass, repeats)
    copies, _ = _in_passes(one_copy, one_pass, repeats)
    data = bytearray(packet.to_bytes())
    decode_passes, _ = _in_passes(decode, one_pass, repeats)
    index_bits, entropy_bits = _index_bits(packet)
    return Row(
        compressor=spec,
        numel=numel,
        encode_passes=encode_passes,
        decode_passes=decode_passes,
        pass_ms=pass_ms,
        copy_ms=copies * pass_ms,
        bytes_per_element=packet.nbytes / numel,
        ratio=4 * numel / packet.nbytes,
        index_bits=index_bits,
        entropy_bits=entropy_bits,
        relative_error=relative_error,
    )


def _measure_torch(name: str, rows: Tensor, repeats: int) -> Row:
    """As :func:`measure`, for one of :data:`gradcomp.bench.torch_codecs.CODECS`; bytes are those of its tensors."""
    numel = rows.shape[1]
    grads = [row.view(_matrix(numel)) for row in rows]
    out, one = torch.zeros_like(grads[0]), torch.zeros_like(rows[0])
    encode, decode_add = torch_codecs.CODECS[name](grads[0])
    tensors = encode(grads[0])
    lost = float((grads[0] - decode_add(tensors, out.clone())).norm() / grads[0].norm().clamp_min(1e-38))
    turn = 0

    def encode_next() -> None:
        nonlocal turn
        turn += 1
        encode(grads[turn % len(grads)])

    def one_pass() -> None:
        one.add_(rows[0])

    encode_passes, pass_ms = _in_passes(encode_next, one_pass, repeats)
    copies, _ = _in_passes(lambda: one.copy_(rows[0]), one_pass, repeats)
    decode_passes, _ = _in_passes(lambda: decode_add(tensors, out), one_pass, repeats)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return Row(
        compressor=name,
        numel=numel,
        encode_passes=encode_passes,
        decode_passes=decode_passes,
        pass_ms=pass_ms,
        copy_ms=copies * pass_ms,
        bytes_per_element=nbytes / numel,
        ratio=4 * numel / nbytes,
        index_bits=None,
        entropy_bits=None,
        relative_error=lost,
    )


def _matrix(numel: int) -> tuple[int, int]:
    """A shape of two dimensions, for compressors that look at it: a power of two of columns, about square."""
    columns = 1
    while 4 * columns * columns <= numel and numel % (2 * columns) == 0:
        columns *= 2
    return numel // columns, columns


def _relative_error(compressor: gradcomp.Compressor, grad: Tensor) -> float:
    lost = compressor.decompress(compressor.compress(grad)).sub_(grad.reshape(-1))
    return float(lost.norm() / grad.norm().clamp_min(1e-38))


def _in_passes(call: Callable[[], object], one_pass: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median time of ``call`` over the median time of ``one_pass``, the two alternating; and the latter, in ms."""
    times: dict[Callable[[], object], list[float]] = {call: [], one_pass: []}
    inner = {f: max(1, math.ceil(_LEAST_S / max(_seconds(f, 1), 1e-7))) for f in times}
    for _ in range(repeats):
        for f in times:
            times[f].append(_seconds(f, inner[f]))
    unit = statistics.median(times[one_pass])
    return statistics.median(times[call]) / unit, unit * 1e3


def _seconds(f: Callable[[], object], inner: int) -> float:
    """Of one call, when so many follow each other."""
    start = _now()
    for _ in range(inner):
        f()
    return start.until(_now()) / inner


def _now() -> Mark:
    """On CUDA: when its stream gets here, and not when the host does, which runs ahead."""
    on_device = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return Mark(torch.device("cuda", torch.cuda.current_device()) if on_device else None)


def _index_bits(packet: Packet) -> tuple[float | None, float | None]:
    if packet.coding is Coding.NONE or not packet.count:
        return None, None
    signed = packet.kind == Kind.SIGNS
    values_nbytes = 4 * packet.count if packet.kind == Kind.VALUES else 0
    spent = 8 * (packet.payload.numel() - values_nbytes) / packet.count
    return spent, _entropy_bits(packet.count, packet.numel) / packet.count + signed


def _entropy_bits(count: int, numel: int) -> float:
    """Bits that say which ``count`` of ``numel`` elements are meant, if all sets are equally likely."""
    choices = math.lgamma(numel + 1) - math.lgamma(count + 1) - math.lgamma(numel - count + 1)
    return choices / math.log(2)


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
    parser.add_argument(
        "--sizes", "--numel", type=_sizes, default=[10**6], help="elements, like 1e4,1e6,25e6; default: 1e6"
    )
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
    for numel in options.sizes:
        steps = gradients.draw(numel) if found is None else gradients.stretch(found, numel)
        steps = steps.to(options.device)
        for spec in specs:
            print(f"{spec}, {numel:,} elements", file=sys.stderr)
            rows.append(measure(spec, steps, options.repeats))
        for name in torch_codecs.CODECS if options.beside_torch else ():
            print(f"{name}, {numel:,} elements", file=sys.stderr)
            rows.append(_measure_torch(name, steps, options.repeats))
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
