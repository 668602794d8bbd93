"""Selection in plain torch operations: what passes a threshold, and the largest elements."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gradcomp.kernels import reference_indices as indices
from gradcomp.kernels.reference_chunks import accumulate, chunks, new_buffer, nonfinite_value

__all__ = [
    "below_least",
    "best_threshold",
    "encode_above",
    "encode_above_sampled",
    "encode_largest",
    "encode_signs",
    "encode_signs_sampled",
    "encode_signs_share",
    "sample_largest",
    "sample_size",
    "sample_threshold",
    "scatter_signs",
    "select_largest",
    "select_threshold",
]

_SAMPLE = 1 << 16
_FLOAT32_MAX = torch.finfo(torch.float32).max  # no finite element passes it


def select_threshold(grad: Tensor, residual: Tensor | None, tau: float) -> tuple[Tensor, Tensor] | float:
    """Where acc > tau or acc < -tau.

    Returns:
        Indices (int64, increasing) and where acc is negative (bool); or a float if acc is not finite everywhere.
    """
    # hardshrink makes 0 of everything that does not pass and keeps NaN. Few words of two elements are then
    # not zero, and looking for those costs less than a comparison and a search of its mask.
    # Over 25M elements on two threads, in passes of r.add_(g): 2.4; with abs, a comparison and a search of the mask by
    # words of eight: 3.4.
    acc_buffer = new_buffer(grad)
    kept = acc_buffer.new_empty(acc_buffer.numel() + 1)  # an odd last part is padded to whole words
    indices, values = [grad.new_empty(0, dtype=torch.int64)], [acc_buffer[:0]]
    for part in chunks(grad.numel(), grad.device):
        size = part.stop - part.start
        acc = accumulate(grad, residual, part, acc_buffer)
        torch.hardshrink(acc, tau, out=kept[:size])
        even = size + size % 2
        kept[size:even] = 0
        pair = kept[:even].view(torch.int64).nonzero().view(-1)
        found = kept[:even].view(-1, 2)[pair]
        row, column = found.nonzero(as_tuple=True)
        indices.append(pair[row] * 2 + column + part.start)
        values.append(found[row, column])
    value = torch.cat(values)
    return nonfinite_value(value) or (torch.cat(indices), value < 0)


def scatter_signs(out: Tensor, index: Tensor, negative: Tensor, magnitude: float) -> None:
    """``out[index] += magnitude``, or -= where ``negative``; ``out`` float32, indices without repetition."""
    plus = torch.tensor(magnitude, dtype=torch.float32, device=out.device)
    out[index] += torch.where(negative, -plus, plus)


def sample_size(numel: int, density: float) -> tuple[int, int]:
    """At which stride to sample, and how many elements of the sample are ``density`` of it, one at least."""
    # Enough that a few elements of it are wanted. At an odd stride: rows and channels are of even length, and a stride
    # that divides them would see a few columns only.
    stride = -(-numel // max(_SAMPLE, math.ceil(8 / density))) | 1
    length = -(-numel // stride)
    return stride, min(max(1, round(density * length)), length)


def sample_largest(grad: Tensor, residual: Tensor | None, density: float, weight: float = 1.0) -> Tensor:
    """The largest magnitudes in a sample of ``weight * grad + residual``: ``density`` of it, one at least.

    The sample is taken at an even stride, so that the same input gives the same result.

    Returns:
        float32, falling; NaN and Inf come first. Empty if ``grad`` is.
    """
    stride, count = sample_size(grad.numel(), density)
    sample = grad[::stride].to(torch.float32) * weight
    if residual is not None:
        sample += residual[::stride]
    return sample.abs().topk(count).values


def best_threshold(largest: Tensor) -> float:
    """The threshold under which the most is sent, count times tau, if no more elements may pass than ``largest`` holds.

    Most often that is the smallest of them. But where few elements are not zero, or few carry most of it, a higher one
    drains the residual faster. Of equally good ones the highest.

    Args:
        largest: from :func:`sample_largest`.

    Returns:
        A threshold that the element it was taken from passes; 0 if there is nothing but zeros, or NaN or Inf.
    """
    if not len(largest) or not bool(largest[0].isfinite()):
        return 0.0
    sent = largest.double() * torch.arange(1, len(largest) + 1, device=largest.device)
    tau = largest[sent.argmax()]
    return float(torch.nextafter(tau, torch.zeros_like(tau))) or float(tau)


def sample_threshold(grad: Tensor, residual: Tensor | None, density: float, weight: float = 1.0) -> float:
    """The :func:`best_threshold` of :func:`sample_largest`."""
    return best_threshold(sample_largest(grad, residual, density, weight))


def below_least(largest: Tensor) -> float:
    """A threshold that all of ``largest`` pass; the largest number of all if there are none, or NaN or Inf."""
    if not len(largest) or not bool(largest[0].isfinite()):
        return _FLOAT32_MAX
    return float(torch.nextafter(largest[-1], torch.zeros_like(largest[-1])))


def select_largest(grad: Tensor, residual: Tensor | None, k: int) -> tuple[Tensor, Tensor] | float:
    """The k elements of acc with the largest magnitude, zeros left out; of equal ones those with the lowest index.

    Returns:
        Indices (int64, increasing) and values (float32), at most k; or a float if acc is not finite everywhere.
    """
    numel = grad.numel()
    tau = 0.0
    if 4 * k < numel:
        # Whatever the sample says: if k elements pass, the k largest are among them. A few more than k should.
        tau = float(sample_largest(grad, residual, 1.25 * k / numel + 1e-4)[-1])
    found = select_threshold(grad, residual, tau if math.isfinite(tau) else 0.0)
    for fewer in (tau / 2, 0.0):
        if isinstance(found, float) or len(found[0]) >= k or not tau:
            break
        found = select_threshold(grad, residual, fewer)
    return found if isinstance(found, float) else _largest_of(grad, residual, found[0], k)


def _largest_of(grad: Tensor, residual: Tensor | None, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the elements ``index`` of acc, and their values."""
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


def encode_signs(
    grad: Tensor, residual: Tensor | None, tau: float, *, left: Tensor | None = None
) -> tuple[Tensor, int] | float:
    """What passes +-tau as the payload of a SIGNS packet.

    Args:
        left: float32, where to write acc less what is sent. May be ``residual``, which is left alone if acc is not
            finite, or ``grad``, which then holds nothing of use; needs a residual.

    Returns:
        The coded index set (uint8) and how many it names; or a float if acc is not finite.
    """
    found = select_threshold(grad, residual, tau)
    if isinstance(found, float):
        return found
    index, negative = found
    if left is not None and residual is not None:
        torch.add(residual, grad, out=left)
        scatter_signs(left, index, negative, -tau)
    coding = indices.choose(len(index), grad.numel(), signed=True)
    return indices.encode(index, negative, grad.numel(), coding), len(index)


def encode_signs_sampled(
    grad: Tensor,
    residual: Tensor,
    tau: float,
    density: float,
    weight: float,
    *,
    left: Tensor,
) -> tuple[Tensor, int, float] | float:
    """:func:`encode_signs`, and the :func:`sample_threshold` of ``weight * grad + left`` afterwards, in one sweep.

    Args:
        left: may be ``grad``, of which the values before that count.

    Returns:
        The coded index set, how many it names, and that threshold; or a float if acc is not finite.
    """
    stride, count = sample_size(grad.numel(), density)
    sample = grad[::stride].to(torch.float32) * weight
    found = encode_signs(grad, residual, tau, left=left)
    if isinstance(found, float):
        return found
    sample += left[::stride]
    return *found, best_threshold(sample.abs().topk(count).values)


def encode_signs_share(
    grad: Tensor,
    residual: Tensor | None,
    density: float,
    weight: float,
    *,
    left: Tensor | None = None,
    sample: Callable[..., float] = sample_threshold,
    encode: Callable[..., tuple[Tensor, int] | float] = encode_signs,
    encode_sampled: Callable[..., tuple[Tensor, int, float] | float] = encode_signs_sampled,
) -> tuple[Tensor, int, float, float] | float:
    """:func:`encode_signs` where no threshold is known yet: with the :func:`sample_threshold` of acc.

    If there is nothing to go by, that is 0, and nothing is sent.

    Args:
        left: as for :func:`encode_signs`.
        sample, encode, encode_sampled: another backend's, to be used instead.

    Returns:
        The coded index set, how many it names, that threshold, and the next one, as of :func:`encode_signs_sampled`,
        which is 0 where nothing is left; or a float if acc is not finite.
    """
    tau = sample(grad, residual, density)
    limit = tau or _FLOAT32_MAX
    if residual is None or left is None:
        found = encode(grad, residual, limit)
        return found if isinstance(found, float) else (*found, tau, 0.0)
    sampled = encode_sampled(grad, residual, limit, density, weight, left=left)
    return sampled if isinstance(sampled, float) else (*sampled[:2], tau, sampled[2])


def encode_largest(
    grad: Tensor, residual: Tensor | None, k: int, *, left: Tensor | None = None
) -> tuple[Tensor, int] | float:
    """:func:`select_largest` as the payload of a VALUES packet.

    Args:
        left: as for :func:`encode_signs`; 0 where something is sent.

    Returns:
        Values and coded index set (uint8), and how many; or a float if acc is not finite.
    """
    found = select_largest(grad, residual, k)
    return found if isinstance(found, float) else _values(grad, residual, *found, left)


def encode_above(
    grad: Tensor, residual: Tensor | None, tau: float, most: int, k: int, *, left: Tensor | None = None
) -> tuple[Tensor, int] | float:
    """What passes +-tau, or the k largest of that if more than ``most`` do, as the payload of a VALUES packet.

    Args:
        most: at least ``k``.

    Returns:
        As :func:`encode_largest`.
    """
    found = select_threshold(grad, residual, tau)
    if isinstance(found, float):
        return found
    count = len(found[0])
    chosen = _largest_of(grad, residual, found[0], k if count > most else count)
    return _values(grad, residual, *chosen, left)


def encode_above_sampled(
    grad: Tensor,
    residual: Tensor | None,
    density: float,
    most: int,
    k: int,
    *,
    left: Tensor | None = None,
    sample: Callable[..., Tensor] = sample_largest,
    encode: Callable[..., tuple[Tensor, int] | float] = encode_above,
) -> tuple[Tensor, int] | float:
    """:func:`encode_above` with a threshold that about ``density`` of acc passes, going by a sample.

    Args:
        sample, encode: another backend's, to be used instead.
    """
    return encode(grad, residual, below_least(sample(grad, residual, density)), most, k, left=left)


def _values(
    grad: Tensor, residual: Tensor | None, index: Tensor, values: Tensor, left: Tensor | None
) -> tuple[Tensor, int]:
    if left is not None and residual is not None:
        torch.add(residual, grad, out=left)
        left[index] -= values
    coding = indices.choose(len(index), grad.numel(), signed=False)
    coded = indices.encode(index, None, grad.numel(), coding)
    return torch.cat([values.contiguous().view(torch.uint8), coded]), len(index)
