"""n-softsync: how stale gradients are, and what it helps to divide the learning rate by their staleness.

    torchrun --standalone --nproc-per-node 4 examples/softsync.py
    torchrun --standalone --nproc-per-node 4 examples/softsync.py --n 4 --staleness-aware

One update is the mean of floor(workers / n) gradients, as they come: n = 1 is nearly synchronous, n = workers is
asynchronous, and gradients are about n updates old. W. Zhang et al., "Staleness-aware async-SGD", IJCAI 2016.
"""

import argparse
import contextlib
import itertools
import json

import torch
from torch import nn

import gradcomp
from gradcomp.examples.tasks.digits import lenet, load_digits
from gradcomp.integrations.local_servers import servers_for_all

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--server", help="HOST:PORT,... instead of one that rank 0 starts")
    parser.add_argument("--n", type=int, default=2)
    parser.add_argument("--staleness-aware", action="store_true")
    parser.add_argument("--compressor", default="threshold:density=0.005")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = lenet()
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.5)
    (images, digits), (test_images, test_digits) = load_digits()
    mode = {"id": "softsync", "n": options.n, "staleness_aware": options.staleness_aware}

    with contextlib.ExitStack() as stack:
        given = options.server and options.server.split(",")
        addresses = given or stack.enter_context(servers_for_all(1))
        sync = gradcomp.attach(
            optimizer,
            model=model,
            compressor=options.compressor,
            exchange={"id": "server", "addresses": addresses, "mode": mode},
        )
        stack.enter_context(sync)
        gradients_per_update = max(1, sync.world_size // options.n)
        updates = options.epochs * len(images) // BATCH // gradients_per_update
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1 - sync.stats()["version"] / updates)
        for step in itertools.count(sync.step):
            rows = torch.Generator().manual_seed(step * sync.world_size + sync.rank)
            picked = torch.randint(len(images), (BATCH,), generator=rows)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[picked]), digits[picked])
            loss.backward()
            optimizer.step()  # pushes, and pulls what the server made of it
            if sync.stats()["version"] >= updates:
                break
            scheduler.step()  # the server's learning rate follows: it goes with each push
        sync.pull()
        with torch.no_grad():
            right = model(test_images).argmax(1) == test_digits
        stats = sync.stats()
        result = {"rank": sync.rank, "n": options.n, "accuracy": round(100 * right.float().mean().item(), 2)}
        result |= {"staleness": stats["staleness"], "updates": stats["version"]}
        result |= {name: round(stats[name], 1) for name in ("ratio", "pull_ratio")}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
