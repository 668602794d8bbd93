"""Checkpoints in a folder: on as many ranks, on others, damaged, foreign."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import attach, outcomes, parameters_of, run_ranks, small_net, train_step
from torch import nn

import gradcomp
from gradcomp.errors import ConfigError, HandshakeError, StateError
from gradcomp.integrations import checkpoint_files
from gradcomp.transports.inproc import InprocTransport

SPEC = "threshold:density=0.1"


class Run:
    """One rank's net, optimizer and exchange."""

    def __init__(self, transport: Any, net: nn.Module | None = None, lr: float = 0.05, **options: Any) -> None:
        self.net = small_net() if net is None else net
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=lr, momentum=0.9)
        self.sync = attach(self.net, self.optimizer, transport, **({"compressor": SPEC} | options))

    def train(self, *numbers: int) -> None:
        for number in numbers:
            train_step(self.net, self.optimizer, self.sync.rank, number)

    def save(self, folder: Path, **options: Any) -> Path:
        return gradcomp.save_checkpoint(folder, self.sync, model=self.net, optimizer=self.optimizer, **options)

    def load(self, folder: Path) -> gradcomp.LoadedCheckpoint | None:
        return gradcomp.load_checkpoint(folder, self.sync, model=self.net, optimizer=self.optimizer)

    def tensors(self) -> list[torch.Tensor]:
        """All that must be equal after a resume that claims to be exact."""
        states = self.sync.state_dict()["states"]
        held = [t for spans in states.values() for roles in spans.values() for s in roles.values() for t in s.values()]
        return [*parameters_of(self.net), *(b.clone() for b in self.net.buffers()), *held]


def alone() -> InprocTransport:
    """The transport of a rank without others."""
    return InprocTransport.world(1, timeout_s=20.0)[0]


def saved_by(world_size: int, folder: Path, steps: int = 3, **options: Any) -> list[list[torch.Tensor]]:
    """Train, save, train on; what each rank has in the end."""

    def rank_main(transport: Any) -> list[torch.Tensor]:
        run = Run(transport, **options)
        with run.sync:
            run.train(*range(steps))
            run.save(folder, extra={"epoch": 5, "by": transport.rank, "order": torch.arange(3)})
            run.train(steps, steps + 1)
            return run.tensors()

    return run_ranks(world_size, rank_main)


def test_as_many_ranks_go_on_bit_for_bit(tmp_path: Path) -> None:
    expected = saved_by(3, tmp_path)

    def rank_main(transport: Any) -> list[torch.Tensor]:
        run = Run(transport, net=small_net(seed=9))
        with run.sync:
            run.train(70)
            found = run.load(tmp_path)
            assert found is not None
            assert (found.step, found.world_size, found.same_ranks) == (3, 3, True)
            assert found.folder == tmp_path / "00000001"
            assert (found.extra["epoch"], found.extra["by"]) == (5, transport.rank)
            assert torch.equal(found.extra["order"], torch.arange(3))
            run.train(3, 4)
            return run.tensors()

    for rank, tensors in enumerate(run_ranks(3, rank_main)):
        assert len(tensors) == len(expected[rank])
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected[rank], strict=True))


def test_other_numbers_of_ranks_hold_back_the_same_sum(tmp_path: Path) -> None:
    def held(run: Run) -> torch.Tensor:
        spans = run.sync.state_dict()["states"]["4.weight"]["0:512"]
        return sum(state["residual"] for state in spans.values())

    def rank_main(transport: Any, load: bool) -> tuple[torch.Tensor, torch.Tensor]:
        run = Run(transport)
        with run.sync:
            found = run.load(tmp_path)
            assert (found is not None) == load
            at_once = held(run) if load else torch.zeros(())
            run.train(*range(4))
            run.sync.check_replicas()
            run.save(tmp_path)
            return at_once, held(run)

    before = [after for _, after in run_ranks(4, lambda transport: rank_main(transport, False))]
    for world_size in (2, 3):
        results = run_ranks(world_size, lambda transport: rank_main(transport, True))
        torch.testing.assert_close(sum(at_once for at_once, _ in results), sum(before))
        before = [after for _, after in results]


def test_random_numbers_go_on_and_nothing_is_there_at_first(tmp_path: Path) -> None:
    run = Run(alone())
    with run.sync:
        assert run.load(tmp_path / "none") is None
        assert run.load(tmp_path) is None
        torch.manual_seed(3)
        run.save(tmp_path)
        expected = torch.rand(4)
        assert gradcomp.load_checkpoint(tmp_path, run.sync) is not None  # neither model nor optimizer
        assert torch.equal(torch.rand(4), expected)


def test_old_ones_are_deleted_and_what_a_crash_left_too(tmp_path: Path) -> None:
    (tmp_path / "00000001").mkdir()
    (tmp_path / "00000001" / "rank-0.pt").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")

    def rank_main(transport: Any) -> None:
        run = Run(transport)
        with run.sync:
            folders = []
            for number in range(4):
                run.train(number)
                folders.append(run.save(tmp_path, keep=2).name)
            assert folders == ["00000002", "00000003", "00000004", "00000005"]

    run_ranks(2, rank_main)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000004", "00000005", "notes.txt"]
    names = sorted(path.name for path in (tmp_path / "00000005").iterdir())
    assert names == [
        "complete.json",
        "rank-0.pt",
        "rank-1.pt",
    ]


def test_a_save_that_was_interrupted_does_not_count(tmp_path: Path) -> None:
    saved_by(2, tmp_path, steps=2)
    saved_by(2, tmp_path, steps=4)
    (tmp_path / "00000002" / "complete.json").unlink()

    def rank_main(transport: Any) -> int:
        run = Run(transport)
        with run.sync:
            found = run.load(tmp_path)
            assert found is not None
            assert run.save(tmp_path).name == "00000003"
            return found.step

    assert run_ranks(2, rank_main) == [2, 2]


def edit(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(position: int) -> Callable[[bytearray], object]:
    def change(data: bytearray) -> None:
        data[position] ^= 1

    return change


def relabel(**fields: object) -> Callable[[bytearray], object]:
    def change(data: bytearray) -> None:
        head = json.dumps(json.loads(data[:512]) | fields).encode()
        data[:512] = head.ljust(511) + b"\n"

    return change


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (flip(-1), "damaged: its digest"),
        (flip(2000), "damaged: its digest"),
        (lambda data: data.__delitem__(slice(-100, None)), "bytes; it says"),
        (lambda data: data.__delitem__(slice(100, None)), "does not begin with the head"),
        (lambda data: data.clear(), "does not begin with the head"),
        (lambda data: data.__setitem__(slice(0, 512), b"7".ljust(512)), "does not begin with the head"),
        (relabel(format="gradcomp checkpoint 9"), "format='gradcomp checkpoint 9'; it must be"),
        (relabel(rank=0), "rank=0; it must be 1"),
        (relabel(world_size=5), "world_size=5; it must be 2"),
        (relabel(nbytes="many"), "does not begin with the head"),
        (None, "file of rank 1 of 2 is missing"),
    ],
)
def test_a_damaged_or_missing_file_is_refused_by_all_and_changes_nothing(
    tmp_path: Path, damage: Callable[[bytearray], object] | None, match: str
) -> None:
    saved_by(2, tmp_path, steps=1)
    path = tmp_path / "00000001" / "rank-1.pt"
    path.unlink() if damage is None else edit(path, damage)
    errors = refusals(tmp_path)
    assert isinstance(errors[0], HandshakeError)
    assert (errors[0].field, errors[0].peer) == ("checkpoint", 1)
    assert isinstance(errors[1], StateError)
    assert re.search(match, str(errors[1]))


def refusals(folder: Path, world_size: int = 2, **options: Any) -> list[Exception]:
    def rank_main(transport: Any) -> Exception:
        run = Run(transport, **options)
        with run.sync:
            run.train(7)
            before = run.tensors()
            with pytest.raises((StateError, HandshakeError)) as caught:
                run.load(folder)
            assert all(torch.equal(a, b) for a, b in zip(before, run.tensors(), strict=True))
            assert run.sync.state_dict()["step"] == 1
            run.train(8)  # and the ranks still understand each other
            return caught.value

    return run_ranks(world_size, rank_main)


def other_net(*, more: bool = False, wide: bool = False) -> nn.Sequential:
    layers = list(small_net())
    layers[5:] = [nn.ReLU(), nn.Linear(32, 12 if wide else 10)]
    return nn.Sequential(*layers, *([nn.Linear(10, 10)] if more else []))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"compressor": "onebit"}, "compressor"),
        ({"net": other_net(more=True)}, r"no '7\.weight'|no parameter '7\.weight'"),
        ({"net": other_net(wide=True)}, r"'6\.weight' has shape \[10, 32\]"),
        ({"net": small_net()[:6]}, r"has '6\.weight'|has parameter '6\.weight'"),
    ],
)
def test_another_model_or_compressor_is_refused(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    saved_by(2, tmp_path, steps=1)
    for world_size in (1, 3):
        if "net" in options and world_size > 1:
            continue  # ranks are threads here, and there is one net
        (error, *_) = refusals(tmp_path, world_size, **options)
        assert isinstance(error, StateError)
        assert re.search(match, str(error))


def test_what_was_not_saved_or_does_not_fit_the_optimizer_is_refused(tmp_path: Path) -> None:
    run = Run(alone())
    with run.sync:
        gradcomp.save_checkpoint(tmp_path, run.sync)
        with pytest.raises(StateError, match="holds no model"):
            gradcomp.load_checkpoint(tmp_path, run.sync, model=run.net)
        with pytest.raises(StateError, match="holds no optimizer"):
            gradcomp.load_checkpoint(tmp_path, run.sync, optimizer=run.optimizer)
        run.save(tmp_path)
        with pytest.raises(StateError, match=r"groups of \[8\] parameters, this one of \[1\]"):
            gradcomp.load_checkpoint(
                tmp_path, run.sync, optimizer=torch.optim.SGD([next(run.net.parameters())], lr=0.1)
            )
        with pytest.raises(ConfigError, match=r"extra\['when'\] is object"):
            run.save(tmp_path, extra={"when": object()})
        with pytest.raises(ConfigError, match="keep=0"):
            run.save(tmp_path, keep=0)


def test_a_rank_that_cannot_write_is_heard_by_all_and_the_last_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_by(2, tmp_path, steps=2)
    write = checkpoint_files.write_rank

    def full(target: Path, content: Any) -> None:
        if content["gradcomp"]["rank"] == 1:
            raise OSError(28, "No space left on device")
        write(target, content)

    monkeypatch.setattr(checkpoint_files, "write_rank", full)

    def rank_main(transport: Any) -> None:
        run = Run(transport)
        with run.sync:
            run.train(0)
            run.save(tmp_path)

    first, second = outcomes(2, rank_main)
    assert "rank 1 could not write" in str(first)
    assert "No space left" in str(second)
    assert checkpoint_files.numbers(tmp_path, complete=True) == [1]


def test_a_writer_that_fails_leaves_no_file(tmp_path: Path) -> None:
    content = dict.fromkeys(checkpoint_files.FIELDS) | {
        "gradcomp": {"rank": 0, "world_size": 1, "step": 0},
        "extra": lambda: None,
    }
    with pytest.raises(Exception, match="lambda"):
        checkpoint_files.write_rank(tmp_path, content)
    assert list(tmp_path.iterdir()) == []
