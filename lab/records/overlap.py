"""Does validation text stand in the training data? Counted, so that a record can state it and anyone can count again.

Natural corpora quote themselves: a few stretches are no leak. A whole split that leaked is one (15 of 34 audited entries of one
contest had trained on most of their validation documents).
"""

import functools
from pathlib import Path

import numpy as np

from data.shards import Dataset, validation_starts

SETTINGS = ("sequence_length", "val_tokens", "val_spread")  # of the trainer, that `repeats` takes
LONGEST = 256  # tokens that must be equal
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it vanishes mod 2^64


def rolling_hash(tokens: np.ndarray, length: int) -> np.ndarray:
    """Polynomial hash mod 2^64 of every stretch of `length` tokens, a power of two: uint64 [tokens - length + 1]."""
    with np.errstate(over="ignore"):
        hashes, size, power = tokens.astype(np.uint64) + np.uint64(1), 1, BASE  # of stretches of `size`; BASE^size
        while size < length:
            hashes, size, power = hashes[:-size] * power + hashes[size:], 2 * size, power * power
    return hashes


@functools.cache
def repeats(folder: Path, T: int, tokens: int, spread: bool) -> list[tuple[int, int]]:
    """(position in the validation split, position in the training split) of each validation sequence of length T whose first
    tokens stand in the training data, word for word; once for each sequence. Compared are LONGEST tokens, or the largest power
    of two that a sequence has."""
    train, val = Dataset(folder, "train"), Dataset(folder, "val")
    length = min(LONGEST, 2 ** (T.bit_length() - 1))
    starts = validation_starts(val, T, tokens, spread)
    wanted = {int(rolling_hash(np.asarray(val.window(start, length)), length)[0]): start for start in starts}
    sieve = np.zeros(2**20, bool)  # by the first 20 bits of a hash: most stretches are none that is wanted
    sieve[np.array(list(wanted), np.uint64) >> np.uint64(44)] = True
    before, places = 0, {}
    for shard in train.shards:
        hashes = rolling_hash(np.asarray(shard), length)
        for at in np.flatnonzero(sieve[hashes >> np.uint64(44)]):
            start = wanted.get(int(hashes[at]))
            if start is not None and start not in places and np.array_equal(shard[at : at + length], val.window(start, length)):
                places[start] = before + int(at)
        before += len(shard)
    return list(places.items())
