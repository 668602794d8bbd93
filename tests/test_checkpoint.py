"""Checkpoints in a folder, and through torch.distributed.checkpoint: on as many ranks, on others, damaged, foreign."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
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

DEADLINE_S = 240
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


class TestDCP:
    """torch.distributed.checkpoint, in one process."""

    def run(self, seed: int = 0, **options: Any) -> Run:
        return Run(alone(), net=small_net(seed), **options)

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        import torch.distributed.checkpoint as dcp

        self.call(dcp.save, state, folder)

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        import torch.distributed.checkpoint as dcp

        self.call(dcp.load, state, folder)

    def call(self, function: Callable[..., object], state: dict[str, Any], folder: Path) -> None:
        # Older versions find out by themselves that there is no process group.
        options = {"no_dist": True} if "no_dist" in inspect.signature(function).parameters else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about there being one process
            function(state, checkpoint_id=folder, **options)

    def test_goes_on_bit_for_bit(self, tmp_path: Path) -> None:
        run, again = self.run(), self.run(seed=4)
        with run.sync, again.sync:
            run.train(0, 1, 2)
            self.save(tmp_path, {"model": run.net.state_dict(), "gradcomp": gradcomp.Checkpoint(run.sync)})
            weights = again.net.state_dict()
            restored = gradcomp.Checkpoint(again.sync, saved_in=tmp_path)
            self.load(tmp_path, {"model": weights, "gradcomp": restored})
            assert again.sync.state_dict()["step"] == 3
            assert all(torch.equal(a, b) for a, b in zip(run.tensors(), again.tensors(), strict=True))
            self.save(tmp_path / "next", {"gradcomp": restored})  # the same object saves from now on
            self.load(tmp_path / "next", {"gradcomp": gradcomp.Checkpoint(run.sync, saved_in=tmp_path / "next")})

    def test_a_folder_for_each_rank(self, tmp_path: Path) -> None:
        """Without a process group, DCP takes each rank for the only one."""

        def rank_main(transport: Any) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
            run = Run(transport)
            with run.sync:
                run.train(0, 1)
                return run.tensors(), gradcomp.Checkpoint(run.sync).state_dict()

        def resume(transport: Any) -> list[torch.Tensor]:
            run = Run(transport)
            with run.sync:
                saved = tmp_path / str(transport.rank)
                restored = gradcomp.Checkpoint(run.sync, saved_in=saved)
                empty = restored.state_dict()
                with lock:
                    self.load(saved, {"gradcomp": empty})
                restored.load_state_dict(empty)
                return run.tensors()[-4:]

        lock = threading.Lock()  # ranks are threads here, and torch changes warnings for all of them
        before = run_ranks(2, rank_main)
        for rank, (_, state) in enumerate(before):
            self.save(tmp_path / str(rank), {"gradcomp": state})
        for (tensors, _), found in zip(before, run_ranks(2, resume), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(tensors[-4:], found, strict=True))

    def test_nothing_of_ours_is_pickled(self, tmp_path: Path) -> None:
        run = self.run()
        with run.sync:
            run.train(0)
            assert all(type(value) is torch.Tensor for value in gradcomp.Checkpoint(run.sync).state_dict().values())

    def test_what_does_not_fit_is_refused(self, tmp_path: Path) -> None:
        from torch.distributed.checkpoint import CheckpointException

        run = self.run()
        with run.sync:
            run.train(0)
            good = gradcomp.Checkpoint(run.sync).state_dict()
            self.save(tmp_path / "good", {"gradcomp": gradcomp.Checkpoint(run.sync)})
            self.save(tmp_path / "part", {"gradcomp": {k.replace("of1", "of2"): v for k, v in good.items()}})
            self.save(tmp_path / "none", {"model": run.net.state_dict()})
            before = run.tensors()
            for folder, options, match in [
                ("absent", {}, "no DCP checkpoint can be read"),
                ("none", {}, "states of no ranks under 'gradcomp'"),
                ("good", {"key": "other"}, "states of no ranks under 'other'"),
            ]:
                with pytest.raises(StateError, match=match):
                    gradcomp.Checkpoint(run.sync, saved_in=tmp_path / folder, **options).state_dict()
            with pytest.raises(StateError, match="must be a folder"):
                gradcomp.Checkpoint(run.sync, saved_in=7).state_dict()
            with pytest.raises(StateError, match="no state of rank 1 of 2"):
                gradcomp.Checkpoint(run.sync, saved_in=tmp_path / "part").state_dict()
            for change, match in [
                ({"rank0of1/about": torch.zeros(9, dtype=torch.uint8)}, "damaged"),
                ({"rank0of1/odd": torch.zeros(())}, "'odd' of rank 0"),
                ({"odd": torch.zeros(())}, "'odd'"),
                ({"rank0of1/0.weight/0:36/gradient/residual": torch.zeros(3)}, "0:36"),
            ]:
                with pytest.raises(StateError, match=match):
                    gradcomp.Checkpoint(run.sync).load_state_dict(good | change)
            part = {name: value for name, value in good.items() if "4.weight" not in name}
            with pytest.raises(StateError, match="saved_in=FOLDER"):
                gradcomp.Checkpoint(run.sync).load_state_dict(part)
            for path in (tmp_path / "good").glob("*.distcp"):
                edit(path, lambda data: data.__delitem__(slice(500, None)))
            with pytest.raises((CheckpointException, RuntimeError, OSError)):
                self.load(tmp_path / "good", {"gradcomp": gradcomp.Checkpoint(run.sync, saved_in=tmp_path / "good")})
            assert all(torch.equal(a, b) for a, b in zip(before, run.tensors(), strict=True))
        other = self.run(compressor="onebit")
        with other.sync, pytest.raises(StateError, match="compressor"):
            gradcomp.Checkpoint(other.sync).load_state_dict(good)


# Runs a script several times, each time as so many ranks: children of one process that has imported what takes long.
RANKS = """
import json, os, runpy, socket, sys, traceback, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed.checkpoint
import gradcomp, gradcomp.transports.zmq
if "sklearn" in sys.argv:
    import sklearn.datasets

def be(rank, world_size, port, output, script, arguments):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")

for output, world_size, script, *arguments in json.loads(sys.argv[1]):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world_size):
        children.append(os.fork())
        if not children[-1]:
            try:
                be(rank, world_size, port, f"{output}-{rank}", script, arguments)
                sys.stdout.flush()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit(1)
"""


def run_scripts(folder: Path, runs: list[tuple[int, list[str]]], *imports: str) -> list[list[list[str]]]:
    """The lines that each rank of each run prints. A run is the number of ranks and the script with its arguments."""
    launcher = folder / "launcher.py"
    launcher.write_text(RANKS)
    plan = [[str(folder / f"out-{i}"), world_size, *command] for i, (world_size, command) in enumerate(runs)]
    arguments = [sys.executable, str(launcher), json.dumps(plan), *imports]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            _, errors = process.communicate(timeout=DEADLINE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its children, too
    assert process.returncode == 0, errors[-3000:]
    return [
        [(folder / f"out-{i}-{rank}").read_text().splitlines() for rank in range(world_size)]
        for i, (world_size, _) in enumerate(runs)
    ]


# A Gloo group for DCP, ZeroMQ for the gradients; each prints the sum of what all ranks hold back.
GLOO = """
import os, sys
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import gradcomp

tests, folder, load, save = sys.argv[1:]
sys.path.insert(0, tests)
from ranks import attach, small_net, train_step
import torch

rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method=f"file://{folder}/group-{save}", rank=rank, world_size=world_size)
net = small_net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
with attach(net, optimizer, "zmq", compressor="threshold:density=0.1", exchange="two_shot") as sync:
    def held():
        states = sync.state_dict()["states"]["4.weight"]
        return sync.average(sum(s["residual"] for s in states["0:512"].values())) * sync.world_size
    if load:
        source = f"{folder}/{load}"
        state = {"model": net.state_dict(), "gradcomp": gradcomp.Checkpoint(sync, saved_in=source)}
        dcp.load(state, checkpoint_id=source)
        net.load_state_dict(state["model"])
        print(sync.state_dict()["step"], f"{held().double().norm():.4f}")
    for number in range(3):
        train_step(net, optimizer, sync.rank, number)
    sync.check_replicas()
    print(sync.state_dict()["step"], f"{held().double().norm():.4f}")
    dcp.save({"model": net.state_dict(), "gradcomp": gradcomp.Checkpoint(sync)}, checkpoint_id=f"{folder}/{save}")
dist.barrier()
dist.destroy_process_group()
"""


def test_dcp_with_several_gloo_processes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(GLOO)
    common = [str(script), str(Path(__file__).parent), str(tmp_path)]
    runs = [(3, [*common, "", "a"]), (2, [*common, "a", "b"])]
    before = None
    for number, outputs in enumerate(run_scripts(tmp_path, runs)):
        assert all(output == outputs[0] for output in outputs)
        steps, norms = zip(*(line.split() for line in outputs[0]), strict=True)
        if before is not None:
            assert steps[0] == str(3 * number)
            assert float(norms[0]) == pytest.approx(float(before), abs=2e-4)
        assert steps[-1] == str(3 * number + 3)
        before = norms[-1]


def test_the_example_resumes_bit_for_bit_and_with_other_workers(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    example = str(Path(__file__).resolve().parent.parent / "examples" / "resume.py")
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    runs = [(2, one, 2), (2, other, 1), (2, other, 2), (3, other, 3)]
    plan = [(world_size, [example, folder, "--epochs", str(epochs)]) for world_size, folder, epochs in runs]
    straight, first, second, third = (outputs[0] for outputs in run_scripts(tmp_path, plan, "sklearn"))
    weights = [lines[-1].split()[-1] for lines in (first, second)]
    assert second[0] == f"resumed bit for bit after epoch 1  weights {weights[0]}"
    assert second[1] == straight[1]
    assert third[0] == f"resumed after epoch 2 with 3 workers in place of 2  weights {weights[1]}"
    assert third[1].startswith("epoch 3  accuracy")
