"""AlexNet, VGG-11, VGG-16 and ResNet-20 on CIFAR-10, from a folder in the data set's own binary layout.

    gradcomp train examples/tasks/cifar10.py --set folder=data/cifar-10-batches-bin --set network=vgg11 --workers 4

The folder holds data_batch_1.bin .. data_batch_5.bin and test_batch.bin (https://www.cs.toronto.edu/~kriz/cifar.html,
"binary version"): records of one label byte, 0 to 9, and 3072 pixel bytes, the red, green and blue planes of 32x32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from gradcomp import ConfigError
from gradcomp.examples.tasks.activations import Activation, learning_rate
from gradcomp.examples.tasks.cifar10_data import TEST_FILES, TRAIN_FILES, read_records
from gradcomp.examples.tasks.image_networks import alexnet, resnet20, vgg11, vgg16
from gradcomp.examples.tasks.images import crop_and_flip
from gradcomp.integrations.tasks import Task
from gradcomp.options import check_integer

__all__ = ["NETWORKS", "alexnet", "crop_and_flip", "read_records", "resnet20", "task", "vgg11", "vgg16"]

NETWORKS: dict[str, Callable[[Activation], nn.Sequential]] = {
    "vgg11": vgg11,
    "vgg16": vgg16,
    "alexnet": alexnet,
    "resnet20": resnet20,
}


def task(
    *,
    folder: str | None = None,
    data: str | None = None,
    network: Literal["vgg11", "vgg16", "alexnet", "resnet20"] = "vgg11",
    activation: Activation = "relu",
    lr: float | None = None,
    momentum: float = 0.5,
    weight_decay: float = 5e-4,
    limit: int | None = None,
    batch_size: int = 32,
    epochs: int = 30,
    steps: int | None = None,
) -> Task:
    """Options: where the data are (``folder``, or ``data``, which means the same), which network, SGD's settings.

    ``limit`` is for a run on the first records only. The learning rate (0.05, for sigmoids 0.0125, if none is given)
    follows half a cosine down to zero over the epochs, or over ``steps`` steps of a worker, for a run of an epoch or
    two. Momentum is low because a residual is one already.
    """
    if steps is not None:
        check_integer("cifar10", "steps", steps, at_least=1)
    where = folder if folder is not None else data
    if where is None:
        raise ConfigError(
            "needs --set folder=...: the folder with data_batch_1.bin to data_batch_5.bin and test_batch.bin of "
            "CIFAR-10's binary version, https://www.cs.toronto.edu/~kriz/cifar.html"
        )
    model = NETWORKS[network](activation)
    rate = learning_rate(lr, 0.05, activation)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=weight_decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs if steps is None else steps)
    return Task(
        model=model,
        loss=nn.functional.cross_entropy,
        optimizer=optimizer,
        train_data=read_records(Path(where), TRAIN_FILES, limit),
        test_data=read_records(Path(where), TEST_FILES, limit),
        batch_size=batch_size,
        epochs=epochs,
        scheduler=cosine if steps is None else None,
        step_scheduler=None if steps is None else cosine,
        augment=crop_and_flip,
    )
