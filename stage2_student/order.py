"""The order that documents are read in: shuffled, and yet almost in sequence.

Windows of neighbouring documents are permuted, and the documents of a few windows form a pool that is shuffled. While a
pool is read, the shards of its windows suffice.
"""

from collections.abc import Iterator

import numpy as np

from shared.cache.format import Array

WINDOW_DOCUMENTS = 128
POOL_WINDOWS = 16


def shuffled_pools(num_documents: int, random: np.random.Generator) -> Iterator[Array]:
    """Every document once, pool by pool.

    Args:
        num_documents: they are numbered from 0.
        random: decides the order; it is drawn from once for the windows, and once more whenever a pool is asked for.

    Returns:
        Document numbers, i64; at most 16 windows of 128 documents in a pool.
    """
    windows = random.permutation(-(-num_documents // WINDOW_DOCUMENTS))
    for first in range(0, len(windows), POOL_WINDOWS):
        starts = windows[first : first + POOL_WINDOWS] * WINDOW_DOCUMENTS
        docs = (starts[:, None] + np.arange(WINDOW_DOCUMENTS)).ravel()
        yield random.permutation(docs[docs < num_documents])
