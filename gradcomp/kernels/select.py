"""Selection, from the fastest backend for the tensors given; :mod:`gradcomp.kernels.reference` defines it."""

from __future__ import annotations

from torch import Tensor

from gradcomp.kernels import native, reference, triton

__all__ = [
    "encode_above",
    "encode_above_sampled",
    "encode_largest",
    "encode_signs",
    "encode_signs_sampled",
    "encode_signs_share",
    "sample_largest",
    "sample_threshold",
]


def encode_signs(
    grad: Tensor, residual: Tensor | None, tau: float, *, left: Tensor | None = None, threads: int | None = None
) -> tuple[Tensor, int] | float:
    """:func:`gradcomp.kernels.reference.encode_signs`, from the fastest backend."""
    if native.takes(grad):
        return native.module.encode_signs(native.floats(grad), residual, tau, left, native.thread_count(threads))
    if triton.takes(grad):
        from gradcomp.kernels import triton_select

        return triton_select.encode_signs(grad.detach(), residual, tau, left=left)
    return reference.encode_signs(grad, residual, tau, left=left)


def encode_signs_sampled(
    grad: Tensor,
    residual: Tensor,
    tau: float,
    density: float,
    weight: float,
    *,
    left: Tensor,
    threads: int | None = None,
) -> tuple[Tensor, int, float] | float:
    """:func:`gradcomp.kernels.reference.encode_signs_sampled`, from the fastest backend."""
    if native.takes(grad) and grad.numel():
        stride, wanted = reference.sample_size(grad.numel(), density)
        flat, count = native.floats(grad), native.thread_count(threads)
        return native.module.encode_signs_sampled(flat, residual, tau, stride, wanted, weight, left, count)
    if triton.takes(grad):
        from gradcomp.kernels import triton_select

        return triton_select.encode_signs_sampled(grad.detach(), residual, tau, density, weight, left=left)
    return reference.encode_signs_sampled(grad, residual, tau, density, weight, left=left)


def encode_signs_share(
    grad: Tensor, residual: Tensor | None, density: float, weight: float, *, left: Tensor | None = None
) -> tuple[Tensor, int, float, float] | float:
    """:func:`gradcomp.kernels.reference.encode_signs_share`, from the fastest backend."""
    if triton.takes(grad):
        from gradcomp.kernels import triton_select

        return triton_select.encode_signs_share(grad.detach(), residual, density, weight, left=left)
    return reference.encode_signs_share(
        grad,
        residual,
        density,
        weight,
        left=left,
        sample=sample_threshold,
        encode=encode_signs,
        encode_sampled=encode_signs_sampled,
    )


def encode_largest(
    grad: Tensor, residual: Tensor | None, k: int, *, left: Tensor | None = None, threads: int | None = None
) -> tuple[Tensor, int] | float:
    """:func:`gradcomp.kernels.reference.encode_largest`, from the fastest backend."""
    if native.takes(grad):
        return native.module.encode_largest(native.floats(grad), residual, k, left, native.thread_count(threads))
    if triton.takes(grad):
        from gradcomp.kernels import triton_select

        return triton_select.encode_largest(grad.detach(), residual, k, left=left)
    return reference.encode_largest(grad, residual, k, left=left)


def encode_above(
    grad: Tensor,
    residual: Tensor | None,
    tau: float,
    most: int,
    k: int,
    *,
    left: Tensor | None = None,
    threads: int | None = None,
) -> tuple[Tensor, int] | float:
    """:func:`gradcomp.kernels.reference.encode_above`, from the fastest backend."""
    if native.takes(grad):
        flat, count = native.floats(grad), native.thread_count(threads)
        return native.module.encode_above(flat, residual, tau, most, k, left, count)
    if triton.takes(grad):
        from gradcomp.kernels import triton_select

        return triton_select.encode_above(grad.detach(), residual, tau, most, k, left=left)
    return reference.encode_above(grad, residual, tau, most, k, left=left)


def encode_above_sampled(
    grad: Tensor, residual: Tensor | None, density: float, most: int, k: int, *, left: Tensor | None = None
) -> tuple[Tensor, int] | float:
    """:func:`gradcomp.kernels.reference.encode_above_sampled`, from the fastest backend."""
    if triton.takes(grad):
        from gradcomp.kernels import triton_select

        return triton_select.encode_above_sampled(grad.detach(), residual, density, most, k, left=left)
    return reference.encode_above_sampled(
        grad, residual, density, most, k, left=left, sample=sample_largest, encode=encode_above
    )


def sample_largest(grad: Tensor, residual: Tensor | None, density: float, weight: float = 1.0) -> Tensor:
    """:func:`gradcomp.kernels.reference.sample_largest`, from the fastest backend."""
    if native.takes(grad):
        stride, count = reference.sample_size(grad.numel(), density)
        return native.module.sample_largest(native.floats(grad), residual, stride, count, weight)
    if triton.takes(grad):
        from gradcomp.kernels import triton_sample

        return triton_sample.sample_largest(grad.detach(), residual, density, weight)
    return reference.sample_largest(grad, residual, density, weight)


def sample_threshold(grad: Tensor, residual: Tensor | None, density: float, weight: float = 1.0) -> float:
    """:func:`gradcomp.kernels.reference.sample_threshold`, from the fastest backend."""
    if native.takes(grad):
        stride, count = reference.sample_size(grad.numel(), density)
        return native.module.sample_threshold(native.floats(grad), residual, stride, count, weight)
    if triton.takes(grad):
        from gradcomp.kernels import triton_sample

        return triton_sample.sample_threshold(grad.detach(), residual, density, weight)
    return reference.sample_threshold(grad, residual, density, weight)
