"""What pytest is not to look into: doctests of modules that cannot be imported here."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["gradcomp/kernels/triton_*.py"]
