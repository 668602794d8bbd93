"""The hot loops in plain torch operations: any device, and the definition of what every other backend computes.

``grad`` is flat, contiguous float32, float16 or bfloat16; ``residual`` is flat float32 of the same length, or None for
zeros. ``acc = float32(grad) + residual`` is what is compressed. It is formed a chunk at a time: one that stays in the
cache costs a fraction of a pass over memory, and nothing of the gradient's size is allocated.

A kernel that reads all of ``acc`` returns a float instead of its result if it finds NaN or Inf: NaN if there is a NaN
or both infinities, else the infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = [
    "add_bits",
    "add_scaled",
    "add_sign_map",
    "encode_bits",
    "pack_bits",
    "sample_largest",
    "scatter_signs",
    "select_largest",
    "select_threshold",
    "unpack_bits",
]

SelectThreshold = Callable[[Tensor, Tensor | None, float], tuple[Tensor, Tensor] | float]

_CPU_CHUNK = 1 << 18  # of 2**15..2**19 the fastest: the loop's overhead is hidden and two buffers stay in the cache
_DEVICE_CHUNK = 1 << 24
_SAMPLE = 1 << 16


def _chunks(numel: int, device: torch.device, multiple_of: int = 1) -> Iterator[slice]:
    size = _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK
    size = max(size // multiple_of, 1) * multiple_of
    for start in range(0, numel, size):
        yield slice(start, min(start + size, numel))


def _accumulate(grad: Tensor, residual: Tensor | None, part: slice, buffer: Tensor | None) -> Tensor:
    """The part of acc: in ``buffer`` if it has to be computed and a buffer is given."""
    if residual is None:
        return grad[part].to(torch.float32)
    if buffer is None:
        return residual[part] + grad[part]
    return torch.add(residual[part], grad[part], out=buffer[: part.stop - part.start])


def _buffer(grad: Tensor) -> Tensor:
    chunk = next(_chunks(grad.numel(), grad.device), slice(0, 0))
    return torch.empty(chunk.stop, dtype=torch.float32, device=grad.device)


def _nonfinite_value(values: Tensor) -> float:
    """NaN or an infinity if ``values`` holds one, else 0."""
    bad = values[~values.isfinite()]
    return float(bad.sum()) if len(bad) else 0.0


def select_threshold(grad: Tensor, residual: Tensor | None, tau: float) -> tuple[Tensor, Tensor] | float:
    """Where acc > tau or acc < -tau.

    Returns:
        Indices (int64, increasing) and where acc is negative (bool); or a float if acc is not finite everywhere.
    """
    # hardshrink makes 0 of everything that does not pass and keeps NaN. Few words of two elements are then
    # not zero, and looking for those costs less than a comparison and a search of its mask.
    # Over 25M elements on two threads, in passes of r.add_(g): 2.4; with abs, a comparison and a search of the mask by
    # words of eight: 3.4.
    acc_buffer = _buffer(grad)
    kept = acc_buffer.new_empty(acc_buffer.numel() + 1)  # an odd last part is padded to whole words
    indices, values = [grad.new_empty(0, dtype=torch.int64)], [acc_buffer[:0]]
    for part in _chunks(grad.numel(), grad.device):
        size = part.stop - part.start
        acc = _accumulate(grad, residual, part, acc_buffer)
        torch.hardshrink(acc, tau, out=kept[:size])
        even = size + size % 2
        kept[size:even] = 0
        pair = kept[:even].view(torch.int64).nonzero().view(-1)
        found = kept[:even].view(-1, 2)[pair]
        row, column = found.nonzero(as_tuple=True)
        indices.append(pair[row] * 2 + column + part.start)
        values.append(found[row, column])
    value = torch.cat(values)
    return _nonfinite_value(value) or (torch.cat(indices), value < 0)


def scatter_signs(out: Tensor, index: Tensor, negative: Tensor, magnitude: float) -> None:
    """``out[index] += magnitude``, or -= where ``negative``; ``out`` float32, indices without repetition."""
    plus = torch.tensor(magnitude, dtype=torch.float32, device=out.device)
    out[index] += torch.where(negative, -plus, plus)


def add_sign_map(out: Tensor, codes: Tensor, magnitude: float) -> None:
    """``out`` plus what a checked MAP of signs says: four elements a byte, 01 plus, 10 minus ``magnitude``."""
    byte = torch.arange(256, device=out.device).unsqueeze(1)
    code = (byte >> torch.tensor([0, 2, 4, 6], device=out.device)) & 3
    sign = (code == 1).to(torch.float32) - (code == 2).to(torch.float32)
    table = sign * torch.tensor(magnitude, dtype=torch.float32, device=out.device)
    for part in _chunks(out.numel(), out.device, 4):
        rows = table[codes[part.start // 4 : -(-part.stop // 4)].to(torch.int32)]
        out[part] += rows.view(-1)[: part.stop - part.start]


def add_scaled(out: Tensor, values: Tensor, scale: float) -> None:
    """``out += scale * values``, each product rounded to float32 before it is added; ``values`` of any float type."""
    if scale in (1.0, -1.0):
        out.add_(values, alpha=scale)  # nothing to round, so nothing to keep apart
        return
    for part in _chunks(out.numel(), out.device):
        out[part] += values[part].to(torch.float32) * scale


def pack_bits(bits: Tensor) -> Tensor:
    """Flat bool to uint8, eight to a byte: bit k of byte j is element 8j + k, unused bits are 0."""
    spare = -bits.numel() % 8
    if spare or bits.storage_offset() % 8:
        bits = torch.cat([bits, bits.new_zeros(spare)])
    # Byte i of a word moves to bit i of its top byte; no two partial products overlap.
    top = (bits.view(torch.int64) * 0x0102040810204080).view(torch.uint8)[7::8]
    return top.clone(memory_format=torch.contiguous_format)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """The inverse of :func:`pack_bits`: the first ``numel`` bits, as bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> shifts) & 1).view(torch.bool).view(-1)[:numel]


def encode_bits(grad: Tensor, residual: Tensor | None, block: int) -> tuple[Tensor, Tensor] | float:
    """A sign bit an element, and for each block the mean of its negative elements and of the others (0 where none).

    Args:
        block: a multiple of 8.

    Returns:
        Scales, float32 [blocks, 2]; bits as :func:`pack_bits`, 1 where acc < 0. Or a float if acc is not finite.
    """
    scales, bits = [grad.new_empty((0, 2), dtype=torch.float32)], [grad.new_empty(0, dtype=torch.uint8)]
    for part in _chunks(grad.numel(), grad.device, block):
        acc = _accumulate(grad, residual, part, None)
        size = acc.numel()
        padded = acc if size % block == 0 else torch.cat([acc, acc.new_zeros(-size % block)])
        rows = padded.view(-1, block)
        negative = rows < 0
        members = torch.full((len(rows),), block, dtype=torch.int64, device=acc.device)
        members[-1] -= padded.numel() - size
        negatives = negative.sum(1)
        # In float64: the sum of a block of finite float32 values may not be a finite float32. Their mean is.
        sums = torch.stack([half.sum(1, dtype=torch.float64) for half in (rows.clamp(max=0), rows.clamp(min=0))])
        if not bool(sums.isfinite().all()):
            return _nonfinite_value(acc)
        counts = torch.stack([negatives, members - negatives]).clamp(min=1)
        scales.append((sums / counts).to(torch.float32).t())
        bits.append(pack_bits(negative.view(-1)[:size]))
    return torch.cat(scales), torch.cat(bits)


def add_bits(out: Tensor, scales: Tensor, bits: Tensor, block: int) -> None:
    """``out`` plus each element's scale: the first of its block's two where its bit is 1, else the second."""
    for part in _chunks(out.numel(), out.device, block):
        size = part.stop - part.start
        rows = scales[part.start // block : -(-part.stop // block)]
        negative = unpack_bits(bits[part.start // 8 : -(-part.stop // 8)], size)
        whole = size // block * block
        target = out[part]
        if whole:
            full = rows[: whole // block]
            values = torch.where(negative[:whole].view(-1, block), full[:, :1], full[:, 1:])
            target[:whole].view(-1, block).add_(values)
        if whole < size:
            target[whole:] += torch.where(negative[whole:], rows[-1, 0], rows[-1, 1])


def sample_largest(grad: Tensor, residual: Tensor | None, density: float, weight: float = 1.0) -> Tensor:
    """The largest magnitudes in a sample of ``weight * grad + residual``: ``density`` of it, one at least.

    The sample is taken at an even stride, so that the same input gives the same result.

    Returns:
        float32, falling; NaN and Inf come first. Empty if ``grad`` is.
    """
    # Enough that a few elements of it are wanted. At an odd stride: rows and channels are of even length, and a stride
    # that divides them would see a few columns only.
    stride = -(-grad.numel() // max(_SAMPLE, math.ceil(8 / density))) | 1
    sample = grad[::stride].to(torch.float32) * weight
    if residual is not None:
        sample += residual[::stride]
    count = min(max(1, round(density * sample.numel())), sample.numel())
    return sample.abs().topk(count).values


def select_largest(
    grad: Tensor, residual: Tensor | None, k: int, select: SelectThreshold = select_threshold
) -> tuple[Tensor, Tensor] | float:
    """The k elements of acc with the largest magnitude, zeros left out; of equal ones those with the lowest index.

    Args:
        select: a backend's :func:`select_threshold`.

    Returns:
        Indices (int64, increasing) and values (float32), at most k; or a float if acc is not finite everywhere.
    """
    numel = grad.numel()
    tau = 0.0
    if 4 * k < numel:
        # Whatever the sample says: if k elements pass, the k largest are among them. A few more than k should.
        tau = float(sample_largest(grad, residual, 1.25 * k / numel + 1e-4)[-1])
    found = select(grad, residual, tau if math.isfinite(tau) else 0.0)
    for fewer in (tau / 2, 0.0):
        if isinstance(found, float) or len(found[0]) >= k or not tau:
            break
        found = select(grad, residual, fewer)
    if isinstance(found, float):
        return found
    index = found[0]
    values = grad[index].to(torch.float32)
    if residual is not None:
        values += residual[index]
    if len(index) > k:
        magnitude = values.abs()
        least = magnitude.kthvalue(len(index) - k + 1).values
        chosen = magnitude > least
        ties = (magnitude == least).nonzero().view(-1)
        chosen[ties[: k - int(chosen.sum())]] = True
        index, values = index[chosen], values[chosen]
    return index, values
