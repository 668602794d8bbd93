"""What becomes of buffers that no optimizer trains: BatchNorm's running statistics, and others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import attach, run_ranks
from torch import Tensor, nn
from training import filled, noise, sgd

import gradcomp
from gradcomp.buffers import BufferPolicy
from gradcomp.interfaces import Slot


class Buffered(nn.Module):
    """A BatchNorm, and buffers of other kinds that each rank fills with something else."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 2)
        self.register_buffer("fp16", torch.zeros(3, dtype=torch.float16))
        self.register_buffer("bf16", torch.zeros((), dtype=torch.bfloat16))
        self.register_buffer("fp64", torch.zeros(2, 2, dtype=torch.float64))
        self.register_buffer("flags", torch.zeros(5, dtype=torch.bool))
        self.register_buffer("count", torch.zeros(3, dtype=torch.int32))
        self.register_buffer("strided", torch.zeros(4, 3).t())
        self.register_buffer("large", torch.zeros(3, 1 << 19))  # more than one message
        self.register_buffer("empty", torch.zeros(0, 7))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.as_tensor(self.last(self.norm(inputs)))


def spoil(net: nn.Module, rank: int) -> None:
    """Buffers as each rank by itself would have them."""
    for name, buffer in net.named_buffers():
        if not name.startswith("norm."):
            flat = torch.arange(buffer.numel()) % 5 + rank
            buffer.copy_((flat % 2 == 0 if buffer.dtype == torch.bool else flat).view(buffer.shape))


def trained(transport: Any, steps: int, **options: Any) -> list[dict[str, Tensor]]:
    """Every buffer after every step."""
    net = filled(Buffered())
    optimizer = sgd(net)
    found = []
    with attach(net, optimizer, transport, compressor="none", **options) as sync:
        for step in range(steps):
            spoil(net, sync.rank)
            optimizer.zero_grad()
            net(noise(sync.rank, step, 8 + sync.rank, 6)).square().mean().backward()
            optimizer.step()
            found.append({name: buffer.clone() for name, buffer in net.named_buffers()})
    return found


def test_alone_each_rank_keeps_its_own() -> None:
    first, second = run_ranks(2, lambda transport: trained(transport, 2))
    for name in ("norm.running_mean", "norm.running_var", "fp16", "flags", "count"):
        assert not torch.equal(first[-1][name], second[-1][name])
    assert first[-1]["norm.num_batches_tracked"] == 2


def test_broadcast_gives_rank_zeros() -> None:
    alone = run_ranks(3, lambda transport: trained(transport, 1))
    for found in run_ranks(3, lambda transport: trained(transport, 1, buffers="broadcast")):
        for name, buffer in found[0].items():
            assert torch.equal(buffer, alone[0][0][name]), name
            assert buffer.dtype == alone[0][0][name].dtype
            assert buffer.stride() == alone[0][0][name].stride()


def test_average_is_the_mean_of_floats_and_rank_zeros_of_others() -> None:
    alone = run_ranks(3, lambda transport: trained(transport, 1))
    averaged = run_ranks(3, lambda transport: trained(transport, 1, buffers="average"))
    for name, first in alone[0][0].items():
        expected = first
        if first.is_floating_point():
            expected = torch.stack([rank[0][name].double() for rank in alone]).mean(0).to(first.dtype)
        for rank in averaged:
            assert torch.equal(rank[0][name], expected), name


@pytest.mark.parametrize(("spec", "due"), [("broadcast:every=3", [3, 6]), ("average:every=2", [2, 4, 6])])
def test_every_so_many_steps(spec: str, due: list[int]) -> None:
    first, second = run_ranks(2, lambda transport: trained(transport, 6, buffers=spec))
    for step, (a, b) in enumerate(zip(first, second, strict=True), start=1):
        assert torch.equal(a["norm.running_mean"], b["norm.running_mean"]) == (step in due)
        assert torch.equal(a["fp16"], b["fp16"]) == (step in due)


@pytest.mark.parametrize("spec", ["broadcast", "average"])
def test_a_model_without_buffers(spec: str) -> None:
    def rank_main(transport: Any) -> int:
        net = nn.Linear(3, 2)
        optimizer = sgd(net)
        with attach(net, optimizer, transport, compressor="none", buffers=spec) as sync:
            net(noise(sync.rank, 0, 4, 3)).sum().backward()
            return int(sync.stats()["steps"])

    assert run_ranks(2, rank_main) == [1, 1]


def test_a_rank_by_itself() -> None:
    assert trained("inproc", 1, buffers="average")[0]["count"].tolist() == [0, 1, 2]


def test_buffers_of_another_size_are_refused() -> None:
    def rank_main(transport: Any) -> None:
        transport.connect({}, max_message_bytes=1000)
        mine = torch.zeros(3 + transport.rank, dtype=torch.float64)
        with pytest.raises(gradcomp.PacketError, match=r"24, 32.* bytes"):
            BufferPolicy.of("average").apply(transport, 1, [mine])
        assert not mine.any()
        transport.all_gather(Slot(9, 0, 0), b"")  # nobody leaves while another one still reads

    run_ranks(2, rank_main)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("median", "buffers='median'.*alone, broadcast, average"),
        ("average:often=2", "buffers='average:often=2'"),
        ("average:every=0", "every=0"),
        ("broadcast:every=1.5", "every=1.5"),
        (3, "buffers=3"),
        ("average", "needs model="),
    ],
)
def test_bad_specs_are_named(spec: Any, message: str) -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(gradcomp.ConfigError, match=message):
        gradcomp.attach(sgd(net), transport="inproc", buffers=spec, model=None if spec == "average" else net)


def test_ranks_must_agree() -> None:
    def rank_main(transport: Any) -> None:
        net = filled(Buffered())
        with pytest.raises(gradcomp.HandshakeError, match="buffers"):
            attach(net, sgd(net), transport, buffers="average" if transport.rank else "broadcast")

    run_ranks(2, rank_main)
