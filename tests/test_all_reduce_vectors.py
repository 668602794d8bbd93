"""Vectors of the user's own, added up over ranks by every transport."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ports import free_port
from processes import run_script
from ranks import attach, batch, outcomes, parameters_of, run_ranks, small_net
from torch import Tensor, nn

from gradcomp.errors import ConfigError, HandshakeError, PeerLost
from gradcomp.testing_transport import run_ranks as run_transports
from gradcomp.transports.hierarchical import HierarchicalTransport
from gradcomp.transports.torch_distributed import GlooTransport
from gradcomp.transports.zmq import ZmqTransport

TIMEOUT_S = 20.0
SHAPES = [(3,), (), (0,), (7, 5), (2, 1, 4)]
LARGE = 5_000_011  # elements: more chunks than are under way at once, and a rest


def connected(transport: Any, **options: Any) -> Any:
    """An exchange of a small net's gradients."""
    net = small_net()
    return attach(net, torch.optim.SGD(net.parameters(), lr=0.05), transport, **options)


def run_zmq(world_size: int, function: Callable[[Any], Any]) -> list[Any]:
    options = {"world_size": world_size, "master": f"127.0.0.1:{free_port()}", "timeout_s": TIMEOUT_S}
    return run_transports([ZmqTransport.from_options(options | {"rank": rank}) for rank in range(world_size)], function)


def run_gloo(world_size: int, function: Callable[[Any], Any]) -> list[Any]:
    return run_transports(GlooTransport.world(world_size, timeout_s=TIMEOUT_S), function)


def run_hosts(world_size: int, function: Callable[[Any], Any]) -> list[Any]:
    """Hosts of two ranks."""
    level = f"inproc:hub={uuid.uuid4().hex},timeout_s={TIMEOUT_S}"
    options: dict[str, Any] = {"world_size": world_size, "ranks_per_host": 2, "local": level, "between": level}
    return run_transports([HierarchicalTransport(rank=rank, **options) for rank in range(world_size)], function)


RUNNERS = {"inproc": run_ranks, "zmq": run_zmq, "gloo": run_gloo, "hosts": run_hosts}
everywhere = pytest.mark.parametrize("run", RUNNERS.values(), ids=RUNNERS)


def vector(rank: int, numel: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank))


def check(results: list[Tensor], expected: Tensor, **tolerance: float) -> None:
    """The same bits on all ranks, about what is expected."""
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0], expected, **({"rtol": 1e-5, "atol": 1e-5} | tolerance))


@everywhere
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_several_of_any_shape_and_type(run: Any, reduction: str) -> None:
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32]

    def given(rank: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(rank)
        pairs = zip(SHAPES, dtypes, strict=True)
        made = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in pairs]
        made[3] = made[3].t().contiguous().t()  # not contiguous
        return [tensor.requires_grad_() for tensor in made]

    def rank_main(transport: Any) -> list[Tensor]:
        with connected(transport) as sync:
            mine = given(sync.rank)
            before = [tensor.detach().clone() for tensor in mine]
            results: list[Tensor] = sync.all_reduce(mine, reduction=reduction)
            assert all(torch.equal(a, b) for a, b in zip(before, mine, strict=True))
            assert not any(result.requires_grad for result in results)
            return results

    found = run(4, rank_main)
    for number, shape in enumerate(SHAPES):
        total = torch.stack([given(rank)[number].detach().float() for rank in range(4)]).sum(0)
        assert found[0][number].shape == shape
        check([results[number] for results in found], total / 4 if reduction == "mean" else total)


@everywhere
@pytest.mark.parametrize("numel", [1, 17_000, LARGE])
@pytest.mark.parametrize("compressor", ["none", "bf16"])
def test_one_of_any_length(run: Any, numel: int, compressor: str) -> None:
    if numel == LARGE and (run, compressor) not in ((run_zmq, "none"), (run_ranks, "bf16"), (run_gloo, "none")):
        numel = 600_000

    def rank_main(transport: Any) -> tuple[Tensor, int]:
        with connected(transport, compressor="none") as sync:
            mine = vector(sync.rank, numel)
            before = sync.stats()["bytes_sent"]
            total = sync.all_reduce(mine, reduction="mean", compressor=compressor)
            sync.average(torch.zeros(1))  # only what the others have is sent for sure, and they say so with this
            return total, sync.stats()["bytes_sent"] - before

    found = run(4, rank_main)
    expected = torch.stack([vector(rank, numel) for rank in range(4)]).mean(0)
    check([result for result, _ in found], expected, **({} if compressor == "none" else {"rtol": 1e-2, "atol": 2e-2}))
    if compressor == "bf16":
        assert torch.equal(found[0][0], found[0][0].bfloat16().float())
    if run in (run_ranks, run_zmq) and numel > 100_000:
        width = 4 if compressor == "none" else 2
        for _, sent in found:  # 2 (N - 1)/N of a vector
            assert 1.5 * width * numel - 8 <= sent < 1.52 * width * numel


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("compressor", ["none", "fp16"])
def test_length_and_transport_make_no_difference(world_size: int, compressor: str) -> None:
    """The same bits whether a vector goes along with the first message, in one trip or in two, here or there."""
    numel = 300_000

    def rank_main(transport: Any) -> tuple[Tensor, Tensor]:
        with connected(transport) as sync:
            mine = 1e3 * vector(sync.rank, numel)
            parts = [sync.all_reduce(part, compressor=compressor, reduction="mean") for part in mine.split(16_000)]
            return sync.all_reduce(mine, compressor=compressor, reduction="mean"), torch.cat(parts)

    for run in (run_ranks, run_zmq):
        for whole, parts in run(world_size, rank_main):
            expected = torch.stack([1e3 * vector(rank, numel) for rank in range(world_size)])
            if compressor == "fp16":
                expected = expected.half().float()
            total = expected[0].clone()
            for row in expected[1:]:
                total += row
            total /= world_size
            assert torch.equal(whole, total.half().float() if compressor == "fp16" else total)
            assert torch.equal(whole, parts)


def test_a_mean_in_half_precision_overflows_only_if_it_is_too_large() -> None:
    def rank_main(transport: Any) -> list[float]:
        with connected(transport) as sync:
            mean = sync.all_reduce(torch.full((2,), 40_000.0), reduction="mean", compressor="fp16")
            total = sync.all_reduce(torch.full((1,), 40_000.0), compressor="fp16")
            return [*mean.tolist(), *total.tolist()]

    for found in run_ranks(3, rank_main):
        assert found == [40_000.0, 40_000.0, float("inf")]


@everywhere
@pytest.mark.parametrize("numel", [3, 300_000])
def test_what_is_not_finite_is_seen_everywhere(run: Any, numel: int) -> None:
    def rank_main(transport: Any) -> Tensor:
        with connected(transport) as sync:
            mine = torch.ones(numel)
            if sync.rank == 2:
                mine[0], mine[1], mine[-1] = float("nan"), float("inf"), float("-inf")
            result: Tensor = sync.all_reduce(mine)
            return result

    for result in run(4, rank_main):
        assert result[0].isnan()
        assert result[1] == float("inf")
        assert result[-1] == float("-inf")
        assert bool((result[2:-1] == 4).all())


@everywhere
def test_disagreements_are_named_on_all_ranks_and_the_run_goes_on(run: Any) -> None:
    cases: list[tuple[str, str, Callable[[int], tuple[Any, dict[str, Any]]]]] = [
        ("tensors", "tensor 1 is the first", lambda odd: ([torch.ones(2), torch.ones(3 + odd)], {})),
        ("tensors", "tensor 0 is the first", lambda odd: ([torch.ones(2 + odd), torch.ones(3 - odd)], {})),
        ("tensors", "[23] tensors here, [23] there", lambda odd: ([torch.ones(2)] * (2 + odd), {})),
        ("tensors", "tensor 0", lambda odd: (torch.ones(4, 8).view(4 + 4 * odd, -1), {})),
        ("tensors", "tensor 0", lambda odd: (torch.ones(10 + 400_000 * odd), {})),
        ("reduction", "'mean'", lambda odd: (torch.ones(2), {"reduction": "mean" if odd else "sum"})),
        ("compressor", "'bf16'", lambda odd: (torch.ones(2), {"compressor": "bf16" if odd else "none"})),
    ]

    def rank_main(transport: Any) -> list[Tensor]:
        with connected(transport) as sync:
            for field, text, make in cases:
                given, options = make(int(sync.rank == 3))
                with pytest.raises(HandshakeError, match=text) as found:
                    sync.all_reduce(given, **options)
                assert found.value.field == field
                assert str(found.value).startswith("all_reduce: ")
            with pytest.raises(ConfigError if sync.rank == 3 else HandshakeError, match="randomk"):
                sync.all_reduce(torch.ones(2), compressor="randomk" if sync.rank == 3 else "none")
            assert sync.all_reduce(torch.ones(200_000)).eq(4).all()
        return []

    run(4, rank_main)


@pytest.mark.parametrize(
    ("tensors", "options", "text"),
    [
        (torch.ones(2), {"compressor": "topk"}, "compressor='topk' is not allowed.*none, fp16 or bf16.*do not send"),
        (torch.ones(2), {"compressor": "powersgd"}, "compressor='powersgd' is not allowed"),
        (torch.ones(2), {"compressor": "nothing"}, "nothing"),
        (torch.ones(2), {"reduction": "max"}, "reduction='max' is not allowed"),
        ([torch.ones(2), torch.ones(2, dtype=torch.int64)], {}, "tensor 1 is torch.strided of torch.int64"),
        (torch.ones(2, dtype=torch.complex64), {}, "tensor 0 is torch.strided of torch.complex64"),
        (torch.ones(2).to_sparse(), {}, "tensor 0 is torch.sparse_coo"),
        ([torch.ones(2), 1.0], {}, "tensor 1 is float"),
    ],
)
def test_what_cannot_be_added_up_is_refused(tensors: Any, options: dict[str, Any], text: str) -> None:
    def rank_main(transport: Any) -> None:
        with connected(transport) as sync:
            sync.all_reduce(tensors, **options)

    for error in outcomes(2, rank_main):
        assert isinstance(error, ConfigError)
        assert re.search(text, str(error)), error


@everywhere
def test_buckets_under_way_are_left_alone(run: Any) -> None:
    def rank_main(transport: Any, *, beside: bool) -> tuple[list[Tensor], list[Tensor]]:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        sums = []
        with attach(net, optimizer, transport, compressor="none", when="step") as sync:
            for step in range(3):
                inputs, targets = batch(sync.rank, step)
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(inputs), targets).backward()
                positions = list(reversed(range(len(list(net.parameters())))))
                # Some buckets leave, on some ranks more than on others where sums need not be in one order.
                early = 3 if sync.rank == 1 or transport.adds_up else 7
                sync.ready(*positions[:early])
                if beside:
                    sums += [sync.all_reduce(vector(sync.rank, numel)) for numel in (5, 300_000)]
                sync.ready(*positions[early:])
                optimizer.step()
            sync.check_replicas()
        return parameters_of(net), sums

    with_sums = run(4, lambda transport: rank_main(transport, beside=True))
    without = run(4, lambda transport: rank_main(transport, beside=False))
    for (parameters, sums), (expected, _) in zip(with_sums, without, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(sums, with_sums[0][1], strict=True))


def test_a_rank_that_leaves_is_named() -> None:
    def rank_main(transport: Any) -> None:
        with connected(transport) as sync:
            if sync.rank != 1:
                sync.all_reduce(torch.ones(LARGE))

    zero, one, two = outcomes(3, rank_main)
    assert one is None
    assert isinstance(zero, PeerLost)
    assert isinstance(two, PeerLost)
    assert 1 in (zero.peer, two.peer)  # the other one may have seen the first one leave, too


@pytest.mark.parametrize("world_size", [2, 3])
def test_no_more_is_sent_ahead_than_half_of_what_a_peer_takes(world_size: int) -> None:
    def rank_main(transport: Any) -> None:
        with connected(transport) as sync:
            assert transport._mailbox.max_unclaimed_bytes > 16 << 20
            transport._mailbox.max_unclaimed_bytes = (8 << 20) + (16 << 10)  # who sends more is cut off
            for turn in range(4):
                if sync.rank == turn % 2:
                    time.sleep(0.1)  # late: the others have sent what they send
                assert sync.all_reduce(torch.ones(LARGE)).eq(world_size).all()

    run_ranks(world_size, rank_main)


PROCESS = """
import gradcomp
net = torch.nn.Linear(4, 4)
with gradcomp.attach(torch.optim.SGD(net.parameters(), lr=0.1), transport=OPTIONS["transport"]) as sync:
    generator = torch.Generator().manual_seed(RANK)
    for numel in (1, 20_000, 2_000_000):
        mine = torch.randn(numel, generator=generator)
        total = sync.all_reduce([mine, mine.double() - 1])
        say(first=total[0].double().sum().item(), second=(total[1] - total[0]).mean().item())
"""


@pytest.mark.parametrize("transport", ["zmq", "gloo"])
def test_processes(transport: str) -> None:
    found = run_script(PROCESS, 2, options={"transport": transport}, deadline_s=90)
    assert found[0] == found[1]
    assert [round(line["second"], 4) for line in found[0]] == [-2.0] * 3


@pytest.mark.gpu
def test_cuda_tensors_stay_on_the_device() -> None:
    def rank_main(transport: Any) -> list[Tensor]:
        device = torch.device("cuda")
        net = small_net().to(device)
        with attach(net, torch.optim.SGD(net.parameters(), lr=0.05), transport) as sync:
            results: list[Tensor] = sync.all_reduce([vector(sync.rank, n).to(device) for n in (3, 300_000)])
            assert all(result.device.type == "cuda" for result in results)
            return [result.cpu() for result in results]

    found = run_ranks(3, rank_main)
    for number, numel in enumerate((3, 300_000)):
        check([results[number] for results in found], sum(vector(rank, numel) for rank in range(3)))  # type: ignore[arg-type]
