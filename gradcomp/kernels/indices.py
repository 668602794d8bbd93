"""Index sets, from the fastest backend for the tensors given; :mod:`gradcomp.kernels.reference_indices` defines it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradcomp.errors import PacketError
from gradcomp.kernels import native, triton
from gradcomp.kernels import reference_indices as reference
from gradcomp.kernels.reference_indices import CodedPacket, Coding

__all__ = ["add_signs", "add_values", "check", "decode", "encode", "sum_sets"]


def encode(index: Tensor, negative: Tensor | None, numel: int, coding: Coding) -> Tensor:
    """:func:`gradcomp.indices.encode`."""
    if native.takes(index):
        signs = None if negative is None else negative.contiguous()
        return native.module.encode_indices(index.contiguous(), signs, numel, coding)
    return reference.encode(index, negative, numel, coding)


def decode(
    payload: Tensor, count: int, numel: int, coding: Coding, *, signed: bool, checked: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`gradcomp.indices.decode`."""
    if native.takes(payload):
        found = native.module.decode_indices(payload, count, numel, coding, signed)
        if isinstance(found, str):
            raise PacketError(f"index set: {found}")
        return found
    if triton.takes(payload):
        from gradcomp.kernels import triton_indices_decode

        return triton_indices_decode.decode(payload, count, numel, coding, signed=signed, checked=checked)
    return reference.decode(payload, count, numel, coding, signed=signed)


def check(payload: Tensor, count: int, numel: int, coding: Coding, *, signed: bool) -> None:
    """:func:`gradcomp.indices.check`."""
    if native.takes(payload):
        _refuse(native.module.check_indices(payload, count, numel, coding, signed))
    elif triton.takes(payload):
        from gradcomp.kernels import triton_indices_check

        triton_indices_check.check(payload, count, numel, coding, signed=signed)
    else:
        reference.check(payload, count, numel, coding, signed=signed)


def add_signs(
    out: Tensor,
    payload: Tensor,
    count: int,
    coding: Coding,
    magnitude: float,
    index_set: tuple[Tensor, Tensor] | None = None,
    threads: int | None = None,
    *,
    checked: bool = False,
) -> None:
    """:func:`gradcomp.kernels.reference.add_signs`; the native and Triton kernels read the payload, and no index set.

    Args:
        checked: whether :func:`check` was called. On CUDA nothing then waits for the device.
    """
    if native.takes(out):
        most = native.thread_count(threads)
        _refuse(native.module.add_signs(out, payload, count, coding, magnitude, threads=most))
    elif triton.takes(out):
        from gradcomp.kernels import triton_indices_decode

        triton_indices_decode.add_signs(out, payload, count, coding, magnitude, checked=checked)
    else:
        reference.add_signs(out, payload, count, coding, magnitude, index_set)


def add_values(
    out: Tensor,
    payload: Tensor,
    count: int,
    coding: Coding,
    values: Tensor,
    scale: float,
    index_set: tuple[Tensor, Tensor] | None = None,
    threads: int | None = None,
    *,
    checked: bool = False,
) -> None:
    """:func:`gradcomp.kernels.reference.add_values`; the native and Triton kernels read the payload, and no index set.

    ``checked`` as in :func:`add_signs`.
    """
    if native.takes(out):
        most = native.thread_count(threads)
        _refuse(native.module.add_values(out, payload, count, coding, values, scale, threads=most))
    elif triton.takes(out):
        from gradcomp.kernels import triton_indices_decode

        triton_indices_decode.add_values(out, payload, count, coding, values, scale, checked=checked)
    else:
        reference.add_values(out, payload, count, coding, values, scale, index_set)


def sum_sets(out: Tensor, packets: Sequence[CodedPacket], scale: float, threads: int | None = None) -> None:
    """:func:`gradcomp.kernels.reference.sum_sets`; the native kernel leaves ``out`` alone if it refuses one."""
    if native.takes(out):
        # What is in a list is taken as it is, without conversions: a plain int.
        plain = [(payload, count, int(coding), magnitude) for payload, count, coding, magnitude in packets]
        _refuse(native.module.sum_sets(out, plain, scale, threads=native.thread_count(threads)))
    else:
        reference.sum_sets(out, packets, scale)


def _refuse(fault: str | None) -> None:
    if fault is not None:
        raise PacketError(f"index set: {fault}")
