"""Hessian-free training: each step solves for its direction, by conjugate gradients on curvature that ranks share.

    python examples/hessian_free.py                                                 by itself
    torchrun --standalone --nproc-per-node 2 examples/hessian_free.py               two processes here
    torchrun --standalone --nproc-per-node 2 examples/hessian_free.py --steps 8 --seed 1

After J. Martens, "Deep learning via Hessian-free optimization" (2010), in the manner of I.-H. Chung et al., "Parallel
deep neural network training for big data on Blue Gene/Q" (2014): samples are dealt out to the ranks, and whatever is a
sum over samples (loss, gradient, product of the curvature and a vector) is added up with ``sync.all_reduce``. All else
every rank does by itself, and alike, for it works on the same bits. It takes few steps and many passes over the data:
each step keeps many ranks busy, where SGD's small batches would not.
"""

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import gradcomp
from gradcomp.examples.tasks.digits import load_digits

SUBSETS = 4  # a step's products are made with one of so many parts of the data, another in each step
L2 = 1e-3  # the objective is the mean loss, and L2 / 2 of the squares of all weights


class Objective:
    """What is minimized, over the samples of all ranks.

    Attributes:
        passes: over the data so far: 1 for a gradient or a product (forward and backward), 1/3 for a loss (forward).
    """

    def __init__(self, sync: gradcomp.Session, model: nn.Module, images: Tensor, digits: Tensor) -> None:
        self.sync, self.model, self.parameters = sync, model, list(model.parameters())
        self.images, self.digits = images[sync.rank :: sync.world_size], digits[sync.rank :: sync.world_size]
        self.samples = len(images)
        self.passes = 0.0

    def loss(self, weights: Tensor) -> float:
        """The objective at ``weights``, which the model has from then on."""
        vector_to_parameters(weights, self.parameters)
        with torch.no_grad():
            mine = nn.functional.cross_entropy(self.model(self.images), self.digits, reduction="sum")
        self.passes += 1 / 3
        return float(self.sync.all_reduce(mine) / self.samples + L2 / 2 * weights.dot(weights))

    def gradient(self, weights: Tensor) -> Tensor:
        """Its gradient."""
        vector_to_parameters(weights, self.parameters)
        loss = nn.functional.cross_entropy(self.model(self.images), self.digits, reduction="sum")
        mine = torch.autograd.grad(loss, self.parameters)
        self.passes += 1
        return self.sync.all_reduce(parameters_to_vector(mine)) / self.samples + L2 * weights

    def curvature(self, weights: Tensor, step: int, damping: float) -> Callable[[Tensor], Tensor]:
        """Multiplies vectors by the Gauss-Newton matrix J'HJ: J of the model's outputs, H the loss's as seen from them.

        J'u is linear in u, and its derivative in the direction v is Jv: so a product is two backward passes over what
        one forward pass left, which all products of the step share.
        """
        vector_to_parameters(weights, self.parameters)
        outputs = self.model(self.images[step % SUBSETS :: SUBSETS])
        u = torch.zeros_like(outputs, requires_grad=True)
        jt_u = torch.autograd.grad(outputs, self.parameters, u, create_graph=True)
        p = outputs.detach().softmax(1)
        samples = float(self.sync.all_reduce(torch.tensor(float(len(outputs)))))

        def product(v: Tensor) -> Tensor:
            parts = zip(torch.split(v, [w.numel() for w in jt_u]), jt_u, strict=True)
            (jv,) = torch.autograd.grad(jt_u, u, [part.view_as(w) for part, w in parts], retain_graph=True)
            hjv = p * (jv - (p * jv).sum(1, keepdim=True))
            mine = torch.autograd.grad(outputs, self.parameters, hjv, retain_graph=True)
            self.passes += samples / self.samples
            return self.sync.all_reduce(parameters_to_vector(mine)) / samples + (L2 + damping) * v

        return product


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, x: Tensor, iterations: int
) -> list[tuple[Tensor, float]]:
    """Minimizes x'Ax / 2 - b'x, beginning at x: some of the iterates, ever fewer of them, and the value at each.

    Ends when the last iterations brought little beside what all of them did (Martens, section 4.4).
    """
    residual = b - product(x)
    direction, square = residual, residual.dot(residual)
    kept, values, next_kept = [], [0.0], 1.0
    for i in range(1, iterations + 1):
        image = product(direction)
        length = square / direction.dot(image)
        x, residual = x + length * direction, residual - length * image
        before, square = square, residual.dot(residual)
        direction = residual + square / before * direction
        values.append(float(-0.5 * x.dot(residual + b)))
        few = max(5, i // 10)
        little = i > few and values[-1] < 0 and values[-1] - values[-1 - few] > 5e-4 * few * values[-1]
        done = little or i == iterations
        if done or i >= next_kept:
            kept.append((x, values[-1]))
            next_kept *= 1.3
        if done:
            break
    return kept


def train(objective: Objective, weights: Tensor, steps: int, iterations: int, report: Callable[..., None]) -> None:
    """Take ``steps`` steps; the model has the weights of the last one."""
    damping, direction = 0.3, torch.zeros_like(weights)
    loss = objective.loss(weights)
    for step in range(steps):
        gradient, product = objective.gradient(weights), objective.curvature(weights, step, damping)
        # Begins near where the last one ended, for this problem is much like the last.
        tried = conjugate_gradients(product, -gradient, 0.9 * direction, iterations)
        direction, promised = tried.pop()
        found = objective.loss(weights + direction)
        # Levenberg-Marquardt: more damping if the loss did not fall as the model of it did, less if it did.
        ratio = (found - loss) / promised
        damping *= 1.5 if ratio < 0.25 else 2 / 3 if ratio > 0.75 else 1.0
        # Back along the iterates as long as that is better.
        for earlier, _ in reversed(tried):
            if (there := objective.loss(weights + earlier)) >= found:
                break
            direction, found = earlier, there
        # Back along the line, until the loss falls enough for such a slope.
        rate, slope = 1.0, float(gradient.dot(direction))
        while found > loss + 0.01 * rate * slope and rate > 1e-3:
            rate *= 0.7
            found = objective.loss(weights + rate * direction)
        if found < loss:
            weights, loss = weights + rate * direction, found
        else:
            direction = torch.zeros_like(direction)
        vector_to_parameters(weights, objective.parameters)
        report(step=step + 1, loss=round(loss, 5), damping=round(damping, 4))


def network() -> nn.Sequential:
    """Smooth, as second derivatives would have it."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 10)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=25, help="of conjugate gradients in a step, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = network()
    # The optimizer takes no step: attach() brings the ranks together and makes their weights equal.
    sync = gradcomp.attach(torch.optim.SGD(model.parameters()), model=model, when="step")
    train_data, (test_images, test_digits) = load_digits()
    objective = Objective(sync, model, *train_data)

    def report(**progress: float) -> None:
        with torch.no_grad():
            right = model(test_images).argmax(1) == test_digits
        accuracy = round(100 * right.float().mean().item(), 2)
        if sync.rank == 0:
            print(json.dumps(progress | {"accuracy": accuracy, "passes": round(objective.passes, 1)}), flush=True)

    train(objective, parameters_to_vector(model.parameters()).detach(), options.steps, options.iterations, report)
    sync.close()


if __name__ == "__main__":
    main()
