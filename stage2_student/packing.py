"""The pack plan: which segments of which documents share a block: a pure function of lengths, size, seed and epoch.

Documents come in the order of `stage2_student.order`, which still reads a cache almost in sequence, or mixed by weight
from several caches. Each pool of documents is packed best-fit decreasing, and its blocks are shuffled.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stage2_student.mixing import mixed_pools
from stage2_student.order import shuffled_pools


class Segment(NamedTuple):
    """Rows `start` to `stop` of a document, numbered through all caches; row t predicts token t + 1."""

    doc: int
    start: int
    stop: int


Block = tuple[Segment, ...]


def pack(
    doc_lengths: Sequence[np.ndarray],
    block_size: int,
    *,
    weights: Sequence[float] | None = None,
    seed: int,
    epoch: int,
) -> list[Block]:
    """Pack every document of every cache once, or, with weights, as many rows of each cache as its weight says.

    Args:
        doc_lengths: for each cache the tokens per document, i64 [D]. A document of n tokens has n − 1 rows with a next
            token; one of a single token has none and appears nowhere. Documents of more rows than a block are cut into
            segments.
        block_size: rows of a block.
        weights: one per cache, above 0, on any scale; see `mixing`.
        seed, epoch: what the order depends on.

    Returns:
        Blocks in training order; the rows of a block's segments add up to at most `block_size`.
    """
    random = np.random.default_rng((seed, epoch))
    num_rows = [np.maximum(lengths - 1, 0) for lengths in doc_lengths]
    every_doc = np.concatenate(num_rows)
    if weights is None:
        pools = shuffled_pools(len(every_doc), random)
    else:
        pools = mixed_pools(num_rows, weights, random, seed=seed, epoch=epoch)
    blocks: list[Block] = []
    for docs in pools:
        segments = [
            Segment(doc, start, min(start + block_size, rows))
            for doc, rows in zip(docs.tolist(), every_doc[docs].tolist(), strict=True)
            for start in range(0, rows, block_size)
        ]
        pool = _best_fit_decreasing(segments, block_size)
        blocks.extend(pool[i] for i in random.permutation(len(pool)))
    return blocks


def _best_fit_decreasing(segments: list[Segment], block_size: int) -> list[Block]:
    """Longest segment first into the fullest block that still holds it (Johnson 1973); equal lengths in the order
    given."""
    bins: list[list[Segment]] = []
    free: list[tuple[int, int]] = []  # (free rows, block), ascending
    for segment in sorted(segments, key=lambda segment: segment.start - segment.stop):
        rows = segment.stop - segment.start
        slot = bisect.bisect_left(free, (rows, -1))
        if slot < len(free):
            left, number = free.pop(slot)
        else:
            left, number = block_size, len(bins)
            bins.append([])
        bins[number].append(segment)
        if left > rows:
            bisect.insort(free, (left - rows, number))
    return [tuple(segments) for segments in bins]
