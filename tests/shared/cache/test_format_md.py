"""FORMAT.md is enough: a reader of its own, after the text alone, in h5py, numpy and plain Python."""

import dataclasses
import hashlib
import json
import math

import h5py
import numpy as np
import pytest

from shared.cache.reader import Cache
from shared.cache.writer import CacheWriter
from tests.support.cache_rows import GRID, IDENTITY, build_options, samples_of_logits, shard_of_logits

V = 64


class TextReader:
    """Sections 1 to 4 of FORMAT.md for one shard; imports nothing of the project."""

    def __init__(self, folder):
        manifest = (folder / "manifest.json").read_bytes()
        self.manifest = json.loads(manifest)
        body = manifest[: manifest.rindex(b',\n  "digest": "')]
        assert manifest == body + f',\n  "digest": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()
        assert (self.manifest["format"], self.manifest["version"]) == ("codedistill-cache", 1)
        for name, entry in self.manifest["files"].items():
            data = (folder / name).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        if self.manifest["filter"] == "zstd":
            import hdf5plugin  # noqa: F401
        with h5py.File(folder / "shard-00000.h5", "r") as file:
            self.data = {name: file[name][()] for name in file}
            self.attributes = dict(file.attrs)
        assert (self.attributes["format"], self.attributes["version"]) == (b"codedistill-cache", 1)

    def document(self, number):
        start, stop = self.data["doc_indptr"][number : number + 2]
        first, last = self.data["doc_meta_indptr"][number : number + 2]
        meta = json.loads(self.data["doc_meta"][first:last].tobytes())
        return self.data["tokens"][start:stop].tolist(), self.data["loss_mask"][start:stop].tolist(), meta

    def row(self, row, column):
        """A row's {id: probability}, the tail's probability, and the sum of the weights."""
        k = self.data["k"].tolist()
        start, T = sum(k[:row]), self.attributes["temperatures"][column]
        entries = range(start, start + k[row])
        ids = [int(self.data["id_table"][self.data["topk_ranks"][i]]) for i in entries]
        if self.attributes["codec"] == b"f16":
            margins = [float(self.data["topk_margins"][i]) for i in entries]
        else:
            escapes = dict(zip(self.data["esc_pos"].tolist(), self.data["esc_value"].tolist(), strict=True))
            code, margins = 0, []
            for i in entries:
                code += escapes.get(i, int(self.data["topk_codes"][i]))
                margins.append(float(self.data["codebook"][code]))
        tail = int(self.data["tail"][row, column])
        tail_weight = 0.0 if tail == -32768 else math.exp(tail / self.attributes["tail_scale"] - margins[-1] / T)
        weights = [math.exp(-margin / T) for margin in margins]
        total = sum(weights) + tail_weight
        return dict(zip(ids, [weight / total for weight in weights], strict=True)), tail_weight / total, total

    def sampled(self, row, column):
        """A row's {id: estimated probability} at a temperature, from samples of the full distribution."""
        first = int(self.data["samples_k"][:row].sum())
        T_s, T = self.attributes["samples_temperature"], self.attributes["temperatures"][column]
        drawn_at = self.attributes["temperatures"].tolist().index(T_s)
        ratio = self.row(row, drawn_at)[2] / self.row(row, column)[2]
        estimate = {}
        for i in range(first, first + int(self.data["samples_k"][row])):
            count, margin = int(self.data["samples_counts"][i]), float(self.data["samples_margins"][i])
            share = count / self.attributes["samples_num"]
            estimate[int(self.data["samples_ids"][i])] = share * math.exp(margin / T_s - margin / T) * ratio
        return estimate


def write_cache(path, codec, compression):
    """Ragged rows of 1 to V entries, some with gaps beyond every escape, in two documents, with samples."""
    rng = np.random.default_rng(3)
    logits = (rng.normal(0, 3, (8, V)) + 100 * (rng.random((8, V)) < 0.04)).astype(np.float32)
    tokens = rng.integers(0, V, 8)
    arrays = shard_of_logits(logits, [6, 2], np.array([3, V, 1, 9, 20, 0, 5, 0]), tokens)
    arrays = dataclasses.replace(arrays, samples=samples_of_logits(logits, arrays, temperature=1.0, num=4000))
    options = build_options(codec=codec, filter=compression, top_k=V, num_shards=1)
    with CacheWriter(path, options) as writer:
        writer.write_shard(0, arrays, {})
        writer.finish(IDENTITY, [])
    return logits, arrays


@pytest.mark.parametrize(("codec", "compression"), [("f16", "gzip"), ("q", "gzip"), ("q", "zstd")])
def test_format_md_is_enough_to_read_a_cache(codec, compression, tmp_path):
    if compression == "zstd":
        pytest.importorskip("hdf5plugin")
    logits, arrays = write_cache(tmp_path / "c", codec, compression)
    text, cache = TextReader(tmp_path / "c"), Cache(tmp_path / "c")
    assert codec == "f16" or len(text.data["esc_pos"]) > 0
    for number, (start, stop) in enumerate([(0, 6), (6, 8)]):
        tokens, mask, meta = text.document(number)
        assert tokens == arrays.tokens[start:stop].tolist() == cache.tokens(number).tolist()
        assert mask == arrays.loss_mask[start:stop].tolist() == cache.loss_mask(number).tolist()
        assert meta == arrays.doc_meta[number] == cache.meta(number)
        samples = cache.samples(number)
        for column, T in enumerate(GRID):
            targets = cache.targets(number, T)
            for row in range(start, stop - 1):
                head, tail, _ = text.row(row, column)
                i, k = row - start, int(arrays.k[row])
                assert list(head) == targets.ids[i, :k].tolist()
                np.testing.assert_allclose(np.exp(targets.logp[i, :k]), list(head.values()), rtol=1e-4, atol=1e-30)
                np.testing.assert_allclose(np.exp(targets.log_tail[i]), tail, rtol=1e-4, atol=1e-30)
                assert sum(head.values()) + tail == pytest.approx(1, abs=1e-12)
                exact = np.exp((logits[row].astype(np.float64) - logits[row].max()) / T)
                exact /= exact.sum()
                np.testing.assert_allclose(list(head.values()), exact[list(head)], rtol=0.3, atol=1e-12)
                if T <= 1:  # as T exceeds T_s, the weights' variance grows
                    estimate = text.sampled(row, column)
                    assert list(estimate) == samples.ids[i, : samples.k[i]].tolist()
                    assert sum(estimate.values()) == pytest.approx(1, abs=0.1)
                    for sampled, probability in estimate.items():
                        assert probability == pytest.approx(exact[sampled], abs=0.05)
