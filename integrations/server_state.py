"""A parameter server's state in a folder: checkpoints, and journals of what was done since.

    checkpoint-00000003     the state when segment 3 of the journal was begun
    journal-00000003        what was done then
    lock                    held by the server that uses the folder

The newest checkpoint that is whole is loaded, and what the journal has since is done again. The two newest are kept: if
the newest is damaged, the one before and the journal since give the same state, bit for bit.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradcomp.errors import StateError
from gradcomp.integrations.checked_files import read_checked, write_checked
from gradcomp.integrations.server_journal import FileJournal, Segment
from gradcomp.server.service import Service

__all__ = ["Recovered", "ServerState"]

logger = logging.getLogger("gradcomp.server")

_FORMAT = "gradcomp server checkpoint 1"
_NAME = re.compile(r"(checkpoint|journal)-(\d{8})")
_KEPT = 2
_RETRY_S = 10.0  # after a checkpoint that could not be written
_MOST_JOURNAL_BYTES = 1 << 30  # then a checkpoint is due in any case
_NOT_WRITTEN = "the journal cannot be written ({}): what is done from now on is lost if the server dies"


@dataclass(frozen=True)
class Recovered:
    """What was found in the folder.

    Attributes:
        checkpoint: number of the one that was loaded; None: there was none.
        entries: of the journal that were done again.
        torn_bytes: of what was being written when the process ended; nobody was told that it was done.
        seconds: that it took.
    """

    checkpoint: int | None
    entries: int
    torn_bytes: int
    seconds: float


class ServerState:
    """The folder of one server. Use it from the thread that handles requests.

    Args:
        durable: wait for the disk before anybody hears that something was done (survives the death of the machine).
        every_updates: a checkpoint each so many updates; None: not for their number.
        every_s: a checkpoint each so many seconds if anything changed; None: not for the time.

    Attributes:
        journal: to be given to the Service.

    Raises:
        StateError: another server uses the folder.
        OSError: it cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        *,
        durable: bool = False,
        every_updates: int | None = None,
        every_s: float | None = None,
    ) -> None:
        self.journal = FileJournal(durable=durable)
        self._folder = folder
        self._every_updates, self._every_s = every_updates, every_s
        self._number = 0
        self._saved_version = self._tried_version = 0
        self._tried_s = time.monotonic()
        self._failed = False
        self._chained = True
        self._writing: _Writing | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise StateError(f"{folder} is in use by another server; each shard needs a folder of its own") from None

    def _path(self, what: str, number: int) -> Path:
        return self._folder / f"{what}-{number:08d}"

    def _numbers(self, what: str) -> list[int]:
        found = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[2]) for match in found if match is not None and match[1] == what)

    # At the beginning.

    def recover(self, service: Service) -> Recovered:
        """Bring ``service``, which is new, to the state in the folder, and begin the next segment.

        Raises:
            StateError: there are checkpoints but none that is whole, or the journal is damaged.
            OSError: the folder cannot be read or written.
        """
        began_s = now = time.monotonic()
        for draft in self._folder.glob("*.tmp"):
            draft.unlink()
        checkpoint = self._load_newest(service, now)
        first = checkpoint or 0
        entries = torn_bytes = 0
        segments = [number for number in self._numbers("journal") if number >= first]
        done = first - 1
        for number in segments:
            segment = Segment(self._path("journal", number), number)
            if number != done + 1 or (number > first and not segment.follows):
                logger.warning("what was done after segment %d of the journal in %s is lost", done, self._folder)
                break
            for entry in segment.entries():
                service.replay(entry, now)
                entries += 1
            torn_bytes += segment.torn_bytes
            done = number
        if checkpoint is None and done < 0 and self._numbers("journal"):
            raise StateError(f"{self._folder} holds a journal without the checkpoint it goes on from")
        for number in [number for number in segments if number > done]:
            self._path("journal", number).unlink()
        self._number = max(done + 1, first)
        self.journal.begin(self._path("journal", self._number), self._number, follows=self._number > first)
        self._saved_version = self._tried_version = service.version
        service.renew(time.monotonic())
        return Recovered(checkpoint, entries, torn_bytes, time.monotonic() - began_s)

    def _load_newest(self, service: Service, now: float) -> int | None:
        damaged = None
        for number in reversed(self._numbers("checkpoint")):
            try:
                content = read_checked(self._path("checkpoint", number), {"format": _FORMAT, "number": number})
            except (StateError, FileNotFoundError) as error:
                logger.warning("%s", error)
                damaged = damaged or error
                continue
            service.load_state_dict(content, now)
            return number
        if damaged is not None and not self._path("journal", 0).exists():
            raise StateError(f"no checkpoint in {self._folder} is whole: {damaged}") from damaged
        return None

    # Now and then.

    def tick(self, service: Service, now: float) -> None:
        """Begin a checkpoint if one is due, and look after the one being written."""
        if self._writing is not None:
            if self._writing.thread.is_alive():
                return
            self._finish(service)
        if self._due(service, now):
            self._begin(service, now)

    def _due(self, service: Service, now: float) -> bool:
        if self._failed or not self._safe:
            return now >= self._tried_s + _RETRY_S
        if self.journal.nbytes > _MOST_JOURNAL_BYTES:
            return True
        if service.version == self._saved_version:
            return False
        updates = service.version - self._tried_version
        return (self._every_updates is not None and updates >= self._every_updates) or (
            self._every_s is not None and now >= self._tried_s + self._every_s
        )

    def _begin(self, service: Service, now: float) -> None:
        """Begin the next segment, and write the state while requests go on being handled."""
        self._tried_s, self._tried_version = now, service.version
        self._chained = self._safe
        self._number += 1
        try:
            self.journal.begin(self._path("journal", self._number), self._number, follows=self._chained)
        except OSError as error:
            self._warn(_NOT_WRITTEN.format(error))
        service.journal = self.journal  # where it had given up writing, it begins again, upon this state
        path = self._path("checkpoint", self._number)
        self._writing = _Writing(path, service.state_dict(), self._number, service.version)

    def _finish(self, service: Service) -> None:
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.thread.join()
        if writing.error is not None:
            self._warn(f"checkpoint {writing.number} was not written ({writing.error}); the last good one stays")
            if not self._chained:  # nothing leads from the last good one to what is done now
                self.journal.whole = service.durable = False
            return
        if self._failed:
            logger.warning("checkpoint %d is written: all is well again", writing.number)
        self._failed, self._chained = False, True
        self._saved_version = writing.version
        oldest = self._numbers("checkpoint")[-_KEPT:][0]
        for what in ("checkpoint", "journal"):
            for number in self._numbers(what):
                if number < oldest:
                    with contextlib.suppress(OSError):
                        self._path(what, number).unlink()

    @property
    def _safe(self) -> bool:
        """Whether the last good checkpoint and the journal since lead to the present state."""
        return self._chained and self.journal.whole

    def _warn(self, what: str) -> None:
        if not self._failed:
            logger.warning("%s; trying again each %g s", what, _RETRY_S)
        self._failed = True

    def sync(self) -> None:
        """With ``durable``, wait for the disk; call it before anybody hears what was done."""
        try:
            self.journal.sync()
        except OSError as error:
            self._warn(_NOT_WRITTEN.format(error))

    # At the end.

    def save(self, service: Service, now: float) -> bool:
        """Write a checkpoint and wait for it. Returns whether there is one of the present state."""
        self._finish(service)
        if service.version != self._saved_version or self._failed or not self._safe:
            self._begin(service, now)
            self._finish(service)
        return not self._failed

    def close(self) -> None:
        """Wait for the checkpoint being written, and let the folder go. Calling it again does nothing."""
        if self._writing is not None:
            self._writing.thread.join()
        self.journal.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class _Writing:
    """A checkpoint being written.

    Attributes:
        error: why it was not, once the thread has ended.
    """

    def __init__(self, path: Path, content: Mapping[str, Any], number: int, version: int) -> None:
        self.number, self.version = number, version
        self.error: OSError | None = None
        self._path, self._content = path, content
        self.thread = threading.Thread(target=self._write, name="gradcomp-checkpoint", daemon=True)
        self.thread.start()

    def _write(self) -> None:
        try:
            write_checked(self._path, {"format": _FORMAT, "number": self.number}, self._content)
        except OSError as error:
            self.error = error
