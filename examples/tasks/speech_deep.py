"""A very deep CNN that hears spoken digits: ten convolutions of 3x3 and three dense layers, on speech.py's features.

    gradcomp train examples/tasks/speech_deep.py --set data=free-spoken-digit-dataset --workers 4 --compressor threshold

The folder is that of speech.py: recordings/DIGIT_SPEAKER_INDEX.wav
(https://github.com/Jakobovski/free-spoken-digit-dataset).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from gradcomp.examples.tasks.activations import Activation, initialise, learning_rate, nonlinearity
from gradcomp.examples.tasks.speech_data import BANDS, FRAMES, load_speech
from gradcomp.integrations.tasks import Task
from gradcomp.options import check_integer

DEPTHS = (2, 2, 3, 3)  # convolutions before each pooling; each group has twice the maps of the one before
HIDDEN = 512


def very_deep(width: int = 16, activation: Activation = "relu") -> nn.Sequential:
    """A VGG-style network with BatchNorm, for (batch, 1, BANDS, FRAMES) features: 1,008,858 parameters.

    Sercu et al., "Very deep multilingual convolutional neural networks for LVCSR" (2016), begin with 64 maps and end
    with layers of 2048, for hundreds of hours of speech.

    Args:
        width: maps of the first convolutions.
        activation: after each BatchNorm and each dense layer but the last.
    """
    layers: list[nn.Module] = []
    channels, maps = 1, width
    for depth in DEPTHS:
        for _ in range(depth):
            layers += [nn.Conv2d(channels, maps, 3, padding=1, bias=False), nn.BatchNorm2d(maps)]
            layers.append(nonlinearity(activation))
            channels = maps
        layers.append(nn.MaxPool2d(2))
        maps *= 2
    places = (BANDS >> len(DEPTHS)) * (FRAMES >> len(DEPTHS))
    network = nn.Sequential(
        *(*layers, nn.Flatten()),
        *(nn.Linear(channels * places, HIDDEN), nonlinearity(activation), nn.Dropout()),
        *(nn.Linear(HIDDEN, HIDDEN), nonlinearity(activation)),
        nn.Linear(HIDDEN, 10),
    )
    initialise(network, activation)
    with torch.no_grad():
        for parameter in network[-1].parameters():
            parameter.mul_(0.1)  # dropout makes noise enough: no opinion to begin with
    return network


def task(
    *,
    data: str,
    width: int = 16,
    activation: Activation = "relu",
    lr: float | None = None,
    momentum: float = 0.5,
    batch_size: int = 16,
    epochs: int = 15,
) -> Task:
    """Options: the data set's folder, maps of the first convolutions, the nonlinearity, SGD's settings.

    The learning rate (0.05, for sigmoids 0.0125, if none is given) follows half a cosine down to zero over the epochs.
    Momentum is low because a residual is one already: what is sent late is sent all at once.
    """
    check_integer("speech_deep", "width", width, at_least=1)
    model = very_deep(width, activation)
    rate = learning_rate(lr, 0.05, activation)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    train, test = load_speech(Path(data))
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
