"""The dense kernels in Triton compute what the reference does, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from triton_device import DEVICE

from gradcomp.kernels import reference, triton_dense

SIZES = [0, 1, 4095, 4096, 10_000]


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_addend", [False, True])
def test_add_scaled(numel: int, dtype: torch.dtype, with_addend: bool) -> None:
    generator = torch.Generator().manual_seed(numel)
    out, values, addend = torch.randn(3, numel, generator=generator).to(DEVICE)
    expected, values = out.clone(), values.to(dtype)
    other = addend if with_addend else None
    reference.add_scaled(expected, values, 0.3, other)
    triton_dense.add_scaled(out, values, 0.3, other)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("numel", SIZES)
def test_all_finite(numel: int) -> None:
    values = 3e38 * torch.linspace(-1, 1, numel, device=DEVICE)
    assert triton_dense.all_finite(values)
    for broken in (math.inf, -math.inf, math.nan, -math.nan):
        for at in {0, numel // 2, numel - 1} if numel else ():
            changed = values.clone()
            changed[at] = broken
            assert not triton_dense.all_finite(changed)
