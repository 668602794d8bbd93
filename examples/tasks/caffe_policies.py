"""Caffe's learning-rate policies, as schedulers that are stepped after every iteration (Jia et al. 2014).

A policy is a factor of the base learning rate that depends on the iteration alone, counted from 0:

    fixed      1
    step       gamma ^ floor(iteration / stepsize)
    exp        gamma ^ iteration
    inv        (1 + gamma * iteration) ^ -power
    multistep  gamma ^ (how many of stepvalue the iteration has reached)
    poly       (1 - iteration / max_iter) ^ power, and 0 from max_iter on
    sigmoid    1 / (1 + exp(-gamma * (iteration - stepsize)))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gradcomp import ConfigError
from gradcomp.options import check_choice, check_integer, check_number

Policy = Literal["fixed", "step", "exp", "inv", "multistep", "poly", "sigmoid"]
OWNER = "Caffe's learning-rate policy"


@dataclass(frozen=True, kw_only=True)
class CaffePolicy:
    """A policy with Caffe's names for what it needs; what it does not need is not looked at.

    Attributes:
        stepsize: in iterations; for sigmoid, where half of the base rate is reached.
        stepvalue: the iterations of multistep, ascending.
        max_iter: of poly.
    """

    policy: Policy = "fixed"
    gamma: float = 0.1
    power: float = 0.75
    stepsize: int = 1000
    stepvalue: Sequence[int] = ()
    max_iter: int = 5000

    def __post_init__(self) -> None:
        check_choice(OWNER, "policy", self.policy, get_args(Policy))
        # Caffe's sigmoid rises from 0; with a negative gamma it falls.
        check_number(OWNER, "gamma", self.gamma, at_least=-math.inf if self.policy == "sigmoid" else 0)
        check_number(OWNER, "power", self.power)
        check_integer(OWNER, "stepsize", self.stepsize, at_least=1)
        check_integer(OWNER, "max_iter", self.max_iter, at_least=1)
        if not isinstance(self.stepvalue, (list, tuple)):
            raise ConfigError(f"{OWNER}: stepvalue={self.stepvalue!r} is not allowed; it must be a list of iterations")
        for value in self.stepvalue:
            check_integer(OWNER, "stepvalue", value, at_least=0)
        if list(self.stepvalue) != sorted(self.stepvalue):
            raise ConfigError(f"{OWNER}: stepvalue={self.stepvalue!r} is not allowed; it must be ascending")

    def factor(self, iteration: int) -> float:
        """Of the base learning rate, in an iteration counted from 0."""
        if self.policy == "step":
            return float(self.gamma ** (iteration // self.stepsize))
        if self.policy == "exp":
            return float(self.gamma**iteration)
        if self.policy == "inv":
            return float((1 + self.gamma * iteration) ** -self.power)
        if self.policy == "multistep":
            return float(self.gamma ** sum(iteration >= value for value in self.stepvalue))
        if self.policy == "poly":
            return float(max(0.0, 1 - iteration / self.max_iter) ** self.power)
        if self.policy == "sigmoid":
            x = self.gamma * (iteration - self.stepsize)
            return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
        return 1.0

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """Every group's rate is its rate now, lr_mult included, times the factor; step it once an iteration."""
        return LambdaLR(optimizer, self.factor)
