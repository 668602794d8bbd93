"""The package's version, and the wire's: ranks must agree on both."""

__version__ = "0.1.0"
WIRE_VERSION = 1
