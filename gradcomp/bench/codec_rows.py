"""One compressor measured: passes over memory to encode and to decode, bytes, and what is lost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import gradcomp
from gradcomp.bench import torch_codecs, torch_hook
from gradcomp.bench.codec_tensors import Layout
from gradcomp.marks import Mark
from gradcomp.packet import Coding, Kind, Packet

__all__ = ["Row", "measure", "measure_hook", "measure_torch"]

_LEAST_S = 2e-3  # shorter calls are repeated until they take so long


@dataclass(frozen=True)
class Row:
    """What was measured of one compressor at one size.

    Attributes:
        model: whose tensors they were; "" for one matrix.
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
    model: str
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


def measure(spec: str, rows: Tensor, repeats: int, layout: Layout | None = None) -> Row:
    """Measure one compressor on gradients of several steps, float32 [steps, numel], where they lie.

    On CUDA packets stay there: decoding is checking and adding them, without the way through host memory.

    Args:
        layout: the tensors they are of; None: one matrix.

    Raises:
        ConfigError: an unknown compressor or option.
    """
    layout = layout or Layout.matrix(rows.shape[1])
    steps = [layout.cut(row) for row in rows]
    compressor, plain = gradcomp.compressor(spec), gradcomp.compressor("none")
    codecs = [plain if dense else compressor for dense in layout.dense]
    relative_error = _relative_error(codecs, steps[0])
    states = [codec.new_state(grad) for codec, grad in zip(codecs, steps[0], strict=True)]
    for number, (codec, state) in enumerate(zip(codecs, states, strict=True)):
        codec.seed_state(state, parameter=f"weight{number}", rank=0)
    packets: list[Packet] = []
    turn = 0

    def encode() -> None:
        nonlocal turn
        turn += 1
        grads = steps[turn % len(steps)]
        packets[:] = [codec.compress(g, state) for codec, g, state in zip(codecs, grads, states, strict=True)]

    for _ in steps:  # thresholds find their level
        encode()
    out = torch.zeros_like(rows[0])
    parts = [part.view(-1) for part in layout.cut(out)]
    on_device = rows.device.type != "cpu"
    data: list[bytearray] = []

    def decode() -> None:
        for number, (codec, packet, part) in enumerate(zip(codecs, packets, parts, strict=True)):
            if on_device:
                received = Packet.from_parts(packet.header(), packet.payload, numel=packet.numel)
            else:
                received = Packet.from_bytes(data[number], numel=packet.numel)
            codec.decompress_add(received, part)

    passes = _Passes(rows[0], repeats)
    encode_passes, pass_ms = passes.of(encode)
    data = [bytearray(packet.to_bytes()) for packet in packets]
    decode_passes, _ = passes.of(decode)
    index_bits, entropy_bits = _index_bits(packets)
    return _row(
        spec,
        layout,
        encode_passes,
        decode_passes,
        pass_ms,
        copies=passes.of_a_copy(),
        nbytes=sum(packet.nbytes for packet in packets),
        index_bits=index_bits,
        entropy_bits=entropy_bits,
        relative_error=relative_error,
    )


def measure_torch(name: str, rows: Tensor, repeats: int, layout: Layout) -> Row:
    """As :func:`measure`, for one of :data:`gradcomp.bench.torch_codecs.CODECS`; bytes are those of its tensors."""
    steps = [[_as_matrix(grad) for grad in layout.cut(row)] for row in rows]
    outs = [_as_matrix(out) for out in layout.cut(torch.zeros_like(rows[0]))]
    codecs = [
        (torch_codecs.plain if dense else torch_codecs.CODECS[name])(grad)
        for grad, dense in zip(steps[0], layout.dense, strict=True)
    ]
    turn = 0

    def encode() -> list[Sequence[Tensor]]:
        nonlocal turn
        turn += 1
        return [codec[0](grad) for codec, grad in zip(codecs, steps[turn % len(steps)], strict=True)]

    def decode() -> None:
        for codec, one, out in zip(codecs, tensors, outs, strict=True):
            codec[1](one, out)

    turn = -1
    tensors = encode()
    decode()
    passes = _Passes(rows[0], repeats)
    lost = _lost(steps[0], outs)
    encode_passes, pass_ms = passes.of(encode)
    decode_passes, _ = passes.of(decode)
    nbytes = sum(tensor.nbytes for one in tensors for tensor in one)
    return _row(
        name,
        layout,
        encode_passes,
        decode_passes,
        pass_ms,
        copies=passes.of_a_copy(),
        nbytes=nbytes,
        relative_error=lost,
    )


def measure_hook(rows: Tensor, repeats: int, layout: Layout) -> Row:
    """As :func:`measure`, for torch's own hook, which encodes and decodes at once: ``decode_passes`` is 0."""
    buffer = rows[0].clone()
    tensors = layout.cut(buffer)
    with torch_hook.powersgd_hook(buffer, tensors) as call:
        lost, nbytes = _lost(layout.cut(rows[0]), tensors), torch_hook.sent_nbytes(tensors)
        passes = _Passes(rows[0], repeats)
        encode_passes, pass_ms = passes.of(call)
    copies = passes.of_a_copy()
    return _row(torch_hook.NAME, layout, encode_passes, 0.0, pass_ms, copies=copies, nbytes=nbytes, relative_error=lost)


def _row(
    name: str,
    layout: Layout,
    encode_passes: float,
    decode_passes: float,
    pass_ms: float,
    *,
    copies: float,
    nbytes: int,
    relative_error: float,
    index_bits: float | None = None,
    entropy_bits: float | None = None,
) -> Row:
    return Row(
        compressor=name,
        model=layout.name,
        numel=layout.numel,
        encode_passes=encode_passes,
        decode_passes=decode_passes,
        pass_ms=pass_ms,
        copy_ms=copies * pass_ms,
        bytes_per_element=nbytes / layout.numel,
        ratio=4 * layout.numel / nbytes,
        index_bits=index_bits,
        entropy_bits=entropy_bits,
        relative_error=relative_error,
    )


def _as_matrix(grad: Tensor) -> Tensor:
    return grad.view(grad.shape[0], -1)


def _lost(grads: Sequence[Tensor], decoded: Sequence[Tensor]) -> float:
    """What is lost of all of them, as a share of their length."""
    lost = [float((grad - out.view(grad.shape)).norm()) for grad, out in zip(grads, decoded, strict=True)]
    return math.hypot(*lost) / max(math.hypot(*(float(grad.norm()) for grad in grads)), 1e-38)


class _Passes:
    """Tells times in passes of ``r.add_(g)`` over vectors as long as ``vector``."""

    def __init__(self, vector: Tensor, repeats: int) -> None:
        self._one, self._other = torch.zeros_like(vector), vector
        self._repeats = repeats

    def of(self, call: Callable[[], object]) -> tuple[float, float]:
        """Median time of ``call`` over the median time of a pass, the two alternating; and the latter, in ms."""
        times: dict[Callable[[], object], list[float]] = {call: [], self._pass: []}
        inner = {f: max(1, math.ceil(_LEAST_S / max(_seconds(f, 1), 1e-7))) for f in times}
        for _ in range(self._repeats):
            for f in times:
                times[f].append(_seconds(f, inner[f]))
        median, unit = (statistics.median(found) for found in times.values())
        return median / unit, unit * 1e3

    def of_a_copy(self) -> float:
        """Of copying the vector."""
        return self.of(lambda: self._one.copy_(self._other))[0]

    def _pass(self) -> None:
        self._one.add_(self._other)


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


def _relative_error(codecs: Sequence[gradcomp.Compressor], grads: Sequence[Tensor]) -> float:
    """Of one packet each, without a state."""
    return _lost(grads, [codec.decompress(codec.compress(grad)) for codec, grad in zip(codecs, grads, strict=True)])


def _index_bits(packets: Sequence[Packet]) -> tuple[float | None, float | None]:
    """Bits spent on a position, and the least there can be, over all sparse packets."""
    sparse = [packet for packet in packets if packet.coding is not Coding.NONE and packet.count]
    if not sparse:
        return None, None
    count = sum(packet.count for packet in sparse)
    values_nbytes = sum(4 * packet.count for packet in sparse if packet.kind == Kind.VALUES)
    spent = 8 * (sum(packet.payload.numel() for packet in sparse) - values_nbytes)
    signs = sum(packet.count for packet in sparse if packet.kind == Kind.SIGNS)
    return spent / count, (sum(_entropy_bits(packet.count, packet.numel) for packet in sparse) + signs) / count


def _entropy_bits(count: int, numel: int) -> float:
    """Bits that say which ``count`` of ``numel`` elements are meant, if all sets are equally likely."""
    choices = math.lgamma(numel + 1) - math.lgamma(count + 1) - math.lgamma(numel - count + 1)
    return choices / math.log(2)
