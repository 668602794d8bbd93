"""The nonlinearity of a network as a choice: ReLU, sigmoid or tanh, and weights that each can start from.

What goes through a layer should neither grow nor vanish with depth. A ReLU drops half of it, so weights are drawn with
variance 2 / inputs (He et al. 2015). Tanh has slope 1 where it starts: 1 / inputs (Glorot and Bengio 2010). A sigmoid
has slope 1/4 and gives 1/2 for nothing: what follows one has weights four times as large, and biases that take that
half away again.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

Activation = Literal["relu", "sigmoid", "tanh"]
MODULES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


def nonlinearity(activation: Activation) -> nn.Module:
    """A new module that applies it."""
    return MODULES[activation]()


def learning_rate(given: float | None, usual: float, activation: Activation) -> float:
    """What is given, or else the usual one, and for sigmoids a quarter of it.

    Their outputs have a mean, along which the loss is as steep as there are many of them (LeCun et al., "Efficient
    BackProp", 1998): larger steps overshoot.
    """
    if given is not None:
        return given
    return usual / 4 if activation == "sigmoid" else usual


def initialise(network: nn.Module, activation: Activation) -> None:
    """Draw the weights of convolutions and dense layers anew. Modules must be registered in the order of their use."""
    follows_sigmoid = False
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Sigmoid):
                follows_sigmoid = True
            elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                gain = 4.0 if follows_sigmoid else math.sqrt(2) if activation == "relu" else 1.0
                module.weight.normal_(0, gain / math.sqrt(module.weight[0].numel()))
                if module.bias is not None:
                    module.bias.zero_()
                    if follows_sigmoid:
                        module.bias.sub_(module.weight.flatten(1).sum(1) / 2)
                follows_sigmoid = False
