"""The modes of a parameter server: what is applied when, who may go on, and what is published."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from server_sides import ListJournal, Side, admit, ask, named_parameters
from torch import Tensor

from gradcomp import registry
from gradcomp.errors import PacketError
from gradcomp.message import Message as Packets
from gradcomp.server import changes
from gradcomp.server.counters import Histogram
from gradcomp.server.messages import Acked, Beat, Busy, Changed, Leave, Refused, Reply, Wait, Welcome
from gradcomp.server.modes import Ssp
from gradcomp.server.paces import Collected, pace
from gradcomp.server.protocol import whole
from gradcomp.server.refusal import Refusal
from gradcomp.server.roster import Roster
from gradcomp.server.service import Service

SHAPES = ((6, 5), (7,))


def sides(names: Sequence[str], *, lr: float = 0.5, optimizer: str = "SGD", **options: Any) -> list[Side]:
    made = getattr(torch.optim, optimizer)
    return [
        Side(made(named_parameters(shapes=SHAPES), lr=lr), name=name, workers=len(names), **options) for name in names
    ]


def gradients(side: Side, value: float) -> list[Tensor | None]:
    return [torch.full(row.shape, value) for row in side.table.rows]


def values_of(service: Service) -> Tensor:
    return torch.as_tensor(service.state_dict()["run"]["shard"]["values"])


def step(service: Service, side: Side, value: float, **options: Any) -> list[Reply]:
    """Push, and take what comes."""
    replies = ask(service, side.push(gradients(side, value), **options))
    for reply in replies:
        side.take(reply)
    return replies


def acked(replies: list[Reply]) -> Acked:
    assert isinstance(replies[0], Acked), replies
    return replies[0]


# -- sync --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_round_is_the_mean_whoever_comes_first(reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(3)]
    found = []
    for order in ((0, 1, 2), (2, 0, 1)):
        service, workers = Service(), sides("abc", spec="sync", reduction=reduction)
        for side in workers:
            admit(service, side)
        for number, i in enumerate(order):
            replies = ask(service, workers[i].push(given[i]))
            assert [type(reply) for reply in replies[1:]] == ([Changed] if number == 2 else [Wait])
        assert service.version == 1
        found.append(values_of(service))
    assert torch.equal(*found)
    parameters = named_parameters(shapes=SHAPES)
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for parameter, *parts in zip(parameters, *given, strict=True):
        scale = 1 / 3 if reduction == "mean" else 1.0
        parameter.grad = parts[0] * scale + parts[1] * scale + parts[2] * scale
    optimizer.step()
    torch.testing.assert_close(found[0], torch.cat([p.detach().reshape(-1) for p in parameters]), rtol=1e-6, atol=1e-7)


def test_who_waits_is_answered_when_the_round_closes() -> None:
    service, (a, b) = Service(), sides("ab", spec="sync")
    assert admit(service, a).clock == 1
    assert isinstance(step(service, a, 1.0)[1], Wait)  # the other has not even joined
    admit(service, b)
    replies = service.handle(b.push(gradients(b, 3.0)), b"b", 0.0)
    assert [(to, type(reply).__name__) for to, reply in replies] == [
        (b"b", "Acked"),
        (b"a", "Changed"),
        (b"b", "Changed"),
    ]
    assert [reply.clock for _, reply in replies if isinstance(reply, Changed)] == [2, 2]
    (refused,) = ask(service, b.push(gradients(b, 3.0), clock=3))
    assert isinstance(refused, Refused)
    assert refused.field == "clock"


def test_a_dead_worker_holds_up_a_round_for_its_lease_only() -> None:
    service, workers = Service(lease_s=10.0), sides("abc", spec="sync")
    for side in workers:
        admit(service, side, 0.0)
    a, b, _ = workers
    ask(service, a.push(gradients(a, 1.0)), 6.0)
    ask(service, b.push(gradients(b, 3.0)), 6.0)
    assert service.version == 0
    replies = service.tick(10.5)
    assert {to for to, reply in replies if isinstance(reply, Changed)} == {b"a", b"b"}
    expected = torch.cat([p.detach().reshape(-1) for p in named_parameters(shapes=SHAPES)]) - 0.5 * 2.0
    assert torch.equal(values_of(service), expected)


def test_late_gradients_go_back_where_they_came_from() -> None:
    """With a backup worker: what was pushed is what was applied and what came back, to the last bit."""
    service, workers = Service(), sides("abcd", spec="sync:backup=1", reduction="sum", lr=1.0)
    for side in workers:
        admit(service, side)
        for reply in ask(service, side.pull()):
            side.take(reply)
    draw = random.Random(0)
    before, pushed, late = values_of(service), torch.zeros(37), torch.zeros(37)
    for _ in range(40):
        draw.shuffle(workers)
        for side in workers:
            value = draw.randrange(-8, 9) / 4  # sums of these are exact
            answer = acked(ask(service, side.push(gradients(side, value))))
            pushed += value
            if answer.result == "late":
                late += value
        for side in workers:
            for reply in ask(service, side.pull()):
                side.take(reply)
    status = service.status()
    assert (status["applied"], status["late"], status["updates"]) == (120, 40, 40)
    assert torch.allclose(before - values_of(service), pushed - late, atol=1e-4)


def test_a_worker_that_was_started_again_does_not_push_twice_for_a_round() -> None:
    service, (a, b) = Service(), sides("ab", spec="sync")
    for side in (a, b):
        admit(service, side)
    step(service, a, 1.0)
    ask(service, Leave(number=9, worker="a", incarnation=1))
    (again, _) = sides("ab", spec="sync", incarnation=2)
    admit(service, again)
    assert acked(step(service, again, 5.0)).result == "late"
    step(service, b, 3.0)
    assert service.status()["updates"] == 1
    assert service.status()["applied"] == 2


def test_a_gradient_that_is_not_finite_does_not_hold_up_its_round() -> None:
    service, (a, b) = Service(), sides("ab", spec="sync")
    for side in (a, b):
        admit(service, side)
    before = values_of(service)
    assert acked(step(service, a, float("nan"))).result == "nonfinite"
    step(service, b, 1.0)
    assert torch.equal(values_of(service), before - 0.5)  # of the others' mean
    for reply in ask(service, a.pull()):
        a.take(reply)
    for side in (a, b):
        step(service, side, float("inf"))
    assert service.version == 1
    for side in (a, b):
        for reply in ask(service, side.pull()):
            side.take(reply)
        step(service, side, 1.0)
    assert service.version == 2


def test_finite_gradients_whose_sum_is_not() -> None:
    service, (a, b) = Service(), sides("ab", spec="sync", reduction="sum")
    for side in (a, b):
        admit(service, side)
        step(service, side, 3e38)
    assert (service.version, service.status()["overflowed"]) == (0, 2)
    assert values_of(service).isfinite().all()


# -- async -------------------------------------------------------------------------------------------------------------


def test_one_worker_warms_up_alone() -> None:
    service, (a, b) = Service(), sides("ab", spec="async:warm_start=3")
    admit(service, a)
    for _ in range(3):
        assert isinstance(ask(service, b.join())[0], Busy)
        assert isinstance(step(service, a, 1.0)[1], Changed)
    assert isinstance(ask(service, b.join())[0], Welcome)


def test_the_next_one_warms_up_if_the_first_dies() -> None:
    service, (a, b) = Service(lease_s=10.0), sides("ab", spec="async:warm_start=3")
    admit(service, a, 0.0)
    assert isinstance(ask(service, b.join(), 10.0)[0], Busy)
    service.tick(10.1)
    assert isinstance(ask(service, b.join(), 10.1)[0], Welcome)


def test_staleness_is_updates_since_what_was_read() -> None:
    service, (a, b) = Service(), sides("ab", spec="async")
    for side in (a, b):
        admit(service, side)
    found = [acked(step(service, side, 1.0)).staleness for side in (a, a, a, b, b, a)]
    assert found == [0, 0, 0, 3, 0, 2]
    assert service.status()["staleness"] == {"counts": {"0": 4, "2": 1, "3": 1}, "mean": 5 / 6, "most": 3}


@pytest.mark.parametrize("spec", ["async", "ssp:staleness=9", "softsync:n=2"])
def test_learning_rate_is_divided_by_staleness(spec: str) -> None:
    service, (a, b) = Service(), sides("ab", spec=f"{spec}{',' if ':' in spec else ':'}staleness_aware=true")
    for side in (a, b):
        admit(service, side)
    expected = values_of(service)
    for side, value, staleness in ((a, 1.0, 0), (a, 2.0, 0), (a, 4.0, 0), (b, 8.0, 3), (b, 1.0, 0)):
        assert acked(step(service, side, value)).staleness == staleness
        expected -= (0.5 / max(1, staleness)) * value
        assert torch.equal(values_of(service), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("aware", ["true", "false"])
def test_softsync_is_an_update_of_so_many(aware: str, reduction: str) -> None:
    service, workers = Service(), sides("abcd", spec=f"softsync:n=2,staleness_aware={aware}", reduction=reduction)
    for side in workers:
        admit(service, side)
    expected = values_of(service)
    a, b, c, d = workers
    versions = []
    for pair in (((a, 1.0), (a, 2.0)), ((a, 3.0), (b, 4.0)), ((c, 5.0), (d, 6.0))):
        terms = []
        for side, value in pair:
            staleness = acked(step(service, side, value)).staleness
            terms.append(value / max(1, staleness) if aware == "true" else value)
            versions.append(service.version)
        expected -= 0.5 * sum(terms) / (2 if reduction == "mean" else 1)
        torch.testing.assert_close(values_of(service), expected, rtol=1e-6, atol=1e-6)
    assert versions == [0, 1, 1, 2, 2, 3]
    # As many as are left: one leaves, and floor(3 / 2) is 1.
    step(service, a, 1.0)
    assert service.version == 3
    ask(service, Leave(number=99, worker="d", incarnation=1))
    assert service.version == 4


def test_adam_feels_staleness_in_its_learning_rate() -> None:
    service, (a, b) = Service(), sides("ab", spec="async:staleness_aware=true", optimizer="Adam", lr=0.01)
    for side in (a, b):
        admit(service, side)
    for _ in range(4):
        step(service, a, 1.0)
    before = values_of(service)
    assert acked(step(service, b, 1.0)).staleness == 4
    torch.testing.assert_close(before - values_of(service), torch.full((37,), 0.01 / 4), rtol=1e-2, atol=0)


# -- ssp ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_nobody_is_too_far_ahead_of_the_slowest(staleness: int) -> None:
    """Random delays, joins and deaths; measured outside, by who was let go."""
    draw = random.Random(staleness)
    spec = f"ssp:staleness={staleness}"
    service = Service(lease_s=50.0)
    live: dict[str, Side] = {}
    clocks: dict[str, int] = {}  # pushes of each that lives
    speeds: dict[str, float] = {}
    waiting: set[str] = set()
    now, most, joined, pushes, turns = 0.0, 0, 0, 0, 0

    def deliver(replies: list[tuple[bytes, Reply]]) -> None:
        nonlocal most
        for to, reply in replies:
            name = to.decode()
            if name not in waiting:
                continue
            if isinstance(reply, Changed):
                waiting.remove(name)
                ahead = clocks[name] - min(clocks.values())
                most = max(most, ahead)
                assert ahead <= staleness, f"{name} goes on {ahead} ahead"
                live[name].take(reply)
            elif isinstance(reply, Wait):
                known = service.status()["workers"].values()
                # Somebody else is slower; who is the slowest is never kept waiting.
                assert clocks[name] - min(worker["clock"] for worker in known if worker["live"]) > staleness

    while pushes < 300:
        turns += 1
        assert turns < 100_000, "everybody waits"
        now += draw.random()
        if len(live) < 4 and (not live or draw.random() < 0.1):
            joined += 1
            (side,) = sides(["w"], spec=spec, pull="topk:k=3", push="topk:k=3")
            side.name = f"w{joined}"
            clocks[side.name] = admit(service, side, now).clock
            live[side.name], speeds[side.name] = side, draw.choice([1.0, 1.0, 0.1])
        deliver(service.tick(now))
        name = draw.choice(list(live))
        side = live[name]
        service.handle(Beat(number=0, worker=name, incarnation=1), b"", now)
        if draw.random() < 0.003:  # it dies: the server finds out by its lease, or is told
            for mapping in (live, clocks, speeds):
                mapping.pop(name)
            waiting.discard(name)
            if draw.random() < 0.5:
                deliver(service.handle(Leave(number=10**6, worker=name, incarnation=1), b"", now))
        elif name in waiting:
            if draw.random() < 0.3:
                deliver(service.handle(side.pull(), name.encode(), now))
        elif draw.random() < speeds[name]:
            pushes += 1
            clocks[name] += 1
            waiting.add(name)
            deliver(service.handle(side.push(gradients(side, 0.1)), name.encode(), now))
    assert most == staleness
    assert service.version == pushes


@pytest.mark.parametrize("staleness", [0, 2, 7])
def test_the_bound_over_many_clocks(staleness: int) -> None:
    draw = random.Random(staleness)
    roster = Roster(4)
    ssp = pace(Ssp(staleness=staleness), roster, "mean")
    begun: dict[str, int] = {}
    names = 0
    held = most = 0
    for _ in range(35_000):
        if len(begun) < 8 and draw.random() < 0.02:
            names += 1
            worker = roster.join(Leave(number=1, worker=f"w{names}", incarnation=1), 0.0)
            worker.clock = ssp.first_clock(worker)
            begun[worker.name] = worker.clock
        if not begun:
            continue
        name = draw.choice(list(begun))
        worker = roster.known[name]
        if draw.random() < 0.002:
            roster.part(worker)
            del begun[name]
        elif not ssp.may_go(worker):
            held += 1
            assert worker.clock > min(begun.values())
            with pytest.raises(Refusal, match="the slowest is at"):
                ssp.is_late(worker, 0)
        else:
            most = max(most, worker.clock - min(begun.values()))
            assert worker.clock - min(begun.values()) <= staleness
            assert not ssp.is_late(worker, draw.randrange(100))  # whatever it says its clock is
            ssp.advance(worker, draw.randrange(100))
            begun[name] += 1
            assert begun[name] == worker.clock
    assert most == staleness
    assert held > 1000


def test_a_worker_that_does_not_wait_is_refused() -> None:
    service, (a, b) = Service(), sides("ab", spec="ssp:staleness=1")
    for side in (a, b):
        admit(service, side)
    assert isinstance(step(service, a, 1.0)[1], Changed)
    assert isinstance(step(service, a, 1.0)[1], Wait)
    (refused,) = ask(service, a.push(gradients(a, 1.0), clock=1))
    assert isinstance(refused, Refused)
    assert refused.field == "clock"
    assert service.version == 2


# -- publishing --------------------------------------------------------------------------------------------------------

PULLS = [
    "none",
    "fp16",
    "topk:k=4",
    "threshold:density=0.1",
    "onebit:block=8",
    "qsgd",
    "powersgd:rank=1",
    "randomk:k=3",
    "dct",
]


@pytest.mark.parametrize("pull", PULLS)
def test_all_copies_are_what_is_published(pull: str) -> None:
    """After any pattern of pulls, and again when everything was restored."""
    draw = random.Random(pull)
    journal = ListJournal()
    service, workers = Service(journal=journal), sides("abc", pull=pull, spec="async", optimizer="Adam", lr=0.02)
    workers[2].values += 1.0  # this one begins somewhere else
    generator = torch.Generator().manual_seed(0)
    for side in workers:
        admit(service, side)
    for turn in range(60):
        side = draw.choice(workers)
        if draw.random() < 0.7:
            ask(
                service, side.push([torch.randn(row.shape, generator=generator) for row in side.table.rows], pull=False)
            )
        if draw.random() < 0.5:
            for reply in ask(service, side.pull()):
                side.take(reply)
            published = service.state_dict()["run"]["shard"]["published"]
            assert (side.have, side.version) == (published["number"], published["version"])
            assert torch.equal(side.values.view(torch.int32), published["values"].view(torch.int32))
            if pull == "none":
                assert torch.equal(side.values, values_of(service)) == (side.version == service.version)
            assert sum(change.numel() for change in published["ring"]) <= 4 * 37
        if turn == 30:
            state = service.state_dict()
            service = Service(journal=journal)
            service.load_state_dict(state, 0.0)


@pytest.mark.parametrize("pull", [*PULLS, "int8", "twobit:tau=0.01"])
def test_what_is_held_back_comes_when_pushes_stop(pull: str) -> None:
    service, (a,) = Service(), sides("a", pull=pull, spec="async")
    admit(service, a)
    for value in (0.3, -1.0, 0.2):
        step(service, a, value, pull=False)
    start = (values_of(service) - a.values).norm()
    assert start > 0.1
    for _ in range(150):
        for reply in ask(service, a.pull()):
            a.take(reply)
    assert (values_of(service) - a.values).norm() < 0.03 * start
    if pull == "none":
        assert torch.equal(values_of(service), a.values)
        before = service.published
        ask(service, a.pull())
        assert service.published == before  # nothing is left to say


def test_who_is_far_behind_gets_everything() -> None:
    shapes = ((100, 100),)
    optimizer = torch.optim.SGD(named_parameters(shapes=shapes), lr=0.1)
    a, b = (Side(optimizer, name=name, workers=2, pull="topk:k=500") for name in "ab")
    service = Service()
    for side in (a, b):
        admit(service, side)
    nbytes = []
    for _ in range(30):
        generator = torch.Generator().manual_seed(len(nbytes))
        for reply in ask(service, a.push([torch.randn(shapes[0], generator=generator)])):
            a.take(reply)
            if isinstance(reply, Changed):
                nbytes.append(len(whole(reply.body)))
    assert max(nbytes) < 5000
    ring = service.status()["ring_bytes"]
    assert 35_000 < ring <= 40_000
    b.have = 30 - ring // max(nbytes)
    (reply,) = ask(service, b.pull())
    assert isinstance(reply, Changed)
    assert not reply.full
    b.have = 1
    (reply,) = ask(service, b.pull())
    assert isinstance(reply, Changed)
    assert (reply.full, reply.have, reply.published) == (True, 0, 30)
    b.take(reply)
    assert torch.equal(a.values, b.values)


def test_one_compression_however_many_pull() -> None:
    service, workers = Service(), sides("abcdef", pull="topk:k=4", push="topk:k=4", spec="sync")
    for side in workers:
        admit(service, side)
    for turn in range(5):
        for side in workers:
            for reply in ask(service, side.push(gradients(side, 1.0))):
                side.take(reply)
        for side in workers[:-1]:
            for reply in ask(service, side.pull()):
                side.take(reply)
        assert service.published <= turn + 2
        assert len({side.digest for side in workers}) == 1


# -- small parts -------------------------------------------------------------------------------------------------------


def test_a_row_that_nobody_has_a_gradient_for_stays() -> None:
    service, (a, b) = Service(), sides("ab", spec="sync")
    for side in (a, b):
        admit(service, side)
    before = values_of(service)
    ask(service, a.push([torch.ones(6, 5), None]))
    ask(service, b.push([torch.ones(6, 5), None]))
    assert torch.equal(values_of(service)[30:], before[30:])
    assert not torch.equal(values_of(service)[:30], before[:30])


def test_weights_of_several() -> None:
    gradient = Packets((registry.compressor("none").encode(torch.ones(3)),), (True,))
    softsync = pace(Ssp(staleness_aware=True), Roster(1), "mean")
    pushes = [Collected("a", gradient, staleness, [{"lr": 1.0}]) for staleness in (0, 1, 2, 4)]
    update = softsync.combine(pushes)
    assert sum(scale for _, scale in update.parts) == pytest.approx(1.0)
    assert [scale * update.rate * 4 for _, scale in update.parts] == pytest.approx([1.0, 1.0, 0.5, 0.25])


def test_a_histogram_of_any_number() -> None:
    histogram = Histogram()
    for value in (0, 31, 32, 63, 64, 1 << 62):
        histogram.add(value)
    counts = {"0": 1, "31": 1, "32-63": 2, "64-127": 1, f"{1 << 62}-{(1 << 63) - 1}": 1}
    assert histogram.summary()["counts"] == counts
    other = Histogram()
    other.load_state_dict(histogram.state_dict())
    assert other.summary() == histogram.summary()


def test_reading_what_is_not_a_change() -> None:
    (a,) = sides("a", pull="topk:k=3")
    for body in (b"1234", b"\xff" * 8, bytes(8), b"\x04" + bytes(11)):
        with pytest.raises(PacketError):
            list(changes.read(a.table, memoryview(body)))
