"""What compressors are measured on: one matrix, or the tensors of a network as an exchange would hand them over."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcomp.bench.networks import MODELS
from gradcomp.bucket import DenseRule

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """How a vector is cut into tensors.

    Attributes:
        name: of the network; "" for one matrix.
        shapes: of the tensors, in order.
        dense: whether each is one that an exchange sends as it is: a bias, or BatchNorm's scales.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dense: tuple[bool, ...]

    @classmethod
    def of_model(cls, name: str) -> Layout:
        """The parameters of one of :data:`gradcomp.bench.networks.MODELS`."""
        with torch.device("meta"):
            named = list(MODELS[name]().named_parameters())
        rule = DenseRule()
        return cls(name, tuple(tuple(p.shape) for _, p in named), tuple(rule(label, p) for label, p in named))

    @classmethod
    def matrix(cls, numel: int) -> Layout:
        """Two dimensions, for compressors that look at them: a power of two of columns, about square."""
        columns = 1
        while 4 * columns * columns <= numel and numel % (2 * columns) == 0:
            columns *= 2
        return cls("", ((numel // columns, columns),), (False,))

    @property
    def numel(self) -> int:
        """Elements of all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes)

    def cut(self, vector: Tensor) -> list[Tensor]:
        """Views of ``vector``, a tensor each."""
        parts = torch.split(vector, [math.prod(shape) for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
