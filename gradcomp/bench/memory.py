"""Memory that compressed exchange adds to a training process, beside what it may: residual + two buckets + packets.

Two processes a rank, one after the other: the same network trained alone and with gradients exchanged over ZeroMQ on
loopback. The difference of their peak resident sizes is what exchange costs.
"""

from __future__ import annotations

import argparse
import json
import resource
import socket
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import gradcomp

__all__ = ["main"]

_MIB = 1 << 20


def network(megabytes: int) -> nn.Sequential:
    """So many MB of float32 parameters, 4 MB a layer."""
    return nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(max(1, megabytes // 4))))


def _train(rank: int, workers: int, port: int, options: argparse.Namespace, results: Any, attached: bool) -> None:
    torch.set_num_threads(1)
    model = network(options.megabytes)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sync = None
    if attached:
        transport = gradcomp.transport(
            {"id": "zmq", "rank": rank, "world_size": workers, "master": f"127.0.0.1:{port}"}
        )
        sync = gradcomp.attach(
            optimizer, model=model, compressor=options.compressor, exchange=options.exchange, transport=transport
        )
    packets, residuals = 0.0, 0
    inputs = torch.randn(8, 1000, generator=torch.Generator().manual_seed(rank))
    for _ in range(options.steps):
        optimizer.zero_grad(set_to_none=False)  # gradients stay allocated, as memory of the training itself
        model(inputs).square().mean().backward()
        optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if sync is not None:
        stats = sync.stats()
        packets = workers * stats["packet_bytes"] / stats["steps"]
        residuals = _tensor_bytes(sync.state_dict()["states"])
        sync.close()
    if rank == 0:
        results.put((peak, packets, residuals))


def _tensor_bytes(tree: Any) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    return sum(_tensor_bytes(branch) for branch in tree.values())


def _peak(workers: int, options: argparse.Namespace, attached: bool) -> tuple[float, float, int]:
    """Bytes: rank 0's peak resident size, all ranks' packets of a step, and what rank 0 keeps between steps."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_train, args=(rank, workers, port, options, results, attached), daemon=True)
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300.0)
        if process.exitcode != 0:
            raise gradcomp.WorkerFailed(f"a worker ended with exit status {process.exitcode}")
    found: tuple[float, float, int] = results.get()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; prints what exchange adds and what it may add."""
    parser = argparse.ArgumentParser(prog="gradcomp bench memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=100, help="size of the model")
    parser.add_argument("--compressor", default="threshold:density=0.001")
    parser.add_argument("--exchange", default="auto")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    alone, _, _ = _peak(1, options, attached=False)
    exchanged, packets, residuals = _peak(options.workers, options, attached=True)
    model_bytes = 4 * sum(p.numel() for p in network(options.megabytes).parameters())
    allowed = residuals + 2 * 25 * _MIB + packets
    result = {
        "compressor": options.compressor,
        "exchange": options.exchange,
        "workers": options.workers,
        "model_mib": round(model_bytes / _MIB, 1),
        "alone_mib": round(alone / _MIB, 1),
        "added_mib": round((exchanged - alone) / _MIB, 1),
        "allowed_mib": round(allowed / _MIB, 1),
        "residuals_mib": round(residuals / _MIB, 1),
        "packets_mib": round(packets / _MIB, 2),
    }
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:12} {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
