"""Downpour SGD as in DistBelief: workers that wait for nobody, and a sharded server that runs Adagrad.

    torchrun --standalone --nproc-per-node 4 examples/downpour.py
    torchrun --standalone --nproc-per-node 4 examples/downpour.py --n-push 4 --n-fetch 4 --slow 3=0.05
    RANK=0 WORLD_SIZE=2 python examples/downpour.py --server HOST:5000,HOST:5001      one worker of two, anywhere

Rank 0 starts two shards on this machine unless ``--server`` names some. A worker that is killed leaves the others
alone; started again under its RANK it goes on from its clock.

J. Dean et al., "Large scale distributed deep networks", NeurIPS 2012.
"""

import argparse
import contextlib
import itertools
import json
import os
import time

import torch
from torch import nn

import gradcomp
from gradcomp.examples.tasks.digits import lenet, load_digits
from gradcomp.integrations.local_servers import servers_for_all

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--server", help="HOST:PORT,... instead of two that rank 0 starts")
    parser.add_argument("--compressor", default="threshold:density=0.005")
    parser.add_argument("--n-push", type=int, default=1)
    parser.add_argument("--n-fetch", type=int, default=1)
    parser.add_argument("--warm-start", type=int, default=50, help="updates that one worker makes alone")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--slow", default="-1=0", help="RANK=SECONDS: that worker sleeps so long in every step")
    options = parser.parse_args()

    rank, workers = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    slow_rank, _, slow_s = options.slow.partition("=")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = lenet()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    (images, digits), (test_images, test_digits) = load_digits()
    mode = f"async:n_push={options.n_push},n_fetch={options.n_fetch},warm_start={options.warm_start}"

    with contextlib.ExitStack() as stack:
        given = options.server and options.server.split(",")
        addresses = given or stack.enter_context(servers_for_all(2))
        sync = stack.enter_context(
            gradcomp.attach(
                optimizer,
                model=model,
                compressor=options.compressor,
                exchange={"id": "server", "addresses": addresses, "mode": mode, "workers": workers},
            )
        )
        # The run is over when the server has made so many updates, whoever made them.
        updates = options.epochs * len(images) // BATCH // options.n_push
        batches = torch.Generator().manual_seed(rank)
        for step in itertools.count(sync.step):
            rows = torch.randint(len(images), (BATCH,), generator=batches.manual_seed(step * workers + rank))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[rows]), digits[rows])
            loss.backward()
            if rank == int(slow_rank):
                time.sleep(float(slow_s))
            optimizer.step()  # pushes, and pulls what the server made of it
            stats = sync.stats()
            if stats["version"] >= updates:
                break
        sync.pull()
        with torch.no_grad():
            right = model(test_images).argmax(1) == test_digits
        result = {"rank": rank, "steps": step + 1, "updates": stats["version"]}
        result |= {"accuracy": round(100 * right.float().mean().item(), 2), "staleness": stats["staleness"]}
        result |= {name: round(stats[name], 1) for name in ("ratio", "pull_ratio")}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
