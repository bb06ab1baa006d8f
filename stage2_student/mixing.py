"""Which documents of several weighted caches an epoch holds: a pure function of lengths, weights, seed and epoch.

Each cache is an endless sequence of rows: its documents in one shuffled order, then in another, and so on. So no
document repeats before all have been used. An epoch has as many rows as all caches together. Cache c gives
weight_c / Σ weight of them: the documents that start in the next stretch of that length of its sequence.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from shared.cache.format import Array
from stage2_student.order import POOL_WINDOWS, WINDOW_DOCUMENTS, shuffled_pools

POOL_DOCUMENTS = WINDOW_DOCUMENTS * POOL_WINDOWS


def mixed_pools(
    num_rows: Sequence[Array], weights: Sequence[float], random: np.random.Generator, *, seed: int, epoch: int
) -> Iterator[Array]:
    """An epoch's documents, pool by pool, the caches spread evenly over it.

    Args:
        num_rows: for each cache the rows of its documents, i64 [D]; some in every cache.
        weights: one per cache, above 0.
        random: shuffles each pool.
        seed: decides the caches' own orders.
        epoch: counts from 0.

    Returns:
        Document numbers, i64, through all caches in the order given.
    """
    total, weight_sum = sum(int(rows.sum()) for rows in num_rows), math.fsum(weights)
    first = np.cumsum([0, *map(len, num_rows)])
    taken, places = [], []
    for cache, (rows, weight) in enumerate(zip(num_rows, weights, strict=True)):
        start, stop = (math.ceil(total * n * (weight / weight_sum)) for n in (epoch, epoch + 1))
        docs, at = _stretch(rows, start, stop, seed, cache)
        taken.append(first[cache] + docs)
        places.append((at - start) / (stop - start))
    in_order = np.concatenate(taken)[np.argsort(np.concatenate(places), kind="stable")]
    for begin in range(0, len(in_order), POOL_DOCUMENTS):
        yield random.permutation(in_order[begin : begin + POOL_DOCUMENTS])


def _stretch(rows: Array, start: int, stop: int, seed: int, cache: int) -> tuple[Array, Array]:
    """The documents of a cache's sequence that start in rows `start` to `stop` of it, and where each starts."""
    whole = int(rows.sum())
    docs, starts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]  # an epoch may take nothing of a tiny cache
    for cycle in range(start // whole, -(-stop // whole)):
        random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(cache, cycle)))
        order = np.concatenate(list(shuffled_pools(len(rows), random)))
        at = cycle * whole + np.cumsum(rows[order]) - rows[order]
        kept = (start <= at) & (at < stop) & (rows[order] > 0)
        docs.append(order[kept])
        starts.append(at[kept])
    return np.concatenate(docs), np.concatenate(starts)
