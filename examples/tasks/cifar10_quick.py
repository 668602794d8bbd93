"""Caffe's "CIFAR-10 quick" network with Caffe's learning-rate policies, trained as its solver says.

    gradcomp train examples/tasks/cifar10_quick.py --set data=cifar-10-batches-bin --workers 4 --compressor threshold

The folder is that of cifar10.py. Layers, fillers and lr_mult are those of cifar10_quick_train_test.prototxt in
https://github.com/BVLC/caffe/tree/master/examples/cifar10, the settings those of cifar10_quick_solver.prototxt and its
_lr1: 4,000 iterations at 0.001 and 1,000 at 0.0001, on 100 images each; four workers take 25 each, in ten epochs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradcomp.examples.tasks.activations import Activation, initialise, learning_rate, nonlinearity
from gradcomp.examples.tasks.caffe_policies import CaffePolicy, Policy
from gradcomp.examples.tasks.cifar10_data import TEST_FILES, TRAIN_FILES, read_records
from gradcomp.examples.tasks.images import Normalise
from gradcomp.integrations.tasks import Task

GAUSSIAN = (0.0001, 0.01, 0.01, 0.1, 0.1)  # weight_filler: std, by layer


def cifar10_quick(mean_image: Tensor, activation: Activation = "relu") -> nn.Sequential:
    """Three convolutions and two dense layers, 145,578 parameters.

    Args:
        mean_image: float32 (3, 32, 32), subtracted from every image; pixels stay as large as they are.
        activation: for sigmoid and tanh, pixels are divided by 64 and the weights are not Caffe's.
    """
    plain = activation == "relu"
    network = nn.Sequential(
        Normalise(mean_image, torch.tensor(1.0 if plain else 64.0)),
        *(nn.Conv2d(3, 32, 5, padding=2), nn.MaxPool2d(3, 2, ceil_mode=True), nonlinearity(activation)),
        *(nn.Conv2d(32, 32, 5, padding=2), nonlinearity(activation), nn.AvgPool2d(3, 2, ceil_mode=True)),
        *(nn.Conv2d(32, 64, 5, padding=2), nonlinearity(activation), nn.AvgPool2d(3, 2, ceil_mode=True)),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.Linear(64, 10)),
    )
    if not plain:
        initialise(network, activation)
        return network
    layers = [layer for layer in network if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer, deviation in zip(layers, GAUSSIAN, strict=True):
        nn.init.normal_(layer.weight, std=deviation)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return network


def task(
    *,
    data: str,
    activation: Activation = "relu",
    lr: float | None = None,
    policy: Policy = "multistep",
    gamma: float = 0.1,
    power: float = 0.75,
    stepsize: int = 4000,
    stepvalue: list[int] = [4000],  # noqa: B006
    max_iter: int = 5000,
    momentum: float = 0.9,
    weight_decay: float = 0.004,
    limit: int | None = None,
    batch_size: int = 25,
    epochs: int = 10,
) -> Task:
    """Options: the data's folder, the nonlinearity, and what Caffe's solvers have, by its names (caffe_policies.py).

    An iteration is a step, whatever the number of workers. ``limit`` is for a run on the first records. The base rate
    is Caffe's 0.001, for tanh 0.02 and for sigmoids 0.005, if none is given.
    """
    schedule = CaffePolicy(
        policy=policy, gamma=gamma, power=power, stepsize=stepsize, stepvalue=stepvalue, max_iter=max_iter
    )
    train = read_records(Path(data), TRAIN_FILES, limit)
    model = cifar10_quick(train[0].sum(0).float() / len(train[0]), activation)
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    biases = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    rate = learning_rate(lr, 0.001 if activation == "relu" else 0.02, activation)
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": biases, "lr": 2 * rate}]  # lr_mult: 1 and 2
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=momentum, weight_decay=weight_decay)
    return Task(
        model=model,
        loss=nn.functional.cross_entropy,
        optimizer=optimizer,
        train_data=train,
        test_data=read_records(Path(data), TEST_FILES, limit),
        batch_size=batch_size,
        epochs=epochs,
        step_scheduler=schedule.scheduler(optimizer),
    )
