"""Spec strings and configs -> objects. Built-ins and plug-ins come in through the same entry points.

A spec string is ``id`` or ``id:key=value,key=value``; a value is JSON, or else a bare word::

    >>> parse_spec("threshold:tau=1e-3")
    ('threshold', {'tau': 0.001})
    >>> parse_spec("zmq:rate=100mbit,insecure=true")
    ('zmq', {'rate': '100mbit', 'insecure': True})

Entry-point groups: ``gradcomp.compressors``, ``gradcomp.transports``, ``gradcomp.exchanges``; the name is the id, the
object a class derived from the group's ABC in :mod:`gradcomp.interfaces`. ``gradcomp.links`` brings what a worker talks
to a parameter server through (:mod:`gradcomp.server.links`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from gradcomp.errors import ConfigError
from gradcomp.interfaces import Compressor, Exchange, Part, Transport
from gradcomp.options import Configured
from gradcomp.server.links import Links

__all__ = [
    "available_compressors",
    "available_exchanges",
    "available_transports",
    "compressor",
    "exchange",
    "format_spec",
    "links_class",
    "parse_spec",
    "transport",
    "transport_class",
    "transport_for_part",
]

T = TypeVar("T", bound=Configured)
K = TypeVar("K")
Spec = str | Mapping[str, object]


def parse_spec(spec: str) -> tuple[str, dict[str, object]]:
    """Split ``id:key=value,...`` into the id and its options.

    Raises:
        ConfigError: no id, an option without ``=``, or an option given twice.
    """
    name, _, rest = spec.partition(":")
    if not name.strip():
        raise ConfigError(f"spec {spec!r} has no id; write 'id' or 'id:key=value,key=value'")
    options: dict[str, object] = {}
    for item in _split_at_commas(rest):
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals or not key:
            raise ConfigError(f"spec {spec!r}: {item!r} is not key=value")
        if key in options:
            raise ConfigError(f"spec {spec!r}: option {key!r} is given twice")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return name.strip(), options


def format_spec(configured: Configured) -> str:
    """The spec string that builds an equal object: what :func:`parse_spec` reads; defaults are left out.

    >>> format_spec(compressor({"id": "topk", "ratio": 0.01}))
    'topk:ratio=0.01'
    """
    config = configured.config()
    usual = {field.name: field.default for field in dataclasses.fields(configured)}  # type: ignore[arg-type]
    options = [f"{key}={json.dumps(value)}" for key, value in config.items() if key != "id" and value != usual.get(key)]
    return ":".join(filter(None, (configured.id, ",".join(options))))


def _split_at_commas(text: str) -> list[str]:
    """Split at commas outside brackets and quotes, so that JSON lists and strings stay whole."""
    items, start, depth, quoted, escaped = [], 0, 0, False, False
    for i, char in enumerate(text):
        if escaped or (quoted and char == "\\"):  # a quote after a backslash belongs to the string
            escaped = not escaped
        elif char == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == "," and depth == 0:
            items.append(text[start:i])
            start = i + 1
    items.append(text[start:])
    return [item for item in items if item.strip()]


@cache
def _found(group: str) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=f"gradcomp.{group}"):
        known = found.get(point.name)
        if known is not None and known.value != point.value:
            raise ConfigError(f"{group}: id {point.name!r} is claimed by both {known.value} and {point.value}")
        found[point.name] = point
    return found


def _available(group: str) -> list[str]:
    return sorted(_found(group))


def _load(group: str, kind: type[K], name: str) -> type[K]:
    point = _found(group).get(name)
    if point is None:
        known = ", ".join(_available(group)) or "none installed"
        raise ConfigError(f"unknown {kind.__name__.lower()} {name!r}; available: {known}")
    cls = point.load()
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise ConfigError(f"{group}: {name!r} ({point.value}) is not a {kind.__name__}")
    return cls


def _build(group: str, kind: type[T], spec: Spec | T) -> T:
    if isinstance(spec, kind):
        return spec
    cls, options = _find(group, kind, spec)
    return cls.from_options(options)


def _find(group: str, kind: type[T], spec: object) -> tuple[type[T], dict[str, object]]:
    """The class a spec names, and the options it gives."""
    if isinstance(spec, str):
        name, options = parse_spec(spec)
    elif isinstance(spec, Mapping):
        options = dict(spec)
        found = options.pop("id", None)
        if not isinstance(found, str):
            raise ConfigError(f"{group}: config {dict(spec)!r} needs an 'id' that is a string")
        name = found
    else:
        raise ConfigError(
            f"{group}: {spec!r} is not a spec string, a config dict or a {kind.__name__}; got {type(spec).__name__}"
        )
    return _load(group, kind, name), options


def compressor(spec: Spec | Compressor) -> Compressor:
    """A compressor from ``"threshold:tau=1e-3"``, ``{"id": "threshold", "tau": 1e-3}`` or a Compressor.

    Raises:
        ConfigError: unknown id (the message lists the known ones), unknown option, or a value out of range.
    """
    return _build("compressors", Compressor, spec)  # type: ignore[type-abstract]


def transport(spec: Spec | Transport) -> Transport:
    """A transport, not yet connected, from ``"zmq:rate=100mbit"``, a config dict or a Transport.

    Raises:
        ConfigError: as :func:`compressor`; also when torchrun's environment is half set.
    """
    return _build("transports", Transport, spec)  # type: ignore[type-abstract]


def transport_for_part(spec: Spec, part: Part) -> Transport:
    """As :func:`transport`, for some ranks of the run only.

    Raises:
        ConfigError: also where the transport cannot be had for a part.
    """
    cls, options = _find("transports", Transport, spec)  # type: ignore[type-abstract]
    for option in ("rank", "world_size"):
        if option in options:
            raise ConfigError(f"{cls.id}: option {option!r} is not to be given here: it follows from the hosts")
    return cls.for_part(options, part)


def transport_class(spec: Spec) -> type[Transport]:
    """The class of the transport that a spec names."""
    return _find("transports", Transport, spec)[0]  # type: ignore[type-abstract]


def links_class(name: str = "zmq") -> type[Links]:
    """What connects workers with a parameter server, by name.

    Raises:
        ConfigError: unknown; the message lists the known ones.
    """
    return _load("links", Links, name)  # type: ignore[type-abstract]


def exchange(spec: Spec | Exchange) -> Exchange:
    """An exchange from ``"two_shot"``, a config dict or an Exchange.

    Raises:
        ConfigError: as :func:`compressor`.
    """
    return _build("exchanges", Exchange, spec)  # type: ignore[type-abstract]


def available_compressors() -> list[str]:
    """Ids of every compressor installed, built-in and plug-in, sorted."""
    return _available("compressors")


def available_transports() -> list[str]:
    """Ids of every transport installed, sorted."""
    return _available("transports")


def available_exchanges() -> list[str]:
    """Ids of every exchange installed, sorted."""
    return _available("exchanges")
