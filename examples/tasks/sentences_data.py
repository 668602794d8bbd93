"""Movie-review sentences (MR; Pang and Lee 2005) as numbered words, and ten folds for cross-validation.

A folder holds rt-polarity.pos and rt-polarity.neg, 5,331 sentences each, one a line, in a Western 8-bit encoding
(https://www.cs.cornell.edu/people/pabo/movie-review-data/, "sentence polarity dataset v1.0").
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from gradcomp import ConfigError

FILES = ("rt-polarity.neg", "rt-polarity.pos")  # by label: 0 and 1
HOME = "https://www.cs.cornell.edu/people/pabo/movie-review-data/"
FOLDS = 10
PADDING = 0  # the number of no word
CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def words_of(sentence: str) -> list[str]:
    """Lower-case words, as Kim splits them: what is contracted apart, ( ) , ! ? as words, other marks dropped."""
    known = re.sub(r"[^a-z0-9(),!?'`]", " ", sentence.lower())
    apart = re.sub(r"('s|'ve|n't|'re|'d|'ll)", r" \1", known)
    return re.sub(r"([(),!?])", r" \1 ", apart).split()


def read_sentences(path: Path) -> list[list[str]]:
    """The words of each line of a file.

    Raises:
        ConfigError: the file is not there, is empty or no text, or ends within a line; names it.
    """
    expected = f"expected 5331 sentences of the sentence polarity dataset v1.0, one a line: {HOME}"
    if not path.is_file():
        raise ConfigError(f"{path} is not there; set data= to the folder with {' and '.join(FILES)}; {expected}")
    content = path.read_bytes()
    strange = CONTROL.search(content)
    if strange is not None:
        line = content.count(b"\n", 0, strange.start()) + 1
        raise ConfigError(f"{path}: line {line} holds the byte {strange.group().hex()}, which is no text; {expected}")
    if not content.endswith(b"\n"):
        raise ConfigError(f"{path}: its {len(content)} bytes end within a line; {expected}")
    # Not splitlines(): in this encoding its byte 85 is an ellipsis, and no end of a line.
    sentences = [words_of(line) for line in content[:-1].decode("cp1252", errors="replace").split("\n")]
    if [] in sentences:
        raise ConfigError(f"{path}: line {sentences.index([]) + 1} has no words; {expected}")
    return sentences


def load_sentences(folder: Path) -> tuple[Tensor, Tensor, int]:
    """All sentences, word numbers int64 (n, longest) filled up with PADDING; labels int64 (n,); words there are.

    Words are numbered from 1 in alphabetical order, so that every rank has the same numbers.

    Raises:
        ConfigError: a file is not there or damaged; names it.
    """
    parts = [read_sentences(folder / name) for name in FILES]
    if len(parts[0]) != len(parts[1]):
        raise ConfigError(
            f"{folder}: {FILES[0]} has {len(parts[0])} sentences and {FILES[1]} {len(parts[1])}; the sentence polarity "
            f"dataset v1.0 has 5331 in each: {HOME}"
        )
    sentences = [*parts[0], *parts[1]]
    vocabulary = sorted({word for sentence in sentences for word in sentence})
    number = {word: place for place, word in enumerate(vocabulary, PADDING + 1)}
    rows = torch.full((len(sentences), max(map(len, sentences))), PADDING)
    for row, sentence in zip(rows, sentences, strict=True):
        row[: len(sentence)] = torch.tensor([number[word] for word in sentence])
    labels = torch.tensor([label for label, part in enumerate(parts) for _ in part])
    return rows, labels, len(vocabulary)


def split_fold(labels: Tensor, fold: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to test on: the same every time, each row tested in one of the folds 0 to 9.

    Each class is dealt out alike.
    """
    place = torch.empty_like(labels)
    generator = torch.Generator().manual_seed(0)
    for label in range(len(FILES)):
        rows = (labels == label).nonzero().flatten()
        place[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)) % FOLDS
    return (place != fold).nonzero().flatten(), (place == fold).nonzero().flatten()
