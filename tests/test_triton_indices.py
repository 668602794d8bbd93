"""Index sets are coded in Triton as the torch reference codes them, and the coding is the one it chooses."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE

from gradcomp.kernels import triton_indices
from gradcomp.kernels.reference_indices import Coding, choose, encode, max_coded_nbytes
from gradcomp.kernels.triton_indices import CODING, COUNT, NBYTES, PASSED, STATUS_SIZE


@pytest.mark.parametrize(
    ("count", "numel"),
    [
        (0, 1), (1, 1), (1, 8), (1, 1000), (2, 1000), (1, 1 << 15), (2, (1 << 15) + 1), (3, 1_000_000), (0, 1 << 33),
        (200_000, 1_000_000), (125_000, 1_000_000), (125_001, 1_000_000), (1, 1 << 31), (1, (1 << 31) + 1),
        (1 << 40, 1 << 59),
    ],
)  # fmt: skip
def test_choice_is_the_reference_s(count: int, numel: int) -> None:
    counts = torch.tensor([count // 2, count - count // 2], device=DEVICE)
    status = torch.zeros(STATUS_SIZE, dtype=torch.int64, device=DEVICE)
    triton_indices.scan(counts, status, numel, choose=True)
    assert counts.tolist() == [0, count // 2]
    found = status.tolist()
    coding = choose(count, numel, signed=True)
    assert (found[PASSED.value], found[COUNT.value], found[CODING.value]) == (count, count, coding)
    assert found[NBYTES.value] == max_coded_nbytes(count, numel, coding, signed=True)


@pytest.mark.parametrize(
    ("index", "numel"),
    [
        ([5], 1000),
        ([0, 999], 1000),
        ([999_999], 1_000_000),
        ([0, 5, 6, 999_999], 1_000_000),
        ([(1 << 31) - 1], 1 << 31),
        ([0, 77, 1 << 33, (1 << 40) - 1], 1 << 40),
        ([(1 << 58) - 1], 1 << 58),
        ([*range(700, 3000)], 1_000_000),
    ],
)
def test_lists(index: list[int], numel: int) -> None:
    """Fields of every width, of tensors that fit no memory; two blocks of them."""
    position = torch.tensor(index, device=DEVICE)
    negative = position % 3 == 0
    count = len(index)
    coding = choose(count, numel, signed=True)
    assert coding is not Coding.MAP
    status = torch.zeros(STATUS_SIZE, dtype=torch.int64, device=DEVICE)
    triton_indices.scan(torch.tensor([count], device=DEVICE), status, numel, choose=True)
    out = torch.zeros(count * 16 + 4, dtype=torch.int32, device=DEVICE)
    triton_indices.write_list(position * 2 + negative, out, status, numel, signed=True, with_values=False)
    expected = encode(position, negative, numel, coding)
    assert int(status[NBYTES.value]) == len(expected)
    assert torch.equal(out.view(torch.uint8)[: len(expected)], expected)
    assert not out.view(torch.uint8)[len(expected) :].any()
