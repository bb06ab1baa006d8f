"""The order of training: which documents' rows block i of a run holds, a function of the caches, sizes and seed alone.

Neighbouring shards form pools of about `POOL_BLOCKS` blocks or more. An epoch's sequence is every pool once, in random
order, each packed anew into blocks of its own (`packing`). That sequence is cut into equally long lanes, and block i
comes from lane i mod L: neighbouring blocks lie far apart in the cache, and whoever reads every n-th block, with n a
divisor of L, as one of several ranks or workers does, meets the pools of its own lanes only, one after the other.
A loader deals micro-batches of b blocks to R ranks in turn, and a rank's to its W workers in turn: n = b x R x W.

No block costs more with more documents: how many blocks a pool gives follows from its number of rows, so the
place of any block is found by a search over pools, and a pool is packed when it is reached.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from shared.cache.format import Array
from stage2_student.packing import Segments, num_blocks, pack

LANES = 64
POOL_BLOCKS = 32
PATTERN = 4_096  # blocks after which the alternation of weighted caches repeats


class Place(NamedTuple):
    """A block's place: the number of a pool, in which pass over the sequence, and which of the pool's blocks it is."""

    pool: int
    cycle: int
    number: int


class BlockOrder:
    """All blocks of a run, without end.

    Args:
        doc_rows: for each cache the rows of its documents, u32 [D]; 0 leaves a document out.
        shard_indptr: for each cache the first document of each shard, and the number of all.
        block_size: rows of a block.
        seed: what the order depends on.
        weights: one per cache, above 0, on any scale: so many of the blocks come from each, in steps of 1/4,096, and a
            cache's documents repeat once all have been used (a lane may be a block ahead of another). None takes every
            document of every cache once per epoch.
        num_lanes: L.
    """

    def __init__(
        self,
        doc_rows: Sequence[Array],
        shard_indptr: Sequence[Sequence[int]],
        *,
        block_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        num_lanes: int = LANES,
    ) -> None:
        self.block_size, self.seed, self.num_lanes = block_size, seed, num_lanes
        self._doc_rows = doc_rows
        pools = [_pools(*each, block_size) for each in zip(doc_rows, shard_indptr, strict=True)]
        self._cache = np.repeat(np.arange(len(pools)), [len(rows) for _, _, rows in pools])
        self._first, self._stop, rows = (np.concatenate(parts) for parts in zip(*pools, strict=True))
        self._num_blocks = num_blocks(rows, block_size)
        self.num_blocks_per_epoch = int(self._num_blocks.sum())
        everything = np.arange(len(rows))
        self._sequences = [everything]
        if weights is not None:
            self._sequences = [everything[self._cache == cache] for cache in range(len(doc_rows))]
        self._lengths = [int(self._num_blocks[pools].sum()) for pools in self._sequences]
        self._pattern = None if weights is None else _alternation(weights)
        self._start_caches()

    def block(self, index: int) -> tuple[int, Array, Array, Array]:
        """The cache of a block, and the numbers in it, first rows and ends of its segments: i64 [n] each."""
        place = self.place(index)
        cache = int(self._cache[place.pool])
        docs, starts, stops = self._packed(place.pool, place.cycle).block(place.number)
        return cache, docs + self._first[place.pool], starts, stops

    def documents_ahead(self, index: int) -> list[tuple[int, int, int]]:
        """Cache, first document and end of the pools that the block's lane reads now and next."""
        place = self.place(index)
        left = int(self._num_blocks[place.pool]) - place.number
        pools = dict.fromkeys([place.pool, self.place(index + left * self.num_lanes).pool])
        return [(int(self._cache[pool]), int(self._first[pool]), int(self._stop[pool])) for pool in pools]

    def place(self, index: int) -> Place:
        """Where block `index` lies."""
        sequence = 0
        if self._pattern is not None:
            sequence, index = self._alternate(*divmod(index, self.num_lanes))
        length = self._lengths[sequence]
        cycle, at = divmod(index, length)
        step, lane = divmod(at, self.num_lanes)
        each, longer = divmod(length, self.num_lanes)  # the first lanes are one block longer
        position = lane * each + min(lane, longer) + step
        pools, ends = self._cycle(sequence, cycle)
        found = int(np.searchsorted(ends, position, side="right"))
        pool = int(pools[found])
        return Place(pool, cycle, position - int(ends[found]) + int(self._num_blocks[pool]))

    def _alternate(self, step: int, lane: int) -> tuple[int, int]:
        """Which sequence a lane's block comes from, and its place among all blocks that come from it."""
        assert self._pattern is not None
        # Lane l starts l places into the pattern, so that neighbouring blocks alternate as a lane's own do.
        choices, before = self._pattern
        rounds, at = divmod(lane + step, PATTERN)
        sequence = int(choices[at])
        taken = int(rounds * before[-1, sequence] + before[at, sequence] - before[lane, sequence])
        return sequence, taken * self.num_lanes + lane

    def _shuffled(self, sequence: int, cycle: int) -> tuple[Array, Array]:
        """A sequence's pools in the order of one pass, and the block beyond each one's last."""
        random = np.random.default_rng((self.seed, sequence, cycle))
        pools = random.permutation(self._sequences[sequence])
        return pools, np.cumsum(self._num_blocks[pools])

    def _pack(self, pool: int, cycle: int) -> Segments:
        random = np.random.default_rng((self.seed, pool, cycle, 1))
        rows = self._doc_rows[self._cache[pool]][self._first[pool] : self._stop[pool]]
        return pack(rows, self.block_size, random)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_cycle", "_packed")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        self._start_caches()

    def _start_caches(self) -> None:
        self._cycle = lru_cache(maxsize=4 * len(self._sequences))(self._shuffled)
        self._packed = lru_cache(maxsize=2 * self.num_lanes * len(self._sequences))(self._pack)


def lanes_within(memory_bytes: int, pool_bytes: int) -> int:
    """The most lanes, a power of two, whose pools fit into memory together; at least one."""
    return 1 << max(min(LANES, memory_bytes // max(pool_bytes, 1)).bit_length() - 1, 0)


def largest_pool(doc_lengths: Array, shard_indptr: Sequence[int], block_size: int) -> int:
    """Tokens of the largest pool of a cache."""
    first, stop, rows = _pools(doc_lengths - np.uint32(1), shard_indptr, block_size)
    return int((rows + stop - first).max(initial=0))


def _pools(doc_rows: Array, shard_indptr: Sequence[int], block_size: int) -> tuple[Array, Array, Array]:
    """Pools of neighbouring shards: first document, the one beyond the last, and rows; i64 [P] each, none of no rows.

    As many shards form a pool as have `POOL_BLOCKS` blocks of rows on average.
    """
    borders = np.asarray(shard_indptr, np.int64)
    shard_rows = np.add.reduceat(doc_rows, borders[:-1], dtype=np.int64)
    each = max(round(POOL_BLOCKS * block_size / max(shard_rows.mean(), 1)), 1)
    begins = np.arange(0, len(shard_rows), each)
    first = borders[:-1][begins]
    stop = np.append(first[1:], borders[-1])
    rows = np.add.reduceat(shard_rows, begins)
    some = rows > 0
    return first[some], stop[some], rows[some]


def _alternation(weights: Sequence[float]) -> tuple[Array, Array]:
    """Which cache each block of the pattern comes from, i64 [P], evenly spread by weight; how often each came before,
    i64 [P + 1, C]."""
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    counts = np.maximum(np.floor(shares * PATTERN).astype(np.int64), 1)
    short = PATTERN - int(counts.sum())
    counts[np.argsort(counts - shares * PATTERN, kind="stable")[: max(short, 0)]] += 1
    counts[counts.argmax()] += min(short, 0)
    caches = np.repeat(np.arange(len(counts)), counts)
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count])
    choices = caches[np.argsort(places, kind="stable")]
    before = np.zeros((PATTERN + 1, len(counts)), np.int64)
    np.cumsum(choices[:, None] == np.arange(len(counts)), axis=0, out=before[1:])
    return choices, before
