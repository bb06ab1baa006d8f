"""Truncated rows against dense float64 logits, and decoded shards that encode to the same bytes again."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cache.encode import encode_shard
from shared.cache.rows import exact, truncate
from shared.cache.shard import decode_shard
from shared.cache.statistics import combine
from shared.errors import ConfigError
from tests.shared.cache.test_codec import rows
from tests.support.cache_rows import GRID, shard_of_logits, small_shard


@settings(max_examples=100, deadline=None)
@given(row=rows(), seed=st.integers(0, 2**32 - 1))
def test_truncated_to_k_equals_labelling_with_k(row, seed):
    """From K entries to k: ids, margins, tails and the gold's state are those of a direct top-k of the dense row."""
    logits, K = row
    rng = np.random.default_rng(seed)
    logits = np.round(logits.clip(-1e4, 1e4) * 64) / 64  # so that margins are exact in float32
    logits = np.stack([logits, rng.permutation(logits), logits])
    k = int(rng.integers(1, K + 1))
    tokens = rng.integers(0, logits.shape[1], 3)
    found = truncate(shard_of_logits(logits, [2, 1], np.full(3, K), tokens), GRID, top_k=k)
    wanted = shard_of_logits(logits, [2, 1], np.full(3, k), tokens)
    np.testing.assert_allclose(found.tail_log, wanted.tail_log, rtol=1e-12, atol=1e-12)
    for field in dataclasses.fields(found):
        if field.name not in ("tail_log", "doc_meta"):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(wanted, field.name), err_msg=field.name)


@settings(max_examples=100, deadline=None)
@given(row=rows(), top_p=st.floats(0.001, 1))
def test_top_p_keeps_the_shortest_prefix_of_the_whole_distribution(row, top_p):
    logits, K = row
    arrays = shard_of_logits(np.stack([logits, logits]), [2], np.array([K, 0]), np.array([0, 0]))
    k, last = truncate(arrays, GRID, top_p=top_p).k
    p = np.exp(logits.astype(np.float64) - logits.max())
    p = np.sort(p / p.sum())[::-1]
    assert (1 <= k <= K) and last == 0
    assert k == K or p[:k].sum() >= top_p - 1e-12
    assert k == 1 or p[: k - 1].sum() < top_p + 1e-12


def test_top_p_by_hand():
    """Probabilities 1/2, 1/4, 1/8, 1/8, of which three are entries."""
    logits = np.log(np.tile(np.float32([4, 2, 1, 1]), (2, 1)))
    arrays = shard_of_logits(logits, [2], np.array([3, 0]), np.array([0, 2]))
    assert [int(truncate(arrays, GRID, top_p=p).k[0]) for p in (0.01, 0.49, 0.51, 0.74, 0.76, 0.88, 1)] == [
        1, 1, 2, 2, 3, 3, 3,
    ]  # fmt: skip
    cut = truncate(arrays, GRID, top_p=0.6)
    np.testing.assert_allclose(cut.tail_log[0, 1], np.log(1 / 2), rtol=1e-6)
    assert (arrays.gold_in_topk[0], cut.gold_in_topk[0]) == (True, False)
    assert int(truncate(arrays, GRID, top_k=1, top_p=0.9).k[0]) == 1


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")}])
def test_refused_truncations(options):
    with pytest.raises(ConfigError, match="out of range"):
        truncate(small_shard(0), GRID, **options)


@settings(max_examples=80, deadline=None)
@given(row=rows(), codec=st.sampled_from(["q", "f16"]))
def test_a_decoded_shard_encodes_to_the_same_bytes(row, codec):
    logits, k = row
    V = len(logits)
    arrays = shard_of_logits(np.stack([logits] * 3), [2, 1], np.full(3, k), np.array([0, V // 2, V - 1]))
    options = {"codec": codec, "temperatures": GRID, "top_k": k, "head_width": V, "tokenizer_size": V}
    image, _ = encode_shard(arrays, **options)
    again, statistics = encode_shard(exact(decode_shard(image, "x"), GRID), **options)
    assert again == image
    assert all(figures["max"] <= 1e-12 for figures in statistics["codec_kl_nats"].values())


def test_what_a_shard_does_not_hold_is_null_in_the_statistics():
    options = {"codec": "q", "temperatures": GRID, "top_k": 4, "head_width": 64, "tokenizer_size": 64}
    image, known = encode_shard(small_shard(0), **options)
    _, unknown = encode_shard(exact(decode_shard(image, "x"), GRID), **options)
    keys = ("entropy_nats", "teacher_nll_nats", "teacher_nll_all_nats")
    for statistics in (unknown, combine([unknown, unknown]), combine([known, unknown])):
        assert [statistics[key] for key in keys] == [None] * 3
        assert statistics["gold_in_topk"] is not None
    assert unknown["gold_in_topk"] == known["gold_in_topk"]
