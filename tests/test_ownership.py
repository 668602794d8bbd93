"""Memory of gradients is used up only where nobody else can see it, and training is the same whether it is or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import attach, batch, parameters_of, run_ranks, small_net, train_step
from torch import Tensor, nn

from gradcomp.ownership import Ownership

SPECS = ["threshold:density=0.05", "threshold:tau=1e-3", "topk:ratio=0.05", "dgc:ratio=0.05"]
SPECS += ["onebit", "signsgd", "minmax", "fp8"]


def made_anew(numel: int = 6) -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(numel))
    (parameter * torch.arange(1.0, numel + 1)).sum().backward()  # type: ignore[no-untyped-call]
    return parameter


def fresh(parameter: Tensor) -> bool:
    """Whether a gradient may be used up that was not there at the last step, when there was another one."""
    assert parameter.grad is not None
    grad, parameter.grad = parameter.grad, parameter.grad.clone()
    owner = Ownership([parameter])
    parameter.grad = grad
    return owner.may_use_up(0)


def test_a_gradient_that_backward_made() -> None:
    assert fresh(made_anew())


def test_a_gradient_that_was_there_before() -> None:
    parameter = made_anew()
    owner = Ownership([parameter])
    assert not owner.may_use_up(0)
    (parameter * 2).sum().backward()  # adds to it
    assert not owner.may_use_up(0)
    parameter.grad = None
    (parameter * 2).sum().backward()
    assert owner.may_use_up(0)
    owner.end_step()
    parameter.grad.zero_()  # zero_grad(set_to_none=False)
    (parameter * 2).sum().backward()
    assert not owner.may_use_up(0)


def test_the_first_gradient_is_not_used_up() -> None:
    parameter = made_anew()
    grad, parameter.grad = parameter.grad, None
    owner = Ownership([parameter])
    parameter.grad = grad
    assert not owner.may_use_up(0)
    owner.end_step()
    parameter.grad = torch.ones(6)
    assert owner.may_use_up(0)


class InOnePlace(torch.autograd.Function):
    """Gradients lie in the same memory in every step, as a CUDA graph's do, though ``p.grad`` is another tensor."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, place: Tensor) -> Tensor:
        ctx.place = place
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.place.add_(1.0)
        return ctx.place.detach(), None


@pytest.mark.parametrize("overlap", ["backward", "forward"])
def test_memory_that_every_pass_writes_to(overlap: str) -> None:
    def rank_main(transport: Any) -> None:
        net = nn.Linear(8, 8, bias=False)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        place, total = torch.zeros(8, 8), 0.0
        with attach(net, optimizer, transport, compressor="topk:ratio=0.1", overlap=overlap, reduction="sum") as sync:
            for step in range(4):
                optimizer.zero_grad()
                InOnePlace.apply(net.weight, place.fill_(step)).backward()  # type: ignore[no-untyped-call]
                total += 64.0 * (step + 1)
                sync.wait()
                assert net.weight.grad is not None
                total -= float(net.weight.grad.sum()) / 2  # what was sent
                [state] = sync._stepper.store._states.values()
                assert float(state["residual"].sum()) == total

    run_ranks(2, rank_main)


def test_no_gradient() -> None:
    assert not Ownership([nn.Parameter(torch.zeros(3))]).may_use_up(0)


@pytest.mark.parametrize("what", ["part of a buffer", "another type", "shared with processes", "strided"])
def test_memory_that_others_may_look_at(what: str) -> None:
    parameter: nn.Parameter = made_anew()
    if what == "part of a buffer":
        parameter.grad = torch.zeros(12)[:6]
    elif what == "another type":
        parameter = nn.Parameter(torch.zeros(6, dtype=torch.bfloat16))
        parameter.grad = torch.zeros(6, dtype=torch.bfloat16)
    elif what == "shared with processes":
        parameter.grad = torch.zeros(6).share_memory_()
    else:
        parameter = nn.Parameter(torch.zeros(2, 3))
        parameter.grad = torch.zeros(3, 2).t()
    assert not fresh(parameter)


def trained(transport: Any, spec: str, *, kept: bool) -> tuple[list[Tensor], list[Tensor], list[bool]]:
    """Train; with ``kept`` as those do who keep their gradients from step to step."""
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    same = []
    if kept:
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
    with attach(net, optimizer, transport, compressor=spec, digest_every=1) as sync:
        mine = [parameter.grad for parameter in net.parameters()]
        for step in range(6):
            if kept:
                inputs, targets = batch(sync.rank, step)
                optimizer.zero_grad(set_to_none=False)
                nn.functional.cross_entropy(net(inputs), targets).backward()
                same += [grad is p.grad for grad, p in zip(mine, net.parameters(), strict=True)]
                optimizer.step()
            else:
                train_step(net, optimizer, sync.rank, step)
        residuals = [
            state["residual"].clone()
            for spans in sync.state_dict()["states"].values()
            for roles in spans.values()
            for state in roles.values()
        ]
    return parameters_of(net), residuals, same


@pytest.mark.parametrize("spec", SPECS)
def test_training_is_the_same_bit_for_bit(spec: str) -> None:
    made = run_ranks(2, lambda transport: trained(transport, spec, kept=False))
    kept = run_ranks(2, lambda transport: trained(transport, spec, kept=True))
    for (ours, our_residuals, _), (theirs, their_residuals, same) in zip(made, kept, strict=True):
        assert all(same), "a gradient that is kept stays the same object"
        for a, b in zip(ours + our_residuals, theirs + their_residuals, strict=True):
            assert torch.equal(a, b)


def test_memory_is_exchanged_and_not_shared() -> None:
    def rank_main(transport: Any) -> None:
        net = nn.Sequential(nn.Linear(8, 8, bias=False))
        weight = net[0].weight
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with attach(net, optimizer, transport, compressor="topk:ratio=0.1") as sync:
            for _ in range(3):
                optimizer.zero_grad()
                net(torch.randn(4, 8)).square().sum().backward()
                assert weight.grad is not None
                [[roles]] = [spans.values() for spans in sync._stepper.store.save().values()]
                residual = sync._stepper.store._states[next(iter(sync._stepper.store._states))]["residual"]
                assert residual.data_ptr() != weight.grad.data_ptr()
                before = residual.clone()
                weight.grad.fill_(7.0)  # whatever is done to the gradient, the residual does not hear of it
                assert torch.equal(residual, before)
                assert torch.equal(roles["gradient"]["residual"], before)
                optimizer.step()

    run_ranks(2, rank_main)
