"""Ordinary training loops, with gradcomp.attach and with DistributedDataParallel itself, side by side."""

from __future__ import annotations

import pytest
import torch
from training import LOOPS, Result, ddp, ours

# Types of fewer bits are added up in them by Gloo, and in float32 by us.
COARSE = {torch.bfloat16: 0.02, torch.float16: 0.003}
# Clipping to a norm and LBFGS divide by what was rounded; autocast rounds what differs by a rounding.
LOOSE = {"closure": 1e-3, "autocast": 1e-2, "mixed_types": 2e-2}


def assert_near(name: str, found: Result, expected: Result) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        tolerance = max(COARSE.get(tensor.dtype, 2e-5), LOOSE.get(name, 0.0))
        if not tensor.isfinite().all():
            continue
        torch.testing.assert_close(found[key], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "all_reduce"])
@pytest.mark.parametrize("name", LOOPS)
def test_uncompressed_is_what_ddp_does(name: str, exchange: str) -> None:
    for found, expected in zip(ours(name, compressor="none", exchange=exchange), ddp()[name], strict=True):
        assert_near(name, found, expected)


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot"])
@pytest.mark.parametrize("name", LOOPS)
def test_compressed_replicas_stay_bit_identical(name: str, exchange: str) -> None:
    """Every step is checked by its digest; here gradients too, and whether there is one."""
    first, second = ours(name, compressor="threshold:tau=0.01", exchange=exchange)
    for key, tensor in first.items():
        if "running" not in key:
            assert torch.equal(tensor, second[key]), key
