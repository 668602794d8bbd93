"""Checkpoints through torch.distributed.checkpoint, in one process and in several; and the example that resumes."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
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
from ports import free_port
from ranks import run_ranks, small_net
from test_checkpoint import Run, alone, edit
from zygote import Popen

import gradcomp
from gradcomp.errors import StateError

DEADLINE_S = 240


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
import json, os, runpy, sys, traceback, warnings
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

for output, port, world_size, script, *arguments in json.loads(sys.argv[1]):
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
    plan = [
        [str(folder / f"out-{i}"), free_port(), world_size, *command] for i, (world_size, command) in enumerate(runs)
    ]
    arguments = [sys.executable, str(launcher), json.dumps(plan), *imports]
    with Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
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
