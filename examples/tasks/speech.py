"""CNNs that hear spoken digits: log-mel features of the Free Spoken Digit Dataset, 3,000 recordings of six speakers.

    gradcomp train examples/tasks/speech.py --set data=free-spoken-digit-dataset --workers 4 --compressor threshold

The folder holds recordings/DIGIT_SPEAKER_INDEX.wav (https://github.com/Jakobovski/free-spoken-digit-dataset): 16-bit
mono, 8 kHz. Indices 0 to 4 of each speaker and digit are the test set, as its authors say.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from gradcomp.examples.tasks.activations import Activation, initialise, learning_rate, nonlinearity
from gradcomp.examples.tasks.speech_data import (
    BANDS,
    FLOOR,
    FRAMES,
    SAMPLES,
    WINDOW,
    load_speech,
    log_mel,
    mel_filters,
    read_wav,
)
from gradcomp.integrations.tasks import Task

__all__ = [
    "BANDS",
    "FLOOR",
    "FRAMES",
    "SAMPLES",
    "WINDOW",
    "load_speech",
    "log_mel",
    "mel_filters",
    "read_wav",
    "sainath_parada",
    "task",
]


def sainath_parada(activation: Activation = "relu") -> nn.Sequential:
    """Two convolutions and three dense layers, for (batch, 1, BANDS, FRAMES) features.

    2,961,398 parameters, nearly all of them dense. The convolutions are strided rather than pooled, to save
    multiplications, as in Sainath and Parada's small-footprint networks (Interspeech 2015).
    """
    network = nn.Sequential(
        *(nn.Conv2d(1, 32, 5, stride=2, padding=2), nonlinearity(activation)),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nonlinearity(activation)),
        nn.Flatten(),
        *(nn.Linear(64 * (BANDS // 4) * (FRAMES // 4), 430), nonlinearity(activation)),
        *(nn.Linear(430, 430), nonlinearity(activation)),
        nn.Linear(430, 10),
    )
    initialise(network, activation)
    return network


def task(
    *,
    data: str,
    activation: Activation = "relu",
    lr: float | None = None,
    momentum: float = 0.5,
    batch_size: int = 16,
    epochs: int = 10,
) -> Task:
    """Options: the data set's folder, the nonlinearity, SGD's momentum and its learning rate.

    The rate (0.02, for sigmoids 0.005, if none is given) follows half a cosine down to zero over the epochs. Momentum
    is low because a residual is one already: what is sent late is sent all at once.
    """
    model = sainath_parada(activation)
    rate = learning_rate(lr, 0.02, activation)
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
