"""Does validation text stand in the training data? Counted, so that it can be stated and checked again.

Natural corpora quote themselves: a few stretches are no leak, and whoever compares recipes on one corpus compares them on the
same stretches. A whole split that leaked is (research record: 15 of 34 audited entries of one contest had trained on most of
their validation documents).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.shards import Dataset, validation_starts

LONGEST = 256  # tokens that must be equal, or a validation sequence if that is shorter
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it vanishes mod 2^64


def rolling_hash(tokens: np.ndarray, length: int) -> np.ndarray:
    """Polynomial hash mod 2^64 of every stretch of `length` tokens: uint64 [len - length + 1]. By doubling: n log(length)."""
    with np.errstate(over="ignore"):
        block, size, power = tokens.astype(np.uint64) + np.uint64(1), 1, BASE  # hashes of stretches of `size`, BASE^size
        result, done = None, 0  # hashes of the first `done` tokens of each stretch
        while True:
            if length & size:
                result = block if result is None else result[: len(block) - done] * power + block[done:]
                done += size
            if 2 * size > length:
                return result[: len(tokens) - length + 1]
            block = block[:-size] * power + block[size:]
            power = power * power
            size *= 2


def hash_of(tokens: np.ndarray) -> int:
    return int(rolling_hash(np.asarray(tokens), len(tokens))[0])


def found(folder: Path, settings: dict) -> Iterator[tuple[int, int]]:
    """(position in the validation split, position in the training split) of each validation sequence whose first LONGEST
    tokens stand in the training data, word for word; once for each sequence."""
    train, val = Dataset(folder, "train"), Dataset(folder, "val")
    length = min(LONGEST, settings["sequence_length"])
    starts = validation_starts(val, settings["sequence_length"], settings["val_tokens"], settings["val_spread"])
    wanted = {hash_of(val.window(start, length)): start for start in starts}
    keys = np.sort(np.array(list(wanted), dtype=np.uint64))
    before, seen = 0, set()
    for shard in train.shards:
        hashes = rolling_hash(np.asarray(shard), length)
        near = keys[np.minimum(np.searchsorted(keys, hashes), len(keys) - 1)]
        for at in np.flatnonzero(near == hashes):
            start = wanted[int(hashes[at])]
            if start not in seen and np.array_equal(shard[at : at + length], val.window(start, length)):
                seen.add(start)
                yield start, before + int(at)
        before += len(shard)


def count(folder: Path, settings: dict) -> dict[str, int]:
    """How many validation sequences there are, and how many of them stand in the training data."""
    return {
        "sequences": settings["val_tokens"] // settings["sequence_length"],
        "in_train": sum(1 for _ in found(folder, settings)),
    }
