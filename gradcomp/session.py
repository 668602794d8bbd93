"""What :func:`gradcomp.attach` hands out, whether ranks exchange gradients among themselves or through a server."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor

from gradcomp.hooks import Handle
from gradcomp.registry import Spec
from gradcomp.vectors import Vectors

__all__ = ["Session"]


class Session(ABC):
    """One worker's part in a run. Leaves it when used as a context manager and that ends."""

    def __init__(self) -> None:
        self._syncing = True
        self._handles: list[Handle] = []

    @property
    @abstractmethod
    def rank(self) -> int:
        """This process's rank."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """Number of workers that the run is made for."""

    @property
    @abstractmethod
    def step(self) -> int:
        """Number of exchanges that are finished; part of a checkpoint."""

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of backward passes in here stay local and add up, as with DDP's; the next one exchanges the sum."""
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before

    @abstractmethod
    def exchange(self) -> None:
        """Exchange all gradients now and wait for them."""

    def pull(self) -> None:  # noqa: B027
        """Bring the parameters up to date with what others have done. Between ranks they always are."""

    @abstractmethod
    def wait(self) -> None:
        """Have the parameters finished: nothing of the steps taken is on its way any more."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """What was sent and how long it took: totals since the start."""

    @abstractmethod
    def average(self, tensor: Tensor) -> Tensor:
        """The mean of a small tensor over workers, dense; all must call it. For metrics."""

    @abstractmethod
    def all_reduce(self, tensors: Vectors, *, reduction: str = "sum", compressor: Spec = "none") -> Vectors:
        """Add up vectors of the user's own over workers; all must call it equally often."""

    @abstractmethod
    def state_dict(self) -> dict[str, object]:
        """Residuals and all else that must last, of this worker: a plain dict of tensors, strings and numbers."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Restore what :meth:`state_dict` gave. Nothing changes if it is refused (StateError)."""

    def add_handle(self, handle: Handle) -> None:
        """Keep a hook's handle, or whatever else :meth:`detach` must remove."""
        self._handles.append(handle)

    def detach(self) -> None:
        """Take the hooks off and leave: training goes on locally."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Leave the others. Bounded; may be called twice."""

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
