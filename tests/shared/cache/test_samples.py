"""Sampled targets in a shard: layout, reading, and what is refused; the zstd filter."""

import dataclasses
import io
import subprocess
import sys

import h5py
import numpy as np
import pytest

from shared.cache.encode import encode_shard
from shared.cache.reader import Cache
from shared.cache.rows import exact, truncate
from shared.cache.shard import decode_shard
from shared.cache.writer import CacheWriter
from shared.errors import CacheFormatError, CacheMismatchError, ConfigError
from tests.support.cache_rows import GRID, IDENTITY, build_options, samples_of_logits, shard_of_logits, small_shard

OPTIONS = {"codec": "q", "temperatures": GRID, "top_k": 4, "head_width": 64, "tokenizer_size": 64}
NAMES = {"samples_k": "<u2", "samples_ids": "<u4", "samples_counts": "<u2", "samples_margins": "<f4"}


def sampled_shard(drawn_from="full"):
    """Documents of 5, 1 and 7 tokens with 20 draws per row at T = 0.5."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (13, 64)).astype(np.float32)
    arrays = shard_of_logits(logits, (5, 1, 7), np.full(13, 4), rng.integers(0, 64, 13))
    samples = samples_of_logits(logits, arrays, temperature=0.5, num=20, drawn_from=drawn_from)
    return dataclasses.replace(arrays, samples=samples)


@pytest.mark.parametrize("drawn_from", ["full", "tail"])
def test_samples_read_back_and_encode_again_to_the_same_bytes(drawn_from):
    arrays = sampled_shard(drawn_from)
    image, statistics = encode_shard(arrays, **OPTIONS)
    with h5py.File(io.BytesIO(image)) as file:
        assert {name: file[name].dtype.str for name in file if name.startswith("samples")} == NAMES
        attributes = [file.attrs[f"samples_{name}"] for name in ("temperature", "from", "num")]
        assert attributes == [0.5, drawn_from.encode(), 20]
    shard = decode_shard(image, "x")
    for field in dataclasses.fields(arrays.samples):
        np.testing.assert_array_equal(getattr(shard.samples, field.name), getattr(arrays.samples, field.name))
    assert encode_shard(exact(shard, GRID), **OPTIONS)[0] == image
    assert statistics == encode_shard(dataclasses.replace(arrays, samples=None), **OPTIONS)[1]


def test_samples_of_a_document(tmp_path):
    with CacheWriter(tmp_path / "c", build_options(codec="q")) as writer:
        for shard in range(2):
            writer.write_shard(shard, sampled_shard(), {})
        writer.finish(IDENTITY, [])
    samples = sampled_shard().samples
    found = Cache(tmp_path / "c").samples(5, 2, 5)  # the last document of the second shard
    assert (found.temperature, found.drawn_from, found.num) == (0.5, "full", 20)
    assert found.ids.shape == found.counts.shape == found.margins.shape == (3, 20)
    starts = np.cumsum(samples.k) - samples.k
    for i, row in enumerate(range(8, 11)):
        part = slice(starts[row], starts[row] + samples.k[row])
        for name in ("ids", "counts", "margins"):
            padded = np.zeros(20)
            padded[: samples.k[row]] = getattr(samples, name)[part]
            np.testing.assert_array_equal(getattr(found, name)[i], padded)
        assert found.counts[i].sum() == 20
    whole = Cache(tmp_path / "c").samples(1)
    assert whole.k.tolist() == [0] and whole.ids.shape == (1, 20)


def test_a_cache_without_samples_says_so(tmp_path):
    with CacheWriter(tmp_path / "c", build_options(num_shards=1)) as writer:
        writer.write_shard(0, small_shard(0), {})
        writer.finish(IDENTITY, [])
    with pytest.raises(CacheMismatchError, match="no sampled targets"):
        Cache(tmp_path / "c").samples(0)


def test_rows_with_no_tail_need_no_samples_of_it():
    logits = np.zeros((3, 4), np.float32)
    arrays = shard_of_logits(logits, [3], np.array([4, 2, 0]), np.array([0, 1, 2]))
    samples = samples_of_logits(logits, arrays, temperature=1.0, num=5, drawn_from="tail")
    assert samples.k[0] == 0
    options = OPTIONS | {"head_width": 4, "tokenizer_size": 4}
    image, _ = encode_shard(dataclasses.replace(arrays, samples=samples), **options)
    assert decode_shard(image, "x").samples.k.tolist() == samples.k.tolist()
    full = dataclasses.replace(samples, drawn_from="full")
    with pytest.raises(CacheFormatError, match="samples do not add up; where: document 'doc/0', position 0"):
        encode_shard(dataclasses.replace(arrays, samples=full), **options)


def test_cut_rows_keep_samples_of_the_full_distribution_alone():
    arrays = sampled_shard()
    assert truncate(arrays, GRID, top_k=2).samples is arrays.samples
    with pytest.raises(ConfigError, match="samples of their tail cannot be cut"):
        truncate(sampled_shard("tail"), GRID, top_k=2)


def changed(name, index, value):
    def change(samples):
        array = getattr(samples, name).copy()
        array[index] = value
        return {name: array}

    return change


START = "where: document 'doc/0', position 0"
REFUSED = [
    (lambda s: {"drawn_from": "head"}, "samples of something unknown; expected: full or tail; got: head"),
    (lambda s: {"temperature": 0.7}, "off the temperature grid"),
    (lambda s: {"num": 0}, "number of samples is out of range"),
    (lambda s: {"num": 65_536}, "number of samples is out of range"),
    (lambda s: {"num": 21}, f"samples do not add up; {START}; expected: 21 draws; got: 20"),
    (lambda s: {"k": s.k[:-1]}, "samples_k has the wrong shape"),
    (lambda s: {"counts": s.counts[:-1]}, "samples_counts has the wrong shape"),
    (lambda s: {"k": s.k + 1}, "samples_k does not add up"),
    (lambda s: {"k": np.concatenate([[-1, s.k[0] + s.k[1] + 1], s.k[2:]])}, "negative number of samples"),
    (lambda s: {"k": np.concatenate([s.k[:3], [0, s.k[3]], s.k[5:]])}, "last row has samples"),
    (changed("ids", 0, -1), f"sampled id is out of range; {START}"),
    (changed("ids", 0, 64), f"sampled id is out of range; {START}"),
    (lambda s: changed("ids", 1, s.ids[0])(s), f"do not ascend; {START}"),
    (lambda s: {"ids": np.concatenate([s.ids[1::-1], s.ids[2:]])}, f"do not ascend; {START}"),
    (changed("counts", 0, 0), f"never drawn; {START}"),
    (changed("margins", 0, -0.5), f"not z_1 − z_i; {START}"),
    (changed("margins", 0, np.inf), f"not z_1 − z_i; {START}"),
    (changed("margins", 0, np.nan), f"not z_1 − z_i; {START}"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refused_samples(change, message):
    arrays = sampled_shard()
    samples = dataclasses.replace(arrays.samples, **change(arrays.samples))
    with pytest.raises(CacheFormatError) as error:
        encode_shard(dataclasses.replace(arrays, samples=samples), **OPTIONS)
    assert message in str(error.value)


def test_a_sample_of_the_tail_within_the_row_is_refused():
    arrays = dataclasses.replace(
        sampled_shard(), samples=dataclasses.replace(sampled_shard().samples, drawn_from="tail")
    )
    with pytest.raises(CacheFormatError, match="tail is an entry of the row"):
        encode_shard(arrays, **OPTIONS)


@pytest.mark.parametrize("name", ["samples_ids", "samples_num"])
def test_half_of_the_samples_is_refused(name):
    buffer = io.BytesIO(encode_shard(sampled_shard(), **OPTIONS)[0])
    with h5py.File(buffer, "r+") as file:
        del (file if name in file else file.attrs)[name]
    with pytest.raises(CacheFormatError, match=f"lacks a mandatory field; where: x; expected: {name}"):
        decode_shard(buffer.getvalue(), "x")


# --- zstd ------------------------------------------------------------------------------------------------------------


def test_zstd_holds_the_same():
    pytest.importorskip("hdf5plugin")
    arrays = sampled_shard()
    images = [encode_shard(arrays, **OPTIONS, filter=name) for name in ("gzip", "zstd", "zstd")]
    assert images[0] != images[1] == images[2]
    with h5py.File(io.BytesIO(images[1][0])) as file:
        for dataset in (dataset for dataset in file.values() if dataset.size):
            assert dataset.id.get_create_plist().get_filter(1)[0] == 32_015 and dataset.fletcher32
    gzip, zstd = (decode_shard(image, "x") for image, _ in images[:2])
    for name in ("tokens", "k", "ids", "margins", "tail", "loss_mask", "doc_indptr"):
        np.testing.assert_array_equal(getattr(gzip, name), getattr(zstd, name))
    assert gzip.meta == zstd.meta


def test_zstd_in_a_fresh_process_with_and_without_the_plugin(tmp_path):
    pytest.importorskip("hdf5plugin")
    with CacheWriter(tmp_path / "c", build_options(codec="q", filter="zstd", num_shards=1)) as writer:
        writer.write_shard(0, small_shard(0), {})
        writer.finish(IDENTITY, [])
    assert Cache(tmp_path / "c").manifest.filter == "zstd"
    code = "import sys; from shared.cache.reader import Cache; print(Cache(sys.argv[1]).targets(0, 1.0).k)"
    absent = "import sys; sys.modules['hdf5plugin'] = None\n" + code
    write = "import sys; sys.modules['hdf5plugin'] = None\nfrom shared.cache.writer import CacheWriter\n"
    write += f"CacheWriter(sys.argv[1] + 'new', {build_options(filter='zstd')!r})"
    results = [
        subprocess.run([sys.executable, "-c", text, tmp_path / "c"], capture_output=True, text=True)
        for text in (code, absent, write)
    ]
    assert results[0].stdout == "[4 4 4 4 0]\n"
    for result in results[1:]:
        assert "CacheFormatError: zstd needs the package hdf5plugin" in result.stderr
        assert result.stderr.endswith("fix: pip install hdf5plugin\n")
    assert not (tmp_path / "cnew").exists()
