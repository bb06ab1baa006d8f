"""The pack plan holds every row of every document exactly once per epoch."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.cache.order import POOL_WINDOWS, WINDOW_DOCUMENTS
from stage2_student.packing import pack

lengths = st.lists(st.integers(1, 90), max_size=400)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, block_size=st.integers(1, 64), seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
@example(lengths=[], block_size=8, seed=0, epoch=0)
@example(lengths=[1, 1], block_size=8, seed=0, epoch=0)
@example(lengths=[9, 17, 10], block_size=8, seed=0, epoch=0)
@example(lengths=[3] * (WINDOW_DOCUMENTS * POOL_WINDOWS + 1), block_size=8, seed=0, epoch=1)
def test_every_row_once_and_no_block_too_long(lengths, block_size, seed, epoch):
    lengths = np.array(lengths, np.int64)
    blocks = pack([lengths], block_size, seed=seed, epoch=epoch)
    seen = [np.zeros(max(n - 1, 0), np.int64) for n in lengths]
    for block in blocks:
        assert 0 < sum(piece.stop - piece.start for piece in block) <= block_size
        for piece in block:
            assert piece.start < piece.stop <= lengths[piece.doc] - 1
            seen[piece.doc][piece.start : piece.stop] += 1
    assert all((rows == 1).all() for rows in seen)
    assert blocks == pack([lengths.copy()], block_size, seed=seed, epoch=epoch)


def test_pieces_of_a_long_document_are_as_long_as_a_block():
    blocks = pack([np.array([26])], 10, seed=0, epoch=0)
    assert sorted(piece for block in blocks for piece in block) == [(0, 0, 10), (0, 10, 20), (0, 20, 25)]


def test_epochs_and_seeds_differ():
    lengths = np.random.default_rng(0).integers(2, 60, 300)
    plans = [pack([lengths], 64, seed=seed, epoch=epoch) for seed, epoch in itertools.product((0, 1), repeat=2)]
    assert all(a != b for a, b in itertools.combinations(plans, 2))
    assert [p.doc for block in plans[0] for p in block] != sorted(p.doc for block in plans[0] for p in block)


@pytest.mark.parametrize(("block_size", "number", "least"), [(512, 158, 155), (1024, 79, 78)])
def test_little_is_wasted_on_lengths_like_mbpps(block_size, number, least):
    """374 documents of 213 tokens on average, with a long tail; no packing needs fewer blocks than `least`."""
    lengths = np.random.default_rng(0).lognormal(5.1, 0.5, 374).astype(np.int64) + 30
    blocks = pack([lengths], block_size, seed=0, epoch=0)
    assert (len(blocks), -(-(lengths - 1).sum() // block_size)) == (number, least)


def test_reading_stays_near_in_the_cache():
    """A pool spans few windows: while it is emitted, few shards are needed."""
    number = WINDOW_DOCUMENTS * POOL_WINDOWS * 3
    blocks = pack([np.full(number, 33)], 64, seed=0, epoch=0)
    first_pool = {piece.doc // WINDOW_DOCUMENTS for block in blocks[: len(blocks) // 3] for piece in block}
    assert len(first_pool) == POOL_WINDOWS
