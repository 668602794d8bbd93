"""Results compared to the bit: what tests of kernels share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["assert_same", "bits"]


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: -0.0 is not 0.0, and NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)


def assert_same(found: Any, expected: Any) -> None:
    """The same types, shapes and bits, in tuples too; of floats NaN is NaN."""
    if isinstance(expected, tuple):
        assert isinstance(found, tuple)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert torch.equal(bits(found), bits(expected))
    else:
        assert type(found) is type(expected)
        assert found == expected or (math.isnan(found) and math.isnan(expected))
