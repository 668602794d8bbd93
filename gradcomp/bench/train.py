"""Final accuracy and time to accuracy of a task for several methods and seeds, over shaped links.

A method is ``[NAME=]SPEC[;KEY=VALUE...]``. SPEC: a compressor, such as threshold:density=0.005, or ddp:fp32, ddp:fp16,
ddp:bf16, which is torch's DistributedDataParallel. KEY: exchange, transport, overlap, servers, mode, pull as of
``gradcomp train``, or set:OPTION for an option of the task. With --rate every worker is a host of its own (a network
namespace; needs root), its link shaped; without, workers talk over loopback as those of ``gradcomp train``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gradcomp.bench.lab import Lab
from gradcomp.bench.train_methods import Method, merge_settings, parse_methods
from gradcomp.bench.train_pictures import draw_curve, draw_progress
from gradcomp.bench.train_rank import Assignment
from gradcomp.bench.train_results import Point, Results, Row, Run, spread, summarize
from gradcomp.errors import ConfigError, WorkerFailed
from gradcomp.integrations.curves import evaluated_steps, new_figure
from gradcomp.integrations.launch import explain, launch, read_failures
from gradcomp.integrations.local_servers import local_servers
from gradcomp.integrations.report import table
from gradcomp.integrations.run_options import RunOptions
from gradcomp.options import check_integer, check_number

__all__ = ["Bench", "main"]

_PROGRAM = ("-m", "gradcomp.bench.train_rank")
_SERVER_PORT = 29600
_GRACE_S = 30.0  # for a rank to say itself that its time is over
# Hosts of a lab are alone on their switch: nothing there needs encryption.
_LAB_TRANSPORT = "zmq:insecure=true"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all runs of a benchmark share.

    Attributes:
        rate: of each host's link; None: loopback, which is not shaped.
        epochs, batch_size: None: the task's own.
        timeout_s: of one run.
    """

    task: str
    settings: tuple[str, ...] = ()
    workers: int = 4
    rate: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    device: str = "cpu"
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        check_integer("bench train", "workers", self.workers, at_least=1)
        check_number("bench train", "timeout_s", self.timeout_s, above=0.0)

    def options(self, method: Method, seed: int) -> RunOptions:
        """Of the workers of one run."""
        settings = merge_settings(self.settings, method.settings)
        usual = None if self.rate is None or method.servers is not None else _LAB_TRANSPORT
        return RunOptions(
            task=self.task,
            compressor="none" if method.hook is not None else method.spec,
            settings=tuple(setting.replace("{seed}", str(seed)) for setting in settings),
            exchange=method.exchange,
            transport=method.transport or usual,
            overlap=method.overlap,
            mode=method.mode,
            pull=method.pull,
            epochs=self.epochs,
            batch_size=self.batch_size,
            device=self.device,
            seed=seed,
            quiet=True,
        )

    def check(self, method: Method) -> None:
        """Find out what can be known before anything is started.

        Raises:
            ConfigError: what is wrong, and of which method.
        """
        try:
            options = asdict(self.options(method, 0))
            RunOptions(**options | {"server": None if method.servers is None else "127.0.0.1:1"}).check()
            if method.servers is not None:
                check_integer("server", "servers", method.servers, at_least=1, at_most=64)
        except ConfigError as error:
            raise ConfigError(f"method {method.name}: {error}") from None

    def of(self, method: Method, seed: int) -> dict[str, object]:
        """What one run is a run of: runs of the same are not repeated."""
        shared = {key: value for key, value in asdict(self).items() if key not in ("settings", "timeout_s")}
        own = {key: value for key, value in asdict(method).items() if key not in ("settings", "name")}
        settings = sorted(merge_settings(self.settings, method.settings))
        return shared | own | {"settings": settings, "seed": seed}

    def run(self, method: Method, seed: int, lab: Lab | None) -> Run:
        """Train once.

        Raises:
            ConfigError, WorkerFailed: it did not succeed; says which rank and why.
        """
        with tempfile.TemporaryDirectory(prefix="gradcomp-bench-") as name, contextlib.ExitStack() as stack:
            folder = Path(name)
            files = {"log": str(folder / "run.jsonl"), "summary": str(folder / "summary.json")}
            options = asdict(self.options(method, seed)) | files
            if method.servers is not None:
                servers = local_servers(method.servers) if lab is None else _servers_in(lab, method.servers)
                options["server"] = ",".join(stack.enter_context(servers))
            assignment = Assignment(
                options=RunOptions(**options),
                hook=method.hook,
                interface=None if lab is None else "eth0",
                folder=name,
                timeout_s=self.timeout_s,
            )
            if lab is None:
                launch([assignment.json()], workers=self.workers, program=_PROGRAM)
            else:
                _run_in(lab, assignment)
            return _read_run(folder, counted=method.hook is None)


def _run_in(lab: Lab, assignment: Assignment) -> None:
    command = [sys.executable, *_PROGRAM, assignment.json()]
    try:
        lab.run(command, timeout_s=assignment.timeout_s + _GRACE_S)
    except WorkerFailed as error:
        failures = read_failures(Path(assignment.folder))
        said = str(error).removeprefix(f"{' '.join(command)}: ")
        raise WorkerFailed(explain(failures, {}) if failures else said) from None


@contextlib.contextmanager
def _servers_in(lab: Lab, count: int) -> Iterator[list[str]]:
    """A parameter server's shards in the hosts of the workers, in turn."""
    command = [sys.executable, "-m", "gradcomp", "server", "--insecure", "--exit-when-done", "--quiet"]
    hosts = [number % lab.hosts for number in range(count)]
    addresses = [f"{lab.address(host)}:{_SERVER_PORT + number}" for number, host in enumerate(hosts)]
    with contextlib.ExitStack() as stack, tempfile.TemporaryFile() as said:
        for host, address in zip(hosts, addresses, strict=True):
            process = lab.start(host, [*command, "--bind", address], stdout=said.fileno(), stderr=said.fileno())
            stack.callback(process.wait, _GRACE_S)
            stack.callback(process.kill)
        yield addresses


def _read_run(folder: Path, *, counted: bool) -> Run:
    """A finished run, from what its ranks left.

    Args:
        counted: whether rank 0's own count of bytes means something.
    """
    summary = json.loads((folder / "summary.json").read_text())
    lines = evaluated_steps(folder / "run.jsonl")
    ranks = [json.loads(path.read_text()) for path in folder.glob("rank*.json")]
    sent, received = (
        spread(rank[key] for rank in ranks).mean if ranks else (summary[key] if counted else None)
        for key in ("bytes_sent", "bytes_received")
    )
    # The kernel's count in all, spread over the epochs as rank 0 counted.
    scale = sent / (lines[-1]["bytes_sent"] or 1) if sent is not None else None
    points = tuple(
        Point(line["epoch"], line["time_s"], None if scale is None else scale * line["bytes_sent"], line["accuracy"])
        for line in lines
    )
    return Run(points=points, steps=summary["steps"], bytes_sent=sent, bytes_received=received, ratio=summary["ratio"])


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers, like 0,1,2") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradcomp bench train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", metavar="TASK", help="a Python file or a module with a function task()")
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="for task(); {seed} in it becomes the run's seed, for folds of a cross-validation, say",
    )
    parser.add_argument("--methods", nargs="+", metavar="METHOD", default=["none", "threshold:density=0.005"])
    parser.add_argument("--dense", metavar="NAME", help="the method others are compared with; default: none, if there")
    parser.add_argument("--workers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--rate", metavar="RATE", help="of each host's link, such as 100mbit; default: loopback")
    parser.add_argument("--seeds", type=_seeds, metavar="N,N,...", default=[0, 1, 2], help="default: 0,1,2")
    parser.add_argument("--epochs", type=int, metavar="N", help="in place of the task's own")
    parser.add_argument("--batch-size", type=int, metavar="N", help="samples a worker takes per step, likewise")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--target",
        type=float,
        metavar="X",
        help="time to what accuracy: up to 1, a share of the dense mean; above, percent; default: 0.95",
    )
    parser.add_argument("--results", metavar="FILE", help="append each run there, and do not repeat those it has")
    parser.add_argument("--timeout-s", type=float, default=3600.0, help="for one run; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--png", metavar="FILE", help="draw accuracy against seconds and against bytes")
    parser.add_argument("--curve", metavar="FILE", help="draw accuracy against ratio, a line a compressor")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print a table, or one JSON object; 1 if a run failed, else 0.

    Raises:
        ConfigError: a method, an option or the results file is wrong, or this machine makes no network namespaces.
    """
    options = _parser().parse_args(argv)
    methods = parse_methods(options.methods)
    dense = _dense(methods, options.dense)
    if dense is None and options.target is not None and options.target <= 1:
        raise ConfigError(
            f"--target {options.target:g} is a share of the dense accuracy: name that method with --dense"
        )
    shared = {name: getattr(options, name) for name in Bench.__dataclass_fields__}
    bench = Bench(**shared | {"settings": tuple(options.settings)})
    for method in methods:
        bench.check(method)
    for option, path in (("--png", options.png), ("--curve", options.curve)):
        if path is not None:
            _check_picture(option, path)
    results = Results(options.results)
    _run_all(bench, methods, options.seeds, results)
    return _report(bench, methods, dense, results, options)


def _check_picture(option: str, path: str) -> None:
    """Hours later is too late to find out."""
    if not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"{option} {path}: its folder does not exist")
    new_figure(1, 1)


def _dense(methods: Sequence[Method], given: str | None) -> str | None:
    names = [method.name for method in methods]
    if given is not None and given not in names:
        raise ConfigError(f"--dense {given} is not one of the methods: {', '.join(names)}")
    return given or next((method.name for method in methods if method.spec == "none"), None)


def _run_all(bench: Bench, methods: Sequence[Method], seeds: Sequence[int], results: Results) -> None:
    """What is not there yet, method by method for each seed in turn: a machine that drifts drifts for all of them."""
    left = [(seed, method) for seed in seeds for method in methods if results.run(bench.of(method, seed)) is None]
    with contextlib.ExitStack() as stack:
        lab = None
        if bench.rate is not None and left:
            lab = stack.enter_context(Lab(bench.workers, bench.rate))
        for number, (seed, method) in enumerate(left, 1):
            started = time.perf_counter()
            outcome: Run | str
            try:
                outcome = bench.run(method, seed, lab)
                said = f"accuracy {outcome.accuracy:.2f} %, {outcome.train_s:.1f} s of training"
            except (ConfigError, WorkerFailed) as error:
                outcome = str(error)
                said = f"failed: {outcome}"
            results.add(bench.of(method, seed), outcome)
            took = time.perf_counter() - started
            print(
                f"{number}/{len(left)}  {method.name}, seed {seed}: {said} ({took:.0f} s)", file=sys.stderr, flush=True
            )


def _report(
    bench: Bench, methods: Sequence[Method], dense: str | None, results: Results, options: argparse.Namespace
) -> int:
    runs: dict[str, list[Run]] = {}
    failed: dict[str, list[str]] = {}
    for method in methods:
        found = [results.run(bench.of(method, seed)) for seed in options.seeds]
        runs[method.name] = [run for run in found if run is not None]
        errors = [results.error(bench.of(method, seed)) for seed in options.seeds]
        failed[method.name] = [error for error in errors if error is not None]
    dense_runs = runs[dense] if dense is not None else []
    target = _target(options.target, dense_runs)
    rows = [summarize(name, found, len(failed[name]), dense=dense_runs, target=target) for name, found in runs.items()]
    if options.json:
        print(_as_json(bench, options.seeds, dense, target, rows, failed), flush=True)
    else:
        print(table([row.cells(target) for row in rows]), flush=True)
    if len({run.steps for method in methods if method.servers is None for run in runs[method.name]}) > 1:
        print("methods took different numbers of steps: an option of the task's decides on them", file=sys.stderr)
    title = f"{Path(bench.task).stem}, {bench.workers} workers, {bench.rate or 'loopback'}"
    if options.png is not None:
        draw_progress(runs, options.png, title=title, target=target)
    if options.curve is not None:
        draw_curve(methods, runs, options.curve, title=title, dense=dense)
    return 1 if any(failed.values()) else 0


def _target(given: float | None, dense_runs: Sequence[Run]) -> float | None:
    """In percent."""
    if given is not None and given > 1:
        return given
    return (given or 0.95) * spread(run.accuracy for run in dense_runs).mean if dense_runs else None


def _as_json(
    bench: Bench,
    seeds: Sequence[int],
    dense: str | None,
    target: float | None,
    rows: Sequence[Row],
    failed: dict[str, list[str]],
) -> str:
    found = []
    for row in rows:
        fields = asdict(row)
        for name in ("accuracy", "to_target"):
            value = getattr(row, name)
            fields[name] = None if value is None else value._asdict()
        found.append(fields | {"errors": failed[row.method]})
    return json.dumps(asdict(bench) | {"seeds": list(seeds), "dense": dense, "target": target, "methods": found})


if __name__ == "__main__":
    raise SystemExit(main())
