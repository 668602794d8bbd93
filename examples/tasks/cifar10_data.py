"""CIFAR-10 from the data set's own binary layout (https://www.cs.toronto.edu/~kriz/cifar.html, "binary version").

Five files data_batch_1.bin .. data_batch_5.bin to train on and test_batch.bin: records of one label byte, 0 to 9, and
3072 pixel bytes, the red, green and blue planes of 32x32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradcomp import ConfigError

TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)
RECORD_BYTES = 1 + 3 * 32 * 32
HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"
MEAN = torch.tensor((125.3, 123.0, 113.9)).view(3, 1, 1)  # of the training pixels, by channel
DEVIATION = torch.tensor((63.0, 62.1, 66.7)).view(3, 1, 1)


def read_records(folder: Path, names: tuple[str, ...], limit: int | None) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, 3, 32, 32) and labels int64 (n,) of the first ``limit`` records of some files.

    Raises:
        ConfigError: a file is not there or not whole records, or a label is above 9; names the file and the record.
    """
    parts: list[np.ndarray] = []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ConfigError(
                f"{path} is not there; set folder= to the folder with {names[0]} of CIFAR-10's binary version: {HOME}"
            )
        found = np.fromfile(path, dtype=np.uint8)
        if found.size == 0 or found.size % RECORD_BYTES:
            raise ConfigError(
                f"{path}: {found.size} bytes are not whole records of {RECORD_BYTES} bytes; the data set's files have "
                f"10000 of them, {10_000 * RECORD_BYTES} bytes: {HOME}"
            )
        records = found.reshape(-1, RECORD_BYTES)
        wrong = np.flatnonzero(records[:, 0] > 9)
        if wrong.size:
            raise ConfigError(
                f"{path}: record {wrong[0]} has label {records[wrong[0], 0]}; labels are 0 to 9 in CIFAR-10's binary "
                f"version: {HOME}"
            )
        parts.append(records)
        if limit is not None and sum(map(len, parts)) >= limit:
            break
    joined = torch.from_numpy(np.concatenate(parts)[:limit])
    return joined[:, 1:].reshape(-1, 3, 32, 32).contiguous(), joined[:, 0].long()
