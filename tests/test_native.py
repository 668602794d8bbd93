"""Which kernels run: the native ones where they are, the torch ones where they are not or where they are wanted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from gradcomp import kernels
from gradcomp.errors import ConfigError
from gradcomp.kernels import native

needs_native = pytest.mark.skipif(not native.AVAILABLE, reason=f"no native kernels: {native.REASON}")


@pytest.fixture(autouse=True)
def _decide_afresh() -> Iterator[None]:
    native.enabled.cache_clear()
    yield
    native.enabled.cache_clear()


@needs_native
def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(native, "module", SimpleNamespace(encode_signs=lambda *args: calls.append(args)))
    monkeypatch.setenv("GRADCOMP_KERNELS", "torch")
    kernels.encode_signs(torch.ones(10), None, 1.0)
    assert not calls
    native.enabled.cache_clear()
    monkeypatch.setenv("GRADCOMP_KERNELS", "native")
    kernels.encode_signs(torch.ones(10), None, 1.0)
    assert len(calls) == 1


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADCOMP_KERNELS", "cuda")
    with pytest.raises(ConfigError, match=r"GRADCOMP_KERNELS='cuda'.*torch or native"):
        kernels.encode_signs(torch.ones(10), None, 1.0)


def test_missing_kernels_are_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("GRADCOMP_KERNELS", raising=False)
    monkeypatch.setattr(native, "AVAILABLE", False)
    monkeypatch.setattr(native, "REASON", "no compiler")
    with caplog.at_level(logging.WARNING, logger="gradcomp"):
        for _ in range(3):
            found = kernels.encode_signs(torch.ones(10), None, 0.5)
            assert not isinstance(found, float)
            assert found[1] == 10
    assert [record.getMessage() for record in caplog.records] == [
        "no native kernels (no compiler): running the torch kernels, which are slower"
    ]
    native.enabled.cache_clear()
    monkeypatch.setenv("GRADCOMP_KERNELS", "native")
    with pytest.raises(ConfigError, match="no compiler"):
        native.enabled()
