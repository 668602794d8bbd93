"""What is particular to the tree exchange; tables over exchanges elsewhere have it as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import attach, parameters_of, run_ranks, small_net, train_step
from torch import Tensor, nn

import gradcomp
from gradcomp import testing_transport
from gradcomp.bucket import Unit
from gradcomp.errors import ConfigError
from gradcomp.transports.torch_distributed import GlooTransport

SHAPE = (160, 64)
SPAN = f"0:{160 * 64}"


class Ranks:
    """Stands in for Work: messages are the tuples of ranks whose packets were added up, and all ranks move at once."""

    def __init__(self, exchange: Any, world_size: int) -> None:
        units = [Unit((0,), SHAPE, gradcomp.compressor("topk"))]
        self.pieces = exchange.cut(units, world_size)
        self.sent: dict[tuple[int, int, int], tuple[int, ...]] = {}
        self.stages: list[list[int]] = [[] for _ in range(world_size)]
        self.delivered: list[list[tuple[int, ...]]] = [[] for _ in range(world_size)]
        self.reduced: set[int] = set()
        running = [exchange.run(One(self, rank, world_size)) for rank in range(world_size)]
        while running:
            running = [steps for steps in running if next(steps, None) is not None]


class One:
    def __init__(self, ranks: Ranks, rank: int, world_size: int) -> None:
        self.ranks, self.rank, self.world_size, self.pieces = ranks, rank, world_size, ranks.pieces

    def encode(self, pieces: Any) -> tuple[int, ...]:
        return (self.rank,)

    def reduce(self, pieces: Any, messages: list[tuple[int, ...]]) -> tuple[int, ...]:
        assert self.rank not in self.ranks.reduced
        self.ranks.reduced.add(self.rank)
        return sum(messages, ())

    def deliver(self, pieces: Any, messages: list[tuple[int, ...]]) -> None:
        assert pieces is self.pieces
        self.ranks.delivered[self.rank] += messages

    def swap(self, stage: int, outgoing: Any, expected: Any) -> Any:
        self.ranks.stages[self.rank].append(stage)
        for peer, message in outgoing:
            assert (self.rank, peer, stage) not in self.ranks.sent
            self.ranks.sent[self.rank, peer, stage] = message
        yield ()
        return {peer: self.ranks.sent[peer, self.rank, stage] for peer in expected}


@pytest.mark.parametrize("arity", [2, 3, 5])
@pytest.mark.parametrize("world_size", [*range(1, 17), 40, 85])
def test_every_packet_counts_once_and_nobody_carries_more_than_a_few(world_size: int, arity: int) -> None:
    ranks = Ranks(gradcomp.exchange(f"tree:arity={arity}"), world_size)
    assert all(len(found) == 1 for found in ranks.delivered)
    (total,) = {found[0] for found in ranks.delivered}  # the same, in the same order
    assert sorted(total) == list(range(world_size))
    assert len(ranks.sent) == 2 * (world_size - 1)
    for rank in range(world_size):
        assert sum(sender == rank for sender, _, _ in ranks.sent) <= arity + (rank > 0)
        assert sum(peer == rank for _, peer, _ in ranks.sent) <= arity + (rank > 0)
        assert ranks.stages[rank] == ranks.stages[0]  # all come to all stages, in the same order
    assert ranks.stages[0] == list(range(len(ranks.stages[0])))
    assert len(ranks.stages[0]) < 256
    assert ranks.reduced == {rank for rank in range(world_size) if ranks.pieces[0].has_sum(rank)}


@pytest.mark.parametrize("arity", [1, 0, 2.0, True, "2"])
def test_arity_is_an_integer_of_two_or_more(arity: object) -> None:
    with pytest.raises(ConfigError, match="arity"):
        gradcomp.exchange({"id": "tree", "arity": arity})


def exchanged(
    transport: Any,
    spec: str,
    steps: int,
    *,
    states: Any = None,
    missing: Any = lambda rank, step: False,
    **options: Any,
) -> tuple[Tensor, Tensor, Any]:
    """Sum of this rank's gradients, sum of what was applied, and the states, after some steps of noise."""
    weight, other = nn.Parameter(torch.zeros(SHAPE)), nn.Parameter(torch.zeros(6))
    optimizer = torch.optim.SGD([weight, other], lr=1.0)
    given = torch.zeros(SHAPE)
    options = {"exchange": "tree", "reduction": "sum", "digest_every": 1} | options
    with attach(None, optimizer, transport, compressor=spec, **options) as sync:
        if states is not None:
            sync.load_state_dicts(states)
        for step in range(steps):
            optimizer.zero_grad()
            loss = other.sum()
            if not missing(transport.rank, step):
                gradient = 0.1 * torch.randn(
                    SHAPE, generator=torch.Generator().manual_seed(100 * step + transport.rank)
                )
                given += gradient
                loss = loss + (weight * gradient).sum()
            loss.backward()
            optimizer.step()
        return given, -weight.detach(), sync.state_dict()


def held(results: list[Any]) -> Tensor:
    total = torch.zeros(SHAPE, dtype=torch.float64)
    for _, _, saved in results:
        for span, roles in saved["states"].get("group0.0", {}).items():
            start, stop = map(int, span.split(":"))
            for state in roles.values():
                total.view(-1)[start:stop] += state["residual"]
    return total


@pytest.mark.parametrize(("world_size", "arity"), [(2, 2), (7, 2), (6, 2), (9, 3)])
@pytest.mark.parametrize("spec", ["threshold:tau=0.1", "onebit:block=64", "topk:ratio=0.05"])
def test_all_gradients_are_what_was_applied_and_all_residuals(spec: str, world_size: int, arity: int) -> None:
    results = run_ranks(
        world_size,
        lambda t: exchanged(t, spec, 6, exchange=f"tree:arity={arity}", missing=lambda r, s: (r + s) % 3 == 0),
    )
    given = sum(result[0] for result in results)
    torch.testing.assert_close(given.double(), results[0][1].double() + held(results), rtol=0, atol=2e-5)
    inner = len(range(0, world_size - 1, arity))
    for rank, (_, _, saved) in enumerate(results):
        assert set(saved["states"]["group0.0"][SPAN]) == ({"gradient", "sum"} if rank < inner else {"gradient"})


@pytest.mark.parametrize("spec", ['scheduled:stages=[[2,"fp16"]],then="topk:k=40"', "powersgd:rank=1,dense_steps=2"])
def test_a_node_whose_ranks_have_no_gradient_counts_the_step(spec: str) -> None:
    """Ranks 1, 3 and 4 are a subtree: without a gradient it sends nothing, but goes on to the next stage."""
    results = run_ranks(
        7, lambda t: exchanged(t, spec, 5, missing=lambda rank, step: rank in (1, 3, 4) and step in (1, 2))
    )
    given = sum(result[0] for result in results)
    torch.testing.assert_close(given.double(), results[0][1].double() + held(results), rtol=0, atol=2e-3)
    for _, _, saved in results:
        for state in saved["states"]["group0.0"][SPAN].values():
            assert int(state["step"] if "step" in state else state["random"][1]) == 5


def test_the_same_ranks_resume_to_the_bit_and_others_lose_nothing() -> None:
    saved = run_ranks(7, lambda t: exchanged(t, "topk:ratio=0.05", 3))
    states = [result[2] for result in saved]
    for rank, (_, _, found) in enumerate(run_ranks(7, lambda t: exchanged(t, "topk:ratio=0.05", 0, states=states))):
        before = states[rank]["states"]["group0.0"][SPAN]
        after = found["states"]["group0.0"][SPAN]
        assert after.keys() == before.keys()
        assert all(torch.equal(after[role]["residual"], before[role]["residual"]) for role in before)
    for world_size in (1, 3, 9):
        resumed = run_ranks(world_size, lambda t: exchanged(t, "topk:ratio=0.05", 0, states=states))
        torch.testing.assert_close(held(resumed), held(saved), rtol=0, atol=1e-5)


def test_residuals_go_from_a_tree_to_another_exchange() -> None:
    saved = run_ranks(7, lambda t: exchanged(t, "topk:ratio=0.05", 3))
    states = [result[2] for result in saved]
    for exchange in ("all_gather", "two_shot", "tree:arity=3"):
        resumed = run_ranks(7, lambda t, e=exchange: exchanged(t, "topk:ratio=0.05", 0, states=states, exchange=e))
        torch.testing.assert_close(held(resumed), held(saved), rtol=0, atol=1e-5)
        assert all("sum" not in r[2]["states"]["group0.0"].get(SPAN, {}) for r in resumed[3:])


@pytest.mark.parametrize("rank", [0, 1, 6])
def test_what_is_not_finite_on_one_rank_changes_no_residual(rank: int) -> None:
    def rank_main(transport: Any) -> tuple[bool, bool]:
        weight = nn.Parameter(torch.zeros(SHAPE))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        with attach(None, optimizer, transport, compressor="topk:ratio=0.05", exchange="tree") as sync:
            norms = []
            for step in range(2):
                gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(transport.rank))
                if step == 1 and transport.rank == rank:
                    gradient[3, 4] = float("inf")
                optimizer.zero_grad()
                (weight * gradient).sum().backward()
                norms.append(sync.stats()["residual_norm"])
            assert weight.grad is not None
            return norms[0] == norms[1] > 0, bool(weight.grad.isfinite().all())

    assert run_ranks(7, rank_main) == [(True, False)] * 7


def test_a_majority_of_majorities() -> None:
    """Of seven ranks, 0, 3, 4 and 5 are for it: 1 with 3 and 4 says yes, 2 with 5 and 6 says no, and 0 decides."""

    def rank_main(transport: Any) -> Tensor:
        weight = nn.Parameter(torch.zeros(40, 40))
        vote = torch.ones(40, 40) if transport.rank in (0, 3, 4, 5) else -torch.ones(40, 40)
        options = {"compressor": "signsgd:variant=majority,scale=0.25", "exchange": "tree"}
        with attach(None, torch.optim.SGD([weight], lr=1.0), transport, **options):
            (weight * vote).sum().backward()
        assert weight.grad is not None
        return weight.grad.clone()

    for grad in run_ranks(7, rank_main):
        assert torch.equal(grad, torch.full((40, 40), 0.25))


def test_packets_that_travel_as_tensors_are_the_same_and_all_ranks_come_to_every_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rank_main(transport: Any) -> list[Tensor]:
        net = small_net(transport.rank)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        options = {"compressor": "topk:ratio=0.1", "exchange": "tree", "digest_every": 1}
        with attach(net, optimizer, transport, **options) as sync:
            for step in range(2):
                train_step(net, optimizer, sync.rank, step)
        return parameters_of(net)

    calls: dict[int, int] = {}
    swap = GlooTransport.swap_tensors

    def counted(self: GlooTransport, outgoing: Any, incoming: Any) -> None:
        assert outgoing or incoming  # or a backend could not tell on which device to take part
        calls[self.rank] = calls.get(self.rank, 0) + 1
        swap(self, outgoing, incoming)

    monkeypatch.setattr(GlooTransport, "swap_tensors", counted)
    gloo = GlooTransport.world(5, timeout_s=20.0, payloads="device")
    found = testing_transport.run_ranks(list(gloo), rank_main)
    assert len(set(calls.values())) == 1
    assert len(calls) == 5
    for ours, theirs in zip(found, run_ranks(5, rank_main), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_bytes_at_a_node_do_not_grow_with_the_number_of_ranks() -> None:
    def rank_main(transport: Any) -> tuple[int, int]:
        weight = nn.Parameter(torch.zeros(SHAPE))
        options = {"compressor": "none", "exchange": "tree", "digest_every": 0}
        with attach(None, torch.optim.SGD([weight], lr=1.0), transport, **options) as sync:
            sent, received = transport.bytes_sent, transport.bytes_received
            sync.average(torch.zeros(1))  # or a child's packet might be counted as from before
            (weight * torch.ones(SHAPE)).sum().backward()
            return transport.bytes_sent - sent, sync.stats()["bytes_received"] - received

    packet = 4 * 160 * 64
    for rank, (sent, received) in enumerate(run_ranks(7, rank_main)):
        packets = 2 if rank == 0 else 3 if rank < 3 else 1
        assert packets * packet < sent < packets * packet + 3000
        assert packets * packet < received < packets * packet + 3000
