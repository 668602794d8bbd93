"""The conformance checks every compressor and every transport must pass, ours and other people's."""

from __future__ import annotations

from gradcomp.testing_compressor import check_compressor
from gradcomp.testing_transport import check_transport

__all__ = ["check_compressor", "check_transport"]
