"""What to use on this link, for this network: probe, forecast every method, and say why. Dense is one of them.

On all ranks, started by torchrun or whatever sets RANK and WORLD_SIZE as it does::

    torchrun --nproc-per-node 4 --no-python gradcomp plan --model vgg11

or by itself, for a cluster that is not there, with this machine's codecs and computing::

    gradcomp plan --model vgg11 --workers 64 --bandwidth 1gbit --latency-ms 0.2

``--check`` measures the methods as well; ``--lab 4 --rates 10mbit,1gbit`` does all of that in network namespaces.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gradcomp import registry
from gradcomp.bench.meeting import Meeting
from gradcomp.bench.plan_check import in_lab, measure
from gradcomp.bench.plan_methods import Bench, Method, Mixture, Prediction, best_of, mix
from gradcomp.bench.plan_report import advice, checked_table, report
from gradcomp.bench.probe_codecs import probe_codecs, take_samples
from gradcomp.bench.probe_link import MAX_MESSAGE_BYTES, LinkProbe, probe_link
from gradcomp.bench.probe_model import ModelProbe, Workload, load_workload, probe_model
from gradcomp.compressors.cast import NoCompression
from gradcomp.errors import ConfigError
from gradcomp.forecast import CodecCost, Link
from gradcomp.interfaces import Compressor, Transport
from gradcomp.options import check_integer, check_number
from gradcomp.registry import format_spec
from gradcomp.transports import environment
from gradcomp.transports.pacing import parse_rate

__all__ = ["main", "options_from", "plan_for", "specs"]

_COMPRESSORS = "none,fp16,bf16,threshold,topk,onebit,int8,powersgd"
# Of ranks that cannot be probed: what zmq took between namespaces of one machine.
_CPU_S_PER_BYTE, _CPU_S_PER_MESSAGE = 2e-9, 1e-4
_SLOWER = 1.2  # than the median rank: the slowest rank's step is what all wait for


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; rank 0 prints."""
    options = options_from(argv)
    if options.lab is not None:
        return _lab(options)
    if options.workers is None and environment.world_size() < 2:
        raise ConfigError(
            "plan: there is one rank here, and nothing to plan for: run it on all ranks under torchrun, or say "
            "which cluster is meant with --workers N --bandwidth RATE, or try --lab HOSTS --rates RATE,..."
        )
    torch.set_num_threads(options.threads)
    workload = load_workload(
        options.model, batch_size=options.batch_size, settings=options.settings, device=options.device
    )
    transport = None if options.workers is not None else registry.transport(options.transport or "zmq")
    result = plan_for(options, workload, transport)
    if result is None:
        return 0
    if options.json:
        print(json.dumps(result), flush=True)
    else:
        print(report(result), flush=True)
        if options.check:
            print("\n" + checked_table([result]), flush=True)
    return 0


def options_from(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        ConfigError: options that are out of range, or do not go together.
    """
    options = _parser().parse_args(argv)
    _check(options)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gradcomp plan", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--model", default="vgg11", help="dense, vgg11, vgg16, or a task's file or module; default: %(default)s"
    )
    parser.add_argument("--set", dest="settings", metavar="KEY=VALUE", action="append", default=[], help="of the task")
    parser.add_argument("--batch-size", type=int, default=8, help="samples a rank takes; default: %(default)s")
    parser.add_argument("--device", default="cpu", help="where the network is computed; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="torch threads a rank; default: %(default)s")
    parser.add_argument("--compressors", metavar="SPEC,...", default=_COMPRESSORS, help="default: %(default)s")
    parser.add_argument("--exchanges", metavar="SPEC,...", default="auto", help="default: %(default)s")
    parser.add_argument("--overlap", choices=("backward", "forward"), default="backward")
    parser.add_argument("--bucket-mb", type=float, default=25.0, help="MiB of gradients a bucket; default: 25")
    parser.add_argument("--transport", metavar="SPEC", help="of the ranks that are here; default: zmq")
    parser.add_argument("--workers", type=int, metavar="N", help="plan for so many ranks that are not here")
    parser.add_argument("--bandwidth", metavar="RATE", help="of each of their hosts, both ways, such as 10gbit")
    parser.add_argument("--latency-ms", type=float, default=0.1, help="one way between them; default: %(default)s")
    parser.add_argument("--topology", default="flat", help="flat, or hosts:R: R ranks share a host's link")
    parser.add_argument(
        "--cores", type=float, metavar="C", help="of each of their ranks; default: all of this machine's"
    )
    parser.add_argument("--check", action="store_true", help="measure the methods as well")
    parser.add_argument("--steps", type=int, default=8, help="that are measured of each method; default: %(default)s")
    parser.add_argument("--lab", type=int, metavar="HOSTS", help="run on hosts that are network namespaces (root)")
    parser.add_argument("--rates", metavar="RATE,...", default="1gbit", help="of their links; default: %(default)s")
    parser.add_argument("--rules", metavar="FILE", help='write what is advised, for compressor="@FILE"')
    parser.add_argument("--json", action="store_true", help="print one JSON object, or with --lab a line a rate")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name in ("batch_size", "threads", "steps"):
        check_integer("plan", name, getattr(options, name), at_least=1)
    check_number("plan", "bucket_mb", options.bucket_mb, above=0.0)
    check_number("plan", "latency_ms", options.latency_ms, at_least=0.0)
    for spec in specs(options.compressors):
        registry.compressor(spec)
    for spec in specs(options.exchanges):
        registry.exchange(spec)
    if options.workers is None:
        if options.bandwidth is not None:
            raise ConfigError("plan: --bandwidth is of ranks that are not here: give --workers too")
    else:
        check_integer("plan", "workers", options.workers, at_least=2)
        if options.bandwidth is None:
            raise ConfigError("plan: --workers needs --bandwidth, such as 10gbit")
        if options.check or options.lab is not None:
            raise ConfigError("plan: a cluster that is not there cannot be measured: leave --check and --lab out")
        _imagined(options)
    if options.cores is not None:
        check_number("plan", "cores", options.cores, above=0.0)


def specs(text: str) -> list[str]:
    """Spec strings separated by commas, which also separate options: what has ``=`` and no ``:`` is one of these."""
    found: list[str] = []
    for part in text.split(","):
        if found and "=" in part and ":" not in part.partition("=")[0]:
            found[-1] += "," + part
        else:
            found.append(part)
    return found


def _imagined(options: argparse.Namespace) -> Link:
    """The link of one rank of a cluster that is not there."""
    rate = (parse_rate("plan", options.bandwidth) or 0.0) / 8
    kind, _, number = options.topology.partition(":")
    if kind == "hosts" and number.isdecimal() and int(number) > 0:
        ranks = int(number)
        if ranks >= options.workers:
            raise ConfigError(
                f"plan: topology={options.topology!r} puts all {options.workers} workers on one host: no link is used"
            )
        # What goes to ranks of the same host does not cross its link.
        rate *= (options.workers - 1) / (options.workers - ranks) / ranks
    elif options.topology != "flat":
        raise ConfigError(f"plan: topology={options.topology!r} is not allowed; it must be flat, or hosts:R")
    return Link(
        latency_s=1e-3 * options.latency_ms,
        bytes_per_s=rate,
        cpu_s_per_byte=_CPU_S_PER_BYTE,
        cpu_s_per_message=_CPU_S_PER_MESSAGE,
    )


def plan_for(options: argparse.Namespace, workload: Workload, transport: Transport | None) -> dict[str, Any] | None:
    """Probe, forecast and advise; every rank calls it.

    Args:
        transport: between the ranks that are here, not connected; None: for ranks that are not.

    Returns:
        What ``--json`` prints, on rank 0; None on others.
    """
    try:
        if transport is not None:
            transport.connect(
                {"plan": options.model}, max_message_bytes=MAX_MESSAGE_BYTES, max_unclaimed_bytes=4 * MAX_MESSAGE_BYTES
            )
        meeting = Meeting(transport)
        names = [format_spec(registry.compressor(spec)) for spec in specs(options.compressors)]
        codecs: list[Compressor] = [NoCompression(), *(registry.compressor(spec) for spec in names if spec != "none")]
        model = _of_all_models(meeting, probe_model(workload, meeting))
        samples = take_samples(workload)
        costs = _of_all_costs(meeting, probe_codecs(codecs, samples, meeting))
        pairs = None if transport is None else probe_link(meeting)
    finally:
        if transport is not None:
            transport.close()
    if options.workers is not None:  # whatever else runs on this machine now will not run there
        model = dataclasses.replace(model, cores=options.cores or model.machine_cores, thread_cores=1.0)
    bench = Bench(
        named=workload.named_parameters,
        model=model,
        costs=costs,
        link=_imagined(options) if pairs is None else pairs.link(),
        world_size=options.workers or meeting.world_size,
        bucket_bytes=int(options.bucket_mb * 2**20),
        overlap=options.overlap,
    )
    methods = [Method(spec, exchange) for exchange in specs(options.exchanges) for spec in names]
    predictions, refused = bench.predict_all(methods)
    if not predictions:
        raise ConfigError("plan: no method is to be had: " + "; ".join(refused.values()))
    measured = _measure_all(options, bench, workload, predictions) if options.check else {}
    if meeting.rank != 0:
        return None
    mixture = mix(bench, best_of(predictions))
    result = _result(options, bench, pairs, predictions, refused, mixture)
    for row in result["methods"]:
        row |= measured.get(Method(row["compressor"], row["exchange"]), {})
    if options.rules is not None:
        _write_rules(options.rules, mixture)
    return result


def _of_all_models(meeting: Meeting, mine: ModelProbe) -> ModelProbe:
    """The median rank's times, or the slowest's if it is far behind: everybody waits for it."""
    found = [ModelProbe(**one) for one in meeting.gather(dataclasses.asdict(mine))]
    steps = [one.forward_s + one.backward_s + one.optimizer_s for one in found]
    if max(steps) > _SLOWER * statistics.median(steps):
        return found[steps.index(max(steps))]
    names = [field.name for field in dataclasses.fields(ModelProbe) if field.name != "parameter_ready_s"]
    medians: dict[str, Any] = {name: statistics.median(getattr(one, name) for one in found) for name in names}
    ready = {name: statistics.median(one.parameter_ready_s[name] for one in found) for name in mine.parameter_ready_s}
    return ModelProbe(**(medians | {"ranks_here": mine.ranks_here, "parameter_ready_s": ready}))


def _of_all_costs(meeting: Meeting, mine: dict[str, CodecCost]) -> dict[str, CodecCost]:
    """Medians over ranks."""
    found = meeting.gather({spec: dataclasses.asdict(cost) for spec, cost in mine.items()})
    medians: dict[str, CodecCost] = {}
    for spec, cost in mine.items():
        fields: dict[str, Any] = {
            name: statistics.median(one[spec][name] for one in found) for name in dataclasses.asdict(cost)
        }
        medians[spec] = CodecCost(**(fields | {"rounds": cost.rounds}))
    return medians


def _measure_all(
    options: argparse.Namespace, bench: Bench, workload: Workload, predictions: Sequence[Prediction]
) -> dict[Method, dict[str, float]]:
    """What was measured of each, and how wrong the forecast was: as it is, and for the cores that were left then."""
    found = {}
    for one in sorted(predictions, key=lambda p: (p.method.compressor, p.method.exchange)):  # alike on all ranks
        got = measure(
            workload,
            one.method,
            transport=options.transport,
            bucket_bytes=bench.bucket_bytes,
            overlap=options.overlap,
            steps=options.steps,
        )
        then = bench.when_computing_took(got.compute_s).predict(one.method)
        found[one.method] = {
            "measured_ms": 1e3 * got.step_s,
            "measured_compute_ms": 1e3 * got.compute_s,
            "measured_mb": got.sent_bytes / 1e6,
            "measured_core_ms": 1e3 * got.core_s,
            "error": one.step_s / got.step_s - 1,
            "error_then": then.step_s / got.step_s - 1,
        }
    return found


def _result(
    options: argparse.Namespace,
    bench: Bench,
    pairs: LinkProbe | None,
    predictions: Sequence[Prediction],
    refused: Mapping[Method, str],
    mixture: Mixture,
) -> dict[str, Any]:
    model, link, best = bench.model, bench.link, mixture.prediction
    compute_s = best.forecast.compute_s
    rules = None if mixture.rules is None else mixture.rules.config()
    compressor = f"@{options.rules}" if options.rules is not None and rules else best.method.compressor
    more = "" if options.overlap == "backward" else ', overlap="forward"'
    more += "" if options.bucket_mb == 25.0 else f", bucket_bytes={int(options.bucket_mb * 2**20)}"
    return {
        "model": options.model,
        "parameters": sum(tensor.numel() for _, tensor in bench.named),
        "world_size": bench.world_size,
        "overlap": options.overlap,
        "profile": {
            "forward_ms": 1e3 * model.forward_s,
            "backward_ms": 1e3 * model.backward_s,
            "optimizer_ms": 1e3 * model.optimizer_s,
            "compute_ms": 1e3 * compute_s,
            "wall_ms": 1e3 * model.wall_s,
            "cores": model.cores,
            "thread_cores": model.thread_cores,
            "ranks_here": model.ranks_here,
        },
        "link": {
            "latency_ms": 1e3 * link.latency_s,
            "mbit_per_s": 8e-6 * link.bytes_per_s,
            "cpu_ns_per_byte": 1e9 * link.cpu_s_per_byte,
            "cpu_us_per_message": 1e6 * link.cpu_s_per_message,
            "burst_kib": link.burst_bytes / 1024,
        },
        "pairs": None if pairs is None else dataclasses.asdict(pairs),
        "codecs": {spec: dataclasses.asdict(cost) for spec, cost in bench.costs.items()},
        "methods": [
            {
                "compressor": one.method.compressor,
                "exchange": one.method.exchange,
                "step_ms": 1e3 * one.step_s,
                "times_compute": one.step_s / one.forecast.compute_s,
                "sent_mb": one.forecast.sent_bytes / 1e6,
                "exposed_ms": 1e3 * one.forecast.exposed_s,
                "core_ms": 1e3 * one.core_s(link),
            }
            for one in predictions
        ],
        "refused": {f"{method.compressor} with {method.exchange}": why for method, why in refused.items()},
        "best": {**dataclasses.asdict(best.method), "step_ms": 1e3 * best.step_s},
        "buckets": [
            {
                "ready_ms": 1e3 * bucket.ready_s,
                "encode_ms": 1e3 * bucket.encode_s,
                "sent_mb": bucket.sent_bytes / 1e6,
                "wire_ms": 1e3 * bucket.wire_s,
                "decode_ms": 1e3 * bucket.decode_s,
                "exposed_ms": 1e3 * bucket.exposed_s,
                **dataclasses.asdict(what),
            }
            for bucket, what in zip(best.forecast.buckets, mixture.buckets, strict=True)
        ],
        "rules": rules,
        "advice": advice(bench, predictions, mixture),
        "use": f'gradcomp.attach(optimizer, model=model, compressor="{compressor}", '
        f'exchange="{best.method.exchange}"{more})',
    }


def _write_rules(path: str, mixture: Mixture) -> None:
    rules: dict[str, object] = {"rules": [], "default": mixture.prediction.method.compressor}
    if mixture.rules is not None:
        rules = mixture.rules.config()
    try:
        Path(path).write_text(json.dumps(rules, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"plan: --rules {path!r}: {error}") from None


def _lab(options: argparse.Namespace) -> int:
    rates = options.rates.split(",")
    for rate in rates:
        parse_rate("plan", rate)
    arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in _HANDED_ON]
    arguments += [f"--set={setting}" for setting in options.settings]
    arguments += [f"--transport={options.transport or 'zmq:insecure=true'}", *(["--check"] if options.check else [])]
    results = []
    for result in in_lab(options.lab, rates, arguments):
        results.append(result)
        print(json.dumps(result) if options.json else f"== links of {result['rate']}\n\n{report(result)}\n", flush=True)
    if options.check and not options.json:
        print(checked_table(results), flush=True)
    return 0


_HANDED_ON = (
    "model",
    "batch_size",
    "device",
    "threads",
    "compressors",
    "exchanges",
    "overlap",
    "bucket_mb",
    "steps",
)


if __name__ == "__main__":
    raise SystemExit(main())
