"""Selection in Triton: one sweep over the gradient marks in bit planes what passes, and writes what is left.

What follows reads the planes, a sixteenth of the data, and lists of what is selected. Everything is on the device: how
many pass, whether anything is not finite, how the set is coded, which threshold a sample suggests; nothing waits before
the packet is there. Lists hold as many as may be sent, or for the exact largest some times that; where more pass than
that, or too few, the host, which sees it at the end, tries again with what is then known.

By what they move, in passes of ``r.add_(g)``: the sweep 1; 0.3 more where the residual is changed in place. It must be
left alone if acc is not finite anywhere, and that is known only after all of it was seen. But a gradient that is small
everywhere cannot make a sum overflow, so that one look at the gradient alone decides; only if that fails is there
another sweep to write.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcomp.kernels import triton_indices as sets
from gradcomp.kernels.reference_indices import Coding, max_coded_nbytes
from gradcomp.kernels.reference_select import sample_size
from gradcomp.kernels.triton import EXACT, grid
from gradcomp.kernels.triton_indices import COUNT, FLAGS, LARGEST, NBYTES, NEXT_TAU, PASSED, TAU
from gradcomp.kernels.triton_largest import keep_largest
from gradcomp.kernels.triton_sample import below_least, float_of, note_best, sample_largest

__all__ = [
    "encode_above",
    "encode_above_sampled",
    "encode_largest",
    "encode_signs",
    "encode_signs_sampled",
    "encode_signs_share",
    "mark",
    "new_status",
    "pad_signs",
    "pad_values",
]

_INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
# 2^102. A smaller number added to any finite float32 rounds to a finite float32: the largest is more than 2^103 away
# from where rounding to infinity begins.
_HARMLESS: tl.constexpr = tl.constexpr((102 + 127) << 23)
# When a sweep writes what is left.
_NEVER: tl.constexpr = tl.constexpr(0)
_ALWAYS: tl.constexpr = tl.constexpr(1)
_IF_HARMLESS: tl.constexpr = tl.constexpr(2)
_IF_FINITE: tl.constexpr = tl.constexpr(3)

# Four warps: 32 elements a thread, eight wide loads of each input before the first is needed. To tune on a new device,
# try COUNTED_WORDS and num_warps of the sweep; the rest hardly counts.
_BLOCK = 32 * sets.COUNTED_WORDS
_ONCE_MORE = 1024  # programs of the second sweep, which hardly ever has anything to do
_LEAST_ROOM = 1 << 16  # in lists of what may be sent


@triton.jit(do_not_specialize=["numel"])
def _find_largest(grad, status, numel, block: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * block
    at = first + tl.arange(0, block)
    if first + block <= numel:  # noqa: SIM108 (unmasked loads are wider)
        value = tl.load(grad + at)
    else:
        value = tl.load(grad + at, mask=at < numel, other=0.0)
    most = tl.max(value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    tl.atomic_max(status + LARGEST, most.to(tl.int64), sem="relaxed")


@triton.jit
def _sweep_block(
    grad, residual, left, mask, negative, counts, status, tau, program, numel,
    has_residual: tl.constexpr, leave: tl.constexpr, signs: tl.constexpr, whole: tl.constexpr, words: tl.constexpr,
):  # fmt: skip
    """One block of elements, 32 in a row; ``whole``: all of them are there, so that nothing is masked."""
    word = program * words + tl.arange(0, words)
    column = tl.arange(0, 32)
    at = word[:, None] * 32 + column[None, :]
    inside = at < numel
    if whole:
        acc = tl.load(grad + at).to(tl.float32)
        if has_residual:
            acc += tl.load(residual + at)
    else:
        acc = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if has_residual:
            acc += tl.load(residual + at, mask=inside, other=0.0)
    # Magnitudes are compared as integers: for floats without their sign that is the same order, and it puts Inf and NaN
    # above every finite tau.
    bits = acc.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    limit = tl.load(tau)
    passes = magnitude > limit.to(tl.int32, bitcast=True)
    below = passes & (bits < 0)
    if leave:
        rest = acc
        if signs:
            rest = tl.where(passes, acc - tl.where(below, -limit, limit), acc)
        written = True
        if leave == _IF_HARMLESS:
            written = tl.load(status + LARGEST) < _HARMLESS
        if written:
            if whole:
                tl.store(left + at, rest)
            else:
                tl.store(left + at, rest, mask=inside)
    if leave != _IF_FINITE:
        ones = tl.sum(passes.to(tl.int32) << column[None, :], axis=1)
        there = word * 32 < numel
        tl.store(mask + word, ones, mask=there)
        if signs:
            tl.store(negative + word, tl.sum(below.to(tl.int32) << column[None, :], axis=1), mask=there)
        count = tl.sum(sets.count_ones(ones.to(tl.uint32, bitcast=True)), axis=0)
        tl.store(counts + program, count.to(tl.int64))
        most = tl.max(tl.max(magnitude, axis=1), axis=0)
        if most >= _INFINITY:
            kind = tl.where(magnitude > _INFINITY, 4, tl.where(bits < 0, 2, 1))
            kind = tl.where(magnitude >= _INFINITY, kind, 0).to(tl.int64)
            tl.atomic_or(status + FLAGS + 0 * at, kind, mask=kind > 0, sem="relaxed")


@triton.jit(do_not_specialize=["numel"])
def _sweep(
    grad, residual, left, mask, negative, counts, status, tau, numel,
    has_residual: tl.constexpr, leave: tl.constexpr, signs: tl.constexpr, words: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if (program + 1) * (32 * words) <= numel:
        _sweep_block(
            grad, residual, left, mask, negative, counts, status, tau, program, numel,
            has_residual, leave, signs, True, words,
        )  # fmt: skip
    else:
        _sweep_block(
            grad, residual, left, mask, negative, counts, status, tau, program, numel,
            has_residual, leave, signs, False, words,
        )  # fmt: skip


@triton.jit(do_not_specialize=["numel", "blocks"])
def _leave(grad, residual, status, tau, numel, blocks, signs: tl.constexpr, words: tl.constexpr):
    """Write what is left over the residual, if the sweep did not dare to and all has turned out to be finite."""
    if (tl.load(status + FLAGS) == 0) & (tl.load(status + LARGEST) >= _HARMLESS):
        for number in range(tl.program_id(0), blocks, tl.num_programs(0)):
            program = tl.zeros((), tl.int64) + number
            _sweep_block(
                grad, residual, residual, status, status, status, status, tau, program, numel,
                True, _IF_FINITE, signs, False, words,
            )  # fmt: skip


def new_status(grad: Tensor) -> Tensor:
    """A status in which nothing is noted yet."""
    return torch.zeros(sets.STATUS_SIZE, dtype=torch.int64, device=grad.device)


def mark(
    grad: Tensor, residual: Tensor | None, tau: Tensor, left: Tensor | None, status: Tensor, *, signs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Mark in bit planes what passes, write what is left of it, and count: the sweep over the data.

    Args:
        tau: float32, 0-dim, on the device.
        left: as for :func:`gradcomp.kernels.reference.encode_signs`.
        status: from :func:`new_status`.
        signs: what passes is left as acc -+ tau, and its signs get a plane, and all of it is to be sent; else what is
            left is acc everywhere.

    Returns:
        The planes, int32, 32 elements a word; and how many elements were marked before every COUNTED_WORDS of them.
    """
    numel = grad.numel()
    words, blocks = -(-numel // 32), -(-numel // _BLOCK)
    new = grad.new_empty
    mask, counts = new(words, dtype=torch.int32), new(blocks, dtype=torch.int64)
    negative = new(words, dtype=torch.int32) if signs else mask
    has_residual, in_place = residual is not None, _same(left, residual)
    held, target = grad if residual is None else residual, grad if left is None else left
    how = _NEVER if left is None else _IF_HARMLESS if in_place else _ALWAYS
    if in_place:
        _find_largest[grid(numel, _BLOCK)](grad, status, numel, _BLOCK)
    _sweep[grid(numel, _BLOCK)](
        grad, held, target, mask, negative, counts, status, tau, numel,
        has_residual, how.value, signs, sets.COUNTED_WORDS, **EXACT,
    )  # fmt: skip
    if in_place:
        _leave[(min(blocks, _ONCE_MORE),)](grad, held, status, tau, numel, blocks, signs, sets.COUNTED_WORDS, **EXACT)
    sets.scan(counts, status, numel, choose=signs)
    return mask, negative, counts


def pad_signs(grad: Tensor, residual: Tensor | None, tau: Tensor, left: Tensor | None, status: Tensor) -> Tensor:
    """:func:`encode_signs` without waiting: the payload, with room for the longest there can be; writes ``status``."""
    numel = grad.numel()
    mask, negative, counts = mark(grad, residual, tau, left, status, signs=True)
    out = torch.zeros(_words_for(2 * -(-numel // 8)), dtype=torch.int32, device=grad.device)
    marks = _new_list(grad, sets.list_capacity(numel))
    sets.spread(mask, negative, counts, marks, out, status, numel)
    sets.write_list(marks, out, status, numel, signed=True, with_values=False)
    return out


def pad_values(
    grad: Tensor, residual: Tensor | None, tau: Tensor, most: int, k: int, least: int, room: int, left: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`encode_above` without waiting: the payload, with room for the longest there can be, and the status.

    Args:
        least: there is no payload if fewer pass.
        room: nor if more do. Where there is none and acc is finite, ``left``, if given, is acc.
    """
    numel = grad.numel()
    status = new_status(grad)
    mask, _, counts = mark(grad, residual, tau, left, status, signs=False)
    marks = _new_list(grad, room)
    sets.spread(mask, None, counts, marks, mask, status, numel)
    most = min(most, room)
    kept = _new_list(grad, most)
    # A MAP takes the same for any count, and no coding that is chosen takes more.
    nbytes = 4 * most + max_coded_nbytes(0, numel, Coding.MAP, signed=False)
    out = torch.zeros(_words_for(nbytes), dtype=torch.int32, device=grad.device)
    # The sweep has written acc where it was asked to.
    grad, residual = (grad, residual) if left is None else (left, None)
    keep_largest(grad, residual, marks, kept, out, status, most=most, k=k, least=least, left=left)
    sets.write_list(kept, out, status, numel, signed=False, with_values=True)
    return out, status


def encode_signs(
    grad: Tensor, residual: Tensor | None, tau: float, *, left: Tensor | None = None
) -> tuple[Tensor, int] | float:
    """:func:`gradcomp.kernels.reference.encode_signs`, bit for bit; waits for the count, once, at the end."""
    if not grad.numel():
        return _nothing(grad)
    left, status = None if residual is None else left, new_status(grad)
    out = pad_signs(grad, residual, _scalar(grad, tau), left, status)
    return _payload(out, status.tolist())


def encode_signs_sampled(
    grad: Tensor, residual: Tensor, tau: float, density: float, weight: float, *, left: Tensor
) -> tuple[Tensor, int, float] | float:
    """:func:`gradcomp.kernels.reference.encode_signs_sampled`, bit for bit; waits once, at the end."""
    if not grad.numel():
        return *_nothing(grad), 0.0
    status = new_status(grad)
    out = _pad_sampled(grad, residual, _scalar(grad, tau), density, weight, left, status)
    noted = status.tolist()
    found = _payload(out, noted)
    return found if isinstance(found, float) else (*found, float_of(noted[NEXT_TAU.value]))


def encode_signs_share(
    grad: Tensor, residual: Tensor | None, density: float, weight: float, *, left: Tensor | None = None
) -> tuple[Tensor, int, float, float] | float:
    """:func:`gradcomp.kernels.reference.encode_signs_share`, bit for bit; waits once, at the end."""
    if not grad.numel():
        return *_nothing(grad), 0.0, 0.0
    status = new_status(grad)
    tau = note_best(sample_largest(grad, residual, density), status[TAU.value :])
    if residual is None or left is None:
        out = pad_signs(grad, residual, tau, None, status)
    else:
        out = _pad_sampled(grad, residual, tau, density, weight, left, status)
    noted = status.tolist()
    found = _payload(out, noted)
    return found if isinstance(found, float) else (*found, float_of(noted[TAU.value]), float_of(noted[NEXT_TAU.value]))


def encode_largest(
    grad: Tensor, residual: Tensor | None, k: int, *, left: Tensor | None = None
) -> tuple[Tensor, int] | float:
    """:func:`gradcomp.kernels.reference.encode_largest`, bit for bit; waits once, at the end."""
    numel = grad.numel()
    k = min(k, numel)
    if 4 * k < numel:
        # Whatever the sample says: if k elements pass, the k largest are among them. A few more than k should.
        tau = sample_largest(grad, residual, 1.25 * k / numel + 1e-4)[-1]
        return _encode_values(grad, residual, tau, k, k, k, left)
    return _encode_values(grad, residual, _scalar(grad, 0.0), k, k, 0, left)


def encode_above(
    grad: Tensor, residual: Tensor | None, tau: float, most: int, k: int, *, left: Tensor | None = None
) -> tuple[Tensor, int] | float:
    """:func:`gradcomp.kernels.reference.encode_above`, bit for bit; waits once, at the end."""
    return _encode_values(grad, residual, _scalar(grad, tau), most, k, 0, left)


def encode_above_sampled(
    grad: Tensor, residual: Tensor | None, density: float, most: int, k: int, *, left: Tensor | None = None
) -> tuple[Tensor, int] | float:
    """:func:`gradcomp.kernels.reference.encode_above_sampled`, bit for bit; waits once, at the end."""
    if not grad.numel():
        return _nothing(grad)
    tau = below_least(sample_largest(grad, residual, density))
    return _encode_values(grad, residual, tau, most, k, 0, left)


def _pad_sampled(
    grad: Tensor, residual: Tensor, tau: Tensor, density: float, weight: float, left: Tensor, status: Tensor
) -> Tensor:
    """:func:`pad_signs`, and the threshold of the next step in the status."""
    stride, count = sample_size(grad.numel(), density)
    sample = grad[::stride].to(torch.float32) * weight  # now, for left may be grad
    out = pad_signs(grad, residual, tau, left, status)
    note_best(sample.add_(left[::stride]).abs_().topk(count).values, status[NEXT_TAU.value :])
    return out


def _encode_values(
    grad: Tensor, residual: Tensor | None, tau: Tensor, most: int, k: int, least: int, left: Tensor | None
) -> tuple[Tensor, int] | float:
    """What passes ``tau``, or the ``k`` largest of that if more than ``most`` do; of less if fewer than ``least``."""
    numel = grad.numel()
    if not numel:
        return _nothing(grad)
    left = None if residual is None else left
    room = min(max(4 * most, _LEAST_ROOM), numel)
    halved = False
    while True:
        out, status = pad_values(grad, residual, tau, most, k, least, room, left)
        found = status.tolist()
        passed = found[PASSED.value]
        if found[FLAGS.value] or least <= passed <= room:
            return _payload(out, found)
        if left is not None:  # it is acc by now
            grad, residual = left, None
        if passed < least:
            near = passed > least // 4 and not halved
            tau, least, halved = (tau / 2, least, True) if near else (torch.zeros_like(tau), 0, True)
        room = numel


def _payload(out: Tensor, status: list[int]) -> tuple[Tensor, int] | float:
    flags = status[FLAGS.value]
    if flags:
        return math.inf if flags == 1 else -math.inf if flags == 2 else math.nan
    # A copy: what is left of the room is more than most packets are.
    return out.view(torch.uint8)[: status[NBYTES.value]].clone(), status[COUNT.value]


def _nothing(grad: Tensor) -> tuple[Tensor, int]:
    return grad.new_empty(0, dtype=torch.uint8), 0


def _same(left: Tensor | None, residual: Tensor | None) -> bool:
    return left is not None and residual is not None and left.data_ptr() == residual.data_ptr()


def _scalar(grad: Tensor, value: float) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=grad.device)


def _new_list(grad: Tensor, size: int) -> Tensor:
    """Room for marks, which are below twice the number of elements."""
    return grad.new_empty(size, dtype=torch.int32 if grad.numel() <= 1 << 30 else torch.int64)


def _words_for(nbytes: int) -> int:
    # And one more: a field that ends with a word may be written as two.
    return -(-nbytes // 4) + 1
