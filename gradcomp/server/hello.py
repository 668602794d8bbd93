"""What all workers of a run must agree on with each shard."""

from __future__ import annotations

import json
from collections.abc import Mapping

from gradcomp import handshake
from gradcomp.errors import ConfigError, GradcompError, HandshakeError
from gradcomp.options import check_choice, check_integer
from gradcomp.server.messages import Hello
from gradcomp.server.modes import Mode, mode
from gradcomp.server.optimizers import Description
from gradcomp.server.protocol import PROTOCOL_VERSION
from gradcomp.server.refusal import Refusal
from gradcomp.server.table import ShardTable
from gradcomp.version import WIRE_VERSION, __version__

__all__ = ["check", "check_same", "hello"]

_BUILD: Hello = {"version": __version__, "wire": WIRE_VERSION, "protocol": PROTOCOL_VERSION}


def hello(
    *,
    table: ShardTable,
    optimizer: Description,
    mode: Mode,
    workers: int,
    reduction: str,
    shard: int,
    shards: int,
) -> Hello:
    """The hello for one shard of a run."""
    return {
        **_BUILD,
        "shard": f"{shard}/{shards}",
        "mode": json.dumps(mode.config(), sort_keys=True),
        "workers": workers,
        "reduction": reduction,
        "optimizer": optimizer.structure(),
        "tensors": table.digest(),
    }


def check(found: Hello, table: ShardTable, optimizer: Description) -> Mode:
    """The mode of the first hello, which must be of this build, and of that table and optimizer.

    Raises:
        Refusal: names the field.
    """
    try:
        chosen = mode(json.loads(str(found.get("mode"))))
        check_integer("server", "workers", found.get("workers"), at_least=1, at_most=1 << 20)
        check_choice("server", "reduction", found.get("reduction"), ("mean", "sum"))
        if not isinstance(found.get("shard"), str):
            raise ConfigError(f"server: shard={found.get('shard')!r} is not allowed; shard must be text")
    except (GradcompError, ValueError, TypeError, RecursionError) as error:
        field = next((name for name in ("workers", "reduction", "shard") if f"{name}=" in str(error)), "mode")
        raise Refusal(field, str(error)) from None
    own: Hello = {"optimizer": optimizer.structure(), "tensors": table.digest()}
    check_same({**found, **_BUILD, **own}, found, "this server", "the hello")
    return chosen


def check_same(mine: Hello, theirs: Mapping[str, str | int | bytes], here: str, there: str) -> None:
    """Refuse a hello that differs from this one.

    Raises:
        Refusal: names the first field that differs and both values.
    """
    try:
        handshake.compare(mine, theirs, rank=0, peer=0)
    except HandshakeError as error:
        _, _, what = str(error).partition(" differ in ")
        raise Refusal(error.field, f"{here} (here) and {there} (there) differ in {what}") from None
