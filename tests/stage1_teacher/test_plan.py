"""The planner's arithmetic, and the audit's comparison, on numbers whose answer is known."""

import json

import numpy as np
import pytest
import torch

from shared.cache.encode import encode_shard
from shared.cache.reader import decode_shard
from stage1_teacher.audit import batch_rows, compare
from stage1_teacher.plan import gradient_errors, predict_seconds, shard_overhead, spread_by_length
from tests.support.cache_rows import GRID, shard_of_logits


def test_the_pilot_is_spread_evenly_over_the_lengths():
    assert spread_by_length([50, 10, 40, 20, 30, 60], 3) == [2, 3, 5]
    assert spread_by_length([7, 7, 7], 9) == [0, 1, 2]
    assert spread_by_length([3, 1, 2], 1) == [2]


def test_seconds_that_lie_on_a_line_are_foretold_exactly():
    cells = np.array([100, 400, 900, 1000])
    seconds = predict_seconds(cells, 0.25 + 0.002 * cells, np.array([500, 500, 50]))
    assert seconds == pytest.approx((0.75 + 2.1,) * 3)


def test_noise_widens_the_bounds_and_two_batches_give_none():
    cells = np.array([1000, 1000, 1000, 1000])
    expected, low, high = predict_seconds(cells, np.array([1.0, 2.0, 1.0, 2.0]), np.array([1000] * 10))
    assert expected == pytest.approx(15)
    assert low < 13 < 17 < high
    assert predict_seconds(cells[:2], np.array([1.0, 2.0]), cells) == (6.0, None, None)


def test_what_a_shard_takes_besides_its_tokens():
    # 1,000 bytes a shard and 10 a token.
    fixed, error = shard_overhead([(9000, 800)], [(5000, 400)] * 2, [(2000, 100)] * 8)
    assert (fixed, error) == (1000, 0.01)


def random_rows(k=5):
    generator = np.random.default_rng(0)
    lengths, V = [6, 1, 9], 40
    z = generator.normal(0, 3, (sum(lengths), V)).astype(np.float32)
    z[2, 7:] = -np.inf
    return z, shard_of_logits(z, lengths, k, generator.integers(0, V, sum(lengths)))


@pytest.mark.parametrize("k", [1, 5, 40])
def test_gradient_errors_equal_the_dense_gradients(k):
    """The sparse gradient of an untrained student, q = 1/V, formed id by id."""
    z, arrays = random_rows(k)
    V, want = z.shape[1], []
    begins = arrays.row_indptr()
    for row in np.flatnonzero(arrays.k):
        p = np.exp(z[row].astype(np.float64) - z[row].max())
        p /= p.sum()
        ids = arrays.topk_ids[begins[row] : begins[row + 1]]
        outside = np.setdiff1d(np.arange(V), ids)
        sparse = 1 / V - p
        if len(outside):
            sparse[outside] = (len(outside) / V - p[outside].sum()) / len(outside)
        want.append(np.linalg.norm(sparse - (1 / V - p)) / np.linalg.norm(1 / V - p))
    np.testing.assert_allclose(gradient_errors(arrays, GRID, V), want, rtol=1e-5, atol=1e-6)
    assert gradient_errors(arrays, (1.0,), V) is None


def stored(arrays, codec, top_k=5):
    options = {"codec": codec, "temperatures": GRID, "head_width": 40, "tokenizer_size": 40, "top_k": top_k}
    return decode_shard(encode_shard(arrays, **options)[0], "shard")


def deviations(z, shard, codec, start=7, stop=15):
    rows = batch_rows(shard, start, stop, GRID)
    return compare(torch.from_numpy(z[start:stop]), rows, temperatures=GRID, codec=codec, tail_scale=16)


@pytest.mark.parametrize("codec", ["q", "f16"])
def test_rows_of_these_logits_do_not_deviate(codec):
    z, arrays = random_rows()
    for start, stop in ((0, 5), (7, 15)):
        deviation, sigma, kl = deviations(z, stored(arrays, codec), codec, start, stop)
        assert float(deviation.max()) < 1e-5
        assert float(kl.max()) < 2.6e-3
        finite = [row[np.isfinite(row)].std() for row in z[start:stop]]
        np.testing.assert_allclose(sigma, finite, rtol=1e-5)


def test_a_deviation_is_measured_in_logits():
    z, arrays = random_rows()
    shard = stored(arrays, "f16")
    order = np.argsort(-z[9])
    entry, missing, tail = z.copy(), z.copy(), z.copy()
    entry[9, order[2]] += 0.01
    missing[9, order[20]] = z[9, order[4]] + 0.5
    tail[9, order[5:]] -= 2.0
    assert deviations(entry, shard, "f16")[0][2] == pytest.approx(0.01, abs=0.005)
    assert deviations(missing, shard, "f16")[0][2] >= 0.5
    assert deviations(tail, shard, "f16")[0][2] == pytest.approx(2.0, abs=0.1)
    for changed in (entry, missing, tail):
        others = np.delete(deviations(changed, shard, "f16")[0].numpy(), 2)
        assert others.max() < 1e-5


def test_ids_that_tie_may_be_swapped():
    z, arrays = random_rows()
    shard = stored(arrays, "f16")
    order = np.argsort(-z[9])
    nearly = z.copy()
    nearly[9, order[4]], nearly[9, order[5]] = z[9, order[5]], z[9, order[4]]
    gap = z[9, order[4]] - z[9, order[5]]
    assert deviations(nearly, shard, "f16")[0][2] <= 2 * gap + 0.01


def test_samples_are_compared_by_their_margins():
    from dataclasses import replace

    from shared.cache.format import Samples

    z, arrays = random_rows()
    k = np.where(arrays.k > 0, 2, 0)
    rows = np.flatnonzero(k)
    ids = np.tile([3, 5], len(rows))
    margins = np.concatenate([z[row].max() - z[row, [3, 5]] for row in rows])
    samples = Samples(k=k, ids=ids, counts=np.tile([1, 3], len(rows)), margins=margins, temperature=1.0,
                      drawn_from="full", num=4)  # fmt: skip
    shard = stored(replace(arrays, samples=samples), "f16")
    assert float(deviations(z, shard, "f16")[0].max()) < 1e-5
    margins[2 * int((rows < 9).sum())] += 0.75
    assert deviations(z, stored(replace(arrays, samples=samples), "f16"), "f16")[0][2] == pytest.approx(0.75, rel=1e-5)


def test_nan_logits_deviate_without_bound():
    z, arrays = random_rows()
    shard = stored(arrays, "q")
    z[9] = np.nan
    deviation = deviations(z, shard, "q")[0]
    assert not torch.isfinite(deviation[2])
    assert json.dumps(float(deviation[3]), allow_nan=False)
