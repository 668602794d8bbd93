"""What ends a request that is wrong: the answer names the field."""

from __future__ import annotations

__all__ = ["Refusal"]


class Refusal(Exception):
    """Answered with Refused; nothing has changed.

    Attributes:
        field: what of the hello or the request is not allowed.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field
