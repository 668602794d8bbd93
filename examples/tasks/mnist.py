"""LeNet on MNIST or Fashion-MNIST, from a folder with the data set's own IDX files, plain or as they come, in .gz.

    gradcomp train examples/tasks/mnist.py --set data=fashion-mnist --workers 4 --compressor threshold

The folder holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte:
60,000 and 10,000 images of 28x28 (http://yann.lecun.com/exdb/mnist/, https://github.com/zalandoresearch/fashion-mnist).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from gradcomp import ConfigError
from gradcomp.examples.tasks.activations import Activation, initialise, learning_rate, nonlinearity
from gradcomp.examples.tasks.idx import read_idx
from gradcomp.examples.tasks.images import Normalise
from gradcomp.integrations.tasks import Task

HOME = "http://yann.lecun.com/exdb/mnist/ or https://github.com/zalandoresearch/fashion-mnist"


def lenet(activation: Activation = "relu") -> nn.Sequential:
    """LeNet as Caffe has it, 431,080 parameters (LeCun et al. 1998), for (batch, 1, 28, 28).

    As in LeCun's, and unlike Caffe's, the convolutions too have a nonlinearity.
    """
    network = nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nonlinearity(activation), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5), nonlinearity(activation), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(50 * 4 * 4, 500), nonlinearity(activation)),
        nn.Linear(500, 10),
    )
    initialise(network, activation)
    return network


def load_mnist(folder: Path, part: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, 1, 28, 28) and labels int64 (n,): the first ``limit`` of ``part``, "train" or "t10k".

    Raises:
        ConfigError: a file is not there or damaged, or images and labels do not belong together; names the file.
    """
    images = read_idx(folder / f"{part}-images-idx3-ubyte", 28, 28, had_from=HOME)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte", had_from=HOME).long()
    if len(images) != len(labels):
        raise ConfigError(
            f"{folder}: {part}-images-idx3-ubyte has {len(images)} images and {part}-labels-idx1-ubyte {len(labels)} "
            f"labels; they must be equally many: {HOME}"
        )
    if int(labels.max()) > 9:
        raise ConfigError(
            f"{folder / f'{part}-labels-idx1-ubyte'}: sample {int((labels > 9).nonzero()[0])} has label "
            f"{int(labels[labels > 9][0])}; labels are 0 to 9: {HOME}"
        )
    return images[:limit].unsqueeze(1), labels[:limit]


def task(
    *,
    data: str,
    activation: Activation = "relu",
    lr: float | None = None,
    momentum: float = 0.5,
    limit: int | None = None,
    batch_size: int = 16,
    epochs: int = 5,
) -> Task:
    """Options: the data's folder, the nonlinearity, SGD's settings, and ``limit`` for a run on the first samples only.

    The learning rate (0.05, for sigmoids 0.0125, if none is given) follows half a cosine down to zero over the epochs.
    Momentum is low because a residual is one already: what is sent late is sent all at once.
    """
    train, test = (load_mnist(Path(data), part, limit) for part in ("train", "t10k"))
    pixels = train[0].float()
    model = nn.Sequential(Normalise(pixels.mean(), pixels.std().clamp_min(1)), *lenet(activation))
    rate = learning_rate(lr, 0.05, activation)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    return Task(
        model=model,
        loss=nn.functional.cross_entropy,
        optimizer=optimizer,
        train_data=train,
        test_data=test,
        batch_size=batch_size,
        epochs=epochs,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs),
    )
