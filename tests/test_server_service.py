"""The state machine of a parameter server: who is let in, and that each push counts exactly once, whatever happens."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import torch
from server_sides import ListJournal, Side, admit, ask, copied, named_parameters

from gradcomp.errors import StateError
from gradcomp.server.messages import (
    Acked,
    Add,
    Alive,
    Beat,
    Busy,
    Changed,
    Empty,
    Join,
    Leave,
    Left,
    Look,
    Message,
    Published,
    Push,
    Refused,
    Reply,
    Request,
    Setup,
    Status,
    Total,
    Unknown,
    Wait,
    Welcome,
)
from gradcomp.server.service import Service

LEASE_S = 10.0


def side(name: str = "a", **options: Any) -> Side:
    parameters = named_parameters(shapes=((6, 5), (7,)))
    return Side(torch.optim.SGD(parameters, lr=0.1, momentum=0.9), name=name, **options)


def noise(side: Side, scale: float = 1.0) -> list[torch.Tensor | None]:
    """Gradients that only this worker and this step have."""
    generator = torch.Generator().manual_seed(1000 * side.sequence + sum(side.name.encode()) + side.incarnation)
    return [scale * torch.randn(row.shape, generator=generator) for row in side.table.rows]


def values_of(service: Service) -> torch.Tensor:
    return torch.as_tensor(service.state_dict()["run"]["shard"]["values"])


def same(one: Any, other: Any) -> bool:
    """Whether two state dicts are the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def lasting(service: Service) -> dict[str, Any]:
    """The state without what is counted outside of the journal."""
    state = service.state_dict()
    for name in ("duplicates", "pulled_bytes"):
        state["run"]["counters"].pop(name)
    return state


def replayed(journal: ListJournal, state: dict[str, Any] | None = None, since: int = 0) -> Service:
    service = Service(lease_s=LEASE_S)
    if state is not None:
        service.load_state_dict(state, 0.0)
    for entry in journal.read()[since:]:
        service.replay(entry, 0.0)
    return service


# -- coming and going --------------------------------------------------------------------------------------------------


def test_the_first_worker_sets_up_and_the_others_follow() -> None:
    service, first, second = Service(), side("a", workers=2), side("b", workers=2)
    assert service.handle(Look(number=1, worker="", incarnation=0), b"?", 0.0)[0][1].code == Status.code
    assert isinstance(ask(service, first.join())[0], Empty)
    assert isinstance(ask(service, second.join())[0], Busy)
    # The first one did not come back in time.
    assert isinstance(ask(service, second.join(), LEASE_S)[0], Empty)
    assert isinstance(ask(service, first.join(), LEASE_S)[0], Busy)
    for one in (second, first):
        (reply,) = ask(service, one.setup(), LEASE_S)
        assert isinstance(reply, Welcome)
        assert (reply.have, reply.version, reply.published, reply.lease_s) == (0, 0, 0, LEASE_S)
    (status,) = ask(service, Look(number=1, worker="", incarnation=0))
    assert json.loads(bytes(status.body))["live"] == 2


def test_same_seed_transfers_nothing_and_another_seed_everything() -> None:
    service, first = Service(), side("a", workers=2, pull="topk:k=3")
    admit(service, first)
    same_seed, other_seed = side("b", workers=2, pull="topk:k=3"), side("c", workers=2, pull="topk:k=3")
    other_seed.values += 1.0
    assert (admit(service, same_seed).have, admit(service, other_seed).have) == (0, -1)
    (reply,) = ask(service, same_seed.pull())
    assert isinstance(reply, Changed)
    assert (len(reply.body), reply.full) == (0, False)
    (reply,) = ask(service, other_seed.pull())
    assert isinstance(reply, Changed)
    assert (len(reply.body), reply.full) == (4 * 37, True)
    other_seed.take(reply)
    assert torch.equal(other_seed.values, first.values)


def test_two_workers_with_one_name() -> None:
    service, one, two = Service(lease_s=LEASE_S), side(incarnation=1), side(incarnation=2)
    admit(service, one, 0.0)
    ask(service, one.push(noise(one)), 1.0)
    (reply,) = ask(service, two.join(), 11.0)
    assert isinstance(reply, Busy)
    assert "another worker 'a' was heard of 10.0 s ago" in reply.reason
    (reply,) = ask(service, two.join(), 11.1)
    assert isinstance(reply, Welcome)
    assert reply.clock == 1  # steps that its name has taken
    assert isinstance(ask(service, one.push(noise(one)), 11.2)[0], Unknown)
    assert isinstance(ask(service, one.join(), 11.2)[0], Busy)
    two.take(reply)
    assert isinstance(ask(service, two.push(noise(two)), 11.2)[0], Acked)
    assert service.version == 2


def test_a_worker_that_was_forgotten_goes_on_where_it_was() -> None:
    service, one = Service(lease_s=LEASE_S), side()
    admit(service, one)
    push = one.push(noise(one))
    acked = ask(service, push, 0.0)[0]
    assert service.tick(10.0) == []
    assert service.status()["live"] == 1
    service.tick(10.1)
    assert service.status()["live"] == 0
    (unknown,) = ask(service, push, 11.0)
    assert isinstance(unknown, Unknown)
    assert unknown.run == one.run
    assert isinstance(ask(service, one.join(), 11.0)[0], Welcome)
    assert ask(service, push, 11.0)[0] == acked  # once
    assert service.version == 1
    assert isinstance(ask(service, one.push(noise(one)), 11.0)[0], Acked)
    assert isinstance(ask(service, Beat(number=1, worker="a", incarnation=1), 12.0)[0], Alive)


def test_a_join_that_comes_after_its_leave_is_nothing() -> None:
    service, one = Service(), side()
    admit(service, one)
    late = one.join()
    one.number += 1
    leave = Leave(number=one.number, worker="a", incarnation=1)
    assert isinstance(ask(service, leave)[0], Left)
    assert isinstance(ask(service, leave)[0], Left)
    assert ask(service, late) == []
    assert service.status()["live"] == 0
    assert isinstance(ask(service, one.join())[0], Welcome)


def test_many_names_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradcomp.server.roster._MOST_GONE", 5)
    service = Service()
    for i in range(50):
        one = side(f"w{i}")
        admit(service, one)
        ask(service, Leave(number=99, worker=one.name, incarnation=1))
    assert len(service.status()["workers"]) <= 6


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("mode", side(spec="ssp:staleness=4")),
        ("workers", side(workers=3)),
        ("reduction", side(reduction="sum")),
        ("tensors", side(push="topk")),
        ("tensors", side(pull="topk")),
        ("shard", side(shard=0, shards=2)),
        ("optimizer", Side(torch.optim.Adam(named_parameters(shapes=((6, 5), (7,)))), name="b")),
        ("version", side()),
        ("wire", side()),
        ("protocol", side()),
    ],
)
def test_who_runs_something_else_is_told_what(field: str, other: Side) -> None:
    service = Service()
    if field in ("version", "wire", "protocol"):
        other.hello = other.hello | {field: "0.0.1" if field == "version" else 7}
        (refused,) = ask(service, other.setup())  # an empty server, too
        assert isinstance(refused, Refused)
        assert refused.field == field
    admit(service, side("a"))
    for request in (other.join(), other.setup()):
        (refused,) = ask(service, request)
        assert isinstance(refused, Refused)
        assert refused.field == field
        if field not in ("tensors", "optimizer"):
            assert str(other.hello[field])[-8:] in refused.reason
    assert service.status()["live"] == 1


# -- what is refused ---------------------------------------------------------------------------------------------------


def table_of(side: Side, **changes: object) -> bytes:
    rows = msgpack.unpackb(side.table.pack())
    for name, value in changes.items():
        rows[0][["name", "start", "stop", "shape", "group", "push", "pull"].index(name)] = value
    return bytes(msgpack.packb(rows))


SETUPS: dict[str, tuple[str, Callable[[Setup], dict[str, Any]]]] = {
    "no table": ("table", lambda s: {"table": b""}),
    "huge table": ("table", lambda s: {"table": table_of(side(), shape=[1 << 47], stop=1 << 47)}),
    "unknown compressor": ("table", lambda s: {"table": table_of(side(), push='{"id": "zip"}')}),
    "deep json": ("table", lambda s: {"table": table_of(side(), push="[" * 60_000)}),
    "group": ("tensors", lambda s: {"table": table_of(side(), group=5)}),
    "optimizer": ("optimizer", lambda s: {"optimizer": "{}"}),
    "unknown optimizer": ("optimizer", lambda s: {"optimizer": s.optimizer.replace("SGD", "Magic")}),
    "other optimizer": (
        "optimizer",
        lambda s: {"optimizer": s.optimizer.replace('"nesterov": false', '"nesterov": true')},
    ),
    "lr": ("optimizer", lambda s: {"optimizer": s.optimizer.replace('"lr": 0.1', '"lr": NaN')}),
    "short body": ("body", lambda s: {"body": bytes(s.body)[:-1]}),
    "no body": ("body", lambda s: {"body": b""}),
    "other body": ("digest", lambda s: {"body": bytes(len(bytes(s.body)))}),
    "digest": ("digest", lambda s: {"digest": b"short"}),
    "mode": ("mode", lambda s: {"hello": s.hello | {"mode": "[]"}}),
    "mode option": ("mode", lambda s: {"hello": s.hello | {"mode": '{"id": "ssp", "staleness": -1}'}}),
    "workers": ("workers", lambda s: {"hello": s.hello | {"workers": 0}}),
    "workers text": ("workers", lambda s: {"hello": s.hello | {"workers": "2"}}),
    "reduction": ("reduction", lambda s: {"hello": s.hello | {"reduction": "max"}}),
    "shard": ("shard", lambda s: {"hello": s.hello | {"shard": 3}}),
    "protocol": ("protocol", lambda s: {"hello": s.hello | {"protocol": 99}}),
    "name": ("worker", lambda s: {"worker": ""}),
    "long name": ("worker", lambda s: {"worker": "x" * 257}),
}


@pytest.mark.parametrize("name", SETUPS)
def test_wrong_setup(name: str) -> None:
    field, change = SETUPS[name]
    service, one = Service(max_numel=1000), side()
    (refused,) = ask(service, dataclasses.replace(one.setup(), **change(copied_setup(one))))
    assert isinstance(refused, Refused)
    assert refused.field == field
    assert "run" not in service.state_dict()
    assert isinstance(ask(service, one.setup())[0], Welcome)


def copied_setup(side: Side) -> Setup:
    setup = copied(side.setup())
    assert isinstance(setup, Setup)
    return setup


@pytest.mark.parametrize("pull", ["dgc:momentum=0.9", "signsgd:variant=majority", "adaptive:clip=1.0"])
def test_what_loses_something_for_good_publishes_nothing(pull: str) -> None:
    (refused,) = ask(Service(), side(pull=pull).setup())
    assert isinstance(refused, Refused)
    assert refused.field == "table"
    assert "pull must be a compressor that loses nothing" in refused.reason


PUSHES: dict[str, tuple[str, dict[str, Any]]] = {
    "gap": ("sequence", {"sequence": 3}),
    "sequence 0": ("sequence", {"sequence": 0}),
    "sequence -1": ("sequence", {"sequence": -1}),
    "version": ("version", {"version": 2}),
    "version -1": ("version", {"version": -1}),
    "clock": ("clock", {"clock": -1}),
    "have": ("have", {"have": 7}),
    "no options": ("options", {"options": []}),
    "negative lr": ("options", {"options": [{"lr": -0.1}]}),
    "unknown option": ("options", {"options": [{"speed": 1.0}]}),
    "no body": ("body", {"body": b""}),
    "noise": ("body", {"body": bytes(range(200))}),
}


@pytest.mark.parametrize("name", PUSHES)
def test_wrong_push(name: str) -> None:
    field, change = PUSHES[name]
    journal = ListJournal()
    service, one = Service(journal=journal), side()
    admit(service, one)
    ask(service, one.push(noise(one)))
    before, entries = lasting(service), list(journal.entries)
    push = one.push(noise(one))
    (refused,) = ask(service, dataclasses.replace(push, **change))
    assert isinstance(refused, Refused)
    assert refused.field == field
    assert same(lasting(service), before)
    assert journal.entries == entries
    assert isinstance(ask(service, push)[0], Acked)
    assert service.version == 2
    assert service.status()["refused"] == 1
    assert torch.equal(values_of(service), values_of(replayed(journal)))


def test_a_packet_of_another_compressor() -> None:
    service, one = Service(), side(push="topk:k=2")
    admit(service, one)
    other = side(push="none")
    ask(service, one.push(noise(one), pull=False))
    before = values_of(service)
    one.sequence = 0
    push = one.push(noise(one))
    (refused,) = ask(service, dataclasses.replace(push, sequence=2, body=other.push(noise(other)).body))
    assert isinstance(refused, Refused)
    assert refused.field == "body"
    assert torch.equal(values_of(service), before)
    ask(service, dataclasses.replace(push, sequence=2))
    assert service.version == 2


def test_nan_is_never_applied() -> None:
    journal = ListJournal()
    service, one = Service(journal=journal), side()
    admit(service, one)
    for gradients in ([torch.full((6, 5), float("nan")), None], [torch.zeros(6, 5), torch.full((7,), float("inf"))]):
        before = values_of(service)
        acked = ask(service, one.push(gradients))[0]
        assert isinstance(acked, Acked)
        assert acked.result == "nonfinite"
        assert torch.equal(values_of(service), before)
    acked = ask(service, one.push(noise(one)))[0]
    assert isinstance(acked, Acked)
    assert (acked.result, acked.version) == ("applied", 1)
    assert values_of(service).isfinite().all()
    assert service.status()["nonfinite"] == 2
    assert same(lasting(service), lasting(replayed(journal)))


def test_unknown_workers_are_told_so() -> None:
    service, one = Service(), side()
    requests = (
        one.push(noise(one)),
        one.pull(),
        Beat(number=1, worker="a", incarnation=1),
        Add(number=1, worker="a", incarnation=1, turn=1),
    )
    for request in requests:
        (reply,) = ask(service, request)
        assert isinstance(reply, Unknown)
        assert reply.run == 0
    admit(service, side("b"))
    (reply,) = ask(service, requests[0])
    assert isinstance(reply, Unknown)
    assert reply.run > 0
    assert isinstance(ask(service, Leave(number=1, worker="a", incarnation=1))[0], Left)


# -- sums --------------------------------------------------------------------------------------------------------------


def add(name: str, turn: int, *values: float) -> Add:
    body = torch.tensor(values).numpy().tobytes()
    return Add(number=50 + turn, worker=name, incarnation=1, turn=turn, body=body)


def total(reply: Reply) -> list[float]:
    assert isinstance(reply, Total)
    return torch.frombuffer(bytearray(reply.body), dtype=torch.float32).tolist()


def test_sums_wait_for_all() -> None:
    journal = ListJournal()
    service = Service(journal=journal, lease_s=LEASE_S)
    for name in "ab":
        admit(service, side(name, workers=3))
    assert isinstance(ask(service, add("b", 1, 1.0, 2.0))[0], Wait)
    assert isinstance(ask(service, add("a", 1, 3.0, 4.0))[0], Wait)  # the third has never been there
    admit(service, side("c", workers=3))
    replies = dict(service.handle(add("c", 1, 5.0, 6.0), b"c", 0.0))
    assert {to: total(reply) for to, reply in replies.items()} == {name: [9.0, 12.0] for name in (b"a", b"b", b"c")}
    # Whoever missed it asks again, even of a server that was started again.
    assert total(ask(service, add("a", 1, 3.0, 4.0))[0]) == [9.0, 12.0]
    assert total(ask(replayed(journal), add("a", 1, 3.0, 4.0))[0]) == [9.0, 12.0]
    for turn in (0, 3):
        (refused,) = ask(service, add("a", turn, 1.0, 2.0))
        assert isinstance(refused, Refused)
        assert refused.field == "turn"
    # Others go on without one that is gone, and without its term.
    assert isinstance(ask(service, add("a", 2, 1.0))[0], Wait)
    (refused,) = ask(service, add("b", 2, 1.0, 2.0))
    assert isinstance(refused, Refused)
    assert refused.field == "body"
    assert isinstance(ask(service, add("b", 2, 2.0))[0], Wait)
    replies = dict(service.handle(Leave(number=9, worker="c", incarnation=1), b"c", 0.0))
    assert total(replies[b"a"]) == total(replies[b"b"]) == [3.0]
    assert replies[b"a"].terms == 2  # type: ignore[attr-defined]
    assert isinstance(ask(service, add("b", 3, 2.0))[0], Wait)
    ask(service, Beat(number=7, worker="a", incarnation=1), 5.0)
    assert service.tick(11.0) == []  # b's term went with it
    assert total(ask(service, add("a", 3, 8.0), 11.0)[0]) == [8.0]


# -- exactly once ------------------------------------------------------------------------------------------------------


class Worker:
    """A worker behind a network that loses, doubles, delays and reorders."""

    def __init__(self, side: Side, steps: int) -> None:
        self.side = side
        self.left = steps
        self.asked: Request | None = None
        self.acks: dict[int, Acked] = {}
        self.moving = False

    def next(self) -> Request | None:
        """What to send next, or again."""
        if self.asked is None:
            if not self.moving:
                self.asked = self.side.join()
            elif self.left:
                self.left -= 1
                self.asked = self.side.push(noise(self.side), pull=True)
            else:
                self.side.number += 1
                self.asked = Leave(number=self.side.number, worker=self.side.name, incarnation=self.side.incarnation)
        return self.asked

    def take(self, reply: Reply) -> None:
        if isinstance(reply, Acked):
            # The same answer each time.
            assert self.acks.setdefault(reply.sequence, reply).result == reply.result
            assert self.acks[reply.sequence].version == reply.version
        if self.asked is None or reply.number != self.asked.number:
            return
        if isinstance(self.asked, Push):
            if isinstance(reply, Acked):
                self.asked = self.side.pull()
        elif isinstance(reply, Empty):
            self.asked = self.side.setup()
        elif isinstance(reply, (Welcome, Changed)):
            self.moving = True
            self.side.take(reply)
            self.asked = None
        elif isinstance(reply, Left):
            self.asked, self.left = None, -1
        else:
            assert isinstance(reply, (Wait, Busy)), reply


@pytest.mark.parametrize("crashes", [False, True])
@pytest.mark.parametrize(
    "spec", ["async", "sync", "sync:backup=1", "ssp:staleness=1", "softsync:n=2,staleness_aware=true"]
)
def test_each_push_counts_once(spec: str, crashes: bool) -> None:
    draw = random.Random(f"{spec} {crashes}")
    workers = {name: Worker(side(name, spec=spec, workers=3, push="topk:k=9", pull="topk:k=9"), 12) for name in "abc"}
    journal, since, state = ListJournal(), 0, None
    service = Service(journal=journal, lease_s=1e9)
    flying: list[Message] = []
    to: list[str] = []

    def send(name: str, message: Message) -> None:
        for _ in range(0 if draw.random() < 0.1 else 2 if draw.random() < 0.1 else 1):
            flying.append(copied(message))
            to.append(name)

    for turn in range(20_000):
        if all(worker.left < 0 for worker in workers.values()):
            break
        if crashes and draw.random() < 0.01 and journal.entries:
            if draw.random() < 0.3:
                state, since = service.state_dict(), len(journal.entries)
            service = replayed(journal, state, since)
            service._lease_s = 1e9
            service.journal = journal
        if not flying or draw.random() < 0.3:
            name = draw.choice("abc")
            request = workers[name].next() if workers[name].left >= 0 else None
            if request is not None:
                send(name, request)
            continue
        place = draw.randrange(len(flying))
        message, name = flying.pop(place), to.pop(place)
        if isinstance(message, Request):
            for sender, reply in service.handle(message, name.encode(), float(turn)):
                if crashes and draw.random() < 0.02:
                    service = replayed(journal, state, since)  # between what it wrote and its answer
                    service._lease_s = 1e9
                    service.journal = journal
                    break
                send(sender.decode(), reply)
        else:
            assert isinstance(message, Reply)
            workers[name].take(message)
    else:
        pytest.fail(f"somebody waits for ever: {service.status()}")
    status = service.status()
    assert status["applied"] + status["late"] == 36
    results = [ack.result for worker in workers.values() for ack in worker.acks.values()]
    assert (results.count("applied"), results.count("late")) == (status["applied"], status["late"])
    assert status["duplicates"] > 0 or crashes
    pushes = [(entry.worker, entry.sequence) for entry in journal.read() if isinstance(entry, Push)]
    assert sorted(pushes) == [(name, sequence) for name in "abc" for sequence in range(1, 13)]
    assert same(lasting(service), lasting(replayed(journal)))
    if spec in ("async", "ssp:staleness=1"):
        assert status["updates"] == 36


def test_state_and_the_rest_of_the_journal(tmp_path: Any) -> None:
    journal = ListJournal()
    service = Service(journal=journal)
    sides = [side(name, spec="sync", workers=2, push="topk:k=5", pull="threshold:density=0.2") for name in "ab"]
    for one in sides:
        admit(service, one)
    states = []
    for _ in range(4):
        for one in sides:
            states.append((service.state_dict(), len(journal.entries)))  # of half a round, too
            for reply in ask(service, one.push(noise(one))):
                one.take(reply)
        sides[0].have, sides[0].clock = sides[1].have, sides[1].clock
    torch.save(states, tmp_path / "states")  # plain things only
    for state, since in torch.load(tmp_path / "states", weights_only=True):
        assert same(lasting(replayed(journal, state, since)), lasting(service))


def test_a_full_disk_does_not_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    journal = ListJournal()
    service, one = Service(journal=journal), side()
    admit(service, one)
    ask(service, one.push(noise(one)))
    entries = len(journal.entries)
    journal.full = True
    for _ in range(3):
        assert isinstance(ask(service, one.push(noise(one)))[0], Acked)
        journal.full = False  # a journal with a gap is of no use
    assert not service.status()["durable"]
    assert len(journal.entries) == entries
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    state = service.state_dict()
    service.journal = fresh = ListJournal()
    assert service.durable
    ask(service, one.push(noise(one)))
    assert same(lasting(service), lasting(replayed(fresh, state)))


def test_what_is_not_a_state() -> None:
    service, one = Service(), side()
    admit(service, one)
    state = service.state_dict()
    with pytest.raises(StateError, match="format"):
        Service().load_state_dict({}, 0.0)
    for key in state["run"]:
        broken = {"format": 1, "run": {k: v for k, v in state["run"].items() if k != key}}
        other = Service()
        with pytest.raises(StateError):
            other.load_state_dict(broken, 0.0)
        assert "run" not in other.state_dict()
    Service().load_state_dict(Service().state_dict(), 0.0)


def test_a_journal_that_does_not_fit() -> None:
    one = side()
    for entry in (one.push(noise(one)), Published(number=0), one.join()):
        with pytest.raises(StateError, match="journal"):
            Service().replay(copied(entry), 0.0)
    service = Service()
    service.replay(copied(one.setup()), 0.0)
    gap = one.push(noise(one))
    with pytest.raises(StateError, match=r"Push\.sequence"):
        service.replay(copied(dataclasses.replace(gap, sequence=9)), 0.0)
    with pytest.raises(StateError, match="has not joined"):
        service.replay(copied(dataclasses.replace(gap, worker="z")), 0.0)
    assert isinstance(copied(one.join()), Join)
