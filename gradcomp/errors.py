"""Every error gradcomp raises on purpose.

GradcompError
├── ConfigError          (ValueError)       an unknown id, option or value
├── PacketError          (ValueError)       bytes that are not a well-formed packet or message
├── GradientError        (RuntimeError)     a gradient that cannot be exchanged (sparse, wrong shape)
├── StateError           (ValueError)       a checkpoint that does not fit this run
├── ReplicaMismatch      (RuntimeError)     replicas that should be identical are not
├── WorkerFailed         (RuntimeError)     a worker process ended with an error
└── TransportError       (RuntimeError)
    ├── HandshakeError                      ranks that do not agree on what they run
    ├── TransportTimeout (TimeoutError)     nothing came within the time allowed
    └── PeerLost         (ConnectionError)  a rank is gone
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "GradcompError",
    "GradientError",
    "HandshakeError",
    "PacketError",
    "PeerLost",
    "ReplicaMismatch",
    "StateError",
    "TransportError",
    "TransportTimeout",
    "WorkerFailed",
]


class GradcompError(Exception):
    """Base of every error below: ``except GradcompError`` catches them all."""


class ConfigError(GradcompError, ValueError):
    """An unknown id, option or value; the message names it and says what is allowed."""


class PacketError(GradcompError, ValueError):
    """Bytes that are not a well-formed packet or message."""


class GradientError(GradcompError, RuntimeError):
    """A gradient that cannot be exchanged."""


class StateError(GradcompError, ValueError):
    """A state dict that does not fit the run it is loaded into."""


class ReplicaMismatch(GradcompError, RuntimeError):
    """Replicas that should be bit-identical are not.

    Attributes:
        parameter: name of the first parameter that differs, in registration order.
        ranks: the ranks whose copy differs from rank 0's.
    """

    def __init__(self, message: str, *, parameter: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.ranks = ranks


class WorkerFailed(GradcompError, RuntimeError):
    """A worker process ended with an error; the message says which rank and why."""


class TransportError(GradcompError, RuntimeError):
    """Something went wrong between ranks."""


class HandshakeError(TransportError):
    """Ranks that do not agree on what they run.

    Attributes:
        field: the field of the handshake that differs (``world_size``, ``tensors``, ``compressor``, ...).
        peer: the rank it differs from.
    """

    def __init__(self, message: str, *, field: str, peer: int) -> None:
        super().__init__(message)
        self.field = field
        self.peer = peer


class TransportTimeout(TransportError, TimeoutError):
    """Nothing came within the time allowed; the message names what was waited for."""


class PeerLost(TransportError, ConnectionError):
    """A rank is gone: killed, unreachable, or it left the run.

    Attributes:
        peer: the rank that is gone.
    """

    def __init__(self, message: str, *, peer: int) -> None:
        super().__init__(message)
        self.peer = peer
