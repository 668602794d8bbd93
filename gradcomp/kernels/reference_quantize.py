"""Quantizers in plain torch operations: a block's parameters from its extremes, then a code an element.

All of them return the payload of a packet, parameters and packed codes, or a float if acc is not finite everywhere.
With ``update`` the residual becomes acc - decoded, unless acc is not finite.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradcomp.kernels.reference_chunks import accumulate, chunks, nonfinite_value
from gradcomp.kernels.reference_codes import add_codes, add_float8, add_levels, pack_codes

__all__ = ["encode_float8", "encode_int8", "encode_levels", "encode_ternary"]

_FLOAT32 = torch.finfo(torch.float32)
# Of rows of blocks: what is finite if they are, their parameters, their codes.
_Quantized = tuple[Tensor, Tensor, Tensor]
_LESS = 1.0 - 2.0**-22


def encode_levels(grad: Tensor, residual: Tensor | None, bits: int, block: int, update: bool = False) -> Tensor | float:
    """The nearest of 2**bits levels, evenly between the lowest and the highest acc of each block.

    Args:
        bits: 1 to 8.
        block: a multiple of 8.

    Returns:
        Float32 low and step of each block, as bytes, then codes as :func:`pack_codes`; or a float.
    """
    last = float((1 << bits) - 1)

    def quantize(rows: Tensor) -> _Quantized:
        low, high = rows.amin(1) + 0.0, rows.amax(1) + 0.0  # -0 becomes 0
        step = _finite_step(low, (high - low).clamp(max=_FLOAT32.max), last)
        codes = ((rows - low.unsqueeze(1)) / _divisor(step)).clamp(max=last).round().to(torch.uint8)
        return torch.cat([low, high]), torch.stack([low, step], 1), codes

    payload = _encode(grad, residual, block, bits, quantize)
    if update and residual is not None and isinstance(payload, Tensor):
        parameters, codes = _parts(payload, grad, block, 2)
        add_levels(residual, parameters.view(-1, 2), codes, bits, block, -1.0, grad)
    return payload


def encode_int8(grad: Tensor, residual: Tensor | None, block: int, update: bool = False) -> Tensor | float:
    """The nearest multiple of the block's largest magnitude / 127.

    Returns:
        Float32 scale of each block, as bytes, then codes + 127; or a float.
    """

    def quantize(rows: Tensor) -> _Quantized:
        most = rows.abs().amax(1)
        scale = _finite_step(torch.zeros_like(most), most, 127.0)
        return most, scale, ((rows / _divisor(scale)).clamp(-127.0, 127.0).round() + 127.0).to(torch.uint8)

    payload = _encode(grad, residual, block, 8, quantize)
    if update and residual is not None and isinstance(payload, Tensor):
        add_codes(residual, *_parts(payload, grad, block, 1), 8, block, -1.0, grad)
    return payload


def encode_float8(grad: Tensor, residual: Tensor | None, block: int, update: bool = False) -> Tensor | float:
    """acc, divided by the block's largest magnitude / 448, as float8_e4m3fn.

    Returns:
        Float32 scale of each block, as bytes, then a byte an element; or a float.
    """

    def quantize(rows: Tensor) -> _Quantized:
        most = rows.abs().amax(1)
        scale = _finite_step(torch.zeros_like(most), most, 448.0)
        codes = (rows / _divisor(scale)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        return most, scale, codes.view(torch.uint8)

    payload = _encode(grad, residual, block, 8, quantize)
    if update and residual is not None and isinstance(payload, Tensor):
        add_float8(residual, *_parts(payload, grad, block, 1), block, -1.0, grad)
    return payload


def encode_ternary(grad: Tensor, residual: Tensor | None, tau: float, update: bool = False) -> Tensor | float:
    """01 where acc >= tau, 10 where acc <= -tau, else 00.

    Returns:
        Codes as :func:`pack_codes`; or a float.
    """
    limit = torch.tensor(tau, dtype=torch.float32, device=grad.device).view(1)

    def quantize(rows: Tensor) -> _Quantized:
        codes = (rows >= limit).to(torch.uint8) + 2 * (rows <= -limit).to(torch.uint8)
        return rows.abs().amax(1), limit[:0], codes

    payload = _encode(grad, residual, 1024, 2, quantize)
    if update and residual is not None and isinstance(payload, Tensor):
        add_codes(residual, limit, payload, 2, 0, -1.0, grad)
    return payload


def _encode(
    grad: Tensor,
    residual: Tensor | None,
    block: int,
    bits: int,
    quantize: Callable[[Tensor], _Quantized],
) -> Tensor | float:
    heads, codes = [], [grad.new_empty(0, dtype=torch.uint8)]
    for part in chunks(grad.numel(), grad.device, block):
        acc = accumulate(grad, residual, part, None)
        size = acc.numel()
        width = min(block, size)
        # The last block is filled up with one of its own elements, which changes no extreme.
        rows = torch.cat([acc, acc[-1:].expand(-size % width)]).view(-1, width)
        extremes, parameters, code = quantize(rows)
        if not bool(extremes.isfinite().all()):
            return _nonfinite_sum(grad, residual)
        heads.append(parameters.reshape(-1).view(torch.uint8))
        codes.append(pack_codes(code.view(-1)[:size], bits))
    return torch.cat([*heads, *codes])


def _nonfinite_sum(grad: Tensor, residual: Tensor | None) -> float:
    whole = chunks(grad.numel(), grad.device)
    return sum(nonfinite_value(accumulate(grad, residual, part, None)) for part in whole)


def _finite_step(low: Tensor, span: Tensor, last: float) -> Tensor:
    """span / last; a little less where rounding would make low + last * step infinite."""
    step = span / torch.full_like(span, last)  # a tensor: on a GPU, dividing by a number is multiplying by its inverse
    return torch.where((low + step * last).isfinite(), step, step * _LESS)


def _divisor(step: Tensor) -> Tensor:
    """1 where the step is 0: what is divided is then so small that it rounds to 0."""
    return torch.where(step > 0, step, torch.ones_like(step)).unsqueeze(1)


def _parts(payload: Tensor, grad: Tensor, block: int, parameters: int) -> tuple[Tensor, Tensor]:
    nbytes = 4 * parameters * -(-grad.numel() // block)
    return payload[:nbytes].view(torch.float32), payload[nbytes:]
