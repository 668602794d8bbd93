"""A token bucket that makes a slow link out of a fast one."""

from __future__ import annotations

import re

from gradcomp.errors import ConfigError
from gradcomp.transports.frames import MAX_CHUNK_BYTES

__all__ = ["TokenBucket", "paced_chunk_bytes", "parse_rate"]

_UNITS = {"bit": 1, "kbit": 1_000, "mbit": 1_000_000, "gbit": 1_000_000_000}
_BURST_S = 0.01
_CHUNK_S = 0.005
_MIN_CHUNK_BYTES = 16 << 10


def parse_rate(owner: str, rate: object) -> float | None:
    """Bits per second from ``"100mbit"`` (bit, kbit, mbit, gbit; decimal) or a number; None for no limit.

    >>> parse_rate("zmq", "1.5gbit")
    1500000000.0

    Raises:
        ConfigError: anything else, or a rate below 1 kbit.
    """
    if rate is None:
        return None
    bits = 0.0
    if isinstance(rate, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", rate.strip().lower())
        if found and found[2] in _UNITS:
            bits = float(found[1]) * _UNITS[found[2]]
    elif isinstance(rate, (int, float)) and not isinstance(rate, bool):
        bits = float(rate)
    if not 1_000 <= bits <= 1e15:
        raise ConfigError(
            f"{owner}: rate={rate!r} is not allowed; rate must be bits per second or a number with a unit, "
            "such as 800kbit, 100mbit or 1gbit, from 1kbit up"
        )
    return bits


def paced_chunk_bytes(bits_per_s: float | None) -> int:
    """Largest chunk on a link of that rate: about 5 ms of it, so that several peers share it smoothly."""
    if bits_per_s is None:
        return MAX_CHUNK_BYTES
    return max(_MIN_CHUNK_BYTES, min(MAX_CHUNK_BYTES, int(bits_per_s / 8 * _CHUNK_S)))


class TokenBucket:
    """Says when the next chunk may leave. May run into debt by one chunk, and saves up to 10 ms of the link."""

    def __init__(self, bits_per_s: float, now_s: float) -> None:
        self._bytes_per_s = bits_per_s / 8
        self._free_at_s = now_s  # when everything taken so far will have left a link of this rate

    def wait_s(self, now_s: float) -> float:
        """Seconds until the next chunk may leave; 0 if it may leave now."""
        return max(0.0, self._free_at_s - now_s)

    def take(self, nbytes: int, now_s: float) -> None:
        """Count ``nbytes`` that left at ``now_s``."""
        self._free_at_s = max(self._free_at_s, now_s - _BURST_S) + nbytes / self._bytes_per_s
