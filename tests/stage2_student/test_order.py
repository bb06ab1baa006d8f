"""The order that documents are read in."""

import hashlib
import itertools

import numpy as np
import pytest

from stage2_student.order import POOL_WINDOWS, WINDOW_DOCUMENTS, shuffled_pools


@pytest.mark.parametrize("number", [0, 1, 127, 128, 129, 2048, 2049, 5000])
def test_pools_hold_every_document_once_and_few_windows(number):
    pools = list(shuffled_pools(number, np.random.default_rng(3)))
    assert sorted(itertools.chain(*pools)) == list(range(number))
    for pool in pools:
        assert len(set(pool // WINDOW_DOCUMENTS)) <= POOL_WINDOWS
        assert set(pool // WINDOW_DOCUMENTS) == set(np.flatnonzero(np.bincount(pool // WINDOW_DOCUMENTS)))


def test_the_order_never_changes():
    """Runs that were trained with it must stay reproducible."""
    order = np.concatenate(list(shuffled_pools(5000, np.random.default_rng((7, 2)))))
    digest = hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()
    assert digest == "d31d1702dc8acf1f4a6b8406b75001d0c32a48e9eeb0548d0012c7753b2fa163"
