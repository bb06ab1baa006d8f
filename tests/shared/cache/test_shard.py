"""What a shard's file holds, and what is refused when it is written."""

import dataclasses
import io

import h5py
import numpy as np
import pytest

from shared.cache.encode import encode_shard
from shared.cache.shard import decode_shard
from shared.errors import CacheCorruptError, CacheFormatError
from tests.support.cache_rows import GRID, shard_of_logits, small_shard

OPTIONS = {"temperatures": GRID, "top_k": 4, "head_width": 64, "tokenizer_size": 64}


def open_image(image):
    return h5py.File(io.BytesIO(image), "r")


@pytest.mark.parametrize("codec", ["f16", "q"])
def test_layout(codec):
    """Types, filters, chunks and attributes are those of the format."""
    arrays = small_shard(0)
    image, _ = encode_shard(arrays, codec=codec, **OPTIONS)
    with open_image(image) as file:
        types = {name: file[name].dtype.str for name in file}
        values = (
            {"topk_margins": "<f2"}
            if codec == "f16"
            else {"codebook": "<f4", "topk_codes": "|u1", "esc_pos": "<i8", "esc_value": "<u4"}
        )
        assert types == {
            "tokens": "<u2",
            "loss_mask": "|u1",
            "doc_indptr": "<i8",
            "doc_meta": "|u1",
            "doc_meta_indptr": "<i8",
            "k": "|u1",
            "id_table": "<u4",
            "topk_ranks": "<u2",
            "tail": "<i2",
            **values,
        }
        for name in file:
            if file[name].size:
                assert file[name].fletcher32 and file[name].shuffle, name
                assert (file[name].compression, file[name].compression_opts) == ("gzip", 4)
                assert all(c <= n for c, n in zip(file[name].chunks, file[name].shape, strict=True))
        attributes = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in file.attrs.items()}
        assert attributes == {
            "format": b"codedistill-cache",
            "version": 1,
            "codec": codec.encode(),
            "temperatures": list(GRID),
            "tail_scale": 16,
            "top_k": 4,
            "head_width": 64,
            "tokenizer_size": 64,
        }
        ranks = file["topk_ranks"][:]
        counts = np.bincount(ranks)
        assert np.all(np.diff(counts) <= 0)
        assert np.array_equal(file["id_table"][:][ranks], arrays.topk_ids)
    assert image[8] == 0  # superblock version, which every HDF5 since 1.8 reads


@pytest.mark.parametrize(("vocabulary", "kind"), [(1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_tokens_are_as_narrow_as_the_vocabulary_allows(vocabulary, kind):
    image, _ = encode_shard(
        small_shard(0), codec="q", temperatures=GRID, top_k=4, head_width=1 << 18, tokenizer_size=vocabulary
    )
    with open_image(image) as file:
        assert file["tokens"].dtype.str == kind


def spread_shard(num_ids, k, step):
    """Rows of k flat entries that use the ids 7, 7 + step, …: `num_ids` of them, and the first k again."""
    num_rows = -(-num_ids // k) + 1
    ids = np.concatenate([np.arange(num_ids), np.arange(num_rows * k - num_ids)]) * step + 7
    ks = np.append(np.full(num_rows, k), 0)
    tail = np.where(ks[:, None] > 0, -1.0, -np.inf)
    return dataclasses.replace(
        small_shard(0),
        tokens=np.zeros(num_rows + 1, np.int64),
        loss_mask=np.zeros(num_rows + 1, np.uint8),
        doc_indptr=np.array([0, num_rows + 1]),
        doc_meta=[{"id": "x"}],
        k=ks,
        topk_ids=ids,
        topk_margins=np.zeros(len(ids), np.float32),
        tail_log=tail,
        gold_logprob=None,
        gold_in_topk=np.zeros(num_rows + 1, bool),
        entropy_nats=None,
    )


@pytest.mark.parametrize(("num_ids", "kind"), [(65_536, "<u2"), (65_537, "<u4"), (70_000, "<u4")])
def test_more_ids_than_u16_ranks_do_not_wrap(num_ids, kind):
    """Ids of a vocabulary of 262,144 read back exactly, whatever type their ranks have."""
    V, k = 262_144, 300
    arrays = spread_shard(num_ids, k, 3)
    image, _ = encode_shard(arrays, codec="q", temperatures=[1.0], top_k=k, head_width=V, tokenizer_size=V)
    with open_image(image) as file:
        assert (file["topk_ranks"].dtype.str, file["tokens"].dtype.str, file["k"].dtype.str) == (kind, "<u4", "<u2")
        assert len(file["id_table"]) == num_ids
    shard = decode_shard(image, "x")
    assert np.array_equal(shard.ids, arrays.topk_ids) and shard.ids.max() > 65_535
    assert np.array_equal(shard.k, arrays.k)


def test_the_largest_row_that_k_can_count():
    V, k = 70_000, 65_535
    arrays = spread_shard(k, k, 1)
    image, _ = encode_shard(arrays, codec="q", temperatures=[1.0], top_k=k, head_width=V, tokenizer_size=V)
    shard = decode_shard(image, "x")
    assert shard.k.tolist() == [k, k, 0] and np.array_equal(shard.ids, arrays.topk_ids)


@pytest.mark.parametrize(("num_rows", "num_chunks"), [(3_495, 1), (3_496, 2)])
def test_chunks_hold_a_million_entries_at_most(num_rows, num_chunks):
    """A shard of up to 2^20 entries is one chunk per data set; a larger one is cut evenly."""
    arrays, V = spread_shard((num_rows - 1) * 300, 300, 1), 1 << 21
    image, _ = encode_shard(arrays, codec="q", temperatures=[1.0], top_k=300, head_width=V, tokenizer_size=V)
    with open_image(image) as file:
        assert file["topk_codes"].chunks == (num_rows * 300 // num_chunks,)
        assert file["tail"].chunks == file["tail"].shape
    assert np.array_equal(decode_shard(image, "x").ids, arrays.topk_ids)


def test_head_and_tokenizer_of_different_sizes():
    """Ids count up to the smaller; k = V alone has no tail, also where the head is narrower than V."""
    logits = np.zeros((3, 6), np.float32)
    arrays = shard_of_logits(logits, [3], np.array([6, 4, 0]), np.array([5, 5, 5]))
    sizes = {"codec": "q", "temperatures": GRID, "top_k": 8}
    for head_width, V, tails in [
        (6, 6, [True, False, True]),
        (8, 6, [True, False, True]),
        (6, 8, [False, False, True]),
    ]:
        image, _ = encode_shard(arrays, head_width=head_width, tokenizer_size=V, **sizes)
        with open_image(image) as file:
            assert (file["tail"][:, 0] == -32768).tolist() == tails
        # A tail that underflows or is empty weighs nothing at any temperature.
        log_tail = decode_shard(image, "x").targets(0, 3, 0.5, 0, 6).log_tail
        assert np.exp(log_tail[0]) == 0 and np.exp(log_tail[1]) == pytest.approx(1 / 3, rel=0.05)
    for head_width, V in [(5, 6), (6, 5)]:
        with pytest.raises(CacheFormatError, match="token id is out of range; where: document 'doc/0', position 0"):
            encode_shard(arrays, head_width=head_width, tokenizer_size=V, **sizes)


@pytest.mark.parametrize("codec", ["f16", "q"])
def test_bytes_are_reproducible(codec):
    assert encode_shard(small_shard(1), codec=codec, **OPTIONS) == encode_shard(small_shard(1), codec=codec, **OPTIONS)


def test_any_string_in_the_metadata_survives():
    meta = {"id": "a\x00\ud800\u2028ü\n", "target_bytes": 3, "nested": {"list": [1, None]}}
    arrays = dataclasses.replace(small_shard(0), doc_meta=[meta, {"id": "b"}, {"id": "c"}])
    image, statistics = encode_shard(arrays, codec="q", **OPTIONS)
    assert decode_shard(image, "x").meta[0] == meta
    assert statistics["target_bytes"] == 3


def test_a_document_of_one_token_has_no_rows():
    arrays = shard_of_logits(np.zeros((1, 8), np.float32), [1], np.array([3]), np.array([5]))
    image, statistics = encode_shard(arrays, codec="q", temperatures=GRID, top_k=3, head_width=8, tokenizer_size=8)
    shard = decode_shard(image, "x")
    assert (shard.k.tolist(), shard.tokens.tolist(), len(shard.ids)) == ([0], [5], 0)
    assert (statistics["rows"], statistics["teacher_nll_nats"], statistics["codec_kl_nats"]["1"]["max"]) == (
        0,
        None,
        None,
    )


def test_ragged_rows_read_back_row_by_row():
    rng = np.random.default_rng(4)
    ks = np.array([1, 4, 2, 0, 3, 8, 0])
    arrays = shard_of_logits(rng.normal(0, 2, (7, 8)).astype(np.float32), [4, 3], ks, rng.integers(0, 8, 7))
    image, _ = encode_shard(arrays, codec="f16", temperatures=GRID, top_k=8, head_width=8, tokenizer_size=8)
    targets = decode_shard(image, "x").targets(0, 7, 1.0, 1, 8)
    start = 0
    for row, k in enumerate(ks):
        assert np.array_equal(targets.ids[row, :k], arrays.topk_ids[start : start + k])
        assert np.all(targets.ids[row, k:] == 0) and np.all(targets.logp[row, k:] == -np.inf)
        start += k
    assert np.array_equal(np.isneginf(targets.log_tail), (ks == 0) | (ks == 8))


def changed(name, index, value):
    def change(arrays):
        array = getattr(arrays, name).copy()
        array[index] = value
        return {name: array}

    return change


# Row 1 is position 1 of document doc/0; each row has four entries, so that it begins at entry 4.
REFUSED = [
    (changed("topk_margins", 6, np.nan), "not finite; where: document 'doc/0', position 1"),
    (changed("topk_margins", 6, np.inf), "not finite; where: document 'doc/0', position 1"),
    (changed("topk_margins", 4, 0.5), "first margin is not 0; where: document 'doc/0', position 1"),
    (changed("topk_margins", 7, 0.0), "does not descend by logit; where: document 'doc/0', position 1"),
    (changed("topk_ids", 5, 64), "id is out of range; where: document 'doc/0', position 1"),
    (changed("topk_ids", 5, -1), "id is out of range; where: document 'doc/0', position 1"),
    (lambda a: changed("topk_ids", 5, a.topk_ids[4])(a), "twice in a row; where: document 'doc/0', position 1"),
    (changed("tokens", 7, 64), "token id is out of range; where: document 'doc/2', position 1"),
    (changed("loss_mask", 4, 1), "loss mask that is wrong; where: document 'doc/0', position 4"),
    (changed("loss_mask", 1, 2), "loss mask that is wrong; where: document 'doc/0', position 1"),
    (changed("k", slice(6, 8), [0, 8]), "without entries that is not its document's last; where: document 'doc/2'"),
    (changed("k", slice(3, 5), [0, 4]), "without entries that is not its document's last; where: document 'doc/0'"),
    (changed("k", slice(3, 5), [1, 3]), "last row has entries; where: document 'doc/0', position 4"),
    (changed("k", slice(0, 2), [5, 3]), "too many entries; where: document 'doc/0', position 0"),
    (changed("tail_log", (1, 0), np.nan), "tail is not a number; where: document 'doc/0', position 1"),
    (changed("tail_log", (1, 0), np.inf), "tail is not a number; where: document 'doc/0', position 1"),
    (changed("tail_log", (1, 3), 4.1), "tail heavier than V − k entries"),
    (changed("entropy_nats", 1, np.inf), "entropy is not finite; where: document 'doc/0', position 1"),
    (changed("gold_logprob", 1, np.nan), "not a log-probability; where: document 'doc/0', position 1"),
    (changed("gold_logprob", 1, 0.5), "not a log-probability; where: document 'doc/0', position 1"),
    (lambda a: {"gold_in_topk": ~a.gold_in_topk}, "gold_in_topk disagrees with the row's ids"),
    (lambda a: {"doc_indptr": np.array([0, 5, 5, 13])}, "document borders"),
    (lambda a: {"k": a.k[:-1]}, "k has the wrong shape"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refused_at_write_time(change, message):
    arrays = small_shard(0)
    with pytest.raises(CacheFormatError) as error:
        encode_shard(dataclasses.replace(arrays, **change(arrays)), codec="f16", **OPTIONS)
    assert message in str(error.value)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("topk_ids", None, "an id is twice in a row"),
        ("topk_ids", 64, "an entry's id is out of range"),
        ("topk_margins", np.nan, "a logit is not finite"),
        ("topk_margins", -1.0, "a row does not descend by logit"),
    ],
)
def test_a_wrong_entry_far_into_a_shard_is_named(ragged, name, value, message):
    """Rows are checked in blocks, sorted without padding where all are of one length."""
    rng, S = np.random.default_rng(0), 3_000
    ks = rng.integers(2, 5, S) if ragged else np.full(S, 4)
    logits = rng.normal(0, 3, (S, 64)).astype(np.float32)
    arrays = shard_of_logits(logits, [2_500, 500], ks, rng.integers(0, 64, S))
    entry = int(arrays.row_indptr()[2_600]) + 1
    values = getattr(arrays, name).copy()
    values[entry] = values[entry - 1] if value is None else value
    with pytest.raises(CacheFormatError, match=f"{message}; where: document 'doc/1', position 100"):
        encode_shard(dataclasses.replace(arrays, **{name: values}), codec="q", **OPTIONS)


def test_rows_shifted_by_one_are_refused():
    """The commonest silent fault of this field: row t holding the distribution for token t."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, 13)
    logits = rng.normal(0, 1, (13, 64)).astype(np.float32)
    logits[np.arange(12), tokens[1:]] = 9
    arrays = shard_of_logits(logits, [13], np.full(13, 4), tokens)
    encode_shard(arrays, codec="q", **OPTIONS)
    shifted = dataclasses.replace(arrays, tokens=np.roll(tokens, 1))
    with pytest.raises(CacheFormatError, match="gold_in_topk disagrees"):
        encode_shard(shifted, codec="q", **OPTIONS)


def test_a_wrong_normaliser_is_refused():
    arrays = shard_of_logits(np.zeros((3, 4), np.float32), [3], np.array([4, 4, 0]), np.array([0, 1, 2]))
    wrong = dataclasses.replace(arrays, gold_logprob=arrays.gold_logprob + np.float32(np.log(2)))
    with pytest.raises(CacheFormatError, match="gold_logprob disagrees with the row"):
        encode_shard(wrong, codec="q", temperatures=GRID, top_k=4, head_width=4, tokenizer_size=4)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("codec", "zip", "unknown codec"),
        ("filter", "lz4", "unknown filter"),
        ("temperatures", (0.5, 2.0), "temperature grid"),
        ("temperatures", (1.0, 0.5), "temperature grid"),
        ("top_k", 65_536, "top-k is out of range"),
        ("top_k", 0, "top-k is out of range"),
    ],
)
def test_refused_options(option, value, message):
    with pytest.raises(CacheFormatError, match=message):
        encode_shard(small_shard(0), **{"codec": "f16", **OPTIONS, option: value})


def test_an_empty_shard_is_refused():
    names = [field.name for field in dataclasses.fields(small_shard(0)) if field.name != "samples"]
    empty = {name: getattr(small_shard(0), name)[:0] for name in names}
    arrays = dataclasses.replace(small_shard(0), **empty | {"doc_indptr": np.array([0])})
    with pytest.raises(CacheFormatError, match="empty shard"):
        encode_shard(arrays, codec="f16", **OPTIONS)


@pytest.mark.parametrize("image", [b"", b"not HDF5", encode_shard(small_shard(0), codec="q", **OPTIONS)[0][:900]])
def test_bytes_that_are_no_shard(image):
    with pytest.raises(CacheCorruptError, match=r"cannot be read; where: some\.h5"):
        decode_shard(image, "some.h5")


def test_an_unknown_version_and_a_missing_field_are_named():
    image, _ = encode_shard(small_shard(0), codec="q", **OPTIONS)

    def edited(edit):
        buffer = io.BytesIO(image)
        with h5py.File(buffer, "r+") as file:
            edit(file)
        return buffer.getvalue()

    with pytest.raises(CacheFormatError, match="expected: codedistill-cache 1; got: codedistill-cache 2"):
        decode_shard(edited(lambda file: file.attrs.modify("version", 2)), "x")
    with pytest.raises(CacheFormatError, match="lacks a mandatory field; where: x; expected: tail"):
        decode_shard(edited(lambda file: file.__delitem__("tail")), "x")


def test_statistics_against_float64():
    rng = np.random.default_rng(7)
    logits, tokens = rng.normal(0, 3, (13, 64)).astype(np.float32), rng.integers(0, 64, 13)
    mask = np.array([0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 1, 0])
    arrays = shard_of_logits(logits, [5, 8], np.full(13, 4), tokens, loss_mask=mask)
    _, statistics = encode_shard(arrays, codec="q", **OPTIONS)
    z = logits.astype(np.float64)
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))
    rows = np.delete(np.arange(13), [4, 12])
    nll = np.array([-logp[t, tokens[t + 1]] for t in rows])
    assert {key: statistics[key] for key in ("documents", "tokens", "rows", "targets", "entries", "target_bytes")} == {
        "documents": 2,
        "tokens": 13,
        "rows": 11,
        "targets": 7,
        "entries": 44,
        "target_bytes": 14,
    }
    assert statistics["teacher_nll_all_nats"] == pytest.approx(nll.mean(), rel=1e-6)
    assert statistics["teacher_nll_nats"] == pytest.approx(nll[mask[rows] == 1].mean(), rel=1e-6)
    assert statistics["entropy_nats"] == pytest.approx(-(np.exp(logp) * logp).sum(1)[rows].mean(), rel=1e-6)
    top = np.argsort(-z, axis=1)[:, :4]
    assert statistics["gold_in_topk"] == np.mean([tokens[t + 1] in top[t] for t in rows])
    for T in GRID:
        p = np.exp(z / T) / np.exp(z / T).sum(1, keepdims=True)
        mass = np.sort(np.take_along_axis(p, top, 1).sum(1)[rows])
        found = statistics["captured_mass"][f"{T:g}"]
        assert found["mean"] == pytest.approx(mass.mean(), rel=1e-6)
        assert found["p1"] == np.floor(mass[0] * 200) / 200
        assert found["p10"] == np.floor(mass[1] * 200) / 200
