"""All-gather of one packet from every rank: how long it takes, beside Gloo's in the same minutes.

Every rank runs it, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set as torchrun does::

    torchrun --nproc-per-node 4 -m gradcomp.bench.all_gather --sizes 0.1,4 --rounds 20 --beside-gloo
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from gradcomp.errors import ConfigError
from gradcomp.interfaces import Slot, Transport
from gradcomp.registry import transport
from gradcomp.transports.pacing import parse_rate

__all__ = ["main"]

# A rank may begin an all-gather early or late, but not all of several in a row: their mean is what one takes.
_IN_A_ROW = 5

Gather = Callable[[bytes, int], None]


def _with_transport(connection: Transport) -> Gather:
    def gather(payload: bytes, step: int) -> None:
        found = connection.all_gather(Slot(step, 0, 0), payload)
        if any(len(one) != len(payload) for one in found):
            raise RuntimeError("all-gather returned another size")

    return gather


def _with_gloo(world_size: int) -> Gather:
    def gather(payload: bytes, step: int) -> None:
        mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        out = [torch.empty_like(mine) for _ in range(world_size)]
        dist.all_gather(out, mine)

    return gather


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; rank 0 prints a table, or a JSON line a measurement."""
    parser = argparse.ArgumentParser(prog="gradcomp bench all-gather", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--transport", action="append", help="spec, e.g. zmq:insecure=true; several alternate (default: zmq)"
    )
    parser.add_argument("--sizes", default="0.1,4", help="MiB from each rank, comma-separated (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=20, help="times 5 all-gathers of each size (default: %(default)s)"
    )
    parser.add_argument("--link", help="rate of the link, e.g. 1gbit: print the share of it that was used")
    parser.add_argument("--beside-gloo", action="store_true", help="measure torch.distributed's Gloo, alternating")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    options = parser.parse_args(argv)
    try:
        sizes = [int(float(text) * (1 << 20)) for text in options.sizes.split(",")]
    except ValueError:
        raise ConfigError(f"--sizes {options.sizes!r} must be numbers separated by commas") from None
    link_bits_per_s = parse_rate("all_gather", options.link)

    connections = [transport(spec) for spec in options.transport or ["zmq"]]
    connection = connections[0]
    rank, world_size = connection.rank, connection.world_size
    gathers: dict[str, Gather] = {}
    for one in connections:
        one.connect({"bench": "all_gather"}, max_message_bytes=max(sizes))
        gathers[one.id] = _with_transport(one)
    if options.beside_gloo:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        gathers["raw gloo"] = _with_gloo(world_size)
    step = 0
    try:
        for size in sizes:
            payload = os.urandom(size)
            took_s: dict[str, list[float]] = {name: [] for name in gathers}
            for number in range(options.rounds + 1):
                for name, gather in gathers.items():
                    connection.all_gather(Slot(step, 0, 1), b"")  # all begin together
                    begin = time.perf_counter()
                    for _ in range(_IN_A_ROW):
                        gather(payload, step)
                        step += 1
                    if number > 0:  # the first one fills caches and opens windows
                        took_s[name].append((time.perf_counter() - begin) / _IN_A_ROW)
            if rank == 0:
                for name, times in took_s.items():
                    _report(name, size * (world_size - 1), size, times, link_bits_per_s, as_json=options.json)
    finally:
        for one in connections:
            one.close()
        if options.beside_gloo:
            dist.destroy_process_group()
    return 0


def _report(
    name: str, received_bytes: int, size: int, times: list[float], link: float | None, *, as_json: bool
) -> None:
    median_s = statistics.median(times)
    found = {
        "transport": name,
        "mib": size / (1 << 20),
        "median_ms": 1e3 * median_s,
        "min_ms": 1e3 * min(times),
        "max_ms": 1e3 * max(times),
        "received_gb_per_s": received_bytes / median_s / 1e9,
    }
    if link is not None:
        found["link_share"] = received_bytes * 8 / link / median_s
    if as_json:
        print(json.dumps(found), flush=True)
    else:
        share = f"  {found['link_share']:.1%} of the link" if link is not None else ""
        print(
            f"{name:8} {found['mib']:8.2f} MiB  median {found['median_ms']:9.2f} ms  "
            f"({found['min_ms']:.2f}..{found['max_ms']:.2f})  {found['received_gb_per_s']:.3f} GB/s{share}",
            flush=True,
        )


if __name__ == "__main__":
    raise SystemExit(main())
