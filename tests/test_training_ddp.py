"""Ordinary training loops, with gradcomp.attach and with DistributedDataParallel itself, side by side."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from ranks import attach, run_ranks
from torch import Tensor, nn
from training import Result, noise
from training_loops import LOOPS, ddp, ours

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


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree", "all_reduce"])
@pytest.mark.parametrize("name", LOOPS)
def test_uncompressed_is_what_ddp_does(name: str, exchange: str) -> None:
    for found, expected in zip(ours(name, compressor="none", exchange=exchange), ddp()[name], strict=True):
        assert_near(name, found, expected)


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
@pytest.mark.parametrize("name", LOOPS)
def test_compressed_replicas_stay_bit_identical(name: str, exchange: str) -> None:
    """Every step is checked by its digest; here gradients too, and whether there is one."""
    compressor = "powersgd:rank=1" if name == "closure" else "threshold:tau=0.01"  # LBFGS takes linear ones only
    first, second = ours(name, compressor=compressor, exchange=exchange)
    for key, tensor in first.items():
        if "running" not in key:
            assert torch.equal(tensor, second[key]), key


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
@pytest.mark.parametrize("compressor", ["threshold:tau=0.02", "onebit:block=64", "topk:ratio=0.05", "int8"])
def test_nothing_is_lost_over_micro_steps_frozen_steps_and_kept_gradients(compressor: str, exchange: str) -> None:
    """What all ranks computed is what was applied, and what they hold back: the sum over all steps."""
    lr, shape = 0.5, (400, 24)

    def rank_main(transport: Any) -> list[Tensor]:
        weight, computed = nn.Parameter(torch.zeros(shape)), torch.zeros(shape)
        other = nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.SGD([weight, other], lr=lr)
        with attach(None, optimizer, transport, compressor=compressor, exchange=exchange) as sync:
            for step in range(8):
                weight.requires_grad_(step not in (3, 4))
                optimizer.zero_grad(set_to_none=step % 3 != 0)
                for micro in range(step % 3, -1, -1):
                    grad = noise(sync.rank, 10 * step + micro, *shape)
                    with sync.no_sync() if micro else contextlib.nullcontext():
                        ((weight * grad).sum() + other.sum()).backward()
                    computed += grad * weight.requires_grad
                optimizer.step()
            held = torch.zeros(weight.numel())
            for span, roles in sync.state_dict()["states"]["group0.0"].items():
                start, stop = map(int, span.split(":"))
                for state in roles.values():
                    held[start:stop] += state["residual"]
        return [computed, held.view(shape), weight.detach()]

    ranks = run_ranks(2, rank_main)
    computed, held = (sum(rank[i] for rank in ranks) for i in range(2))
    torch.testing.assert_close(ranks[0][2] * (-2 / lr) + held, computed, rtol=1e-4, atol=1e-4)
