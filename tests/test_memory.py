"""Memory that is used again: never while anybody can still see it, and never without bound."""

from __future__ import annotations

import torch

from gradcomp import memory
from gradcomp.memory import Memory, empty_floats


def _address(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


def test_what_is_let_go_of_is_used_again_for_about_as_much() -> None:
    pool = Memory()
    first = pool.take(1_000_001)
    assert len(first) == 1_000_001
    assert not first.readonly
    at = _address(first)
    del first
    assert _address(pool.take(1_048_576)) == at
    assert _address(pool.take(1_000_000)) == at


def test_every_view_keeps_it() -> None:
    pool = Memory()
    whole = pool.take(3 << 20)
    part = torch.frombuffer(whole[1000:2000], dtype=torch.uint8)[10:20]
    part.fill_(7)
    del whole
    pool.take(3 << 20)[:] = bytes(3 << 20)
    assert part.tolist() == [7] * 10
    at = part.data_ptr() - 1010
    del part
    addresses = [_address(view) for view in [pool.take(3 << 20), pool.take(3 << 20)]]
    assert at in addresses


def test_no_more_is_kept_than_allowed() -> None:
    pool = Memory()
    limit = memory._MOST_KEPT_BYTES
    held = [pool.take(limit // 4) for _ in range(6)]
    held.clear()
    assert sum(base.nbytes for base in pool._free) == limit
    del held
    pool.take(2 * limit)  # longer than all that may be kept: is not, and what was kept before it makes way
    assert sum(base.nbytes for base in pool._free) <= limit


def test_floats() -> None:
    cpu = torch.device("cpu")
    for numel in (0, 1, 1000, 300_000):
        floats = empty_floats(numel, cpu)
        assert floats.dtype == torch.float32
        assert floats.shape == (numel,)
        assert floats.data_ptr() % 4 == 0
        floats.fill_(1.0)
    assert empty_floats(5, torch.device("meta")).is_meta
