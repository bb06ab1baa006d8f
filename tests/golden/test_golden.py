"""The committed caches of every format version read to what they held when they were written."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from shared.cache.format import ATTRIBUTES, CODECS, DATASETS, SAMPLES
from shared.cache.manifest import Manifest, ShardRecord, seal, unseal
from shared.cache.reader import Cache
from shared.cache.verify import verify_cache
from shared.errors import CacheCorruptError, DistillError
from tests.golden.make_v1 import contents

FOLDER = Path(__file__).parent / "v1"
NAMES = ["q-gzip", "q-zstd", "f16-gzip"]


def assert_equal(found, expected, path=""):
    """Equal, down to the last bit; probabilities within an ulp or two of float32, since exp() differs by machine."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            assert_equal(found[key], expected[key], f"{path}/{key}")
    elif path.endswith(("/probabilities", "/tails")):
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=path)
    elif path == "/documents":
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert_equal(ours, theirs, f"{path}/{number}")
    else:
        assert found == expected, path


@pytest.mark.parametrize("name", NAMES)
def test_version_1_reads_to_what_was_written(name):
    if name.endswith("zstd"):
        pytest.importorskip("hdf5plugin")
    assert verify_cache(FOLDER / name) == []
    assert_equal(contents(FOLDER / name), json.loads((FOLDER / f"{name}.json").read_text()))


def test_both_filters_and_codecs_hold_the_same_rows():
    gzip, zstd, half = (json.loads((FOLDER / f"{name}.json").read_text()) for name in NAMES)
    assert gzip == zstd
    for ours, theirs in zip(gzip["documents"], half["documents"], strict=True):
        for key in ("meta", "tokens", "loss_mask", "k", "ids", "samples_ids", "samples_margins"):
            assert ours[key] == theirs[key]
    assert len({k for document in gzip["documents"] for k in document["k"]}) > 3  # ragged
    assert max(gzip["margins"]) > 255 / 5  # an escape


# --- what a reader refuses -------------------------------------------------------------------------------------------


def sign(path, edit=lambda manifest: None):
    """Edit the manifest, and make sizes and digests right again: what is left to refuse is the edit alone."""
    manifest = unseal((path / "manifest.json").read_bytes())
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(manifest)
    (path / "manifest.json").write_bytes(seal(manifest))


def required(record):
    """The fields that a reader needs."""
    return [field.name for field in dataclasses.fields(record)
            if field.default is field.default_factory is dataclasses.MISSING]  # fmt: skip


@pytest.fixture
def cache(tmp_path, request):
    return Path(shutil.copytree(FOLDER / getattr(request, "param", "q-gzip"), tmp_path / "cache"))


def read_all(path):
    cache = Cache(path)
    return [(cache.targets(number, 1.0), cache.samples(number)) for number in range(cache.num_documents)]


def test_an_edit_that_changes_nothing_is_read(cache):
    sign(cache)
    assert len(read_all(cache)) == 3 and verify_cache(cache) == []


@pytest.mark.parametrize("key", ["format", "version", *required(Manifest)])
def test_a_manifest_without_a_field(cache, key):
    sign(cache, lambda manifest: manifest.pop(key))
    with pytest.raises(DistillError, match={"format": "not a logit cache"}.get(key, key)):
        Cache(cache)
    assert len(verify_cache(cache)) == 1


@pytest.mark.parametrize(
    ("key", "value"), [("version", 2), ("version", "1"), ("codec", "r"), ("filter", "lz4"), ("top_k", "12")]
)
def test_a_manifest_of_another_kind(cache, key, value):
    sign(cache, lambda manifest: manifest.update({key: value}))
    with pytest.raises(DistillError, match=f"{key}.*") as error:
        Cache(cache)
    assert key == "top_k" or f"got: {value}" in str(error.value)


def edit_shard(path, edit):
    with h5py.File(path / "shard-00000.h5", "r+") as file:
        edit(file)
    sign(path)


@pytest.mark.parametrize("name", [*DATASETS, *CODECS["q"], *SAMPLES, *ATTRIBUTES])
def test_a_shard_without_a_field(cache, name):
    def remove(file):
        del (file if name in file else file.attrs)[name]

    edit_shard(cache, remove)
    named = "codedistill-cache 1" if name in ("format", "version") else name
    with pytest.raises(DistillError, match=named):
        read_all(cache)


@pytest.mark.parametrize("cache", ["f16-gzip"], indirect=True)
def test_a_shard_without_its_margins(cache):
    edit_shard(cache, lambda file: file.__delitem__("topk_margins"))
    with pytest.raises(DistillError, match="topk_margins"):
        read_all(cache)


@pytest.mark.parametrize(("key", "value"), [("version", 2), ("format", np.bytes_("other")), ("codec", np.bytes_("r"))])
def test_a_shard_of_another_kind(cache, key, value):
    edit_shard(cache, lambda file: file.attrs.__setitem__(key, value))
    text = value.decode() if isinstance(value, bytes) else value
    with pytest.raises(DistillError, match=f"unknown.*got: .*{text}"):
        read_all(cache)


@pytest.mark.parametrize("key", ["format", "version", *required(ShardRecord)])
def test_a_shard_json_without_a_field(cache, key):
    file = cache / "shard-00000.json"
    record = unseal(file.read_bytes())
    del record[key]
    file.write_bytes(seal(record))
    sign(cache)
    (problem,) = verify_cache(cache)
    named = "not the record of shard-00000, codedistill-cache 1" if key in ("format", "version", "shard") else key
    assert problem.startswith("shard-00000.json: ") and named in problem
    with pytest.raises(CacheCorruptError, match=named):
        Cache(cache).record(0)
