"""A mix by weight: each cache's share of every epoch, and none of its documents twice before all have come."""

import math
from collections import Counter

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stage2_student.mixing import mixed_pools
from stage2_student.packing import pack

caches = st.lists(
    st.tuples(
        st.lists(st.integers(1, 40), min_size=1, max_size=30).filter(lambda lengths: max(lengths) > 1),
        st.floats(1e-3, 1e3),
    ),
    min_size=1,
    max_size=4,
)


def epoch_documents(lengths, weights, *, seed=0, epoch):
    """An epoch's documents, in order, as (cache, document)."""
    rows = [np.maximum(np.array(part) - 1, 0) for part in lengths]
    pools = mixed_pools(rows, weights, np.random.default_rng((seed, epoch)), seed=seed, epoch=epoch)
    names = [(cache, doc) for cache, part in enumerate(lengths) for doc in range(len(part))]
    return [names[number] for pool in pools for number in pool]


@settings(max_examples=80, deadline=None)
@given(caches=caches, seed=st.integers(0, 2**40), epochs=st.integers(1, 6))
@example(caches=[([2], 1.0), ([2], 1.0), ([2], 1.0)], seed=0, epochs=3)
@example(caches=[([2], 1.0), ([2], 2.0)], seed=0, epochs=3)
@example(caches=[([2, 1, 1], 1000.0), ([40] * 30, 0.001)], seed=0, epochs=2)
def test_shares_and_cycles(caches, seed, epochs):
    lengths, weights = zip(*caches, strict=True)
    total = sum(n - 1 for part in lengths for n in part)
    times = Counter()
    for epoch in range(epochs):
        documents = epoch_documents(lengths, weights, seed=seed, epoch=epoch)
        for cache, part in enumerate(lengths):
            share = total * weights[cache] / sum(weights)
            rows = sum(part[doc] - 1 for c, doc in documents if c == cache)
            assert abs(rows - share) <= max(part)  # one document more or less
        times.update(documents)
        for cache, part in enumerate(lengths):
            counts = [times[cache, doc] for doc, n in enumerate(part) if n > 1]
            assert max(counts) - min(counts) <= 1
            assert not any(times[cache, doc] for doc, n in enumerate(part) if n == 1)
    for cache, part in enumerate(lengths):  # nor does what is left over add up from epoch to epoch
        rows = sum(times[cache, doc] * (n - 1) for doc, n in enumerate(part))
        assert abs(rows - epochs * total * weights[cache] / sum(weights)) <= max(part)


def test_a_small_mix_worked_out_by_hand():
    """18 rows in all; the first cache gives two thirds: 12 rows an epoch of its 6 in 3 documents, so each twice."""
    lengths, weights = [[3, 3, 3], [5, 5, 5]], [2, 1]
    documents = epoch_documents(lengths, weights, epoch=0)
    assert Counter(documents)[0, 0] == Counter(documents)[0, 1] == Counter(documents)[0, 2] == 2
    second = [doc for cache, doc in documents if cache == 1]  # 6 of its 12 rows: the documents that start before row 6
    assert len(second) == len(set(second)) == 2
    (last,) = [doc for cache, doc in epoch_documents(lengths, weights, epoch=1) if cache == 1]
    assert {*second, last} == {0, 1, 2}
    plan = pack([np.array(part) for part in lengths], 8, weights=weights, seed=0, epoch=0)
    assert plan == [
        ((1, 0, 2), (0, 0, 2), (0, 0, 2), (2, 0, 2)),
        ((2, 0, 2), (1, 0, 2)),
        ((5, 0, 4), (4, 0, 4)),
    ]


def test_the_caches_are_spread_evenly_over_an_epoch():
    """Also through many pools: each holds both caches by their weights."""
    rows = [np.full(6_000, 10), np.full(9_000, 10)]
    pools = list(mixed_pools(rows, [1, 4], np.random.default_rng(0), seed=0, epoch=0))
    assert [len(pool) for pool in pools] == [2048] * 7 + [15_000 - 7 * 2048]
    for pool in pools:
        assert abs(int((pool < 6_000).sum()) - len(pool) / 5) <= 1


def test_one_scale_of_weights_is_as_good_as_another_and_a_lone_cache_gives_all():
    lengths = [np.arange(2, 40), np.arange(2, 90)]
    plans = [pack(lengths, 64, weights=weights, seed=3, epoch=2) for weights in ([0.25, 0.75], [1, 3], [100, 300])]
    assert plans[0] == plans[1] == plans[2]
    blocks = pack(lengths[:1], 64, weights=[7.0], seed=3, epoch=2)
    assert sorted(piece.doc for block in blocks for piece in block) == list(range(38))
    unweighted = pack(lengths, 64, seed=3, epoch=2)
    assert math.fsum(p.stop - p.start for block in unweighted for p in block) == sum(
        (part - 1).sum() for part in lengths
    )
