"""Sign compression: error feedback with the block's mean magnitude, and votes that every exchange counts alike."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ranks import attach, run_ranks
from torch import nn

from gradcomp import registry
from gradcomp.compressors.signsgd import SignSGD
from gradcomp.errors import PacketError
from gradcomp.packet import Kind, Packet


class TestFeedback:
    def test_the_mean_magnitude_of_the_block_with_the_sign(self) -> None:
        c = SignSGD(block=8)
        grad = torch.tensor([1.0, -3.0, 0.0, 4.0, 1.0, -3.0, 0.0, 4.0, -2.0, 6.0])
        state = c.new_state(grad)
        packet = c.compress(grad, state)
        assert packet.kind == Kind.BITS
        assert c.decompress(packet).tolist() == [2, -2, 2, 2, 2, -2, 2, 2, -4, 4]
        assert state["residual"].tolist() == [-1, -1, -2, 2, -1, -1, -2, 2, 2, 2]

    def test_what_is_decoded_on_average_is_the_gradient(self) -> None:
        c = SignSGD(block=64)
        grad = torch.randn(256, generator=torch.Generator().manual_seed(0))
        state = c.new_state(grad)
        total = torch.zeros(256)
        for _ in range(2000):
            c.decompress_add(c.compress(grad, state), total)
        assert torch.allclose(total / 2000, grad, atol=0.1)

    def test_bytes(self) -> None:
        assert SignSGD().encode(torch.randn(4096)).nbytes == 32 + 4 * 8 + 512


class TestMajority:
    def test_no_state(self) -> None:
        assert SignSGD(variant="majority").new_state(torch.zeros(5)) == {}

    def test_one_bit_where_nothing_is_zero(self) -> None:
        c = SignSGD(variant="majority")
        packet = c.encode(torch.tensor([1e-3, -5.0, 1e-45, -1e30, 2.0, 3.0, 4.0, 5.0, -6.0]))
        assert packet.kind == Kind.BITS
        assert packet.nbytes == 32 + 8 + 2
        assert c.decompress(packet).tolist() == [1, -1, 1, -1, 1, 1, 1, 1, -1]

    @pytest.mark.parametrize("zeros", [1, 5, 990, 1000])
    def test_zero_has_no_vote(self, zeros: int) -> None:
        c = SignSGD(variant="majority")
        grad = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        grad[:zeros] = 0.0
        grad[0] = -0.0
        packet = c.encode(grad)
        assert (packet.kind, packet.nbytes) == (Kind.CODES, 32 + 250)
        assert torch.equal(c.decompress(packet), grad.sign())

    def test_aggregate_is_the_sign_times_the_scale(self) -> None:
        total = torch.tensor([3.0, -0.25, 0.0, 1.0])
        SignSGD(variant="majority", scale=0.5).aggregate(total)
        assert total.tolist() == [0.5, -0.5, 0.0, 0.5]

    def test_nobody_else_aggregates(self) -> None:
        total = torch.tensor([3.0, -0.25, 0.0])
        for spec in ("none", "onebit", "signsgd", "topk"):
            registry.compressor(spec).aggregate(total)
        assert total.tolist() == [3.0, -0.25, 0.0]

    def test_the_variants_refuse_each_other_s_packets(self) -> None:
        grad = torch.randn(64)
        with pytest.raises(PacketError, match="blocks of"):
            SignSGD().decompress(SignSGD(variant="majority").encode(grad))
        with pytest.raises(PacketError, match="blocks of"):
            SignSGD(variant="majority").decompress(SignSGD().encode(grad))
        terngrad_like = Packet(
            kind=Kind.CODES, numel=64, payload=torch.zeros(16, dtype=torch.uint8), bits=2, scalar=0.5
        )
        with pytest.raises(PacketError, match=r"scalar 0\.5"):
            SignSGD(variant="majority").decompress(terngrad_like)


NUMEL = 640 * 40  # enough for two_shot to cut it


def gradient(rank: int, step: int) -> torch.Tensor:
    """Coarse, so that some elements are 0; all ranks' are in the first rows."""
    grad = (torch.randn(640, 40, generator=torch.Generator().manual_seed(10 * step + rank)) * 2).round()
    grad[:3] = 0.0
    return grad


def exchanged(transport: Any, exchange: str, reduction: str, spec: str) -> list[torch.Tensor]:
    weight = nn.Parameter(torch.zeros(640, 40))
    net = nn.ParameterDict({"weight": weight})
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    found = []
    options = {"compressor": spec, "exchange": exchange, "reduction": reduction, "bucket_bytes": 1 << 20}
    with attach(net, optimizer, transport, **options) as sync:
        for step in range(3):
            optimizer.zero_grad()
            (weight * gradient(sync.rank, step)).sum().backward()
            assert weight.grad is not None
            found.append(weight.grad.clone())
        sync.check_replicas()
    return found


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize(
    ("exchange", "reduction"),
    [("all_gather", "mean"), ("all_gather", "sum"), ("two_shot", "mean"), ("tree:arity=3", "mean")],
)
def test_the_majority_wins(exchange: str, reduction: str, world_size: int) -> None:
    spec = "signsgd:variant=majority,scale=0.25"
    ranks = run_ranks(world_size, lambda t: exchanged(t, exchange, reduction, spec))
    for step in range(3):
        votes = torch.stack([gradient(rank, step).sign() for rank in range(world_size)]).sum(0)
        assert bool((votes == 0).any())
        for grads in ranks:
            assert torch.equal(grads[step], 0.25 * votes.sign())


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
def test_a_vote_does_not_hide_what_is_not_finite(exchange: str) -> None:
    def rank_main(transport: Any) -> torch.Tensor:
        weight = nn.Parameter(torch.zeros(640, 40))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        options = {"compressor": "signsgd:variant=majority", "exchange": exchange}
        with attach(nn.ParameterDict({"weight": weight}), optimizer, transport, **options) as sync:
            grad = gradient(sync.rank, 0)
            grad[5, 5] = math.inf if sync.rank == 1 else 1.0
            (weight * grad).sum().backward()
            assert weight.grad is not None
            return weight.grad.clone()

    for grad in run_ranks(3, rank_main):
        assert not bool(grad.isfinite().all())
