"""Changing the compressor in mid-run: nothing that is held back is lost, and all ranks change or none."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from ranks import attach, outcomes, parameters_of, run_ranks, small_net, train_step
from torch import nn

import gradcomp
from gradcomp.bucket import Piece
from gradcomp.errors import StateError
from gradcomp.states import StateStore

CHANGES = ["threshold:tau=0.01", "none", "onebit:block=64", "fp16", "none", "dgc:ratio=0.05", "topk:ratio=0.05"]


def held_by(sync: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """All that a rank holds back of its first parameter, in whatever role."""
    held = torch.zeros(shape).view(-1)
    for span, roles in sync.state_dict()["states"].get("group0.0", {}).items():
        start, stop = map(int, span.split(":"))
        for state in roles.values():
            held[start:stop] += state["residual"]
    return held.view(shape)


def gradients(rank: int, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    while True:
        yield 0.01 * torch.randn(shape, generator=generator)


def step(weight: nn.Parameter, optimizer: torch.optim.Optimizer, gradient: torch.Tensor) -> None:
    optimizer.zero_grad()
    (weight * gradient).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
def test_nothing_is_lost(exchange: str, world_size: int) -> None:
    """Sum of all gradients == sum of all that was applied + all residuals, after every change and at the end."""
    shape = (160, 64)

    def rank_main(transport: Any) -> list[tuple[torch.Tensor, ...]]:
        weight = nn.Parameter(torch.zeros(shape))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        sync = attach(
            None, optimizer, transport, compressor="topk:ratio=0.05", exchange=exchange, reduction="sum", digest_every=1
        )
        given, seen = torch.zeros(shape), []
        stream = gradients(transport.rank, shape)
        for change in CHANGES:
            for _ in range(3):
                gradient = next(stream)
                given += gradient
                step(weight, optimizer, gradient)
            sync.set_compressor(change)
            assert sync.compressor == gradcomp.compressor(change)
            seen.append((given.clone(), -weight.detach().clone(), held_by(sync, shape)))
        with sync:
            gradient = next(stream)
            step(weight, optimizer, gradient)
            return [*seen, (given + gradient, -weight.detach(), held_by(sync, shape))]

    for moments in zip(*run_ranks(world_size, rank_main), strict=True):
        given = sum(moment[0] for moment in moments)
        held = sum(moment[2] for moment in moments)
        assert all(torch.equal(moment[1], moments[0][1]) for moment in moments)
        lost = given - (moments[0][1] + held)
        # fp16 has no residual: what it rounds off is gone.
        assert lost.abs().max() < 3e-4


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree", "auto"])
def test_replicas_stay_identical_and_train(exchange: str) -> None:
    def rank_main(transport: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 640), nn.ReLU(), nn.Linear(640, 10))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        options = {"exchange": exchange, "bucket_bytes": 1 << 20, "digest_every": 1}
        with attach(net, optimizer, transport, compressor="none", **options) as sync:
            for number, change in enumerate(["topk:ratio=0.1", *CHANGES]):
                sync.set_compressor(change)
                for _ in range(2):
                    train_step(net, optimizer, sync.rank, number)
            assert sync.stats()["compressors"]["1.weight"] == "topk:ratio=0.05"
            assert sync.stats()["compressors"]["1.bias"] == "none"
        return parameters_of(net)

    first, *others = run_ranks(3, rank_main)
    assert all(torch.isfinite(p).all() for p in first)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
def test_a_residual_without_a_place_goes_out_with_the_next_gradient(exchange: str) -> None:
    """In a bucket of joined tensors, after a step that was not finite, and not before the parameter has a gradient."""

    def rank_main(transport: Any) -> None:
        weight, other = nn.Parameter(torch.zeros(96, 64)), nn.Parameter(torch.zeros(8))
        optimizer = torch.optim.SGD([weight, other], lr=1.0)
        options = {"exchange": exchange, "reduction": "sum", "bucket_bytes": 1 << 20}
        with attach(None, optimizer, transport, compressor="topk:k=5", **options) as sync:
            ramp = torch.arange(1.0, 6145.0).view(96, 64)
            (weight * ramp).sum().backward()
            assert weight.grad is not None
            delivered = weight.grad.clone()
            assert delivered.count_nonzero() in range(5, 50)
            before = sync.stats()["residual_norm"]
            sync.set_compressor("none")
            # The sum over shard owners moved to these ranks' own residuals: the norm of all together may not change.
            held = [sync.average(held_by(sync, (96, 64))) * 3]

            optimizer.zero_grad()  # one rank is not finite: everything must still be there afterwards
            (other * (float("nan") if sync.rank == 1 else 1.0)).sum().backward()
            assert other.grad is not None
            assert other.grad.isnan().all()
            optimizer.zero_grad()
            (weight * (float("inf") if sync.rank == 2 else 1.0)).sum().backward()
            held.append(sync.average(held_by(sync, (96, 64))) * 3)
            assert torch.equal(held[0], held[1])

            optimizer.zero_grad()
            other.sum().backward()  # no rank has a gradient of weight
            assert weight.grad is None
            assert torch.equal(other.grad, torch.full((8,), 3.0))
            assert sync.stats()["residual_norm"] > 0

            optimizer.zero_grad()
            (weight * 0.0).sum().backward()
            assert weight.grad is not None
            torch.testing.assert_close(delivered + weight.grad, 3 * ramp)
            assert before > 0
            assert sync.stats()["residual_norm"] == 0
            assert sync.state_dict()["states"] == {}

    run_ranks(3, rank_main)


def test_the_same_compressor_changes_nothing() -> None:
    def rank_main(transport: Any, change: bool) -> list[torch.Tensor]:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        rules = {"rules": [{"name": "4.*", "compressor": "threshold:density=0.1"}], "default": "onebit:block=64"}
        with attach(net, optimizer, transport, compressor=rules, exchange="two_shot") as sync:
            for number in range(8):
                train_step(net, optimizer, sync.rank, number)
                if change and number % 2:
                    sync.set_compressor(rules)
        return parameters_of(net)

    for a, b in zip(
        run_ranks(3, lambda t: rank_main(t, True)), run_ranks(3, lambda t: rank_main(t, False)), strict=True
    ):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("others", "one", "at_one", "field"),
    [
        ("topk", "topk:ratio=0.01", gradcomp.HandshakeError, "compressor"),
        ("none", "topk:ratio=7", gradcomp.ConfigError, "compressor"),
        ("none", "topk:ratio=1", gradcomp.ConfigError, "compressor"),
        ("none", "@no-such-file.json", gradcomp.ConfigError, "compressor"),
    ],
)
def test_ranks_that_disagree_all_get_an_error_and_go_on(
    others: str, one: str, at_one: type[Exception], field: str
) -> None:
    def rank_main(transport: Any) -> list[Exception]:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        with attach(net, optimizer, transport, compressor="threshold:tau=0.01", digest_every=1) as sync:
            train_step(net, optimizer, sync.rank, 0)
            before = torch.save(sync.state_dict(), saved := io.BytesIO()) or saved.getvalue()
            with pytest.raises(gradcomp.GradcompError) as caught:
                sync.set_compressor(one if sync.rank == 1 else others)
            after = torch.save(sync.state_dict(), saved := io.BytesIO()) or saved.getvalue()
            assert before == after
            train_step(net, optimizer, sync.rank, 1)
            sync.set_compressor("onebit")
            train_step(net, optimizer, sync.rank, 2)
            return [caught.value]

    errors = [error for (error,) in run_ranks(3, rank_main)]
    assert isinstance(errors[1], at_one)
    for rank in (0, 2):
        error = errors[rank]
        assert isinstance(error, gradcomp.HandshakeError)
        assert error.field == field
        assert error.peer == 1


def test_a_compressor_that_may_send_more_than_agreed_is_refused() -> None:
    def rank_main(transport: Any) -> None:
        net = nn.Linear(1000, 2000, bias=False)  # all of the model: no room is left for more
        with attach(net, torch.optim.SGD(net.parameters(), lr=1.0), transport, compressor="threshold") as sync:
            with pytest.raises(gradcomp.ConfigError, match="agreed on"):
                sync.set_compressor("topk:ratio=1")
            sync.set_compressor("topk:ratio=0.5")
            sync.set_compressor('scheduled:stages=[[1,"none"]],then="topk"')

    run_ranks(2, rank_main)


def test_in_the_midst_of_a_step_is_too_late() -> None:
    def rank_main(transport: Any) -> None:
        net = small_net()
        sync = attach(net, torch.optim.SGD(net.parameters(), lr=1.0), transport, compressor="topk")
        next(net.parameters()).register_hook(lambda grad: sync.set_compressor("none"))
        train_step(net, torch.optim.SGD(net.parameters(), lr=1.0), transport.rank, 0)

    for error in outcomes(1, rank_main):
        assert isinstance(error, gradcomp.ConfigError)
        assert "under way" in str(error)


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
def test_a_checkpoint_holds_what_waits(exchange: str) -> None:
    def rank_main(transport: Any, resumed: bool) -> list[torch.Tensor]:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        with attach(net, optimizer, transport, compressor="topk:ratio=0.05", exchange=exchange) as sync:
            for number in range(4):
                train_step(net, optimizer, sync.rank, number)
            sync.set_compressor("bf16")
            if resumed:
                torch.save([net.state_dict(), sync.state_dict()], file := io.BytesIO())
                for number in range(90, 92):
                    train_step(net, optimizer, sync.rank, number)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                assert "waiting" in next(iter(next(iter(saved[1]["states"].values())).values()))
                net.load_state_dict(saved[0])
                sync.load_state_dict(saved[1])
            train_step(net, optimizer, sync.rank, 4)
            sync.set_compressor("onebit")
            train_step(net, optimizer, sync.rank, 5)
        return parameters_of(net)

    straight = run_ranks(2, lambda t: rank_main(t, False))
    for a, b in zip(straight, run_ranks(2, lambda t: rank_main(t, True)), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_only_the_parameters_that_change_lose_what_else_was_learnt() -> None:
    def rank_main(transport: Any) -> None:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        with attach(net, optimizer, transport, compressor="threshold:density=0.1") as sync:
            train_step(net, optimizer, sync.rank, 0)
            before = sync.state_dict()["states"]
            sync.set_compressor(
                gradcomp.Rules(
                    [gradcomp.Rule(name="0.*", min_dim=2, compressor="topk")], default="threshold:density=0.1"
                )
            )
            after = sync.state_dict()["states"]
            assert set(after["0.weight"]["0:36"]["gradient"]) == {"residual"}
            assert torch.equal(
                after["0.weight"]["0:36"]["gradient"]["residual"], before["0.weight"]["0:36"]["gradient"]["residual"]
            )
            assert torch.equal(
                after["4.weight"]["0:512"]["gradient"]["tau"], before["4.weight"]["0:512"]["gradient"]["tau"]
            )
            train_step(net, optimizer, sync.rank, 1)

    run_ranks(2, rank_main)


class TestStates:
    """What the store does, piece by piece."""

    def pieces(self, compressor: str, *cuts: int, owner: int | None = None) -> dict[tuple[str, str], Piece]:
        codec = gradcomp.compressor(compressor)
        return {("w", f"{a}:{b}"): Piece(0, a, b, (b - a,), codec, owner) for a, b in pairwise(cuts)}

    def filled(self, pieces: dict[tuple[str, str], Piece]) -> StateStore:
        store = StateStore()
        for (name, _), piece in pieces.items():
            for role, value in (("gradient", 1.0), ("sum", 10.0)):
                state = store.get(name, piece, role, torch.zeros(piece.shape))
                state["residual"] += value * torch.arange(piece.start + 1, piece.stop + 1)
        return store

    def residuals(self, store: StateStore) -> dict[str, list[float]]:
        return {
            f"{span} {role}": state["residual"].tolist()
            for span, roles in store.save().get("w", {}).items()
            for role, state in roles.items()
        }

    def test_residuals_are_cut_anew_and_the_owners_go_home(self) -> None:
        before, after = self.pieces("topk", 0, 2, 6), self.pieces("onebit", 0, 3, 6)
        store = self.filled(before)
        new = store.recut(before, after, {"w": 6}, torch.device("cpu"))
        assert self.residuals(new) == {"0:3 gradient": [11.0, 22.0, 33.0], "3:6 gradient": [44.0, 55.0, 66.0]}
        assert self.residuals(store)["0:2 sum"] == [10.0, 20.0]  # the old one is as it was
        assert not new.holds_waiting

    def test_an_owners_residual_stays_where_the_piece_does(self) -> None:
        before, after = self.pieces("topk", 0, 2, 6, owner=1), self.pieces("topk", 0, 2, 6, owner=1)
        after["w", "2:6"] = self.pieces("topk", 2, 6, owner=0)["w", "2:6"]
        new = self.filled(before).recut(before, after, {"w": 6}, torch.device("cpu"))
        assert self.residuals(new) == {
            "0:2 gradient": [1.0, 2.0],
            "0:2 sum": [10.0, 20.0],
            "2:6 gradient": [33.0, 44.0, 55.0, 66.0],
        }

    def test_what_waits_comes_back_into_a_residual(self) -> None:
        before, after = self.pieces("topk", 0, 6), self.pieces("dgc:momentum=0.9", 0, 6)
        waiting = self.filled(before).recut(before, {}, {"w": 6}, torch.device("cpu"))
        assert self.residuals(waiting) == {"0:6 waiting": [11.0, 22.0, 33.0, 44.0, 55.0, 66.0]}
        assert waiting.residual_norm() == pytest.approx(11 * 91**0.5)
        again = StateStore()
        again.load(waiting.save(), {}, {"w": 6})
        new = again.recut({}, after, {"w": 6}, torch.device("cpu"))
        assert self.residuals(new) == {"0:6 gradient": [11.0, 22.0, 33.0, 44.0, 55.0, 66.0]}
        state = new.get("w", after["w", "0:6"], "gradient", torch.zeros(6))
        assert not state["momentum"].any()

    def test_a_loaded_state_is_carried_over_too(self) -> None:
        before, after = self.pieces("topk", 0, 6), self.pieces("onebit", 0, 6)
        store = StateStore()
        store.load(self.filled(before).save(), before, {"w": 6})
        assert self.residuals(store.recut(before, after, {"w": 6}, torch.device("cpu"))) == {
            "0:6 gradient": [11.0, 22.0, 33.0, 44.0, 55.0, 66.0]
        }
        wrong = {"w": {"0:6": {"gradient": {"residual": torch.zeros(5)}}}}
        store.load(wrong, before, {"w": 6})
        with pytest.raises(StateError, match="5 elements"):
            store.recut(before, after, {"w": 6}, torch.device("cpu"))
        wrong["w"]["0:6"] = {"waiting": {"residual": torch.zeros(5)}}
        with pytest.raises(StateError, match="waits for 'w'"):
            store.load(wrong, before, {"w": 6})
