"""Step time on a cluster of network namespaces, whose links are as slow as asked for: gradcomp beside DDP over Gloo.

Compressors, exchanges and transports are combined with each other; ``--method`` names one combination. It takes root
and iproute2. In each run steps of all methods alternate, and of the same model without any exchange; a ratio counts
only between steps of the same minute.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gradcomp import registry
from gradcomp.bench.cluster_rank import COMPUTE, Job
from gradcomp.bench.cluster_report import draw, finish, show, show_rate
from gradcomp.bench.lab import Lab
from gradcomp.bench.machine import describe_machine, free_memory_bytes
from gradcomp.bench.methods import TORCH_HOOKS, with_usual
from gradcomp.bench.step_time import MODELS
from gradcomp.errors import ConfigError, WorkerFailed
from gradcomp.options import check_choice, check_integer, check_number
from gradcomp.rules import choose
from gradcomp.transports.pacing import parse_rate

__all__ = ["main"]

Ways = dict[str, dict[str, Any]]

_NOT_HERE = {
    "server": "it needs parameter servers, which are not started here",
    "hierarchical": "each host runs one rank",
    "inproc": "it connects threads of one process",
}
# A process by itself; and for each parameter of each method: itself, its gradient, residual, and what is under way.
_PROCESS_BYTES, _PARAMETER_BYTES, _MEMORY_SHARE = 500 << 20, 16, 0.8
# Options that are every rank's.
_SAME = ("model", "batch_size", "threads", "bucket_mb", "overlap", "in_a_row", "steps", "warm_up", "budget_s")
_STEP_TIMEOUT_S, _START_TIMEOUT_S = 300.0, 300.0
# For ZeroMQ: nobody else is on this network; and nobody is lost because the steps of others fill a slow link for long.
_USUAL: dict[str, object] = {"insecure": True, "silence_s": 60.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark: prints a table a rate, or one JSON object.

    Raises:
        ConfigError: an option that is not allowed, or this machine or user makes no network namespaces.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(words)
    if options.in_a_row is None:
        options.in_a_row = 5 if options.overlap == "forward" else 1
    _check(options)
    rates, numel = _rates(options.rates), _numel(options.model)
    dense_s = {rate: 2 * 32 * numel * options.hosts / bits for rate, bits in rates.items()}  # no step takes longer
    timeout_s = _STEP_TIMEOUT_S + max(dense_s.values())
    ways = {name: _in_lab(way, timeout_s) for name, way in _ways(options).items()}
    machine = describe_machine()  # its load before ours
    rows: list[dict[str, Any]] = []
    with Lab(options.hosts, burst_bytes=options.link_burst) as lab:
        if any(way.get("transport", {}).get("id") == "zmq" for way in ways.values()):
            _say("zmq: insecure=true unless said otherwise: nobody else is on the network of these hosts")
        groups = _groups(ways, numel, options)
        runs = [
            (group, part)
            for part in ([[rate] for rate in rates] if options.anew else [list(rates)])
            for group in groups
        ]
        for number, (group, part) in enumerate(runs):
            if len(runs) > 1:
                _say(f"run {number + 1} of {len(runs)}: {', '.join(group)}")

            def take(rate: str, found: list[dict[str, Any]], number: int = number) -> None:
                done = [finish({"run": number, **row}, rate, rates[rate]) for row in found]
                rows.extend(done)
                report = sys.stderr if options.json else sys.stdout
                print(f"{show_rate(rates[rate])}\n{show(done)}\n", file=report, flush=True)

            a_method_s = _START_TIMEOUT_S + sum(2 * options.budget_s + 4 * seconds for seconds in dense_s.values())
            _run(lab, _job(options, group, part, timeout_s), (len(group) + 1) * a_method_s, take)
    result = {
        "command": shlex.join(["gradcomp", "bench", "cluster", *words]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "parameters": numel,
        **{key: getattr(options, key) for key in (*_SAME, "hosts", "link_burst")},
        "methods": ways,
        "rows": rows,
    }
    if options.json:
        print(json.dumps(result))
    if options.png:
        draw(result, options.png)
    return 0 if any(row["method"] != COMPUTE and not row.get("error") for row in rows) else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gradcomp bench cluster", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hosts", type=int, default=4, help="default: %(default)s")
    parser.add_argument(
        "--rates",
        default="10mbit,100mbit,1gbit,10gbit",
        metavar="RATE,...",
        help="of each host's link, both ways; default: %(default)s",
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="vgg11", help="default: %(default)s")
    usual = "default: {}, unless there is a --method"
    parser.add_argument("--compressors", nargs="+", metavar="SPEC", help=usual.format("threshold:density=0.001 none"))
    parser.add_argument("--exchanges", nargs="+", default=["auto"], metavar="SPEC", help="default: auto")
    parser.add_argument("--transports", nargs="+", default=["zmq"], metavar="SPEC", help="default: zmq")
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="COMPRESSOR/EXCHANGE/TRANSPORT",
        help="one combination, such as onebit/two_shot/gloo; what is left out is auto, zmq; repeatable",
    )
    parser.add_argument(
        "--ddp",
        default="fp32,fp16,bf16",
        metavar="HOOK,...",
        help="DistributedDataParallel over Gloo as it is (fp32) and with torch's hooks, or none; default: %(default)s",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="samples a host; default: %(default)s")
    parser.add_argument("--bucket-mb", type=float, default=25.0, help="MiB of gradients a bucket; default: 25")
    parser.add_argument("--threads", type=int, default=1, help="torch threads a host; default: %(default)s")
    parser.add_argument(
        "--overlap", choices=("backward", "forward"), default="backward", help="of gradcomp; default: %(default)s"
    )
    parser.add_argument("--in-a-row", type=int, metavar="N", help="steps of a method; default: 1, with forward 5")
    parser.add_argument("--steps", type=int, default=20, help="timed steps, or rows of them; default: %(default)s")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before those; default: %(default)s")
    parser.add_argument(
        "--budget-s",
        type=float,
        default=60.0,
        metavar="S",
        help="no more timed steps of a method at a rate than fit in S seconds, but at least 2 (rows); "
        "and half of it for those before; default: %(default)s",
    )
    parser.add_argument("--anew", action="store_true", help="start all anew for each rate, instead of going on")
    parser.add_argument("--at-once", type=int, metavar="N", help="methods in one run; default: what memory holds")
    parser.add_argument(
        "--link-burst",
        type=int,
        metavar="BYTES",
        help="what an idle link lets through before its rate holds; default: 4 ms of it, 64 to 512 KiB",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object; tables go to standard error")
    parser.add_argument("--png", metavar="FILE", help="draw step time against bandwidth")
    return parser


def _check(options: argparse.Namespace) -> None:
    owner = "bench cluster"
    for name in ("batch_size", "threads", "in_a_row", "warm_up"):
        check_integer(owner, name, getattr(options, name), at_least=1)
    check_integer(owner, "hosts", options.hosts, at_least=2)
    check_integer(owner, "steps", options.steps, at_least=2)
    if options.at_once is not None:
        check_integer(owner, "at_once", options.at_once, at_least=1)
    for name in ("budget_s", "bucket_mb"):
        check_number(owner, name, getattr(options, name), above=0)
    if options.png is not None:  # not only when all is measured
        if find_spec("matplotlib") is None:
            raise ConfigError("--png needs matplotlib: pip install 'gradcomp[demo]'")
        if not Path(options.png).parent.is_dir():
            raise ConfigError(f"--png {options.png}: there is no such folder")


def _rates(text: str) -> dict[str, float]:
    """Rates in bits per second, the fastest first: a method that takes no end of time then fails last."""
    found = {rate.strip(): parse_rate("bench cluster", rate.strip()) or 0.0 for rate in text.split(",")}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _ways(options: argparse.Namespace) -> Ways:
    """The methods by name, checked as far as can be without ranks."""
    compressors = options.compressors or ([] if options.method else ["threshold:density=0.001", "none"])
    combined = [*itertools.product(compressors, options.exchanges, options.transports), *map(_split, options.method)]
    ways: Ways = {}
    for hook in [] if options.ddp == "none" else options.ddp.split(","):
        check_choice("bench cluster", "ddp", hook.strip(), ("fp32", *TORCH_HOOKS, "none"))
        ways[f"ddp:{hook.strip()}"] = {"ddp": hook.strip()}
    for compressor, exchange, transport in combined:
        choose(compressor)
        for configured in (registry.exchange(exchange), registry.transport(transport)):
            if configured.id in _NOT_HERE:
                raise ConfigError(f"bench cluster: {configured.id!r} is not allowed: {_NOT_HERE[configured.id]}")
        shown = [compressor, exchange, transport]
        for usual in ("zmq", "auto"):
            if shown[-1] == usual:
                shown.pop()
        ways["/".join(shown)] = {"compressor": compressor, "exchange": exchange, "transport": transport}
    if not ways:
        raise ConfigError("bench cluster: there is nothing to measure: give --method, --compressors or --ddp")
    return ways


def _split(method: str) -> tuple[str, str, str]:
    parts = method.split("/")
    if not parts[0] or len(parts) > 3:
        raise ConfigError(
            f"bench cluster: --method {method!r} is not allowed; it must be COMPRESSOR/EXCHANGE/TRANSPORT, such as "
            "threshold:density=0.001/two_shot/zmq; without the last, or the last two: auto, zmq"
        )
    compressor, exchange, transport = parts + ["auto", "zmq"][len(parts) - 1 :]
    return compressor, exchange, transport


def _numel(model: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MODELS[model]().parameters())


def _groups(ways: Ways, numel: int, options: argparse.Namespace) -> list[Ways]:
    """Methods that fit into memory together, as evenly as they go."""
    at_once = options.at_once
    if at_once is None:
        room = _MEMORY_SHARE * free_memory_bytes() / options.hosts - _PROCESS_BYTES
        at_once = max(1, int(room / (_PARAMETER_BYTES * numel)) - 1)  # one is compute only
    runs = -(-len(ways) // at_once)
    if runs > 1:
        _say(f"{len(ways)} methods in {runs} runs of at most {at_once}, each with a {COMPUTE!r} of its own")
    names = list(ways)
    return [{name: ways[name] for name in names[i::runs]} for i in range(runs)]


def _run(lab: Lab, job: Job, timeout_s: float, take: Callable[[str, list[dict[str, Any]]], None]) -> None:
    """One program on each host, for all rates; ``take`` is handed a rate and its rows as they come."""
    got = 0
    with tempfile.TemporaryDirectory(prefix="gradcomp-cluster-") as folder:
        job = replace(job, folder=folder)

        def listen(line: str) -> None:
            nonlocal got
            if not line.startswith("{"):
                return  # not ours
            said = json.loads(line)
            if "wants" in said:
                _say(f"links of {said['wants']}: steps of {len(job.ways)} methods, and of compute only")
                lab.set_rate(said["wants"])
                Path(folder, f"rate{got}").touch()
            else:
                got += 1
                take(said["rate"], said["rows"])

        lab.set_rate(None)
        try:
            lab.run(
                [sys.executable, "-m", "gradcomp.bench.cluster_rank", job.to_argument()],
                timeout_s=timeout_s,
                environment={"OMP_NUM_THREADS": str(job.threads)},
                listener=listen,
            )
        except WorkerFailed as error:
            headline, _, written = str(error).partition("\n")
            _say(written)
            why = headline.rpartition(": ")[2]
            for rate in job.rates[got:]:
                take(rate, [{"method": name, "error": f"the run ended: {why}"} for name in job.ways])


def _job(options: argparse.Namespace, ways: Ways, rates: Sequence[str], timeout_s: float) -> Job:
    return Job(ways=ways, rates=rates, timeout_s=timeout_s, **{key: getattr(options, key) for key in _SAME})


def _in_lab(way: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """With what a transport needs here: the hosts' network is this machine's own, and slow."""
    if "ddp" in way:
        return way
    return way | {"transport": with_usual(way["transport"], {**_USUAL, "timeout_s": timeout_s})}


if __name__ == "__main__":
    raise SystemExit(main())
