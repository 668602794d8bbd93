"""``gradcomp doctor`` says which kernels run, and why."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from gradcomp.cli import main
from gradcomp.integrations.doctor import Finding, examine
from gradcomp.kernels import native


@pytest.fixture(autouse=True)
def _decide_afresh() -> Iterator[None]:
    native.enabled.cache_clear()
    yield
    native.enabled.cache_clear()


def kernels() -> Finding:
    return next(finding for finding in examine() if finding.subject == "CPU kernels")


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
