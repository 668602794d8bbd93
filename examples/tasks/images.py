"""What image tasks share: normalising in the model, so that data stay bytes, and moving images about at random."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """uint8 images (n, channels, height, width) to float32: less ``mean``, divided by ``deviation``.

    Args:
        mean: of the training pixels; (channels, 1, 1), or of a whole image.
        deviation: likewise.
    """

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.mean, self.deviation = mean, deviation  # no buffers: these are never averaged between ranks

    def forward(self, images: Tensor) -> Tensor:
        """Normalise."""
        return (images.float() - self.mean.to(images.device)) / self.deviation.to(images.device)


def crop_and_flip(images: Tensor) -> Tensor:
    """Shift square images by up to 4 pixels, black coming in, and mirror every other one, at random."""
    count, channels, side, _ = images.shape
    device = images.device
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, count, 1), device=device)
    span = torch.arange(side, device=device)
    rows, columns = top + span, left + span
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns.flip(1), columns)
    image = torch.arange(count, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
