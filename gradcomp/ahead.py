"""Training goes on while a step is in flight: what there is to ask of it, and when it must have landed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from gradcomp.errors import GradientError, TransportError
from gradcomp.flight import StepSome
from gradcomp.stepper import Stepper

__all__ = ["Ahead", "or_leave"]


class Ahead:
    """The step in flight, if there is one: for the exchange itself, and for those who bring hooks.

    Args:
        leave: called on an error, so that the other ranks hear of it at once instead of waiting.

    Attributes:
        late: the positions of parameters that had not landed when the last backward pass began: it may not reach them.
    """

    def __init__(self, stepper: Stepper, leave: Callable[[], None]) -> None:
        self._stepper = stepper
        self._leave = leave
        self._failure: Exception | None = None
        self.late: frozenset[int] = frozenset()

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
        if self._stepper.flight is None:
            return
        if self._failure is not None:
            raise TransportError(
                f"some parameters have not been stepped, for the exchange failed: {self._failure}. sync.detach() "
                "leaves all of them as they are"
            ) from self._failure
        try:
            with or_leave(self._leave):
                self._stepper.land(parameters)
        except Exception as error:
            self._failure = error
            raise

    def begin_backward(self, position: int) -> bool:
        """The parameter at ``position`` has a gradient: what is in flight lands before anything else; returns True.

        Raises:
            GradientError: there was no optimizer step since the pass before; or forward used a parameter that had not
                landed.
        """
        with or_leave(self._leave):
            if self.is_flying and not self.is_promised:
                raise GradientError(
                    "backward() again before optimizer.step(), with overlap='forward': the gradients that it adds to "
                    "are on their way. Call sync.wait() before it, or accumulate inside no_sync()"
                )
            if self.is_flying:
                self.late = self._stepper.in_flight
            if position in self.late:
                raise GradientError(
                    f"parameter {self._stepper.plan.table[position].name!r} was used before it was stepped, with "
                    "overlap='forward': not by a module's forward that calls hooks (torch.compile() leaves them out). "
                    "Call sync.wait() before it is used, or use overlap='backward'"
                )
        self.land()
        return True


@contextmanager
def or_leave(leave: Callable[[], None]) -> Iterator[None]:
    """A step that fails in here leaves the run, so that the other ranks hear of it at once instead of waiting."""
    try:
        yield
    except BaseException:
        leave()
        raise
