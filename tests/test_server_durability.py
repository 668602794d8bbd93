"""What a parameter server has acknowledged outlives it: journals, checkpoints, kills, full disks."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import free_port
from processes import ROOT, Process, until
from server_network import gradients, linked, same, side
from server_network import join as join_over
from server_sides import Side, admit, ask
from server_worker import SIZE, counting_side

from gradcomp.errors import StateError
from gradcomp.integrations.serve import look
from gradcomp.integrations.server_journal import FileJournal, Segment
from gradcomp.integrations.server_state import ServerState
from gradcomp.server.messages import Forgot
from gradcomp.server.service import Service

KILLS = int(os.environ.get("GRADCOMP_SOAK_KILLS", "2"))


class Served:
    """A service with a folder, and a worker that pushes to it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.state = ServerState(folder, **options)
        self.service = Service(journal=self.state.journal, lease_s=1e9)
        self.found = self.state.recover(self.service)
        self.side: Side | None = None
        self.now = time.monotonic()

    def push(self, times: int = 1) -> None:
        if self.side is None:
            self.side = side()
            self.side.take(admit(self.service, self.side))
        generator = torch.Generator().manual_seed(self.side.sequence)
        for _ in range(times):
            for reply in ask(self.service, self.side.push(gradients(self.side, generator))):
                self.side.take(reply)

    def tick(self, later_s: float = 0.0) -> None:
        """Whatever is due, and wait until it is written."""
        self.now += later_s
        self.state.tick(self.service, self.now)
        if self.state._writing is not None:
            self.state._writing.thread.join()
            self.state._finish(self.service)

    def content(self) -> dict[str, Any]:
        found = self.service.state_dict()["run"]
        return {part: found[part] for part in ("shard", "roster", "pace", "totals")}


@contextlib.contextmanager
def served(folder: Path, **options: Any) -> Iterator[Served]:
    found = Served(folder, **options)
    try:
        yield found
    finally:
        found.state.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


# The journal.


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    journal = FileJournal()
    journal.begin(tmp_path / "j", 3, follows=True)
    entries = [Forgot(number=i, worker=f"w{i}", incarnation=i, body=bytes(i)) for i in range(400)]
    many = Forgot(number=1, worker="w", incarnation=1, body=[b"ab"] * 2000)
    for entry in [*entries, many]:
        journal.append(entry)
    journal.close()
    segment = Segment(tmp_path / "j", 3)
    found = list(segment.entries())
    assert found[:-1] == entries
    assert [bytes(entry.body) for entry in found[:-1]] == [entry.body for entry in entries]  # type: ignore[arg-type]
    assert bytes(found[-1].body) == b"ab" * 2000  # type: ignore[arg-type]
    assert segment.follows
    assert not segment.torn_bytes
    assert journal.nbytes == (tmp_path / "j").stat().st_size
    with pytest.raises(StateError, match="does not begin as segment 4"):
        Segment(tmp_path / "j", 4)


def test_a_torn_tail_is_cut_and_damage_is_not(tmp_path: Path) -> None:
    journal = FileJournal()
    journal.begin(tmp_path / "j", 0, follows=False)
    ends = [journal.nbytes]
    for i in range(3):
        journal.append(Forgot(number=i, worker="w", incarnation=i, body=bytes(range(50))))
        ends.append(journal.nbytes)
    journal.close()
    whole = (tmp_path / "j").read_bytes()
    for cut in range(len(whole)):
        (tmp_path / "j").write_bytes(whole[:cut])
        segment = Segment(tmp_path / "j", 0)
        assert len(list(segment.entries())) == max(0, sum(end <= cut for end in ends) - 1)
    (tmp_path / "j").write_bytes(whole[: ends[2]] + bytes(5000))  # where a machine stopped
    assert len(list(Segment(tmp_path / "j", 0).entries())) == 2
    for at in range(ends[0] + 16, ends[2]):
        (tmp_path / "j").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        if at < ends[1] or at >= ends[1] + 16:  # not in the length of the second
            with pytest.raises(StateError, match="is damaged at byte"):
                list(Segment(tmp_path / "j", 0).entries())


def test_with_fsync_the_disk_has_it_before_anybody_hears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    with served(tmp_path, durable=True) as found:
        found.push()
        found.state.sync()
        found.state.sync()
        assert len(synced) == 1

        def fails(descriptor: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fdatasync", fails)
        found.push()
        found.state.sync()
        found.push()
        assert not found.service.durable


# Coming back.


def test_it_comes_back_from_the_journal_alone(tmp_path: Path) -> None:
    with served(tmp_path) as first:
        first.push(7)
        before = first.content()
    with served(tmp_path) as second:
        assert second.found.checkpoint is None
        assert second.service.version == 7
        assert same(second.content(), before)
        second.side = first.side
        second.push(2)  # as if nothing had been
        before = second.content()
    with served(tmp_path) as third:
        assert same(third.content(), before)


def test_it_comes_back_from_checkpoint_and_journal(tmp_path: Path) -> None:
    with served(tmp_path, every_updates=5) as first:
        for _ in range(23):
            first.push()
            first.tick()
        before = first.content()
    assert names(tmp_path) == ["checkpoint-00000003", "checkpoint-00000004", "journal-00000003", "journal-00000004"]
    with served(tmp_path) as second:
        assert second.found.checkpoint == 4
        assert same(second.content(), before)


def test_the_checkpoint_before_gives_the_same_state_if_the_newest_is_damaged(tmp_path: Path) -> None:
    with served(tmp_path, every_s=10.0) as first:
        for _ in range(3):
            first.push(3)
            first.tick(later_s=20.0)
        first.push(2)
        before = first.content()
    newest = tmp_path / "checkpoint-00000003"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    with served(tmp_path) as second:
        assert second.found.checkpoint == 2
        assert same(second.content(), before)
    for path in tmp_path.glob("checkpoint*"):
        path.write_bytes(b"{}")
    with pytest.raises(StateError, match="is whole"):
        Served(tmp_path)


def test_what_is_left_of_a_crash_is_no_harm(tmp_path: Path) -> None:
    with served(tmp_path, every_updates=2) as first:
        first.push(2)
        first.tick()
        first.push()
        before = first.content()
    (tmp_path / "checkpoint-00000002.tmp").write_bytes(b"half")
    (tmp_path / "journal-00000002").write_bytes(b"GCMP")  # it was being begun
    with served(tmp_path) as second:
        assert same(second.content(), before)
    assert not (tmp_path / "checkpoint-00000002.tmp").exists()


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    with served(tmp_path), pytest.raises(StateError, match="is in use by another server"):
        ServerState(tmp_path)
    with served(tmp_path):
        pass


# Full disks.


@contextlib.contextmanager
def full_disk(nbytes: int) -> Iterator[None]:
    """No file grows beyond so many bytes: writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_training_goes_on_when_a_checkpoint_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with served(tmp_path, every_updates=3) as first:
        first.push(3)
        first.tick()
        good = (tmp_path / "checkpoint-00000001").read_bytes()
        first.push(3)
        with full_disk(1000):
            first.tick()
        assert "checkpoint 2 was not written" in caplog.text
        assert "File too large" in caplog.text
        assert (tmp_path / "checkpoint-00000001").read_bytes() == good
        first.push(3)
        assert first.service.durable  # the journal is whole
        shutil.copytree(tmp_path, tmp_path / "killed")
        before = first.content()
        first.tick()  # too early
        assert not (tmp_path / "checkpoint-00000003").exists()
        first.tick(later_s=20.0)
        assert (tmp_path / "checkpoint-00000003").exists()
        assert "all is well again" in caplog.text
    for folder in (tmp_path / "killed", tmp_path):
        with served(folder) as second:
            assert same(second.content(), before)


def test_training_goes_on_when_the_journal_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with served(tmp_path, every_updates=1000) as first:
        first.push(3)
        kept = first.content()
        with full_disk((tmp_path / "journal-00000000").stat().st_size + 20):
            first.push(4)
            first.tick(later_s=20.0)  # which fails, too
            first.push()
        assert first.service.version == 8
        assert not first.service.status()["durable"]
        shutil.copytree(tmp_path, tmp_path / "killed")
        first.push()
        first.tick(later_s=20.0)
        assert first.service.status()["durable"]
        first.push()
        before = first.content()
    with served(tmp_path / "killed") as second:
        assert same(second.content(), kept)
    with served(tmp_path) as third:
        assert third.service.version == 10
        assert same(third.content(), before)


# Processes.


def server(folder: Path, address: str, *options: str) -> Process:
    arguments = ["--bind", address, "--state", str(folder / "state"), *options]
    return Process(folder / "server.log", "-m", "gradcomp", "server", *arguments)


def test_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    """Each worker process counts at a coordinate of its own: its pushes that were acknowledged, and at most the one
    that was under way when it was killed."""
    address = f"127.0.0.1:{free_port()}"

    def serve() -> Process:
        return server(tmp_path, address, "--checkpoint-updates", "40", "--lease-s", "1", "--exit-when-done")

    def start(name: str, coordinate: int) -> Process:
        log = tmp_path / f"worker-{coordinate}.log"
        return Process(log, str(ROOT / "tests" / "server_worker.py"), address, name, str(coordinate), str(tmp_path))

    def acknowledged(coordinate: int) -> int:
        path = tmp_path / str(coordinate)
        return path.read_text().count("\n") if path.exists() else 0

    running = {"server": serve(), "w0": start("w0", 0), "w1": start("w1", 1)}
    coordinates = {"w0": 0, "w1": 1}
    killed: set[int] = set()
    recovered_s = []
    try:
        for kill in range(KILLS):
            for coordinate in coordinates.values():
                until(lambda at=coordinate: acknowledged(at) > 20)
            name, survivor = (f"w{(kill + i) % 2}" for i in range(2))
            running["server"].end(signal.SIGKILL)
            running[name].end(signal.SIGKILL)
            killed.add(coordinates[name])
            began_s = time.monotonic()
            running["server"] = serve()
            running[name] = start(name, kill + 2)
            coordinates[name] = kill + 2
            before = acknowledged(coordinates[survivor])
            until(lambda at=coordinates[survivor], count=before: acknowledged(at) > count + 1)
            recovered_s.append(time.monotonic() - began_s)
        for coordinate in coordinates.values():
            until(lambda at=coordinate: acknowledged(at) > 20)
        (tmp_path / "stop").touch()
        for process in running.values():
            assert process.process.wait(60) == 0, process.said[-3000:]
    finally:
        for process in running.values():
            process.close()
    print(f"acknowledged again after {', '.join(f'{seconds:.1f} s' for seconds in recovered_s)}")
    with served(tmp_path / "state") as found:
        values = found.content()["shard"]["values"]
    assert values.numel() == SIZE
    for coordinate in range(KILLS + 2):
        counted, told = int(values[coordinate]), acknowledged(coordinate)
        assert told <= counted <= told + (coordinate in killed), f"worker {coordinate}: {counted}, {told} acknowledged"
    assert not values[KILLS + 2 :].any()


def test_sigterm_saves_and_the_status_is_json(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    first = server(tmp_path, address)
    try:
        me = counting_side("a", 1)
        with linked(address, incarnation=me.incarnation, timeout_s=60.0) as links:
            join_over(links, me)
        with linked(address, incarnation=me.incarnation, timeout_s=60.0) as links:
            for _ in range(5):
                asked = links.ask(0, me.push([torch.ones(SIZE)]))
                links.wait([asked])
                me.take(asked.replies[-1])
            assert look(address)["updates"] == 5
            assert first.end(signal.SIGTERM) == 0
    finally:
        first.close()
    assert re.search(rf"^gradcomp server listens on {address}$", first.said, re.MULTILINE)
    assert "ended by SIGTERM: update 5 after" in first.said
    with served(tmp_path / "state") as found:
        assert found.found.checkpoint == 1
        assert found.found.entries == 0
        assert found.service.version == 5
