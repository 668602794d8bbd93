"""``gradcomp doctor`` says which kernels run, and why."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from gradcomp.cli import main
from gradcomp.integrations.doctor import Finding, examine
from gradcomp.kernels import native, triton


@pytest.fixture(autouse=True)
def _decide_afresh() -> Iterator[None]:
    for backend in (native, triton):
        backend.enabled.cache_clear()
    yield
    for backend in (native, triton):
        backend.enabled.cache_clear()


def kernels(device: str = "CPU") -> Finding:
    return next(finding for finding in examine() if finding.subject == f"{device} kernels")


@pytest.mark.skipif(not native.AVAILABLE, reason=f"no native kernels: {native.REASON}")
def test_native_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADCOMP_KERNELS", raising=False)
    assert native.LEVEL in kernels().found
    assert not kernels().advice


@pytest.mark.skipif(not native.AVAILABLE, reason=f"no native kernels: {native.REASON}")
def test_kernels_that_were_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADCOMP_KERNELS", "torch")
    assert "GRADCOMP_KERNELS=torch" in kernels().found
    assert "unset GRADCOMP_KERNELS" in kernels().advice


def test_kernels_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADCOMP_KERNELS", raising=False)
    monkeypatch.setattr(native, "AVAILABLE", False)
    monkeypatch.setattr(native, "REASON", "no compiler was found")
    assert "no compiler was found" in kernels().found
    assert "install a C++17 compiler" in kernels().advice


def test_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADCOMP_KERNELS", "fast")
    assert "GRADCOMP_KERNELS='fast'" in kernels().advice


def test_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = pytest.importorskip("triton")
    monkeypatch.delenv("GRADCOMP_KERNELS", raising=False)
    assert kernels("CUDA").found == f"Triton {installed.__version__}"
    assert not kernels("CUDA").advice


@pytest.mark.parametrize("has_device", [False, True])
def test_triton_that_is_missing_or_turned_off(monkeypatch: pytest.MonkeyPatch, has_device: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(triton, "AVAILABLE", True)
    monkeypatch.setenv("GRADCOMP_KERNELS", "torch")
    assert "torch, because GRADCOMP_KERNELS=torch" in kernels("CUDA").found
    assert ("unset GRADCOMP_KERNELS" in kernels("CUDA").advice) == has_device
    monkeypatch.delenv("GRADCOMP_KERNELS")
    monkeypatch.setattr(triton, "AVAILABLE", False)
    triton.enabled.cache_clear()
    assert kernels("CUDA").found == "torch, because Triton is not installed"
    assert ("pip install triton" in kernels("CUDA").advice) == has_device


def test_too_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    cores = next(finding for finding in examine() if finding.subject == "cores")
    assert "OMP_NUM_THREADS" in cores.advice


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADCOMP_KERNELS", raising=False)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert "CURVE" in text
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "threshold" in found["compressors"]["found"]
