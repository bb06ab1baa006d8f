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
from stage2_student.dataset import PackedBlocks, hold_out
from stage2_student.packing import pack
from stage2_student.samples import sample_weights
from tests.support.student_cache import make_cache

SIZE = 32


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("dataset") / "cache")


def blocks_of(cache, **options):
    return PackedBlocks([cache], **{"block_size": SIZE, "seed": 0, "temperature": 1.5} | options)


@pytest.mark.parametrize("all_targets", [False, True])
def test_items_are_the_plans_pieces_as_the_reader_has_them(cache, all_targets):
    data = blocks_of(cache, num_epochs=2, all_targets=all_targets)
    plans = [pack([cache.doc_lengths], SIZE, seed=0, epoch=epoch) for epoch in (0, 1)]
    assert len(data) == len(plans[0]) + len(plans[1])
    num_labels = 0
    for item, block in zip((data[i] for i in range(len(data))), plans[0] + plans[1], strict=True):
        at = 0
        for doc, start, stop in block:
            rows = slice(at, at + stop - start)
            tokens, mask = cache.tokens(doc), cache.loss_mask(doc)
            soft = cache.targets(doc, 1.5)
            assert item["input_ids"][rows].tolist() == tokens[start:stop].tolist()
            assert item["position_ids"][rows].tolist() == list(range(stop - start))
            wanted = [tokens[t + 1] if all_targets or mask[t] else IGNORE for t in range(start, stop)]
            assert item["labels"][rows].tolist() == wanted
            num_labels += sum(label != IGNORE for label in wanted)
            for name, array in (("ids", soft.ids), ("logp", soft.logp), ("log_tail", soft.log_tail), ("k", soft.k)):
                assert np.array_equal(item[f"soft_{name}"][rows].numpy(), array[start:stop])
            at = rows.stop
        assert item["position_ids"][at:].tolist() == list(range(SIZE - at))
        assert (item["labels"][at:] == IGNORE).all()
        assert not item["soft_k"][at:].any()
        assert not item["input_ids"][at:].any()
    targets = sum(int(cache.loss_mask(doc).sum()) for doc in range(cache.num_documents))
    assert num_labels == 2 * (cache.num_tokens - cache.num_documents if all_targets else targets)


@pytest.mark.parametrize("drawn_from", ["full", "tail"])
def test_sampled_targets_with_their_weights(tmp_path, drawn_from):
    cache = make_cache(tmp_path / "cache", samples={"temperature": 1.5, "num": 5, "drawn_from": drawn_from})
    data = blocks_of(cache, temperature=1.0, with_samples=True)
    for item, block in zip(
        (data[i] for i in range(len(data))), pack([cache.doc_lengths], SIZE, seed=0, epoch=0), strict=True
    ):
        at = 0
        for doc, start, stop in block:
            rows = slice(at, at + stop - start)
            samples = cache.samples(doc, start, stop)
            weights = sample_weights(samples, *(cache.targets(doc, T, start, stop) for T in (1.0, 1.5)), 1.0)
            assert np.array_equal(item["soft_sample_ids"][rows].numpy(), samples.ids)
            assert np.array_equal(item["soft_sample_weights"][rows].numpy(), weights)
            assert ((item["soft_sample_weights"][rows] > 0).numpy() == (samples.counts > 0)).all()
            at = rows.stop
        assert item["soft_sample_weights"].shape == (SIZE, 5)
        assert not item["soft_sample_weights"][at:].any()


def test_without_a_temperature_there_are_no_soft_labels_and_the_rest_is_equal(cache):
    plain, soft = blocks_of(cache, temperature=None), blocks_of(cache)
    assert len(plain) == len(soft)
    for i in range(len(plain)):
        assert set(plain[i]) == {"input_ids", "position_ids", "labels"}
        assert all(torch.equal(plain[i][name], soft[i][name]) for name in plain[i])


def test_workers_and_pickling_change_nothing(cache):
    data = blocks_of(cache, num_epochs=2)
    loads = [
        list(DataLoader(data, batch_size=2, num_workers=0)),
        list(DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context="spawn")),
        list(DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork", prefetch_factor=3)),
        list(DataLoader(pickle.loads(pickle.dumps(data)), batch_size=2)),
    ]
    for other in loads[1:]:
        assert len(other) == len(loads[0])
        for a, b in zip(loads[0], other, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_as_many_epochs_as_the_blocks_asked_for_take(cache):
    one, two = (len(pack([cache.doc_lengths], SIZE, seed=0, epoch=epoch)) for epoch in (0, 1))
    data = blocks_of(cache, num_blocks=one + 1)
    assert (data.num_epochs, len(data)) == (1 + 1 / two, one + 1)
    data = blocks_of(cache, num_epochs=1.5)
    assert (data.num_epochs, len(data)) == (1 + math.ceil(two / 2) / two, one + math.ceil(two / 2))
    assert blocks_of(cache, num_blocks=one + two).num_epochs == 2


def test_the_length_is_filled_up_with_blocks_that_hold_nothing(cache):
    data = blocks_of(cache)
    filled = blocks_of(cache, multiple=len(data) + 1)
    assert (len(filled), filled.num_blocks, filled.num_epochs) == (len(data) + 1, len(data), 1)
    assert all(torch.equal(filled[0][name], data[0][name]) for name in data[0])
    empty = filled[len(data)]
    assert (empty["labels"] == IGNORE).all()
    assert not empty["soft_k"].any()
    assert filled.documents(len(data)) == []
    assert len(list(filled)) == len(filled)


def test_a_block_names_its_documents(cache):
    data = blocks_of(cache)
    (block,) = (block for block in pack([cache.doc_lengths], SIZE, seed=0, epoch=0)[:1])
    assert data.documents(0) == [f"{cache.meta(doc).get('id', doc)} [{a}:{b}]" for doc, a, b in block]


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
        seen = {doc for i in range(len(data)) for doc, _, _ in data._block(i)}
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
def test_several_caches_are_read_by_the_plan_for_every_number_of_workers(cache, tmp_path, weights):
    caches = [cache, make_cache(tmp_path / "other", seed=1, lengths=(30, 20, 10, 5, 33))]
    data = PackedBlocks(caches, weights=weights, block_size=SIZE, seed=0, num_epochs=3, temperature=1.5)
    lengths = [part.doc_lengths for part in caches]
    plans = [pack(lengths, SIZE, weights=weights, seed=0, epoch=epoch) for epoch in range(3)]
    pieces = [piece for plan in plans for block in plan for piece in block]
    if weights is None:
        rows = sum(piece.stop - piece.start for piece in pieces)
        assert rows == 3 * data.num_rows == 3 * sum((part - 1).sum() for part in lengths)
    assert len(data) == sum(map(len, plans))
    for index, block in enumerate(block for plan in plans for block in plan):
        item, at = data[index], 0
        for number, start, stop in block:
            part, doc = (caches[0], number) if number < 8 else (caches[1], number - 8)
            rows = slice(at, at + stop - start)
            assert item["input_ids"][rows].tolist() == part.tokens(doc)[start:stop].tolist()
            assert np.array_equal(item["soft_logp"][rows].numpy(), part.targets(doc, 1.5).logp[start:stop])
            at = rows.stop
    one, two = (list(DataLoader(data, batch_size=2, num_workers=n)) for n in (0, 2))
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
