"""The built-in compressors, one file a family. The registry finds them through entry points, as it finds plug-ins."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from gradcomp import kernels
from gradcomp.errors import ConfigError, GradientError
from gradcomp.lanes import short_tensor
from gradcomp.options import check_integer
from gradcomp.packet import MAX_BLOCK, Kind, Packet

__all__ = [
    "FACTORS_HEAD_NBYTES",
    "add_dense",
    "check_block",
    "exchange_residual",
    "flat_gradient",
    "float_accumulated",
    "is_finite",
    "pack_factors",
    "read_factors",
]

_FACTORS_HEAD = struct.Struct("<QQ")
FACTORS_HEAD_NBYTES = _FACTORS_HEAD.size


def check_block(owner: str, field: str, value: object) -> None:
    """Raise ConfigError unless ``value`` is a number of elements that may share their scales: a multiple of 8."""
    check_integer(owner, field, value, at_least=8, at_most=MAX_BLOCK)
    if isinstance(value, int) and value % 8:
        raise ConfigError(f"{owner}: {field}={value} is not allowed; {field} must be a multiple of 8")


def flat_gradient(grad: Tensor) -> Tensor:
    """``grad`` as a vector, without its history and, if contiguous, without a copy.

    Raises:
        GradientError: not a dense float32, float16 or bfloat16 tensor.
    """
    if grad.layout != torch.strided or grad.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise GradientError(f"gradient must be dense float32, float16 or bfloat16; got {grad.layout}, {grad.dtype}")
    return grad.detach().reshape(-1)


def float_accumulated(flat: Tensor, residual: Tensor | None) -> Tensor:
    """acc, the gradient plus the residual, in memory of its own: for the few that cannot do without."""
    return flat.to(torch.float32, copy=True) if residual is None else residual + flat


def is_finite(flat: Tensor, residual: Tensor | None) -> bool:
    """Whether acc is finite everywhere."""
    # Nothing finite passes the largest number there is: one reading of both, and nothing written.
    return not isinstance(kernels.encode_signs(flat, residual, torch.finfo(torch.float32).max), float)


def add_dense(packet: Packet, out: Tensor, scale: float, addend: Tensor | None = None) -> None:
    """Decode DENSE_F32, which is what others send, too, where they have nothing smaller."""
    packet.require(Kind.DENSE_F32)
    if addend is not None:
        out += addend
    kernels.add_scaled(out, packet.payload.view(torch.float32), scale)


def pack_factors(left: Tensor, right: Tensor) -> Packet:
    """FACTORS: the matrix ``left.T @ right``, of float32 [r, m] and [r, n]."""
    rank, columns = right.shape
    head = short_tensor([columns, rank], right.device)
    payload = torch.cat([part.reshape(-1).view(torch.uint8) for part in (head, left, right)])
    return Packet(kind=Kind.FACTORS, numel=left.shape[1] * columns, payload=payload, _head=(columns, rank))


def read_factors(packet: Packet) -> tuple[Tensor, Tensor]:
    """Left and right of a checked FACTORS packet."""
    head = packet._head
    if head is None:
        head = tuple(packet.payload[:FACTORS_HEAD_NBYTES].view(torch.int64).tolist())
        object.__setattr__(packet, "_head", head)
    columns, rank = head
    floats = packet.payload[FACTORS_HEAD_NBYTES:].view(torch.float32)
    rows = packet.numel // columns
    return floats[: rank * rows].view(rank, rows), floats[rank * rows :].view(rank, columns)


def exchange_residual(state: dict[str, Tensor], left: Tensor) -> Tensor:
    """Make ``left`` the residual; returns the old one, whose memory nobody needs any more."""
    old, state["residual"] = state["residual"], left
    return old
