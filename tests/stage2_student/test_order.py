"""The order of training: every row once an epoch, or by weight; near in the cache for each reader; never linear."""

import hashlib
import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stage2_student import order as orders
from stage2_student.order import LANES, POOL_BLOCKS, BlockOrder, lanes_within, largest_pool
from stage2_student.packing import num_blocks


def shards_of(rows, per_shard):
    return [*range(0, len(rows), per_shard), len(rows)]


def order_of(rows, *, per_shard=5, **options):
    """The order of caches with given rows; `per_shard` documents in each shard."""
    rows = [np.array(part, np.uint32) for part in rows]
    settings = {"block_size": 16, "seed": 0} | options
    return BlockOrder(rows, [shards_of(part, per_shard) for part in rows], **settings)


def times_seen(order, rows, indices):
    """How often each row of each cache's documents is in some blocks."""
    seen = [[np.zeros(n, np.int64) for n in part] for part in rows]
    for index in indices:
        cache, docs, starts, stops = order.block(index)
        assert (stops - starts).sum() <= order.block_size
        for doc, start, stop in zip(docs, starts, stops, strict=True):
            seen[cache][doc][start:stop] += 1
    return seen


caches = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(rows=caches, block_size=st.integers(1, 64), num_lanes=st.sampled_from([1, 2, 8, 64]), seed=st.integers(0, 9))
def test_each_epoch_holds_every_row_of_every_cache_once(rows, block_size, num_lanes, seed):
    order = order_of(rows, block_size=block_size, num_lanes=num_lanes, seed=seed)
    each = order.num_blocks_per_epoch
    for epoch in (0, 1):
        seen = times_seen(order, rows, range(epoch * each, (epoch + 1) * each))
        assert all((part == 1).all() for cache in seen for part in cache)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=60), min_size=1, max_size=3),
    weights=st.lists(st.floats(0.05, 20), min_size=3, max_size=3),
    num_lanes=st.sampled_from([1, 2, 8, 64]),
)
def test_weighted_caches_give_their_shares_and_repeat_after_all_have_come(rows, weights, num_lanes):
    weights = weights[: len(rows)]
    order = order_of(rows, weights=weights, num_lanes=num_lanes)
    number = 40 * order.num_blocks_per_epoch
    came = Counter(order.block(index)[0] for index in range(number))
    for cache, weight in enumerate(weights):
        assert abs(came[cache] - number * weight / sum(weights)) <= num_lanes + number / orders.PATTERN + 1
    for cache, seen in enumerate(times_seen(order, rows, range(number))):
        counts = [int(row) for part in seen for row in part]
        own_blocks = int(num_blocks(np.int64(sum(rows[cache])), order.block_size))
        assert max(counts) - min(counts) <= 2 + num_lanes / own_blocks  # each lane may be a block ahead


def test_neighbouring_blocks_of_weighted_caches_alternate():
    order = order_of([[15] * 500, [15] * 500], weights=[1, 3])
    chosen = [order.block(index)[0] for index in range(640)]
    for start in range(0, 640, 8):
        assert chosen[start : start + 8].count(1) == 6


@pytest.mark.parametrize(("ranks", "workers", "micro_batch"), [(1, 1, 4), (1, 4, 4), (4, 1, 4), (2, 2, 8), (8, 2, 4)])
def test_every_reader_meets_its_own_pools_one_after_the_other(ranks, workers, micro_batch):
    """Batches are dealt to ranks in turn, and a rank's to its workers in turn."""
    order = order_of([[15] * 40_000], per_shard=32)
    met = {}
    for index in range(order.num_blocks_per_epoch):
        batch = index // micro_batch
        reader = (batch % ranks, batch // ranks % workers)
        pool = order.place(index).pool
        met.setdefault(reader, []).append((index % LANES, pool))
    num_pools = len(order._num_blocks)
    visits = sum(len(set(pools)) for pools in met.values())
    assert visits <= num_pools + LANES + 1  # a pool that two lanes share is met twice
    for pools in met.values():
        for _, own in itertools.groupby(sorted(pools, key=lambda each: each[0]), key=lambda each: each[0]):
            changes = [pool for pool, _ in itertools.groupby(pool for _, pool in own)]
            assert len(changes) == len(set(changes))


def test_neighbouring_blocks_lie_far_apart():
    order = order_of([[15] * 40_000], per_shard=32)
    for first in range(0, 3 * LANES, LANES):
        assert len({order.place(index).pool for index in range(first, first + LANES)}) >= LANES - 1


def test_neighbouring_shards_form_pools_of_enough_blocks():
    order = order_of([[15] * 1_000], per_shard=1)
    assert set(order._num_blocks[:-1]) <= {POOL_BLOCKS, POOL_BLOCKS + 1, POOL_BLOCKS + 2}
    assert len(order_of([[15] * 1_000], per_shard=500)._num_blocks) == 2
    lengths = np.full(1_000, 16, np.uint32)
    assert largest_pool(lengths, [0, 500, 1_000], 16) == 500 * 16
    assert [lanes_within(100, size) for size in (1, 25, 34, 99, 101, 10**9)] == [LANES, 4, 2, 1, 1, 1]


def test_the_order_never_changes():
    """Runs that were trained with it must stay reproducible."""
    rows = np.random.default_rng(7).integers(0, 60, 3_000)
    for weights, expected in (
        (None, "83ed586fd7cd96e934e7082ec822207c81c791e4ab7fa8ede0f9e15b27337f3f"),
        ((0.7, 0.3), "b6c6fa94b76c313ce8a23e7c18709a184c075c77d99cd579663e5fbdfdd0e466"),
    ):
        order = order_of([rows, rows[:500]], weights=weights, seed=2)
        digest = hashlib.sha256()
        for index in range(0, 3 * order.num_blocks_per_epoch, 7):
            cache, *arrays = order.block(index)
            digest.update(np.concatenate([[cache], *arrays]).astype("<i8").tobytes())
        assert digest.hexdigest() == expected


def test_epochs_and_seeds_differ_and_a_copy_does_not():
    rows = [np.random.default_rng(0).integers(2, 60, 300)]
    order, other = order_of(rows), order_of(rows, seed=1)
    each = order.num_blocks_per_epoch

    def names(order, epoch):
        return [tuple(order.block(index)[1].tolist()) for index in range(epoch * each, (epoch + 1) * each)]

    plans = [names(order, 0), names(order, 1), names(other, 0), names(other, 1)]
    assert all(a != b for a, b in itertools.combinations(plans, 2))
    assert names(pickle.loads(pickle.dumps(order)), 1) == plans[1]


def test_what_a_block_costs_does_not_grow_with_the_documents(monkeypatch):
    """Pools are packed when they are reached, each of them once, and nothing else is packed."""
    packed = []
    monkeypatch.setattr(
        orders, "pack", lambda rows, *more, real=orders.pack: packed.append(len(rows)) or real(rows, *more)
    )
    order = order_of([np.full(1_000_000, 15)], per_shard=32)
    assert packed == []
    for index in range(LANES):
        order.block(index)
    assert len(packed) <= LANES and max(packed) <= 2 * POOL_BLOCKS
