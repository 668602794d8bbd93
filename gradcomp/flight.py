"""A step whose buckets are still coming in while the training loop goes on: the next forward pass uses the first ones.

First needed, first served (D. Das et al., "Distributed deep learning using synchronous stochastic gradient descent",
2016; A. Jayarajan et al., "Priority-based parameter propagation for distributed DNN training", 2019; Y. Peng et al., "A
generic communication scheduler for distributed DNN training acceleration", 2019). The layers that forward needs first
are those whose gradients backward makes last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from gradcomp.driver import Driver
from gradcomp.gradients import HeldGradients
from gradcomp.telemetry import StepRecord
from gradcomp.verdict import Verdict
from gradcomp.work import BucketWork

__all__ = ["Flight", "StepSome"]

# Steps the optimizer for some parameters: pairs of parameter and gradient.
StepSome = Callable[[Sequence[tuple[Tensor, Tensor]]], None]


class Flight:
    """One step on its way, from the end of backward until all its buckets have landed. Used by the training thread.

    Args:
        verdict: None: the sums need not be waited for, or all must be.
        wait_for_all: no bucket may land before all are here.
        timeout_s: how long to wait for the verdict, in seconds.
    """

    def __init__(
        self,
        works: Sequence[BucketWork],
        *,
        record: StepRecord,
        driver: Driver,
        gradients: HeldGradients,
        verdict: Verdict | None,
        wait_for_all: bool,
        timeout_s: float,
    ) -> None:
        self.record = record
        self._left = {work.bucket.index: work for work in works}
        self._works = works
        self._driver = driver
        self._gradients = gradients
        self._verdict = verdict
        self._wait_for_all = wait_for_all
        self._timeout_s = timeout_s
        self._commit: bool | None = None
        self._step: StepSome | None = None

    @property
    def promised(self) -> bool:
        """Whether the optimizer was told to step: then parameters are stepped as their buckets land."""
        return self._step is not None

    @property
    def left(self) -> list[int]:
        """The buckets that have not landed, by index."""
        return list(self._left)

    @property
    def landed(self) -> bool:
        """Whether nothing is left to do."""
        return not self._left

    @property
    def nonfinite(self) -> bool:
        """Whether a rank saw a value that is not finite; of a flight that has landed."""
        return any(work.nonfinite for work in self._works)

    def promise(self, step: StepSome) -> None:
        """Clear ``p.grad``, and have ``step`` called with the sums of each bucket that lands.

        Raises:
            GradientError: somebody changed ``p.grad``, which was this rank's alone.
        """
        self._gradients.take()
        self._step = step

    def land(self, buckets: Iterable[int] | None = None) -> None:
        """Wait for these buckets, by index, or all; commit their residuals, and step their parameters.

        What was not promised lands as a whole, and its sums are put in ``p.grad``.

        Raises:
            GradcompError: what the exchange of a bucket failed with.
        """
        wanted = self._left.keys() if buckets is None or self._step is None else self._left.keys() & set(buckets)
        for index in sorted(wanted, reverse=True):
            work, lane = self._left[index], self._driver.lane
            with self.record.held_up():
                with self.record.timed("wait_s"):
                    if self._commit is None:
                        self._commit = self._ask()
                    self._driver.wait_until(lambda work=work: work.over)  # type: ignore[misc]
                with lane.after(lane.mark()):
                    work.finish(commit=self._commit)
                lane.join()
            if self._step is not None:
                self._step(self._gradients.sums(work.bucket.parameters))
                lane.follow()  # before memory is freed that the optimizer still reads
                self._gradients.release(work.bucket.parameters)
            del self._left[index]
        if self._step is None and self.landed:
            self._gradients.give_back()

    def _ask(self) -> bool:
        """Whether residuals are to be committed: the same on every rank, in all that it says of sums of all."""
        if self._verdict is not None:
            verdict = self._verdict
            self._driver.wait_until(lambda: verdict.told)
            deadline = time.monotonic() + self._timeout_s
            self._driver.wait_until(lambda: verdict.known or time.monotonic() > deadline)
            if verdict.sure():
                return True
        elif not self._wait_for_all:
            return True  # there is nothing to commit
        self._driver.drain()
        return not self.nonfinite
