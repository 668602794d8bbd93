"""SVRG on a parameter server, lock-free: it converges where asynchronous SGD stalls.

    torchrun --standalone --nproc-per-node 4 examples/svrg.py
    torchrun --standalone --nproc-per-node 4 examples/svrg.py --method sgd

L2-regularized softmax regression on the digits, which is strongly convex: its optimum is found with L-BFGS beforehand,
so that each epoch can say how far it is from it. An epoch begins with a snapshot of the parameters and the gradient of
all data there, of which each worker computes a share. Then everyone takes steps along

    gradient of a few samples here - gradient of the same samples at the snapshot + gradient of all data at the snapshot

whose variance vanishes as both come near the optimum. Nobody waits for anybody within an epoch: the server (mode
``async``) applies what comes. With a constant learning rate plain SGD ends in a ball of noise around the optimum.

R. Johnson, T. Zhang, "Accelerating stochastic gradient descent using predictive variance reduction", NeurIPS 2013.
S.-Y. Zhao, W.-J. Li, "Fast asynchronous parallel stochastic gradient descent", AAAI 2016 (AsySVRG).
"""

import argparse
import contextlib
import json
import os

import torch
from torch import Tensor, nn

import gradcomp
from gradcomp.examples.tasks.digits import load_digits
from gradcomp.integrations.local_servers import servers_for_all

CLASSES = 10
LAMBDA = 1e-2  # of the penalty: what makes it strongly convex


class Regression:
    """Softmax regression on some samples, in float64: differences of objectives are below float32's precision."""

    def __init__(self) -> None:
        (images, self.digits), _ = load_digits()
        flat = torch.cat([images.flatten(1), torch.ones(len(images), 1)], dim=1).double()
        self.inputs = flat / flat.shape[1] ** 0.5
        self.targets = nn.functional.one_hot(self.digits, CLASSES).double()
        self.shape = flat.shape[1], CLASSES

    def objective(self, weight: Tensor) -> Tensor:
        """The mean loss over all samples and the penalty."""
        loss = nn.functional.cross_entropy(self.inputs @ weight, self.digits)
        return loss + LAMBDA / 2 * weight.square().sum()

    def gradient(self, weight: Tensor, rows: Tensor) -> Tensor:
        """The mean gradient over the samples ``rows``, with the penalty's."""
        inputs = self.inputs[rows]
        errors = torch.softmax(inputs @ weight, 1) - self.targets[rows]
        mean: Tensor = inputs.T @ errors / len(rows)
        return mean + LAMBDA * weight

    def optimum(self) -> float:
        """The least objective."""
        weight = torch.zeros(self.shape, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.objective(weight)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return float(self.objective(weight.detach()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--server", help="HOST:PORT,... instead of one that rank 0 starts")
    parser.add_argument("--method", choices=("svrg", "sgd"), default="svrg")
    parser.add_argument("--compressor", default="none", help="of what is pushed")
    parser.add_argument("--pull", default="none", help="compressor of what is pulled")
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10, help="of twice as many samples as there are")
    options = parser.parse_args()

    rank, workers = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    problem = Regression()
    best = problem.optimum()
    weight = nn.Parameter(torch.zeros(problem.shape))
    optimizer = torch.optim.SGD([weight], lr=options.lr)
    samples = len(problem.digits)
    everything = torch.arange(samples)
    draws = torch.Generator().manual_seed(rank)

    with contextlib.ExitStack() as stack:
        given = options.server and options.server.split(",")
        addresses = given or stack.enter_context(servers_for_all(1))
        server = {"id": "server", "addresses": addresses, "mode": "async", "pull": options.pull, "workers": workers}
        sync = stack.enter_context(
            # A single weight is neither small nor a bias here: what is asked for is what compresses it.
            gradcomp.attach(optimizer, compressor=options.compressor, exchange=server, dense=lambda name, p: False)
        )
        for epoch in range(1, options.epochs + 1):
            share = everything[rank::workers]
            snapshot = weight.detach().double()
            full = sync.all_reduce(problem.gradient(snapshot, share) * len(share)).double() / samples
            for _ in range(2 * samples // (options.batch * workers)):
                rows = torch.randint(samples, (options.batch,), generator=draws)
                grad = problem.gradient(weight.detach().double(), rows)
                if options.method == "svrg":
                    grad += full - problem.gradient(snapshot, rows)
                weight.grad = grad.float()
                optimizer.step()  # pushes, and pulls what all have made of the weight meanwhile
            sync.average(torch.zeros(1))  # everyone has pushed all there is in this epoch
            sync.pull()  # so that everyone has the same snapshot
            gap = float(problem.objective(weight.detach().double())) - best
            if rank == 0:
                staleness = sync.stats()["staleness"]
                print(json.dumps({"epoch": epoch, "suboptimality": gap, "staleness": staleness}), flush=True)


if __name__ == "__main__":
    main()
