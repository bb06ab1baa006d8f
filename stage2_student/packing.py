"""Packing: which rows of which documents share a block, for one pool of documents."""

import bisect
from typing import NamedTuple

import numpy as np

from shared.cache.format import Array

SPARE = 100  # in large pools one block in so many is added, so that next to no document has to be cut


class Segments(NamedTuple):
    """Rows of documents, in the order in which they lie in blocks; row t of a document predicts token t + 1."""

    docs: Array  # i64 [n], the documents' places in the pool
    starts: Array  # i64 [n], their first row
    stops: Array  # i64 [n], the one beyond the last
    borders: Array  # i64 [N + 1], the first segment of each block

    def block(self, number: int) -> tuple[Array, Array, Array]:
        """Documents, first rows and ends of one block's segments."""
        part = slice(self.borders[number], self.borders[number + 1])
        return self.docs[part], self.starts[part], self.stops[part]


def num_blocks(rows: Array, block_size: int) -> Array:
    """Blocks that so many rows are packed into: i64 of the same shape, known before anything is packed."""
    fewest = -(-rows // block_size)
    with_spare = (2 * rows * (SPARE + 1) + SPARE * block_size) // (2 * SPARE * block_size)  # rounded
    blocks: Array = np.maximum(fewest, with_spare)
    return blocks


def pack(doc_rows: Array, block_size: int, random: np.random.Generator) -> Segments:
    """Pack a pool's documents into `num_blocks` blocks.

    Documents of more rows than a block are cut into segments. Longest segment first goes into the fullest block that
    still holds it (best-fit decreasing, Johnson 1973). Where no block is left for a segment, it is cut to fill what is
    free: so the number of blocks follows from the number of rows alone.

    Args:
        doc_rows: [D], rows of each document; documents without rows appear nowhere.
        block_size: rows of a block.
        random: decides which of equally long documents comes first, and the order of the blocks.
    """
    order = random.permutation(len(doc_rows)).tolist()
    segments = [
        (doc, start, min(start + block_size, rows))
        for doc, rows in zip(order, doc_rows[order].tolist(), strict=True)
        for start in range(0, rows, block_size)
    ]
    segments.sort(key=lambda segment: segment[1] - segment[2])
    count = int(num_blocks(doc_rows.sum(dtype=np.int64), block_size))
    blocks: list[list[tuple[int, int, int]]] = [[] for _ in range(count)]
    free: list[tuple[int, int]] = []  # (free rows, block) of the blocks in use, ascending
    num_used, left_over = 0, []
    for segment in segments:
        rows = segment[2] - segment[1]
        slot = bisect.bisect_left(free, (rows, -1))
        if slot < len(free):
            room, number = free.pop(slot)
        elif num_used < len(blocks):
            room, number = block_size, num_used
            num_used += 1
        else:
            left_over.append(segment)
            continue
        blocks[number].append(segment)
        if room > rows:
            bisect.insort(free, (room - rows, number))
    for doc, start, stop in left_over:
        while start < stop:
            room, number = free.pop()
            end = min(start + room, stop)
            blocks[number].append((doc, start, end))
            if end - start < room:
                bisect.insort(free, (room - (end - start), number))
            start = end
    shuffled = [blocks[number] for number in random.permutation(len(blocks))]
    flat = np.array([segment for block in shuffled for segment in block], np.int64).reshape(-1, 3)
    borders = np.cumsum([0, *map(len, shuffled)])
    return Segments(docs=flat[:, 0], starts=flat[:, 1], stops=flat[:, 2], borders=borders)
