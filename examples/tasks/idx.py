"""IDX files, in which MNIST and Fashion-MNIST are kept: a header, then unsigned bytes; plain or compressed with gzip.

The header is two zero bytes, a type (8: unsigned byte), the number of dimensions, and the size of each dimension as a
big-endian 32-bit number; the last dimension varies fastest (http://yann.lecun.com/exdb/mnist/).
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradcomp import ConfigError

UNSIGNED_BYTE = 8


def read_idx(path: Path, *sample_sizes: int, had_from: str) -> Tensor:
    """All samples as a uint8 tensor (n, *sample_sizes).

    Args:
        path: the file; if it is not there, the same with ``.gz`` at the end is taken.
        sample_sizes: what each sample must be, such as 28, 28; nothing for labels.
        had_from: where such files are had, for errors.

    Raises:
        ConfigError: neither file is there, or it is damaged or holds something else; names it.
    """
    packed = path.with_name(path.name + ".gz")
    found = path if path.is_file() else packed
    expected = " x ".join(["n", *map(str, sample_sizes)])
    wanted = f"expected an IDX file of {expected} unsigned bytes; such files are had from {had_from}"
    if not found.is_file():
        raise ConfigError(f"neither {path} nor {packed.name} is there; {wanted}")
    try:
        content = gzip.decompress(found.read_bytes()) if found is packed else found.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{found} cannot be read: {error}; {wanted}") from error
    header_bytes = 4 + 4 * (1 + len(sample_sizes))
    magic = bytes((0, 0, UNSIGNED_BYTE, 1 + len(sample_sizes)))
    if content[:4] != magic:
        raise ConfigError(f"{found} begins with {content[:4].hex() or 'nothing'} and not {magic.hex()}; {wanted}")
    if len(content) < header_bytes:
        raise ConfigError(f"{found} ends after {len(content)} bytes, within its header; {wanted}")
    count, *sizes = struct.unpack(f">{1 + len(sample_sizes)}I", content[4:header_bytes])
    if tuple(sizes) != sample_sizes:
        raise ConfigError(f"{found} has samples of {' x '.join(map(str, sizes))}; {wanted}")
    values = count * math.prod(sample_sizes)
    if count == 0 or len(content) - header_bytes != values:
        held = len(content) - header_bytes
        raise ConfigError(f"{found} holds {held} bytes of samples; its header says {count} samples, {values}; {wanted}")
    flat = np.frombuffer(content, np.uint8, offset=header_bytes)
    return torch.from_numpy(flat.reshape(-1, *sample_sizes).copy())
