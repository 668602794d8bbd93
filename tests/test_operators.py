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
from gradcomp.kernels import operators, reference_random, triton
from gradcomp.tiles import Tiling

NUMEL = 1000  # not a multiple of the blocks
TILING = Tiling.of(40, 25, 16)
KEY, STEP = -0x0123_4567_89AB_CDEF, (1 << 40) + 3
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def payload_of(spec: str, parameters: int) -> tuple[Tensor, Tensor]:
    """What is in front of a packet's codes, float32, and the codes."""
    payload = gradcomp.compressor(spec).compress(noise(0, 0, NUMEL)).payload
    return payload[: 4 * parameters].view(torch.float32), payload[4 * parameters :]


def arguments(name: str, device: str) -> tuple[Any, ...]:
    """What ``name`` may be called with."""
    out, other, stream = noise(1, 0, NUMEL), noise(2, 0, NUMEL), torch.tensor([KEY, STEP])
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
    elif name == "add_spectrum":
        found = out, *kernels.largest_coefficients(other, None, TILING, 5), TILING, 0.3, other
        found = *found[:2], found[2].to(torch.int16), *found[3:]
    elif name == "add_factors":
        found = out, noise(3, 0, 2, 40), noise(4, 0, 2, 25), 0.3, other
    else:
        found = {
            "add_scaled": (out, other, 0.3),
            "clear": (out,),
            "cast": (out, torch.bfloat16),
            "pack_votes": (out,),
            "code_bits": (other, out, 64, False, True),
            "code_powers": (other, out, 64, stream, True),
            "code_stochastic": (other, out, 7, 64, "l2", 0.0, stream, True),
            "code_values": (other, out, "levels", 4, 64, 0.0, True),
            "combine": (other, out, noise(3, 0, 2, 40)),
            "largest_coefficients": (other, out, TILING, 5),
            "norms": (noise(3, 0, 2, 40),),
            "orthonormal": (noise(3, 0, 2, 40),),
            "project": (other, out, noise(3, 0, 2, 25)),
            "random_words": (stream, 41),
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
            given[0].mul_(2)
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


ENCODERS: dict[str, tuple[Any, ...]] = {
    "stochastic": (7, 64, "max", 0.0),
    "powers": (64,),
}


def code(
    name: str, grad: Tensor, residual: Tensor | None, stream: Tensor, update: bool = False
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = getattr(kernels, f"code_{name}")(grad, residual, *ENCODERS[name], stream, update)
    return result


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("device", DEVICES)
def test_stochastic_codes_are_what_the_encoders_make_of_key_and_step(name: str, device: str) -> None:
    grad, stream = noise(0, 0, NUMEL).to(device), torch.tensor([KEY, STEP], device=device)
    seen = []
    for step in (STEP, STEP + 1):
        before, after = noise(1, 0, NUMEL).to(device), noise(1, 0, NUMEL).to(device)
        encode = getattr(kernels, f"encode_{name}")
        expected = encode(grad, before, *ENCODERS[name], KEY % (1 << 64), step, True)
        payload, status = code(name, grad, after, stream, update=True)
        assert torch.equal(payload, expected)
        assert torch.equal(after, before)
        assert status.tolist() == [0, 0]
        stream[1].add_(1)
        seen.append(payload)
    assert not torch.equal(*seen)
    grad[7] = torch.inf
    again, status = code(name, grad, after, stream, update=True)
    assert again.shape == payload.shape
    assert any(status.tolist())
    assert torch.equal(after, before)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_stream_that_is_none_is_refused(name: str) -> None:
    for stream in (torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(2, dtype=torch.int64, device="meta")):
        with pytest.raises(gradcomp.ConfigError, match=r"stream=.* is not allowed; it must be torch.int64\[2\] on cpu"):
            code(name, torch.ones(8), None, stream)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("update", [False, True])
def test_replays_draw_what_the_step_in_the_stream_says(name: str, update: bool) -> None:
    grad, residual = noise(0, 0, NUMEL), noise(1, 0, NUMEL)
    on_gpu, left, stream = grad.cuda(), residual.cuda(), torch.tensor([KEY, STEP], device="cuda")
    code(name, on_gpu, left.clone(), stream, update)  # compiles, which cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        payload, status = code(name, on_gpu, left, stream, update)
        stream[1].add_(1)
    for step in (STEP, STEP + 1):  # the residual goes on, too
        graph.replay()
        expected, _ = code(name, grad, residual, torch.tensor([KEY, step]), update)
        assert torch.equal(payload.cpu(), expected)
        assert torch.equal(left.cpu(), residual)
        assert status.tolist() == [0, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 4, 41])
def test_random_words(device: str, count: int) -> None:
    words = kernels.random_words(torch.tensor([KEY, STEP], device=device), count)
    expected = reference_random.philox(KEY % (1 << 64), STEP, 0, 11).view(-1)[:count]
    assert torch.equal(words.cpu(), expected)


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
