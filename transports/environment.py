"""What torchrun's environment says about this process."""

from __future__ import annotations

import os

from gradcomp.errors import ConfigError

__all__ = ["all_on_this_host", "master", "rank", "ranks_per_host", "world_size"]


def _integer(name: str, at_least: int) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or int(text) < at_least:
        raise ConfigError(f"environment variable {name}={text!r} must be an integer >= {at_least}")
    return int(text)


def _rank_and_world_size() -> tuple[int, int]:
    found, size = _integer("RANK", 0), _integer("WORLD_SIZE", 1)
    if found is None and size is None:
        return 0, 1
    if found is None or size is None:
        missing, there = ("RANK", "WORLD_SIZE") if found is None else ("WORLD_SIZE", "RANK")
        raise ConfigError(f"environment variable {there} is set but {missing} is not; torchrun sets both")
    if found >= size:
        raise ConfigError(f"environment variable RANK={found} must be below WORLD_SIZE={size}")
    return found, size


def rank() -> int:
    """RANK; 0 if neither it nor WORLD_SIZE is set.

    Raises:
        ConfigError: only one of the two is set, or not to an integer in range; names the variable.
    """
    return _rank_and_world_size()[0]


def world_size() -> int:
    """WORLD_SIZE; 1 if neither it nor RANK is set. Raises as :func:`rank`."""
    return _rank_and_world_size()[1]


def all_on_this_host() -> bool:
    """Whether torchrun said that every rank runs on this host."""
    local = _integer("LOCAL_WORLD_SIZE", 1)
    return local is not None and local == _integer("WORLD_SIZE", 1)


def ranks_per_host() -> int:
    """LOCAL_WORLD_SIZE; 1 if there is only one rank.

    Raises:
        ConfigError: it is not set, or the ranks of a host are not as many on each, one after the other.
    """
    found, size = _rank_and_world_size()
    count, local, hosts = _integer("LOCAL_WORLD_SIZE", 1), _integer("LOCAL_RANK", 0), _integer("GROUP_WORLD_SIZE", 1)
    if count is None or local is None:
        if size == 1:
            return 1
        raise ConfigError(
            f"environment variable {'LOCAL_WORLD_SIZE' if count is None else 'LOCAL_RANK'} is not set: torchrun sets "
            "it; without torchrun say how many ranks run on each host, with ranks_per_host="
        )
    if size % count or (hosts is not None and hosts * count != size):
        raise ConfigError(
            f"WORLD_SIZE={size} is not {hosts or 'a number of'} hosts of LOCAL_WORLD_SIZE={count} ranks each: "
            "every host must run as many ranks"
        )
    if found % count != local:
        raise ConfigError(
            f"RANK={found} is not LOCAL_RANK={local} of a host of {count} ranks: the ranks of a host must follow one "
            "another, as torchrun numbers them"
        )
    return count


def master(option: str | None) -> tuple[str, int]:
    """Where ranks meet: ``host:port`` of the option, else MASTER_ADDR and MASTER_PORT, else 127.0.0.1:29500.

    Raises:
        ConfigError: not a host and a port.
    """
    if option is None:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        port = _integer("MASTER_PORT", 1)
        if port is not None and port > 65535:
            raise ConfigError(f"environment variable MASTER_PORT={port} must be at most 65535")
        return host, 29500 if port is None else port
    host, _, text = option.rpartition(":")
    if not host or not (text.isascii() and text.isdigit()) or not 0 < int(text) < 65536:
        raise ConfigError(f"zmq: master={option!r} is not allowed; master must be host:port")
    return host.strip("[]"), int(text)
