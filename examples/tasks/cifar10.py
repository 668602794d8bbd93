"""AlexNet- and VGG-style networks for CIFAR-10, from a folder in the data set's own binary layout.

    gradcomp train examples/tasks/cifar10.py --set folder=data/cifar-10-batches-bin --set network=vgg11 --workers 4

The folder holds data_batch_1.bin .. data_batch_5.bin and test_batch.bin (https://www.cs.toronto.edu/~kriz/cifar.html,
"binary version"): records of one label byte, 0 to 9, and 3072 pixel bytes, the red, green and blue planes of 32x32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from gradcomp import ConfigError
from gradcomp.integrations.tasks import Task

TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)
RECORD_BYTES = 1 + 3 * 32 * 32
MEAN, DEVIATION = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # of the training pixels, by channel


class Normalise(nn.Module):
    """uint8 images (n, 3, 32, 32) to float32 with mean 0 and deviation 1. In the model, so that data stay small."""

    def forward(self, images: Tensor) -> Tensor:
        """Normalise by channel."""
        mean, deviation = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
        return (images.float() - mean) / deviation


def vgg11() -> nn.Sequential:
    """VGG-11 with BatchNorm and one dense layer: 9.2 million parameters (Simonyan and Zisserman 2014)."""
    layers: list[nn.Module] = [Normalise()]
    channels = 3
    for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        if width == 0:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def alexnet() -> nn.Sequential:
    """Five convolutions and three dense layers, most of whose 7.0 million parameters are dense (Krizhevsky 2012)."""
    return nn.Sequential(
        Normalise(),
        *(nn.Conv2d(3, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(192, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 192, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(192, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Dropout(), nn.Linear(192 * 4 * 4, 1536), nn.ReLU()),
        *(nn.Dropout(), nn.Linear(1536, 512), nn.ReLU()),
        nn.Linear(512, 10),
    )


def read_records(folder: Path, names: tuple[str, ...], limit: int | None) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, 3, 32, 32) and labels int64 (n,) of the first ``limit`` records of some files.

    Raises:
        ConfigError: a file is not there or not whole records, or a label is above 9; names the file and the record.
    """
    parts: list[np.ndarray] = []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ConfigError(
                f"{path} is not there; set folder= to the folder with {names[0]} of CIFAR-10's binary version"
            )
        found = np.fromfile(path, dtype=np.uint8)
        if found.size == 0 or found.size % RECORD_BYTES:
            raise ConfigError(f"{path}: {found.size} bytes are not whole records of {RECORD_BYTES} bytes")
        records = found.reshape(-1, RECORD_BYTES)
        wrong = np.flatnonzero(records[:, 0] > 9)
        if wrong.size:
            raise ConfigError(f"{path}: record {wrong[0]} has label {records[wrong[0], 0]}; labels are 0 to 9")
        parts.append(records)
        if limit is not None and sum(map(len, parts)) >= limit:
            break
    joined = torch.from_numpy(np.concatenate(parts)[:limit])
    return joined[:, 1:].reshape(-1, 3, 32, 32).contiguous(), joined[:, 0].long()


def crop_and_flip(images: Tensor) -> Tensor:
    """Shift each image by up to 4 pixels, black coming in, and mirror every other one, at random."""
    count, device = len(images), images.device
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, count, 1), device=device)
    span = torch.arange(32, device=device)
    rows, columns = top + span, left + span
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns.flip(1), columns)
    image = torch.arange(count, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(3, device=device).view(1, -1, 1, 1)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def task(
    *,
    folder: str,
    network: Literal["vgg11", "alexnet"] = "vgg11",
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    limit: int | None = None,
    batch_size: int = 32,
    epochs: int = 30,
) -> Task:
    """Options: where the data are, which network, SGD's settings, and ``limit`` for a run on the first records only.

    The learning rate follows half a cosine down to zero over the epochs.
    """
    model = {"vgg11": vgg11, "alexnet": alexnet}[network]()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    return Task(
        model=model,
        loss=nn.functional.cross_entropy,
        optimizer=optimizer,
        train_data=read_records(Path(folder), TRAIN_FILES, limit),
        test_data=read_records(Path(folder), TEST_FILES, limit),
        batch_size=batch_size,
        epochs=epochs,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs),
        augment=crop_and_flip,
    )
