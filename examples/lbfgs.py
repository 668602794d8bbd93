"""L-BFGS on all data, in DistBelief's manner: small portions of it are computed by whoever is free.

    python examples/lbfgs.py                                                 by itself
    torchrun --standalone --nproc-per-node 2 examples/lbfgs.py               two processes here
    torchrun --standalone --nproc-per-node 4 examples/lbfgs.py --slow 3      rank 3 rests after each portion

After Sandblaster in J. Dean et al., "Large scale distributed deep networks" (2012). An evaluation of loss and gradient
is cut into many more portions than there are ranks. Who is done with one takes the next, so slow ranks do less and the
others need not wait for them; a counter in the store that the ranks met by deals portions out. The result has the same
bits whoever did what, for gradients are added up as whole numbers, which is exact in any order. The history is cut up,
too: a rank keeps a slice of it, and adds its part to the dot products.

How that differs from ``gradcomp.attach(torch.optim.LBFGS(...))``: there each rank evaluates its own closure, on its own
batch, all ranks wait for the slowest, and each of them keeps the whole history.
"""

import argparse
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import gradcomp
from gradcomp.examples.tasks.digits import load_digits

PORTION = 50  # samples
L2 = 1e-3  # the objective is the mean loss, and L2 / 2 of the squares of all weights
HISTORY = 10  # steps remembered
EXACT_BITS = 24  # whole numbers up to 2**24 are exact in float32


class Objective:
    """What is minimized; called with weights, gives loss and gradient.

    Attributes:
        evaluations: how often it was called.
        done: portions that this rank did.
    """

    def __init__(self, sync: gradcomp.Session, model: nn.Module, images: Tensor, digits: Tensor, rest_s: float) -> None:
        self.sync, self.model, self.parameters = sync, model, list(model.parameters())
        self.portions = list(zip(torch.split(images, PORTION), torch.split(digits, PORTION), strict=True))
        self.bits = EXACT_BITS - len(self.portions).bit_length()
        self.samples, self.rest_s = len(images), rest_s
        self.evaluations = self.done = 0
        self.store = None
        if sync.world_size > 1:
            self.store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)

    def deal(self) -> Iterator[int]:
        """The portions that are this rank's to do: one after the other, as it asks for them."""
        counter = f"lbfgs/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{self.evaluations}"
        for turn in itertools.count():
            number = turn if self.store is None else self.store.add(counter, 1) - 1
            if number >= len(self.portions):
                return
            yield number

    def __call__(self, weights: Tensor) -> tuple[float, Tensor]:
        vector_to_parameters(weights, self.parameters)
        self.evaluations += 1
        losses, largest = torch.zeros(2, len(self.portions))
        gradients = []
        for number in self.deal():
            images, digits = self.portions[number]
            loss = nn.functional.cross_entropy(self.model(images), digits, reduction="sum")
            gradient = parameters_to_vector(torch.autograd.grad(loss, self.parameters))
            losses[number], largest[number] = loss.detach(), gradient.abs().max()
            gradients.append(gradient)
            time.sleep(self.rest_s)
        self.done += len(gradients)
        # Each portion has a place of its own, where all ranks but one add 0: then everybody sees all portions.
        losses, largest = self.sync.all_reduce([losses, largest])
        # In units so small that a portion has self.bits bits, and so large that the sum of all of them is exact.
        unit = torch.exp2(largest.max().clamp(min=1e-30).log2().ceil() - self.bits)
        whole = torch.zeros_like(weights)
        for gradient in gradients:
            whole += (gradient / unit).round()
        gradient = self.sync.all_reduce(whole) * unit / self.samples
        return float(losses.sum() / self.samples + L2 / 2 * weights.dot(weights)), gradient + L2 * weights


class History:
    """The last steps s and what they changed in the gradient, y: this rank's slice of each."""

    def __init__(self, sync: gradcomp.Session, numel: int) -> None:
        self.sync = sync
        self.slice = slice(*(numel * rank // sync.world_size for rank in (sync.rank, sync.rank + 1)))
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def add(self, s: Tensor, y: Tensor) -> None:
        """Remember a step, unless the curvature along it is not positive."""
        if s.dot(y) > 1e-8 * y.dot(y):
            self.pairs = [*self.pairs, (s[self.slice].clone(), y[self.slice].clone())][-HISTORY:]

    def direction(self, gradient: Tensor) -> Tensor:
        """Minus the gradient times the inverse Hessian that the history tells of: L-BFGS's two loops.

        It is a sum of multiples of the vectors remembered and the gradient, and the loops find the multiples from
        nothing but dot products between these, of which each rank adds up its slice (W. Chen et al., "Large-scale
        L-BFGS using MapReduce", 2014). So there are two all-reduces, not two for each step remembered.
        """
        m = len(self.pairs)
        vectors = torch.stack([*(s for s, _ in self.pairs), *(y for _, y in self.pairs), gradient[self.slice]])
        dot = self.sync.all_reduce(vectors.double() @ vectors.double().T).double()
        multiples, alphas = torch.zeros(2 * m + 1, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
        multiples[-1] = -1.0
        for i in reversed(range(m)):
            alphas[i] = multiples @ dot[i] / dot[i, m + i]
            multiples[m + i] -= alphas[i]
        multiples *= dot[m - 1, 2 * m - 1] / dot[2 * m - 1, 2 * m - 1] if m else dot[0, 0].rsqrt()
        for i in range(m):
            multiples[i] += alphas[i] - multiples @ dot[m + i] / dot[i, m + i]
        whole = torch.zeros_like(gradient)
        whole[self.slice] = multiples.float() @ vectors
        return self.sync.all_reduce(whole)


def search(
    objective: Objective, weights: Tensor, loss: float, slope: float, direction: Tensor
) -> tuple[Tensor, float, Tensor] | None:
    """Along the direction to where the loss fell and the slope got flatter, as much as there is a right to expect.

    Returns:
        Weights, loss and gradient there; None if no such place was found.
    """
    low, high, rate = 0.0, float("inf"), 1.0
    for _ in range(20):
        there = weights + rate * direction
        found, gradient = objective(there)
        if found > loss + 1e-4 * rate * slope:
            high = rate
        elif float(gradient.dot(direction)) < 0.9 * slope:
            low = rate
        else:
            return there, found, gradient
        rate = (low + high) / 2 if high < float("inf") else 2 * low
    return None


def train(objective: Objective, weights: Tensor, steps: int, report: Callable[..., None]) -> None:
    """Take ``steps`` steps, or as many as lead downhill."""
    history = History(objective.sync, weights.numel())
    loss, gradient = objective(weights)
    for step in range(steps):
        direction = history.direction(gradient)
        found = search(objective, weights, loss, float(gradient.dot(direction)), direction)
        if found is None:
            break
        history.add(found[0] - weights, found[2] - gradient)
        weights, loss, gradient = found
        report(step=step + 1, loss=round(loss, 5))
    vector_to_parameters(weights, objective.parameters)


def network() -> nn.Sequential:
    """Smooth, as second derivatives would have it."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 10)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slow", type=int, help="a rank that rests for a tenth of a second after each portion")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = network()
    # The optimizer takes no step: attach() brings the ranks together and makes their weights equal.
    sync = gradcomp.attach(torch.optim.SGD(model.parameters()), model=model, when="step")
    train_data, (test_images, test_digits) = load_digits()
    objective = Objective(sync, model, *train_data, rest_s=0.1 if sync.rank == options.slow else 0.0)

    def say(**what: object) -> None:
        if sync.rank == 0:
            print(json.dumps(what), flush=True)

    def report(**progress: float) -> None:
        with torch.no_grad():
            right = model(test_images).argmax(1) == test_digits
        say(**progress, accuracy=round(100 * right.float().mean().item(), 2), evaluations=objective.evaluations)

    weights = parameters_to_vector(model.parameters()).detach()
    train(objective, weights, options.steps, report)
    done = sync.all_reduce(torch.eye(sync.world_size)[sync.rank] * objective.done)
    digest = hashlib.sha256(parameters_to_vector(model.parameters()).detach().numpy().tobytes()).hexdigest()
    say(portions_by_rank=done.int().tolist(), weights=digest[:8])
    sync.close()


if __name__ == "__main__":
    main()
