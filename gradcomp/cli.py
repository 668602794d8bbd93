"""The command line: ``gradcomp train | worker | server | plan | report | top | compressors | demo | bench | doctor``.

Exit status: 0 done, 1 a worker or a benchmark failed, 2 the command line or an option is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradcomp.errors import ConfigError, GradcompError
from gradcomp.version import __version__

if TYPE_CHECKING:
    from gradcomp.integrations.worker import RunOptions

__all__ = ["main"]

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

# What parses its own options has a module with main(argv).
BENCHMARKS = {
    "codecs": "gradcomp.bench.codecs",
    "all-gather": "gradcomp.bench.all_gather",
    "step-time": "gradcomp.bench.step_time",
    "step": "gradcomp.bench.step_alone",
    "ddp-hooks": "gradcomp.bench.ddp_hooks",
    "memory": "gradcomp.bench.memory",
    "cluster": "gradcomp.bench.cluster",
    "train": "gradcomp.bench.train",
}
TOOLS: dict[str, tuple[str, str]] = {  # command: its module, and what it is for
    "plan": ("gradcomp.bench.plan", "probe link, codecs and network, and say which method to use, and why"),
    "report": ("gradcomp.integrations.report_page", "make an HTML page, and pictures, of the logs of runs"),
    "top": ("gradcomp.integrations.top", "watch a run that writes a log, live in the terminal"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name; ``sys.argv`` if None) and return its exit status."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.run is not _module:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(arguments.run(arguments, rest))
    except ConfigError as error:
        print(f"gradcomp: {error}", file=sys.stderr)
        return USAGE
    except GradcompError as error:
        headline, _, details = str(error).partition("\n")
        print(*filter(None, (details, f"gradcomp: {headline}")), sep="\n", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("gradcomp: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gradcomp", description="Train across slow links with compressed gradients.")
    parser.add_argument("--version", action="version", version=f"gradcomp {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = argparse.ArgumentParser(add_help=False)
    run.add_argument("task", metavar="TASK", help="a Python file or a module with a function task()")
    run.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an argument for task(); repeatable",
    )
    run.add_argument(
        "--compressor",
        metavar="SPEC",
        default="threshold",
        help="or @FILE: rules by parameter, in JSON; default: %(default)s",
    )
    run.add_argument("--transport", metavar="SPEC", help="default: zmq, or what the exchange brings")
    run.add_argument("--exchange", metavar="SPEC", default="auto", help="default: %(default)s")
    run.add_argument(
        "--overlap",
        choices=("backward", "forward"),
        default="backward",
        help="what hides the exchange: backward, or the next forward pass, too; default: %(default)s",
    )
    run.add_argument("--server", metavar="HOST:PORT,...", help="a parameter server's shards, instead of an exchange")
    run.add_argument("--mode", metavar="SPEC", help="of the server: sync, async, ssp, softsync; default: sync")
    run.add_argument("--pull", metavar="SPEC", help="compressor of what comes back from the server")
    run.add_argument("--epochs", type=int, metavar="N", help="in place of the task's own")
    run.add_argument(
        "--batch-size", type=int, metavar="N", help="samples a worker takes per step, in place of the task's own"
    )
    run.add_argument("--seed", type=int, metavar="N", default=0, help="default: %(default)s")
    run.add_argument("--device", choices=("cpu", "cuda", "auto"), default="cpu", help="default: %(default)s")
    run.add_argument("--log", metavar="FILE", help="write one JSON object a step; `report` and `top` show it")
    run.add_argument(
        "--log-layers",
        type=int,
        metavar="K",
        default=10,
        help="how each layer does, every K steps; default: %(default)s",
    )
    run.add_argument("--tensorboard", metavar="DIR", help="write scalars for TensorBoard")
    run.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    run.add_argument("--quiet", action="store_true", help="no progress")
    run.add_argument("--slow", help=argparse.SUPPRESS)  # RANK=SECONDS: a straggler, for experiments
    run.add_argument("--summary", help=argparse.SUPPRESS)  # where the demo finds a run's result
    run.add_argument("--label", default="", help="what the progress starts with; default: the compressor")

    train = commands.add_parser("train", parents=[run], help="train a task in worker processes on this machine")
    train.add_argument("--workers", type=int, metavar="N", default=2, help="default: %(default)s")
    train.add_argument("--servers", type=int, metavar="N", help="through a parameter server of N shards, started here")
    train.set_defaults(run=_train)

    worker = commands.add_parser("worker", parents=[run], help="be one worker; for torchrun on many hosts")
    worker.add_argument(
        "--launched", action="store_true", help=argparse.SUPPRESS
    )  # by `train`, which explains failures
    worker.set_defaults(run=_worker)

    server = commands.add_parser("server", help="be one shard of a parameter server")
    _add_server_options(server)
    server.set_defaults(run=_server)

    listing = commands.add_parser("compressors", help="list compressors with their options and defaults")
    listing.set_defaults(run=_compressors)

    demo = commands.add_parser("demo", help="train a CNN over slow links, dense beside compressed (2 to 3 minutes)")
    demo.add_argument("--out", metavar="FILE", default="gradcomp-demo.png", help="the picture; default: %(default)s")
    demo.add_argument("--seed", type=int, metavar="N", default=0, help="default: %(default)s")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="benchmarks", add_help=False)
    bench.add_argument(
        "name",
        choices=tuple(BENCHMARKS),
        help="what to measure; --help after it",
    )
    bench.set_defaults(run=_module)
    for name, (module, purpose) in TOOLS.items():
        commands.add_parser(name, help=purpose, add_help=False).set_defaults(run=_module, module=module)

    doctor = commands.add_parser("doctor", help="say which kernels run here and why, and what else matters")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_server_options(server: argparse.ArgumentParser) -> None:
    server.add_argument("--bind", metavar="IP:PORT", default="127.0.0.1:0", help="port 0: any; default: %(default)s")
    server.add_argument("--state", metavar="DIR", help="keep its state there, and go on from what is there already")
    server.add_argument("--checkpoint-updates", type=int, metavar="K", help="write the state each K updates")
    server.add_argument(
        "--checkpoint-s", type=float, metavar="S", default=30.0, help="... and each S seconds; default: %(default)s"
    )
    server.add_argument(
        "--fsync", action="store_true", help="nothing is acknowledged before the disk has it: for the machine's death"
    )
    server.add_argument(
        "--lease-s",
        type=float,
        metavar="S",
        default=10.0,
        help="forget workers silent for so long; default: %(default)s",
    )
    server.add_argument(
        "--max-elements", type=int, metavar="N", default=1 << 28, help="take no larger shard; default: %(default)s"
    )
    server.add_argument("--threads", type=int, metavar="N", default=1, help="for arithmetic; default: %(default)s")
    server.add_argument("--rate", metavar="RATE", help="send no faster, such as 100mbit")
    server.add_argument("--insecure", action="store_true", help="allow another address than loopback, in the clear")
    server.add_argument("--exit-when-done", action="store_true", help="end when all workers came and are gone")
    server.add_argument("--quiet", action="store_true", help="no progress")
    server.add_argument("--status", metavar="HOST:PORT", help="print the status of the server there as JSON, and end")


def _server(arguments: argparse.Namespace, rest: list[str]) -> int:
    from gradcomp.integrations.serve import ServeOptions, look, serve
    from gradcomp.transports.server_loop import ServerLoop

    if arguments.status is not None:
        print(json.dumps(look(arguments.status)))
        return DONE
    options = ServeOptions(**{name: getattr(arguments, name) for name in ServeOptions.__dataclass_fields__})
    return serve(
        options,
        lambda service, before_replies: ServerLoop(
            service,
            bind=options.bind,
            insecure=options.insecure,
            max_message_bytes=options.max_message_bytes,
            rate=options.rate,
            before_replies=before_replies,
        ),
    )


def _options(arguments: argparse.Namespace, **more: str) -> RunOptions:
    from gradcomp.integrations.worker import RunOptions

    fields = {name: getattr(arguments, name) for name in RunOptions.__dataclass_fields__}
    return RunOptions(**(fields | {"settings": tuple(arguments.settings)} | more))


def _train(arguments: argparse.Namespace, rest: list[str]) -> int:
    from gradcomp.integrations.launch import launch
    from gradcomp.integrations.local_servers import local_servers

    with contextlib.ExitStack() as stack:
        if arguments.servers is not None:
            if arguments.server is not None:
                raise ConfigError("--servers starts servers, --server names those that are there: give one of them")
            _options(arguments, server="127.0.0.1:1").check()  # before anything is started
            arguments.server = ",".join(stack.enter_context(local_servers(arguments.servers)))
        options = _options(arguments)
        options.check()
        launch(options.to_arguments(), workers=arguments.workers)
    return DONE


def _worker(arguments: argparse.Namespace, rest: list[str]) -> int:
    from gradcomp.integrations.worker import work

    return work(_options(arguments), launched=arguments.launched)


def _compressors(arguments: argparse.Namespace, rest: list[str]) -> int:
    import gradcomp

    for name in gradcomp.available_compressors():
        found = gradcomp.compressor(name)
        options = {key: value for key, value in found.config().items() if key != "id"}
        about = (type(found).__doc__ or "").strip().partition("\n")[0]
        print(f"{name:12}{about}")
        for key, value in options.items():
            print(f"{'':12}  {key}={json.dumps(value)}")
    return DONE


def _demo(arguments: argparse.Namespace, rest: list[str]) -> int:
    from gradcomp.integrations.demo import demo

    demo(out=arguments.out, seed=arguments.seed)
    return DONE


def _module(arguments: argparse.Namespace, rest: list[str]) -> int:
    module = BENCHMARKS[arguments.name] if hasattr(arguments, "name") else arguments.module
    return int(importlib.import_module(module).main(rest))


def _doctor(arguments: argparse.Namespace, rest: list[str]) -> int:
    from gradcomp.integrations.doctor import examine

    findings = examine()
    if arguments.json:
        print(json.dumps({f.subject: {"found": f.found, "advice": f.advice} for f in findings}))
        return DONE
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(f"{finding.subject:{width}}  {finding.found}")
        if finding.advice:
            print(f"{'':{width}}  -> {finding.advice}")
    return DONE
