"""AlexNet-, VGG- and ResNet-style networks for CIFAR-10's 32x32 images, given as bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradcomp.examples.tasks.activations import Activation, initialise, nonlinearity
from gradcomp.examples.tasks.cifar10_data import DEVIATION, MEAN
from gradcomp.examples.tasks.images import Normalise

POOL = 0  # among the widths of a VGG network
VGG11 = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
VGG16 = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512, POOL)


def _vgg(widths: tuple[int, ...], activation: Activation) -> nn.Sequential:
    layers: list[nn.Module] = [Normalise(MEAN, DEVIATION)]
    channels = 3
    for width in widths:
        if width == POOL:
            layers.append(nn.MaxPool2d(2))
        else:
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nonlinearity(activation)]
            channels = width
    return _start(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)), activation)


def vgg11(activation: Activation = "relu") -> nn.Sequential:
    """VGG-11 with BatchNorm and one dense layer: 9.2 million parameters (Simonyan and Zisserman 2014)."""
    return _vgg(VGG11, activation)


def vgg16(activation: Activation = "relu") -> nn.Sequential:
    """VGG-16 with BatchNorm and one dense layer: 14.7 million parameters (Simonyan and Zisserman 2014)."""
    return _vgg(VGG16, activation)


def alexnet(activation: Activation = "relu") -> nn.Sequential:
    """Five convolutions and three dense layers, most of whose 7.0 million parameters are dense (Krizhevsky 2012)."""

    def act() -> nn.Module:
        return nonlinearity(activation)

    network = nn.Sequential(
        Normalise(MEAN, DEVIATION),
        *(nn.Conv2d(3, 64, 5, padding=2), act(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 192, 5, padding=2), act(), nn.MaxPool2d(2)),
        *(nn.Conv2d(192, 256, 3, padding=1), act()),
        *(nn.Conv2d(256, 192, 3, padding=1), act()),
        *(nn.Conv2d(192, 192, 3, padding=1), act(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Dropout(), nn.Linear(192 * 4 * 4, 1536), act()),
        *(nn.Dropout(), nn.Linear(1536, 512), act()),
        nn.Linear(512, 10),
    )
    initialise(network, activation)
    with torch.no_grad():
        for parameter in network[-1].parameters():
            parameter.mul_(0.1)  # dropout makes noise enough: no opinion to begin with
    return network


class Block(nn.Module):
    """Two convolutions and a way past them, which has no parameters: every other pixel, and zeros for new channels."""

    def __init__(self, channels: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, width - channels
        self.way = nn.Sequential(
            *(nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width)),
            nonlinearity(activation),
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)),
        )
        self.activation = nonlinearity(activation)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, channels, side, side) to (n, width, side / stride, side / stride)."""
        past = images[:, :, :: self.stride, :: self.stride]
        past = nn.functional.pad(past, (0, 0, 0, 0, 0, self.new_channels))
        return self.activation(self.way(images) + past)  # type: ignore[no-any-return]


def resnet20(activation: Activation = "relu") -> nn.Sequential:
    """ResNet-20, nine blocks of 16, 32 and 64 channels: 0.27 million parameters (He et al. 2016, section 4.2)."""
    layers: list[nn.Module] = [
        Normalise(MEAN, DEVIATION),
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nonlinearity(activation)),
    ]
    channels = 16
    for width in (16, 16, 16, 32, 32, 32, 64, 64, 64):
        layers.append(Block(channels, width, 1 if width == channels else 2, activation))
        channels = width
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    initialise(network, activation)
    return network


def _start(network: nn.Sequential, activation: Activation) -> nn.Sequential:
    """torch's own initialisation for ReLU."""
    if activation != "relu":
        initialise(network, activation)
    return network
