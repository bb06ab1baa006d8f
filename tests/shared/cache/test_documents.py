"""`CacheWriter.add_document`: rows, tails and shards from plain lists of log-probabilities."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cache.documents import document_rows
from shared.cache.reader import Cache
from shared.cache.verify import verify_cache
from shared.cache.writer import CacheWriter
from shared.errors import CacheFormatError, ResumeError
from tests.support.cache_faults import contents, killed_at
from tests.support.cache_rows import IDENTITY, SOURCES, build_options

V = 50
META = {"id": "d"}


def options(**changes):
    build = build_options(temperatures=[1.0], top_k=8, head_width=V, tokenizer_size=V, codec="q", shard_tokens=12)
    del build["num_shards"]
    return build | changes


def dense(seed, length):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (length - 1, V))
    return rng.integers(0, V, length), logits - np.log(np.exp(logits).sum(1, keepdims=True))


def top(logp, ks):
    ids = [np.argsort(-row, kind="stable")[:k] for row, k in zip(logp, ks, strict=True)]
    return ids, [row[kept] for row, kept in zip(logp, ids, strict=True)]


def write(path, lengths=(5, 1, 7, 9, 3), stop=None, **changes):
    with CacheWriter(path, options(**changes)) as writer:
        if writer.finished:
            return
        for number, length in enumerate(lengths[:stop]):
            tokens, logp = dense(number, length)
            ids, values = top(logp, np.arange(length - 1) % 8 + 1)
            shuffled = [np.random.default_rng(number).permutation(len(row)) for row in ids]
            ids = [row[order] for row, order in zip(ids, shuffled, strict=True)]
            values = [row[order].tolist() for row, order in zip(values, shuffled, strict=True)]
            gold = logp[np.arange(length - 1), tokens[1:]]
            writer.add_document(tokens, ids, values, gold_logprobs=gold, meta={"id": f"d{number}"})
        writer.finish(IDENTITY, SOURCES)


def test_rows_of_unequal_length_come_back(tmp_path):
    write(tmp_path / "c")
    assert verify_cache(tmp_path / "c") == []
    cache = Cache(tmp_path / "c")
    assert cache.doc_lengths.tolist() == [5, 1, 7, 9, 3]
    assert cache.num_shards == 3  # 5 + 1, 7, 9 + 3 of at most 12 tokens; 6 + 7 is too much
    nll = []
    for number in range(5):
        tokens, logp = dense(number, int(cache.doc_lengths[number]))
        assert np.array_equal(cache.tokens(number), tokens)
        assert cache.loss_mask(number).tolist() == [True] * (len(tokens) - 1) + [False]
        targets = cache.targets(number, 1.0)
        for row, exact in enumerate(logp):
            k = row % 8 + 1
            order = np.argsort(-exact, kind="stable")
            assert targets.ids[row, :k].tolist() == order[:k].tolist()
            np.testing.assert_allclose(targets.logp[row, :k], exact[order[:k]], atol=0.15)
            np.testing.assert_allclose(targets.log_tail[row], np.log(np.exp(exact[order[k:]]).sum()), atol=0.15)
        nll += (-logp[np.arange(len(logp)), tokens[1:]]).tolist()
    assert cache.statistics["teacher_nll_all_nats"] == pytest.approx(np.mean(nll), rel=1e-6)
    assert cache.statistics["entropy_nats"] is None
    assert cache.statistics["codec_kl_nats"]["1"]["max"] < 2.6e-3
    assert len(cache.meta(0)["digest"]) == 64


def test_killed_anywhere_the_same_documents_end_equal(tmp_path):
    write(tmp_path / "whole")
    for boundary in range(0, 200, 5):
        path = tmp_path / f"killed-{boundary}"
        killed = killed_at(boundary, write, path)
        write(path)
        assert contents(path) == contents(tmp_path / "whole"), boundary
        if not killed:
            return
    raise AssertionError("never ran to its end")


def test_other_documents_are_not_mixed_in(tmp_path):
    with CacheWriter(tmp_path / "c", options()) as writer:
        for name in ("a", "b", "c"):
            writer.add_document(range(8), [[1]] * 7, [[-0.1]] * 7, meta={"id": name})
    with CacheWriter(tmp_path / "c", options()) as writer, pytest.raises(ResumeError, match="holds other documents"):
        for name in ("a", "x", "c"):
            writer.add_document(range(8), [[1]] * 7, [[-0.1]] * 7, meta={"id": name})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, V), st.floats(0.01, 30))
def test_the_tail_is_what_the_entries_leave(seed, k, scale):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (1, V))
    logp = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    ids, values = top(logp, [k])
    rows = document_rows([0, 1], ids, values, tokenizer_size=V, meta=META)
    rest = np.exp(np.sort(logp[0])[: V - k]).sum()
    tail = np.exp(rows.tail_log[0, 0] + values[0][0])
    np.testing.assert_allclose(tail, rest, rtol=1e-6, atol=1e-15 * V)
    np.testing.assert_allclose(rows.topk_margins, (values[0][0] - values[0]).astype(np.float32))


def test_sums_a_little_above_one_are_divided():
    values = np.log([0.7, 0.3005])
    rows = document_rows([0, 3], [[3, 4]], [values], tokenizer_size=V, meta=META)
    assert np.isneginf(rows.tail_log[0, 0])
    np.testing.assert_allclose(rows.gold_logprob[0], np.log(0.7 / 1.0005), rtol=1e-6)


def test_minus_infinity_is_left_out_and_ties_go_by_id():
    rows = document_rows([0, 3], [[9, 4, 7]], [[-1.0, -1.0, -np.inf]], tokenizer_size=V, meta=META)
    assert rows.topk_ids.tolist() == [4, 9] and rows.k.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("ids", "logprobs", "message"),
    [
        ([[1]], [[0.0]], r"do not fit its tokens;.*document 'd'.*expected: 2 rows for 3 tokens.*got: 1 rows"),
        ([[1], [2, 3]], [[-1.0], [-1.0]], r"unequal lengths; where: document 'd', position 1; expected: .*; got: 1"),
        ([[1], [2]], [[-1.0], [np.nan]], "not a number; where: document 'd', position 1"),
        ([[1], [2]], [[np.inf], [-1.0]], "not a number; where: document 'd', position 0"),
        ([[1], []], [[-1.0], []], "without entries; where: document 'd', position 1"),
        ([[1, 2], [2]], [[-0.1, -0.2], [-1.0]], "add up to more than 1; where: document 'd', position 0"),
        ([[1, 2], [2]], [[-1.0, -20.0], [-1.0]], "lacks more mass than .* position 0"),
        ([[1], ["x"]], [[-1.0], [-1.0]], "document 'd'"),
        ([[1], [2.5]], [[-1.0], [-1.0]], "ids that are no integers"),
        ([[1], [2]], [["x"], [-1.0]], "not lists of numbers; where: document 'd'"),
        ([[1], [[2]]], [[-1.0], [-1.0, -2.0]], "unequal lengths"),
    ],
)
def test_rows_that_are_refused(ids, logprobs, message):
    with pytest.raises(CacheFormatError, match=message):
        document_rows([0, 1, 2], ids, logprobs, tokenizer_size=V, meta=META)


def test_more_that_is_refused(tmp_path):
    with (
        CacheWriter(tmp_path / "grid", build_options()) as writer,
        pytest.raises(CacheFormatError, match=r"grid \[1\]"),
    ):
        writer.add_document([0, 1], [[1]], [[-1.0]], meta=META)
    for ids, message in [([V], "id is out of range"), ([1, 1], "twice in a row")]:
        with CacheWriter(tmp_path / message, options()) as writer:
            writer.add_document([0, 1], [ids], [[-2.0] * len(ids)], meta=META)
            with pytest.raises(CacheFormatError, match=f"{message}; where: shard-00000, document 'd', position 0"):
                writer.finish(IDENTITY, SOURCES)
