"""A LeNet-style CNN that reads handwritten digits: 8x8 images, bundled with scikit-learn, so nothing is downloaded.

    gradcomp train examples/tasks/digits.py --workers 4 --compressor threshold

383,306 parameters, far more than digits this small need: 1.5 MB of gradients a step make a slow link felt.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradcomp.examples.tasks.activations import Activation, initialise, learning_rate, nonlinearity
from gradcomp.integrations.tasks import Task

TEST_SAMPLES = 397


def lenet(activation: Activation = "relu") -> nn.Sequential:
    """Two 5x5 convolutions and two dense layers, for (batch, 1, 8, 8) images."""
    network = nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nonlinearity(activation),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nonlinearity(activation),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 320),
        nonlinearity(activation),
        nn.Linear(320, 10),
    )
    if activation != "relu":  # for ReLU, torch's own initialisation
        initialise(network, activation)
    return network


def load_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Train and test, 1,400 and 397 samples; the split is the same every time.

    Returns:
        Two pairs of images, float32 (n, 1, 8, 8) with mean 0 and deviation 1, and digits, int64 (n,).
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'gradcomp[demo]'") from error
    found = load()
    images = torch.from_numpy(found.images).float().unsqueeze(1)
    images = (images - images.mean()) / images.std()
    digits = torch.from_numpy(found.target).long()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images, digits = images[order], digits[order]
    return (images[TEST_SAMPLES:], digits[TEST_SAMPLES:]), (images[:TEST_SAMPLES], digits[:TEST_SAMPLES])


def task(
    *,
    activation: Activation = "relu",
    lr: float | None = None,
    momentum: float = 0.5,
    batch_size: int = 16,
    epochs: int = 12,
) -> Task:
    """Options: the nonlinearity, SGD's momentum and its learning rate, half a cosine down to zero over the epochs.

    The rate is 0.2, for sigmoids 0.05, if none is given. Momentum is low because a residual is one already: what is
    sent late is sent all at once.
    """
    model = lenet(activation)
    rate = learning_rate(lr, 0.2, activation)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    train, test = load_digits()
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
