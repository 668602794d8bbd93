"""Training goes on while a step is in flight: what there is to ask of it, and when it must have landed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from gradcomp.errors import GradientError
from gradcomp.flight import StepSome
from gradcomp.stepper import Stepper

__all__ = ["Ahead", "or_leave"]


class Ahead:
    """The step in flight, if there is one: for the exchange itself, and for those who bring hooks.

    Args:
        leave: called on an error, so that the other ranks hear of it at once instead of waiting.
    """

    def __init__(self, stepper: Stepper, leave: Callable[[], None]) -> None:
        self._stepper = stepper
        self._leave = leave

    @property
    def is_flying(self) -> bool:
        """Whether a step is in flight."""
        return self._stepper.flight is not None

    @property
    def is_promised(self) -> bool:
        """Whether one is, and :meth:`promise` was called: the optimizer's step belongs to it."""
        return self._stepper.flight is not None and self._stepper.flight.promised

    def promise(self, step: StepSome) -> None:
        """The optimizer is to step: have ``step`` called with parameters and gradients as they land; clear ``p.grad``.

        Without a step in flight that waits for it, only :meth:`land`.

        Raises:
            GradientError: somebody changed ``p.grad``.
        """
        flight = self._stepper.flight
        if flight is None or flight.promised:
            self.land()
            return
        with or_leave(self._leave):
            flight.promise(step)

    def land(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Finish the step in flight, for these parameters at least, or for all.

        Raises:
            TransportError: a rank is gone, or nothing came in time.
            GradientError: as :meth:`promise`.
        """
        if self._stepper.flight is not None:
            with or_leave(self._leave):
                self._stepper.land(parameters)

    def begin_backward(self, *, syncing: bool) -> bool:
        """A backward pass has a gradient: what is in flight lands before anything else does; returns ``syncing``.

        Raises:
            GradientError: there was no optimizer step since the pass before.
        """
        if self.is_flying:
            with or_leave(self._leave):
                if not self.is_promised:
                    raise GradientError(
                        "backward() again before optimizer.step(), with overlap='forward': the gradients that it adds "
                        "to are on their way. Call sync.wait() before it, or accumulate inside no_sync()"
                    )
                self._stepper.land()
        return syncing


@contextmanager
def or_leave(leave: Callable[[], None]) -> Iterator[None]:
    """A step that fails in here leaves the run, so that the other ranks hear of it at once instead of waiting."""
    try:
        yield
    except BaseException:
        leave()
        raise
