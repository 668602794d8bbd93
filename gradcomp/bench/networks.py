"""The networks that step times are measured with: plain definitions, random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradcomp.examples.tasks.cifar10 import vgg11

__all__ = ["MODELS", "batch_for"]


def dense_heavy() -> nn.Module:
    """25.2M parameters, AlexNet's share of them in dense layers, for 32x32 images."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(64 * 64, 4096), nn.ReLU(), nn.Linear(4096, 2048), nn.ReLU(), nn.Linear(2048, 10)),
    )


def vgg() -> nn.Module:
    """The CIFAR-10 example's VGG-11, 9.2M parameters, on images that are normalised already."""
    return vgg11()[1:]


def tiny() -> nn.Module:
    """101k parameters: to try a benchmark out."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 32), nn.ReLU(), nn.Linear(32, 64), nn.Linear(64, 10))


def vgg16() -> nn.Module:
    """VGG-16 for 224x224 images and 1,000 classes, 138M parameters: for machines with a GPU.

    K. Simonyan, A. Zisserman, "Very deep convolutional networks for large-scale image recognition", 2014.
    """
    layers: list[nn.Module] = []
    channels = 3
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    dense = [nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)]
    return nn.Sequential(*layers, nn.Flatten(), *dense)


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if channels != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.body(images) + self.shortcut(images))


def resnet50() -> nn.Module:
    """ResNet-50 for 224x224 images and 1,000 classes, 25.6M parameters.

    K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition", CVPR 2016; strides as in
    torchvision.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    channels = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(_Bottleneck(channels, width, stride if block == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dense": dense_heavy,
    "resnet50": resnet50,
    "tiny": tiny,
    "vgg11": vgg,
    "vgg16": vgg16,
}


def batch_for(model: str, size: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random images of the size that the model wants, and classes."""
    side = 224 if model in ("vgg16", "resnet50") else 32
    return torch.randn(size, 3, side, side, device=device), torch.randint(0, 10, (size,), device=device)
