"""A step of training by itself: how long forward, backward and the optimizer take, and when each gradient is there.

On a CPU it is core time that is measured, so that ranks which share a machine, and whatever else runs there, do not
count; what they leave a rank is told apart, as its share of a core.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradcomp.bench.meeting import Meeting, machine_name
from gradcomp.bench.step_time import MODELS, batch_for
from gradcomp.bucket import Bucket
from gradcomp.errors import ConfigError
from gradcomp.forecast import StepProfile
from gradcomp.integrations.tasks import load, train_batches

__all__ = ["Clock", "ModelProbe", "Workload", "load_workload", "probe_model"]


@dataclass
class Workload:
    """What is trained, and on what."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor

    @property
    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """As :func:`gradcomp.attach` takes them."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def backward(self) -> None:
        """Forward and backward."""
        self.loss(self.model(self.inputs), self.targets).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """All of it."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def load_workload(name: str, *, batch_size: int, settings: Sequence[str] = (), device: str = "cpu") -> Workload:
    """A network by its name in :data:`gradcomp.bench.step_time.MODELS`, or a task's.

    Raises:
        ConfigError: there is neither a network nor a task of that name.
    """
    torch.manual_seed(0)
    if name in MODELS:
        if settings:
            raise ConfigError(f"--set {settings[0]!r}: network {name!r} has no options; they are for tasks")
        model = MODELS[name]().to(device)
        inputs, targets = batch_for(name, batch_size, device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return Workload(name, model, optimizer, nn.functional.cross_entropy, inputs, targets)
    if not name.endswith(".py") and "." not in name:
        raise ConfigError(f"--model {name!r} is neither one of {', '.join(sorted(MODELS))} nor a task's file or module")
    task = load(name).build(settings, batch_size=batch_size)
    model = task.model.to(device)
    batches = train_batches(task.train_data, batch_size=task.batch_size, rank=0, world_size=1, seed=0, epoch=0)
    inputs, targets = next(batches)
    inputs, targets = inputs.to(device), targets.to(device)
    if task.augment is not None:
        inputs = task.augment(inputs)
    return Workload(name, model, task.optimizer, task.loss, inputs, targets)


@dataclass(frozen=True, kw_only=True)
class ModelProbe:
    """See :class:`gradcomp.forecast.StepProfile` for the times.

    Attributes:
        parameter_ready_s: from the start of backward, by name.
        cores: of this rank: its part of the machine's.
        thread_cores: what a thread got of a core, where other programs used the machine as well.
        machine_cores: of the whole machine, that may be used.
        ranks_here: how many ranks share this machine.
        wall_s: what a step took by the clock, with all ranks computing at once.
        copy_s_per_element: copying a float32 into fresh memory.
    """

    forward_s: float
    backward_s: float
    optimizer_s: float
    parameter_ready_s: dict[str, float]
    cores: float
    thread_cores: float
    machine_cores: float
    compute_cores: float
    ranks_here: int
    wall_s: float
    copy_s_per_element: float

    def profile(self, names: Sequence[str], buckets: Sequence[Bucket]) -> StepProfile:
        """For a plan's buckets; ``names``: its table's."""
        return StepProfile(
            forward_s=self.forward_s,
            backward_s=self.backward_s,
            optimizer_s=self.optimizer_s,
            ready_s=tuple(
                max(self.parameter_ready_s.get(names[p], self.backward_s) for p in bucket.parameters)
                for bucket in buckets
            ),
            cores=self.cores,
            thread_cores=self.thread_cores,
            compute_cores=self.compute_cores,
            copy_s_per_element=self.copy_s_per_element,
        )


class Clock:
    """Core time where the CPU computes, else time on the wall, once the device is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self) -> float:
        if self._device.type == "cpu":
            return time.process_time()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def probe_model(workload: Workload, meeting: Meeting, *, steps: int = 8, warm_up: int = 2) -> ModelProbe:
    """Time some steps, all ranks at once."""
    named = workload.named_parameters
    device = named[0][1].device
    clock, on_cpu = Clock(device), device.type == "cpu"
    began_s = 0.0
    ready: dict[str, list[float]] = {name: [] for name, _ in named}

    def note(name: str) -> Callable[[Tensor], None]:
        return lambda _: ready[name].append(clock() - began_s)

    rows: list[tuple[float, float, float]] = []
    walls: list[float] = []
    shares: list[float] = []
    handles = [
        tensor.register_post_accumulate_grad_hook(note(name))  # type: ignore[no-untyped-call]
        for name, tensor in named
    ]
    try:
        for number in range(warm_up + steps):
            meeting.begin()
            wall_s, start_cpu_s, start_s = time.perf_counter(), time.process_time(), clock()
            loss = workload.loss(workload.model(workload.inputs), workload.targets)
            began_s = clock()
            loss.backward()  # type: ignore[no-untyped-call]
            done_s = clock()
            workload.optimizer.step()
            workload.optimizer.zero_grad()
            end_s = clock()
            if number >= warm_up:
                rows.append((began_s - start_s, done_s - began_s, end_s - done_s))
                walls.append(time.perf_counter() - wall_s)
                shares.append((time.process_time() - start_cpu_s) / walls[-1])
    finally:
        for handle in handles:
            handle.remove()
    # Threads that compute together take core time faster than the clock goes.
    busy = statistics.median(shares)
    threads = float(max(torch.get_num_threads(), 1))
    compute_cores = min(max(busy, 1.0), threads) if on_cpu else busy
    forward_s, backward_s, optimizer_s = (
        statistics.median(row[i] for row in rows) / (compute_cores if on_cpu else 1.0) for i in range(3)
    )
    machines = meeting.gather(machine_name())
    ranks_here = machines.count(machine_name())
    cores = _cores() / ranks_here
    crowded = on_cpu and busy < 0.9 * min(cores, 1.0)
    return ModelProbe(
        forward_s=forward_s,
        backward_s=backward_s,
        optimizer_s=optimizer_s,
        parameter_ready_s={
            name: statistics.median(times[warm_up:]) / (compute_cores if on_cpu else 1.0)
            for name, times in ready.items()
            if len(times) > warm_up
        },
        cores=cores,
        thread_cores=busy if crowded else 1.0,
        machine_cores=_cores(),
        compute_cores=compute_cores,
        ranks_here=ranks_here,
        wall_s=statistics.median(walls),
        copy_s_per_element=_copy_s_per_element(device),
    )


def _cores() -> float:
    """That this process may use."""
    return float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _copy_s_per_element(device: torch.device, numel: int = 1 << 20) -> float:
    source, clock = torch.ones(numel, device=device), Clock(device)
    took = []
    for _ in range(7):
        start_s = clock()
        torch.empty_like(source).copy_(source)
        took.append(clock() - start_s)
    return statistics.median(took) / numel
