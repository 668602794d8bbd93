"""Spoken digits as pictures: log-mel features of the Free Spoken Digit Dataset, 3,000 recordings of six speakers.

A folder holds recordings/DIGIT_SPEAKER_INDEX.wav (https://github.com/Jakobovski/free-spoken-digit-dataset): 16-bit
mono, 8 kHz. Indices 0 to 4 of each speaker and digit are the test set, as its authors say.
"""

from __future__ import annotations

import re
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gradcomp import ConfigError

RATE_HZ = 8000
WINDOW, HOP, BANDS, FRAMES = 256, 200, 40, 40  # 32 ms every 25 ms; 40 of them are a second: longer recordings are cut
SAMPLES = HOP * FRAMES
FLOOR = 1e-2  # of the power in a band, below which it counts as silent; a full-scale sine has about 1e3
TEST_INDICES = range(5)
HOME = "https://github.com/Jakobovski/free-spoken-digit-dataset"
WANTED = f"expected 16-bit mono at {RATE_HZ} Hz, as the Free Spoken Digit Dataset has it: {HOME}"
NAME = re.compile(r"([0-9])_([^_]+)_([0-9]+)\.wav")


def read_wav(path: Path) -> Tensor:
    """A recording as float32 in -1..1.

    Raises:
        ConfigError: the file is damaged, or of another kind; names it.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate, count, *_ = file.getparams()
            data = file.readframes(count)
    except (OSError, EOFError, wave.Error) as error:
        reason = error if str(error) else "it ends too early"
        raise ConfigError(f"{path}: not a WAV file that can be read: {reason}; {WANTED}") from error
    if (channels, width, rate) != (1, 2, RATE_HZ):
        raise ConfigError(
            f"{path}: {channels} channels of {8 * width} bits at {rate} Hz; it must be 1 of 16 at {RATE_HZ}; {WANTED}"
        )
    if count == 0 or len(data) != 2 * count:
        raise ConfigError(f"{path}: {len(data)} bytes of samples; its header says {count} samples of 2 bytes; {WANTED}")
    return torch.from_numpy(np.frombuffer(data, dtype="<i2").astype(np.float32) / 32768)


def mel_filters() -> Tensor:
    """Triangles of equal width on the mel scale, up to half the sampling rate: (BANDS, WINDOW // 2 + 1)."""
    top = 2595 * np.log10(1 + RATE_HZ / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, BANDS + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.linspace(0, RATE_HZ / 2, WINDOW // 2 + 1, dtype=torch.float64)
    low, middle, high = (edges[i : BANDS + i, None] for i in range(3))
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return torch.minimum(rising, falling).clamp_min(0).float()


def log_mel(sounds: Tensor) -> Tensor:
    """Log-mel features (n, BANDS, FRAMES) of sounds (n, SAMPLES)."""
    padded = nn.functional.pad(sounds, (0, WINDOW - HOP))
    spectra = torch.stft(padded, WINDOW, HOP, window=torch.hann_window(WINDOW), center=False, return_complex=True)
    return (mel_filters() @ spectra.abs().square() + FLOOR).log()


def load_speech(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Train and test: features float32 (n, 1, BANDS, FRAMES) and digits int64 (n,).

    Features have mean 0 and deviation 1 in each band over the training set.

    Raises:
        ConfigError: the recordings are not there, or one is damaged or has another name; names folder or file.
    """
    paths = sorted((folder / "recordings").glob("*.wav"))
    sounds, digits, is_test = torch.zeros(len(paths), SAMPLES), [], []
    for row, path in zip(sounds, paths, strict=True):
        name = NAME.fullmatch(path.name)
        if name is None:
            raise ConfigError(
                f"{path}: recordings are called DIGIT_SPEAKER_INDEX.wav, such as 7_jackson_32.wav: {HOME}"
            )
        sound = read_wav(path)[:SAMPLES]
        row[: len(sound)] = sound
        digits.append(int(name[1]))
        is_test.append(int(name[3]) in TEST_INDICES)
    held_out = torch.tensor(is_test, dtype=torch.bool)
    if not held_out.any() or held_out.all():
        raise ConfigError(
            f"{folder / 'recordings'} has {len(paths)} WAV files, {sum(is_test)} of them to test (indices 0 to 4) and "
            "the others to train on; set data= to the folder of the Free Spoken Digit Dataset, which holds "
            f"recordings/DIGIT_SPEAKER_INDEX.wav: {HOME}"
        )
    features = torch.cat([log_mel(part) for part in torch.split(sounds, 500)]).unsqueeze(1)
    seen = features[~held_out]
    features = (features - seen.mean((0, 1, 3), keepdim=True)) / seen.std((0, 1, 3), keepdim=True).clamp_min(1e-3)
    targets = torch.tensor(digits)
    return (features[~held_out], targets[~held_out]), (features[held_out], targets[held_out])
