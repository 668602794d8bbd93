"""The nonlinearity of a network as a choice: ReLU, sigmoid or tanh, and weights that each can start from.

What goes through a layer should neither grow nor vanish with depth. A ReLU drops half of it, so weights are drawn with
variance 2 / inputs (He et al. 2015). Tanh has slope 1 where it starts: 1 / inputs (Glorot and Bengio 2010). A sigmoid
has slope 1/4 and gives 1/2 for nothing: weights four times as large, and biases that take that half away again.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

Activation = Literal["relu", "sigmoid", "tanh"]
MODULES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
GAINS = {"relu": math.sqrt(2), "sigmoid": 4.0, "tanh": 1.0}


def nonlinearity(activation: Activation) -> nn.Module:
    """A new module that applies it."""
    return MODULES[activation]()


def initialise(network: nn.Module, activation: Activation) -> None:
    """Draw the weights of convolutions and dense layers anew, for layers that all but the first follow an activation.

    The last layer, which none follows, gets no gain: outputs start small.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        for layer in layers:
            gain = 1.0 if layer is layers[-1] and activation != "relu" else GAINS[activation]
            layer.weight.normal_(0, gain / math.sqrt(layer.weight[0].numel()))
            if layer.bias is not None:
                layer.bias.zero_()
                if activation == "sigmoid" and layer is not layers[0]:
                    layer.bias.sub_(layer.weight.flatten(1).sum(1) / 2)
