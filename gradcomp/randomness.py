"""Random numbers that repeat: a stream for each seed, parameter and rank, and fresh numbers at every step.

A stream is a 64-bit key: the XXH3-64 hash of the UTF-8 text ``seed \\0 rank \\0 parameter``, numbers in decimal, rank
empty where all ranks must draw the same. Element and step are the counter of a Philox generator under that key
(:mod:`gradcomp.kernels.random`), so nothing is drawn in any order: a number depends on key, step and element alone.

A compressor keeps its stream in ``state["random"]``: int64 [key, step], on the CPU. Five places make use of it::

    new_state:   state["random"] = randomness.new_stream(self.seed)
    seed_state:  randomness.seed_stream(state, self.seed, parameter, rank)  # without rank: the same on all ranks
    encode:      key, step = randomness.stream(state, self.seed)
    commit:      randomness.advance(state)
    and encode_in_place, which is encode and commit.
"""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

from gradcomp.interfaces import State

__all__ = ["advance", "go_on", "is_stream", "new_stream", "seed_stream", "stream", "stream_key"]

_WORD = 1 << 64


def stream_key(seed: int, parameter: str = "", rank: int | None = None) -> int:
    """The key of a stream, in 0..2**64-1.

    >>> hex(stream_key(0)), stream_key(0, "weight", 0) != stream_key(0, "weight", 1)
    ('0x3cf812c405a2bade', True)
    """
    text = f"{seed}\0{'' if rank is None else rank}\0{parameter}"
    return xxhash.xxh3_64_intdigest(text.encode())


def new_stream(seed: int) -> Tensor:
    """What goes into ``state["random"]``: the stream of ``seed`` alone, at step 0."""
    return torch.tensor([_signed(stream_key(seed)), 0], dtype=torch.int64)


def seed_stream(state: State, seed: int, parameter: str, rank: int | None = None) -> None:
    """Make a new state's stream that of seed, parameter and, unless ranks must draw the same, rank."""
    state["random"][0] = _signed(stream_key(seed, parameter, rank))


def stream(state: State | None, seed: int) -> tuple[int, int]:
    """Key and step to draw with now, both in 0..2**64-1; without a state: the stream of ``seed`` alone, at step 0."""
    if state is None:
        return stream_key(seed), 0
    key, step = state["random"].tolist()
    return key % _WORD, step % _WORD


def advance(state: State) -> None:
    """On to the next step's numbers."""
    state["random"][1] += 1


def is_stream(field: str) -> bool:
    """Whether a state's field of this name is a stream: ``random``, or a schedule's ``0.random``."""
    return field.rpartition(".")[2] == "random"


def go_on(own: Tensor, old: Tensor) -> None:
    """Bring a stream to the step of another one; it keeps its own key."""
    own[1] = old[1]


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word
