"""Kernels trace under torch.compile, and can be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training import noise

import gradcomp
from gradcomp import kernels
from gradcomp.kernels import operators, triton

NUMEL = 1000  # not a multiple of the blocks
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def payload_of(spec: str, parameters: int) -> tuple[Tensor, Tensor]:
    """What is in front of a packet's codes, float32, and the codes."""
    payload = gradcomp.compressor(spec).compress(noise(0, 0, NUMEL)).payload
    return payload[: 4 * parameters].view(torch.float32), payload[4 * parameters :]


def arguments(name: str, device: str) -> tuple[Any, ...]:
    """What ``name`` may be called with."""
    out, other = noise(1, 0, NUMEL), noise(2, 0, NUMEL)
    blocks = -(-NUMEL // 64)
    found: tuple[Any, ...]
    if name == "add_bits":
        scales, packed = payload_of("onebit:block=64", 2 * blocks)
        found = out, scales.view(-1, 2), packed, 64, other
    elif name == "add_levels":
        parameters, packed = payload_of("minmax:bits=4,block=64", 2 * blocks)
        found = out, parameters.view(-1, 2), packed, 4, 64, 0.3, other
    elif name == "add_codes":
        found = out, *payload_of("int8:block=64", blocks), 8, 64, 0.3, other
    elif name == "add_float8":
        found = out, *payload_of("fp8:block=64", blocks), 64, 0.3, other
    elif name == "add_powers":
        found = out, *payload_of("natural:block=64", blocks), 64, 0.3, None
    elif name == "add_factors":
        found = out, noise(3, 0, 2, 40), noise(4, 0, 2, 25), 0.3, other
    else:
        found = {
            "add_scaled": (out, other, 0.3),
            "clear": (out,),
            "cast": (out, torch.bfloat16),
            "pack_votes": (out,),
            "code_bits": (other, out, 64, False, True),
            "code_values": (other, out, "levels", 4, 64, 0.0, True),
        }[name]
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in found)


def called(function: Callable[..., Any], name: str, device: str) -> list[Any]:
    """What a call returns, and what becomes of the vectors it is given."""
    given = arguments(name, device)
    returned = function(*given)
    return [*given[:2], *results(returned)]


def results(returned: Any) -> list[Tensor]:
    if returned is None:
        return []
    return list(returned) if isinstance(returned, tuple) else [returned]


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", operators.__all__)
class TestOperators:
    def test_traced_whole(self, device: str, name: str) -> None:
        kernel = getattr(kernels, name)
        torch.compiler.reset()  # each name would be one more version of the same step

        def step(*given: Any) -> Any:
            given[0].mul_(2.0)
            return kernel(*given)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert_equal(called(compiled, name, device), called(step, name, device))

    def test_declared_right(self, device: str, name: str) -> None:
        torch.library.opcheck(getattr(torch.ops.gradcomp, name).default, arguments(name, device))


@pytest.mark.gpu
@pytest.mark.parametrize("name", operators.__all__)
def test_in_a_cuda_graph(name: str) -> None:
    kernel = getattr(kernels, name)
    expected = called(kernel, name, "cuda")  # which also compiles it, and that cannot be captured
    given, start = arguments(name, "cuda"), arguments(name, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = kernel(*given)
    for _ in range(2):
        for mine, before in zip(given, start, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(before)
        graph.replay()
        assert_equal([*given[:2], *results(returned)], expected)


class Dispatched(TorchDispatchMode):
    """The names of the operators that the dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_plain_calls_do_not_pass_the_dispatcher() -> None:
    with Dispatched() as seen:
        kernels.clear(torch.ones(8))
        assert not any("gradcomp" in name for name in seen.names)
        torch.ops.gradcomp.clear(torch.ones(8))
        assert "gradcomp::clear" in seen.names


@pytest.mark.parametrize("form", ["levels", "signed", "float8", "ternary"])
def test_codes_and_whether_they_are_worth_anything(form: str) -> None:
    spec = {"levels": "minmax:bits=8,block=64", "signed": "int8:block=64", "float8": "fp8:block=64"}
    grad = noise(0, 0, NUMEL)
    expected = gradcomp.compressor(spec.get(form, "twobit:tau=0.5")).compress(grad).payload
    payload, status = kernels.code_values(grad, None, form, 2 if form == "ternary" else 8, 64, 0.5)
    assert torch.equal(payload, expected)
    assert status.tolist() == [0, 0]
    grad[7] = torch.inf
    again, status = kernels.code_values(grad, None, form, 2 if form == "ternary" else 8, 64, 0.5)
    assert again.shape == payload.shape
    assert any(status.tolist())


def test_another_device_than_the_current_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "enabled", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    there = SimpleNamespace(is_cuda=True, get_device=lambda: 1, device=torch.device("cuda", 1))
    with pytest.raises(gradcomp.ConfigError, match="current device, cuda:0"):
        triton.takes(there)  # type: ignore[arg-type]
    assert triton.takes(SimpleNamespace(is_cuda=True, get_device=lambda: 0))  # type: ignore[arg-type]
    assert not triton.takes(torch.zeros(1))
