"""Where a server writes down what it does before it says that it did."""

from __future__ import annotations

from abc import ABC, abstractmethod

from gradcomp.server.protocol import Message

__all__ = ["Journal", "NoJournal"]


class Journal(ABC):
    """What was done, in order: requests and events (gradcomp.server.protocol).

    Replayed upon the state it was begun with, it gives the same state again, bit for bit.
    """

    @abstractmethod
    def append(self, entry: Message) -> None:
        """Write ``entry``, its body included. When this returns it survives the death of this process.

        Raises:
            OSError: it could not be written; nothing of it is in the journal.
        """


class NoJournal(Journal):
    """Forgets everything: for servers that keep no state beyond their life, and while a journal is replayed."""

    def append(self, entry: Message) -> None:
        """Do nothing."""
