"""Gradient compression between a PyTorch optimizer and the network.

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradcomp.attach(optimizer, model=model, compressor="threshold:density=0.001")

This module is the face of the package: it only hands names on.
"""

from gradcomp.bucket import DenseRule
from gradcomp.engine import GradientExchange
from gradcomp.errors import (
    ConfigError,
    GradcompError,
    GradientError,
    HandshakeError,
    PacketError,
    PeerLost,
    ReplicaMismatch,
    StateError,
    TransportError,
    TransportTimeout,
    WorkerFailed,
)
from gradcomp.exchanges.hierarchical import hierarchical
from gradcomp.integrations import ddp as _ddp  # noqa: F401  (gradcomp.integrations.ddp is part of the face)
from gradcomp.integrations.checkpoint import LoadedCheckpoint, load_checkpoint, save_checkpoint
from gradcomp.integrations.checkpoint_dcp import Checkpoint
from gradcomp.integrations.optimizer import attach
from gradcomp.interfaces import Compressor, Exchange, LinearCompressor, Transport
from gradcomp.packet import Packet
from gradcomp.registry import (
    available_compressors,
    available_exchanges,
    available_transports,
    compressor,
    exchange,
    transport,
)
from gradcomp.rules import Rule, Rules
from gradcomp.session import Session
from gradcomp.version import __version__

__all__ = [
    "Checkpoint",
    "Compressor",
    "ConfigError",
    "DenseRule",
    "Exchange",
    "GradcompError",
    "GradientError",
    "GradientExchange",
    "HandshakeError",
    "LinearCompressor",
    "LoadedCheckpoint",
    "Packet",
    "PacketError",
    "PeerLost",
    "ReplicaMismatch",
    "Rule",
    "Rules",
    "Session",
    "StateError",
    "Transport",
    "TransportError",
    "TransportTimeout",
    "WorkerFailed",
    "__version__",
    "attach",
    "available_compressors",
    "available_exchanges",
    "available_transports",
    "compressor",
    "exchange",
    "hierarchical",
    "load_checkpoint",
    "save_checkpoint",
    "transport",
]
