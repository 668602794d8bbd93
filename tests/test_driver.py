"""The exchange thread: what it failed with is what whoever waits for it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from gradcomp.driver import Driver
from gradcomp.errors import TransportError, TransportTimeout
from gradcomp.interfaces import Incoming
from gradcomp.lanes import Lane
from gradcomp.telemetry import StepRecord
from gradcomp.transports.inproc import InprocTransport


@pytest.fixture
def driver() -> Iterator[Driver]:
    (transport,) = InprocTransport.world(1)
    driver = Driver(transport, Lane(torch.device("cpu")))
    yield driver
    driver.stop()


def failing() -> Any:
    yield from nothing()
    raise TransportTimeout("nothing came")


def nothing() -> Iterator[Sequence[Incoming]]:
    yield ()


class RanOut(threading.Event):
    """A wait that runs out; then the thread fails, and is gone, before whoever waited looks."""

    def __init__(self, thread: threading.Thread, go_on: threading.Event) -> None:
        super().__init__()
        self._thread, self._go_on = thread, go_on

    def wait(self, timeout: float | None = None) -> bool:
        self._go_on.set()
        self._thread.join(10)
        return False


def test_what_failed_just_after_a_wait_ran_out_is_said(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def waits() -> Any:
        go_on.wait(10)
        yield from failing()

    driver.submit(waits(), StepRecord())
    monkeypatch.setattr(driver, "_idle", RanOut(driver._thread, go_on))
    with pytest.raises(TransportTimeout, match="nothing came"):
        driver.drain()


def test_a_failure_is_said_again_to_whoever_asks(driver: Driver) -> None:
    driver.submit(failing(), StepRecord())
    for ask in (driver.drain, lambda: driver.wait_until(lambda: False), lambda: driver.submit(failing(), StepRecord())):
        with pytest.raises(TransportTimeout, match="nothing came"):
            ask()


def test_what_is_submitted_after_the_end_is_refused(driver: Driver) -> None:
    driver.submit(nothing(), StepRecord())  # type: ignore[arg-type]
    driver.drain()
    driver.stop()
    with pytest.raises(TransportError, match="closed"):
        driver.submit(nothing(), StepRecord())  # type: ignore[arg-type]
