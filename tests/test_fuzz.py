"""A small part of tests/fuzz.py, always the same; the rest runs by hand."""

import fuzz


def test_odd_words_and_damaged_corpora_end_in_one_line():
    counts, failed = fuzz.run(200, 1, ("spec", "flags", "verb", "corpus"))
    assert not failed, "\n".join(failed)
    assert sum(counts.values()) > 190
