"""Where a rank listens, and whether the others can reach it there."""

from __future__ import annotations

import ipaddress
import os
import socket

from gradcomp.errors import ConfigError, HandshakeError, TransportError
from gradcomp.transports import environment
from gradcomp.transports.rendezvous import Record

__all__ = [
    "check_exposure",
    "check_reachable",
    "endpoint",
    "join_address",
    "listening_address",
    "parse_ip",
    "split_address",
]

_MAX_IPC_PATH = 100


def listening_address(address: str | None, master: tuple[str, int], *, insecure: bool) -> str:
    """The IP address to bind: ``address``, else loopback if all ranks are on this host, else what routes to the master.

    Raises:
        ConfigError: it is not loopback, and ``insecure`` does not allow that.
    """
    host = address
    if host is None:
        host = "127.0.0.1" if environment.all_on_this_host() else _route_to(*master)
    check_exposure("zmq", host, insecure=insecure)
    return host


def check_exposure(owner: str, host: str, *, insecure: bool) -> None:
    """Raise ConfigError unless ``host`` is a loopback address, or ``insecure`` allows others."""
    if not parse_ip(host, owner).is_loopback and not insecure:
        raise ConfigError(
            f"{owner}: would receive on {host}, in the clear and from anybody who reaches it: whoever can connect "
            "could read and send gradients. Keys come in a later version; in a network where every machine is trusted, "
            "allow it with insecure=true"
        )


def check_reachable(mine: Record, theirs: Record) -> None:
    """Raise unless this rank can reach the other one where that listens.

    Raises:
        HandshakeError: unix-domain sockets between two hosts (field ``host``).
        TransportError: it listens on the loopback of another host.
    """
    if mine.host == theirs.host:
        return
    if "ipc://" in (mine.endpoint[:6], theirs.endpoint[:6]):
        raise HandshakeError(
            f"rank {mine.rank} and rank {theirs.rank} differ in host: {mine.host!r} here, {theirs.host!r} there; "
            "ipc=true needs one host",
            field="host",
            peer=theirs.rank,
        )
    if theirs.endpoint.startswith(("tcp://127.", "tcp://[::1]")):
        raise TransportError(
            f"rank {mine.rank}: rank {theirs.rank} on {theirs.host!r} listens on its loopback, {theirs.endpoint}; "
            "set MASTER_ADDR to an address that is not loopback on any host, or give address="
        )


def parse_ip(text: str, owner: str = "zmq") -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IP address in ``text``; ConfigError unless it is one that peers can connect to."""
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        raise ConfigError(f"{owner}: address={text!r} is not allowed; address must be an IP address") from None
    if found.is_unspecified:
        raise ConfigError(f"{owner}: address={text!r} is not allowed; address must be one that peers can connect to")
    return found


def split_address(owner: str, text: str) -> tuple[str, int]:
    """Host and port of ``"host:port"`` or ``"[IPv6]:port"``.

    Raises:
        ConfigError: anything else.
    """
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or (":" in bare) != (bare != host) or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{owner}: address={text!r} is not allowed; it must be HOST:PORT, such as 127.0.0.1:29600")
    return bare, int(port)


def join_address(host: str, port: int) -> str:
    """What :func:`split_address` splits."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _route_to(host: str, port: int) -> str:
    """This host's address on the way to ``host``. Nothing is sent: connecting a UDP socket only looks up the route."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            address: str = probe.getsockname()[0]
    except OSError as error:
        raise TransportError(f"zmq: no route to the master {host}: {error}") from None
    return address


def endpoint(host: str | None, folder: str | None) -> str:
    """What to bind: a free TCP port of ``host``, or a unix-domain socket in ``folder``."""
    if folder is not None:
        path = os.path.join(folder, "socket")
        if len(path) > _MAX_IPC_PATH:
            raise ConfigError(
                f"zmq: the path {path!r} is too long for a unix-domain socket; set TMPDIR to a shorter one"
            )
        return f"ipc://{path}"
    return f"tcp://[{host}]:*" if host is not None and ":" in host else f"tcp://{host}:*"
