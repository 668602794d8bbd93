"""Compressors that select wait for a GPU once a step, when all is queued; with the packets and states of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_device import DEVICE

import gradcomp
from gradcomp.interfaces import Compressor, State
from gradcomp.kernels import native, reference_select, triton
from gradcomp.packet import Packet

# The interpreter's arithmetic is numpy's, and numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

ATEN = torch.ops.aten
READS = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal}
NUMEL = 700


class Waits(TorchDispatchMode):
    """Counts what a GPU would be waited for: reads of values that are not known to lie on the CPU.

    Here all tensors do, so those that stand for what does on a GPU's machine too are told apart: the 0-dim ones of a
    state, new ones made of Python's numbers, and what is computed of such alone.
    """

    def __init__(self, state: State) -> None:
        super().__init__()
        self.count = 0
        self._on_host = {id(tensor): tensor for tensor in state.values() if not tensor.dim()}
        self._tolist = Tensor.tolist

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        host = bool(given) and all(id(tensor) in self._on_host for tensor in given)
        by_mask = func.overloadpacket is ATEN.index and any(tensor.dtype == torch.bool for tensor in given[1:])
        if (func.overloadpacket in READS or by_mask) and not host:
            self.count += 1
        if host or func.overloadpacket is ATEN.lift_fresh:
            self._on_host |= {id(tensor): tensor for tensor in tree_leaves(found) if isinstance(tensor, Tensor)}
        return found

    def __enter__(self) -> Waits:
        waits = self

        def tolist(tensor: Tensor) -> Any:
            waits.count += id(tensor) not in waits._on_host
            with torch.utils._python_dispatch._disable_current_modes():
                return waits._tolist(tensor)

        Tensor.tolist = tolist  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        Tensor.tolist = self._tolist  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_select, "_SAMPLE", 64)


def noise(step: int) -> Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(step))


def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the compressors call the Triton kernels, whatever the device."""
    monkeypatch.setattr(native, "takes", lambda _: False)
    monkeypatch.setattr(triton, "takes", lambda _: True)


def in_place(codec: Compressor, grad: Tensor, state: State, once: Callable[..., Any]) -> Packet:
    return once(codec.encode_in_place, grad, state)


def encode_and_commit(codec: Compressor, grad: Tensor, state: State, once: Callable[..., Any]) -> Packet:
    packet: Packet = once(codec.encode, grad, state)
    once(codec.commit, grad, packet, state)
    return packet


def prepare_and_commit(codec: Compressor, grad: Tensor, state: State, once: Callable[..., Any]) -> Packet:
    packet, commit = once(codec.prepare, grad.clone(), state)
    once(commit)
    return packet


def alone(codec: Compressor, grad: Tensor, state: State, once: Callable[..., Any]) -> Packet:
    return once(codec.encode, grad)


def results(
    spec: str, run: Callable[..., Packet], device: torch.device, once: Callable[[State], Callable[..., Any]]
) -> list[Any]:
    """Packets and states of the first steps, the last in half precision."""
    codec = gradcomp.compressor(spec)
    state = codec.new_state(torch.zeros(NUMEL, device=device))
    found: list[Any] = []
    for step in range(3):
        grad = noise(step).to(device, torch.float32 if step < 2 else torch.bfloat16)
        packet = run(codec, grad, state, once(state))
        state_bits = {name: tensor.cpu().view(-1).view(torch.uint8).tolist() for name, tensor in state.items()}
        found.append((packet.to_bytes(), state_bits))
    return found


def test_what_counts_as_a_wait() -> None:
    there, tau = torch.rand(3), torch.tensor(2.0)
    with Waits({"tau": tau}) as waits:
        assert tau.item() == float(torch.tensor(1.0) * 2) == 2.0
        assert there.add(tau).numel() == 3
        assert waits.count == 0
        for number, read in enumerate((bool, float, Tensor.tolist, lambda value: there[value.long()]), 1):
            read(there[0] + tau - 2)
            assert waits.count == number
        assert there[there < 2].numel() == 3
        assert waits.count == 5


def at_once(_: State) -> Callable[..., Any]:
    return lambda function, *arguments: function(*arguments)


CASES = [
    *(("threshold:density=0.1", run) for run in (in_place, prepare_and_commit, encode_and_commit, alone)),
    ("adaptive:max_density=0.2,min_density=0.1", in_place),
    ("dgc:ratio=0.1", in_place),
    ("dgc:ratio=0.1", prepare_and_commit),
    ("dgc:ratio=0.1,momentum=0.9", in_place),
]


@pytest.mark.parametrize(("spec", "run"), CASES)
def test_one_wait_at_most(monkeypatch: pytest.MonkeyPatch, spec: str, run: Callable[..., Packet]) -> None:
    def once(state: State) -> Callable[..., Any]:
        def call(function: Callable[..., Any], *arguments: Any) -> Any:
            with Waits(state) as waits:
                found = function(*arguments)
            assert waits.count <= 1
            return found

        return call

    expected = results(spec, run, torch.device("cpu"), at_once)
    on_triton(monkeypatch)
    assert results(spec, run, DEVICE, once) == expected


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "run"), CASES)
def test_cuda_finds_no_other_wait(monkeypatch: pytest.MonkeyPatch, spec: str, run: Callable[..., Packet]) -> None:
    """What CUDA itself sees in torch's operations, but for the one reading."""
    tolist = Tensor.tolist

    def read(tensor: Tensor) -> Any:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return tolist(tensor)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def once(_: State) -> Callable[..., Any]:
        def call(function: Callable[..., Any], *arguments: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    expected = results(spec, run, torch.device("cpu"), at_once)
    assert results(spec, run, DEVICE, at_once) == expected  # compiles
    monkeypatch.setattr(Tensor, "tolist", read)
    assert results(spec, run, DEVICE, once) == expected
