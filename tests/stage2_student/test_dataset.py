"""Packed blocks hold exactly what the cache holds."""

import math
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from shared.cache.reader import Cache
from shared.errors import ConfigError
from shared.model.gpt import IGNORE
from stage2_student.dataset import PackedBlocks, collate, hold_out
from stage2_student.soft_labels import Decoding, NarrowRows, decode
from tests.support.blocks import decoded
from tests.support.student_cache import make_cache

SIZE = 32


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("dataset") / "cache", codec="q")


def blocks_of(cache, **options):
    return PackedBlocks([cache], **{"block_size": SIZE, "seed": 0, "temperature": 1.5} | options)


@pytest.mark.parametrize("codec", ["q", "f16"])
@pytest.mark.parametrize("all_targets", [False, True])
def test_items_are_the_orders_segments_as_the_reader_has_them(tmp_path, all_targets, codec):
    cache = make_cache(tmp_path / "cache", codec=codec)
    data = blocks_of(cache, num_epochs=2, all_targets=all_targets)
    each = data.order.num_blocks_per_epoch
    assert len(data) == 2 * each
    num_labels = 0
    for index in range(len(data)):
        item, at = data[index], 0
        labels = decoded(item, data)
        _, docs, starts, stops = data.order.block(index)
        for doc, start, stop in zip(docs, starts, stops, strict=True):
            rows = slice(at, at + stop - start)
            tokens, mask = cache.tokens(doc), cache.loss_mask(doc)
            soft = cache.targets(doc, 1.5, start, stop)
            assert item["input_ids"][rows].tolist() == tokens[start:stop].tolist()
            assert item["position_ids"][rows].tolist() == list(range(stop - start))
            wanted = [tokens[t + 1] if all_targets or mask[t] else IGNORE for t in range(start, stop)]
            assert item["labels"][rows].tolist() == wanted
            num_labels += sum(label != IGNORE for label in wanted)
            assert np.array_equal(labels.k[rows], soft.k)
            real = np.arange(cache.width) < soft.k[:, None]
            assert np.array_equal(labels.ids[rows][real], soft.ids[real])
            np.testing.assert_allclose(labels.logp[rows][real], soft.logp[real], rtol=2e-6, atol=1e-6)
            np.testing.assert_allclose(labels.log_tail[rows], soft.log_tail, rtol=2e-6, atol=1e-6)
            assert (labels.logp[rows][~real] == -torch.inf).all()
            at = rows.stop
        assert item["position_ids"][at:].tolist() == list(range(SIZE - at))
        assert (item["labels"][at:] == IGNORE).all()
        assert not item["soft_k"][at:].any() and not item["input_ids"][at:].any()
        assert (labels.log_tail[at:] == -torch.inf).all() and not labels.logp[at:].isnan().any()
    targets = sum(int(cache.loss_mask(doc).sum()) for doc in range(cache.num_documents))
    assert num_labels == 2 * (cache.num_tokens - cache.num_documents if all_targets else targets)


@pytest.mark.parametrize("drawn_from", ["full", "tail"])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_sampled_targets_with_their_weights(tmp_path, drawn_from, temperature):
    """Against float64 and the definition: count/S · p_T/p_Ts, and of a tail's draws times the tail's mass at T_s."""
    cache = make_cache(tmp_path / "cache", samples={"temperature": 1.5, "num": 5, "drawn_from": drawn_from})
    data = blocks_of(cache, temperature=temperature, with_samples=True)
    for index in range(len(data)):
        item, at = data[index], 0
        labels = decoded(item, data)
        for doc, start, stop in zip(*data.order.block(index)[1:], strict=True):
            rows = slice(at, at + stop - start)
            samples = cache.samples(doc, start, stop)
            at_T, at_Ts = (cache.targets(doc, T, start, stop) for T in (temperature, 1.5))
            log_Z = [-part.logp[:, :1].astype(np.float64) for part in (at_T, at_Ts)]  # the first margin is 0
            margins = samples.margins.astype(np.float64)
            log_ratio = (-margins / temperature - log_Z[0]) - (-margins / 1.5 - log_Z[1])
            expected = samples.counts / 5 * np.exp(log_ratio)
            if drawn_from == "tail":
                expected *= np.exp(at_Ts.log_tail.astype(np.float64))[:, None]
            assert np.array_equal(labels.sample_ids[rows], samples.ids)
            np.testing.assert_allclose(labels.sample_weights[rows], expected, rtol=1e-5, atol=1e-8)
            at = rows.stop
        assert labels.sample_weights.shape == (SIZE, 5) and not labels.sample_weights[at:].any()


@pytest.mark.parametrize("drawn_from", ["full", "tail", None])
def test_where_a_document_ends_the_closing_token_is_certain(tmp_path, drawn_from):
    samples = drawn_from and {"temperature": 1.5, "num": 5, "drawn_from": drawn_from}
    cache = make_cache(tmp_path / "cache", samples=samples)
    closing = int(cache.tokens(3)[-1])  # random tokens: it also stands elsewhere
    options = {"with_samples": drawn_from is not None, "temperature": 1.0}
    data, plain = blocks_of(cache, closing_id=closing, **options), blocks_of(cache, **options)
    num_ends = num_inside = 0
    for index in range(len(data)):
        labels, others = decoded(data[index], data), decoded(plain[index], plain)
        at, is_end = 0, np.zeros(SIZE, bool)
        for doc, start, stop in zip(*data.order.block(index)[1:], strict=True):
            at += stop - start
            is_end[at - 1] = stop == len(cache.tokens(doc)) - 1 and cache.tokens(doc)[-1] == closing
            num_inside += closing in cache.tokens(doc)[start + 1 : stop]
        num_ends += is_end.sum()
        for field, other in zip(labels, others, strict=True):
            assert field is other is None or torch.equal(field[~is_end], other[~is_end])
        assert (labels.k[is_end] == 1).all() and (labels.ids[is_end, 0] == closing).all()
        assert (labels.logp[is_end].exp().numpy() == np.eye(cache.width)[0]).all()
        assert (labels.log_tail[is_end] == -torch.inf).all()
        if drawn_from:
            weights = np.eye(5)[0] if drawn_from == "full" else np.zeros(5)
            assert (labels.sample_weights[is_end].numpy() == weights).all()
            assert (labels.sample_ids[is_end, 0] == closing).all()
    assert num_ends > 0 and num_inside > 0


def test_without_a_temperature_there_are_no_soft_labels_and_the_rest_is_equal(cache):
    plain, soft = blocks_of(cache, temperature=None), blocks_of(cache)
    assert len(plain) == len(soft)
    for i in range(len(plain)):
        assert set(plain[i]) == {"input_ids", "position_ids", "labels"}
        assert all(np.array_equal(plain[i][name], soft[i][name]) for name in plain[i])


def test_codebooks_of_unequal_lengths_and_codes_of_unequal_widths_make_one_batch(tmp_path):
    """One cache's codes fit into a byte, the other's do not."""
    flat, steep = (make_cache(tmp_path / str(scale), codec="q", scale=scale) for scale in (1, 40))
    data = PackedBlocks([flat, steep], block_size=SIZE, seed=0, temperature=1.0)
    items = [data[index] for index in range(len(data))]
    assert {item["soft_codes"].dtype.name for item in items} == {"uint8", "uint16"}
    batch = collate(items)
    fields = {name.removeprefix("soft_"): field for name, field in batch.items() if name.startswith("soft_")}
    rows = NarrowRows(**{name: field if name == "codebook" else field.flatten(0, 1) for name, field in fields.items()})
    together = decode(rows, torch.arange(len(items) * SIZE), Decoding(temperature=1.0))
    alone = [decoded(item, data) for item in items]
    for name in ("ids", "logp", "log_tail", "k"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(part, name) for part in alone])), name


def test_workers_and_pickling_change_nothing(cache):
    data, options = blocks_of(cache, num_epochs=2), {"batch_size": 2, "collate_fn": collate}
    loads = [
        list(DataLoader(data, **options, num_workers=0)),
        list(DataLoader(data, **options, num_workers=1, multiprocessing_context="spawn")),
        list(DataLoader(data, **options, num_workers=2, multiprocessing_context="fork", prefetch_factor=3)),
        list(DataLoader(pickle.loads(pickle.dumps(data)), **options)),
    ]
    for other in loads[1:]:
        assert len(other) == len(loads[0])
        for a, b in zip(loads[0], other, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_as_many_epochs_as_the_blocks_asked_for_take(cache):
    each = blocks_of(cache).num_blocks
    data = blocks_of(cache, num_blocks=each + 1)
    assert (data.num_epochs, len(data), data.epoch_ends()) == (1 + 1 / each, each + 1, [each, each + 1])
    data = blocks_of(cache, num_epochs=1.5)
    more = math.ceil(each / 2)
    assert (data.num_epochs, len(data), data.epoch_ends()) == (1 + more / each, each + more, [each, each + more])
    data = blocks_of(cache, num_blocks=2 * each)
    assert (data.num_epochs, data.epoch_ends()) == (2, [each, 2 * each])


def test_the_length_is_filled_up_with_blocks_that_hold_nothing(cache):
    data = blocks_of(cache)
    filled = blocks_of(cache, multiple=len(data) + 1)
    assert (len(filled), filled.num_blocks, filled.num_epochs) == (len(data) + 1, len(data), 1)
    assert all(np.array_equal(filled[0][name], data[0][name]) for name in data[0])
    empty = filled[len(data)]
    assert (empty["labels"] == IGNORE).all()
    assert not empty["soft_k"].any() and not decoded(empty, data).k.any()
    assert filled.documents(len(data)) == []
    assert len(list(filled)) == len(filled)


def test_a_block_names_its_documents(cache):
    data = blocks_of(cache)
    segments = zip(*data.order.block(0)[1:], strict=True)
    assert data.documents(0) == [f"{cache.meta(doc).get('id', doc)} [{a}:{b}]" for doc, a, b in segments]


def test_held_out_documents_are_in_the_other_half_and_nowhere_else(cache):
    names = [cache.meta(doc)["id"] for doc in range(cache.num_documents)]
    out = hold_out(cache, 0.5, seed=5)
    drawn = {name for name, held in zip(names, out, strict=True) if held}
    assert (len(drawn), len(set(names))) == (2, 4)
    assert [name in drawn for name in names] == out.tolist()
    assert np.array_equal(out, hold_out(cache, 0.5, seed=5))
    assert any(not np.array_equal(out, hold_out(cache, 0.5, seed=seed)) for seed in range(5))
    for left_out in (out, ~out):
        data = blocks_of(cache, held_out=[left_out])
        seen = {doc for i in range(len(data)) for doc in data.order.block(i)[1].tolist()}
        assert seen == {doc for doc in range(cache.num_documents) if not left_out[doc] and cache.doc_lengths[doc] > 1}
    assert len({name for name, held in zip(names, hold_out(cache, 1e-9, seed=0), strict=True) if held}) == 1


def test_a_cache_without_rows_is_refused(cache, tmp_path):
    empty = make_cache(tmp_path / "cache", lengths=(1, 1, 1))
    with pytest.raises(ConfigError, match="no document"):
        blocks_of(Cache(empty.path))
    options = {"block_size": SIZE, "seed": 0, "temperature": 1.5}
    assert PackedBlocks([cache, empty], **options).num_rows == blocks_of(cache).num_rows
    with pytest.raises(ConfigError, match=f"no document.*{empty.path}"):
        PackedBlocks([cache, empty], weights=[1, 1], **options)


@pytest.mark.parametrize("weights", [None, (0.7, 0.3)])
def test_several_caches_are_read_in_order_for_every_number_of_workers(cache, tmp_path, weights):
    caches = [cache, make_cache(tmp_path / "other", codec="q", seed=1, lengths=(30, 20, 10, 5, 33))]
    data = PackedBlocks(caches, weights=weights, block_size=SIZE, seed=0, num_epochs=3, temperature=1.5)
    num_rows = 0
    for index in range(len(data)):
        item, at = data[index], 0
        number, *segments = data.order.block(index)
        for doc, start, stop in zip(*segments, strict=True):
            assert item["input_ids"][at : at + stop - start].tolist() == caches[number].tokens(doc)[start:stop].tolist()
            at += int(stop - start)
        num_rows += at
    if weights is None:
        assert num_rows == 3 * data.num_rows == 3 * sum(int((part.doc_lengths - 1).sum()) for part in caches)
    one, two = (list(DataLoader(data, batch_size=2, num_workers=n, collate_fn=collate)) for n in (0, 2))
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_shard_is_read_once_an_epoch_and_memory_is_bounded(tmp_path):
    cache = make_cache(tmp_path / "cache", lengths=(40,) * 60, shards=20)
    data = blocks_of(cache, num_epochs=2)
    for index in range(len(data)):
        data[index]
    assert cache.memory.num_reads == 20  # all of it fits into memory
    few = blocks_of(cache, num_epochs=2)
    few.order.num_lanes, num_pools = 1, len(few.order._num_blocks)
    shard_bytes = cache.load_shard(0).num_bytes
    cache.memory.limit_bytes = 10 * shard_bytes
    for index in range(few.num_blocks):
        few[index]
        assert cache.memory._num_bytes <= 10 * shard_bytes + 100
    assert num_pools == 3 and cache.memory.num_reads <= 2 * 20
