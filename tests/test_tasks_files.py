"""The loaders of data sets' own files: what they read, and what they say of files that are missing or damaged."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from gradcomp.errors import ConfigError
from gradcomp.examples.tasks.cifar10_data import read_records
from gradcomp.examples.tasks.idx import read_idx
from gradcomp.examples.tasks.mnist import load_mnist
from gradcomp.examples.tasks.sentences_data import (
    FOLDS,
    PADDING,
    load_sentences,
    read_sentences,
    split_fold,
    words_of,
)
from gradcomp.integrations.tasks import load


def idx(*sizes: int, values: bytes | None = None) -> bytes:
    """An IDX file of unsigned bytes, which count up."""
    count = torch.Size(sizes).numel()
    body = bytes(i % 251 for i in range(count)) if values is None else values
    return bytes((0, 0, 8, len(sizes))) + struct.pack(f">{len(sizes)}I", *sizes) + body


def digit(label: int) -> bytes:
    """An image, the same for all samples of a label."""
    return np.random.default_rng(label).bytes(28 * 28)


def write_mnist(folder: Path, *, packed: bool = False, train: int = 12, test: int = 5) -> None:
    for part, count in (("train", train), ("t10k", test)):
        labels = idx(count, values=bytes(i % 10 for i in range(count)))
        images = idx(count, 28, 28, values=b"".join(digit(i % 10) for i in range(count)))
        for name, content in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{part}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)


# -- IDX ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_reads_plain_and_packed_files(tmp_path: Path, packed: bool) -> None:
    write_mnist(tmp_path, packed=packed)
    images, labels = load_mnist(tmp_path, "train", None)
    assert images.shape == (12, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert bytes(images[11].flatten().tolist()) == digit(1)
    assert labels.tolist() == [*range(10), 0, 1]
    assert len(load_mnist(tmp_path, "t10k", None)[0]) == 5
    assert [len(part) for part in load_mnist(tmp_path, "train", 7)] == [7, 7]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"neither .*images nor images\.gz is there"),
        (b"", "begins with nothing and not 00000803"),
        (b"\0\0\x08", "begins with 000008 and not 00000803"),
        (idx(3), "begins with 00000801 and not 00000803"),
        (b"\0\0\x0d\x03" + idx(2, 4, 4)[4:], "begins with 00000d03"),
        (b"<html>not found</html>", "begins with 3c68746d"),
        (idx(2, 4, 4)[:11], "ends after 11 bytes, within its header"),
        (idx(2, 4, 5), "has samples of 4 x 5"),
        (idx(2, 4, 4)[:-1], "holds 31 bytes of samples; its header says 2 samples, 32"),
        (idx(2, 4, 4) + b"\0", "holds 33 bytes of samples"),
        (idx(0, 4, 4), "holds 0 bytes of samples"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 4, 4), "its header says 4294967295 samples"),
    ],
)
def test_idx_files_that_are_damaged(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "images"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_idx(path, 4, 4, had_from="https://example.org/images")
    assert str(path) in str(error.value)
    assert "expected an IDX file of n x 4 x 4 unsigned bytes" in str(error.value)
    assert str(error.value).endswith("https://example.org/images")


@pytest.mark.parametrize("damage", ["cut", "plain", "flipped", "empty"])
def test_packed_files_that_are_damaged(tmp_path: Path, damage: str) -> None:
    packed = bytearray(gzip.compress(idx(2, 4, 4)))
    if damage == "flipped":
        packed[-6] ^= 255  # in the checksum
    content = {"cut": packed[:-9], "plain": idx(2, 4, 4), "flipped": packed, "empty": b""}[damage]
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_idx(tmp_path / "images", 4, 4, had_from="nowhere")
    assert str(path) in str(error.value)


def test_mnist_says_where_it_is_had_and_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte.*github\.com/zalandoresearch/fashion-mnist"):
        load_mnist(tmp_path, "train", None)
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(11, values=bytes(11)))
    with pytest.raises(ConfigError, match="has 12 images and train-labels-idx1-ubyte 11 labels"):
        load_mnist(tmp_path, "train", None)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(12, values=bytes([*range(10), 10, 3])))
    with pytest.raises(ConfigError, match="train-labels-idx1-ubyte: sample 10 has label 10; labels are 0 to 9"):
        load_mnist(tmp_path, "train", None)


# -- CIFAR-10 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"", b"\0" * 3000, b"\x0a" + b"\0" * 3072])
def test_cifar10_says_where_it_is_had(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "test_batch.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"https://www\.cs\.toronto\.edu") as error:
        read_records(tmp_path, ("test_batch.bin",), None)
    assert str(path) in str(error.value)


def test_cifar10_asks_for_its_folder_under_either_name(tmp_path: Path) -> None:
    function = load("gradcomp.examples.tasks.cifar10")
    with pytest.raises(ConfigError, match=r"needs --set folder=\.\.\..*https://www\.cs\.toronto\.edu"):
        function.build()
    for option in ("folder", "data"):
        with pytest.raises(ConfigError, match=r"data_batch_1\.bin is not there"):
            function.build([f"{option}={tmp_path}"])


# -- MR ----------------------------------------------------------------------------------------------------------------


def write_sentences(folder: Path, count: int = 30) -> None:
    """Every other word says which file it is in."""
    for name, word in (("rt-polarity.neg", "dull"), ("rt-polarity.pos", "bright")):
        lines = [f"a {word} film , number {i} ; it's {word}er\x85 than caf\xe9 {i * i} . \n" for i in range(count)]
        (folder / name).write_bytes("".join(lines).encode("latin-1"))


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("It isn't the 21st century's new \"conan\" .", "it is n't the 21st century 's new conan"),
        ("they've said : we'll see , you'd bet (twice!)", "they 've said we 'll see , you 'd bet ( twice ! )"),
        ("o'brien 's high-strung caf\xe9 ?", "o'brien 's high strung caf ?"),
        ("-- . :", ""),
    ],
)
def test_words(sentence: str, words: str) -> None:
    assert words_of(sentence) == words.split()


def test_sentences_are_numbered_in_alphabetical_order(tmp_path: Path) -> None:
    write_sentences(tmp_path)
    rows, labels, words = load_sentences(tmp_path)
    assert rows.shape[0] == 60
    assert labels.tolist() == [0] * 30 + [1] * 30
    vocabulary = sorted(
        {w for name in ("neg", "pos") for s in read_sentences(tmp_path / f"rt-polarity.{name}") for w in s}
    )
    assert words == len(vocabulary)
    assert [vocabulary[i - 1] for i in rows[31] if i != PADDING] == words_of(
        "a bright film , number 1 it 's brighter than caf 1"
    )
    assert int(rows.max()) == words
    assert torch.equal(load_sentences(tmp_path)[0], rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not there; set data= to the folder with rt-polarity.neg and rt-polarity.pos"),
        (b"", "its 0 bytes end within a line"),
        (b"good film\nbad fi", "its 16 bytes end within a line"),
        (b"good film\n\nbad film\n", "line 2 has no words"),
        (b"good film\n\x1f\x8b\x08\n", "line 2 holds the byte 1f, which is no text"),
    ],
)
def test_sentence_files_that_are_damaged(tmp_path: Path, content: bytes | None, message: str) -> None:
    write_sentences(tmp_path)
    path = tmp_path / "rt-polarity.pos"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_sentences(tmp_path)
    assert str(path) in str(error.value)
    assert "5331 sentences" in str(error.value)
    assert "https://www.cs.cornell.edu" in str(error.value)


def test_a_file_that_lost_lines_is_noticed(tmp_path: Path) -> None:
    write_sentences(tmp_path)
    (tmp_path / "rt-polarity.neg").write_bytes(b"a dull film\n" * 29)
    with pytest.raises(ConfigError, match=r"rt-polarity\.neg has 29 sentences and rt-polarity\.pos 30"):
        load_sentences(tmp_path)


def test_folds_are_disjoint_and_cover_all() -> None:
    labels = torch.tensor([0, 1, 1] * 50)
    seen: list[int] = []
    for fold in range(FOLDS):
        train, test = split_fold(labels, fold)
        assert sorted([*train.tolist(), *test.tolist()]) == list(range(150))
        assert labels[test].bincount().tolist() == [5, 10]
        assert torch.equal(split_fold(labels, fold)[1], test)
        seen += test.tolist()
    assert sorted(seen) == list(range(150))


def test_the_fold_is_an_option(tmp_path: Path) -> None:
    write_sentences(tmp_path)
    function = load("gradcomp.examples.tasks.sentences")
    first, second = (function.build([f"data={tmp_path}", f"fold={fold}"]).test_data for fold in (0, 9))
    assert isinstance(first, tuple)
    assert isinstance(second, tuple)
    assert len(first[0]) == len(second[0]) == 6
    assert not torch.equal(first[0], second[0])
    for fold in (-1, 10):
        with pytest.raises(ConfigError, match=f"fold={fold} is not allowed; fold must be an integer >= 0 and <= 9"):
            function.build([f"data={tmp_path}", f"fold={fold}"])
