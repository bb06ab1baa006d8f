"""Extending a finished cache: valid throughout, killed anywhere, and mended after damage."""

import copy
import itertools
import json
import shutil

import pytest

from shared.cache.extend import CacheExtender
from shared.cache.reader import Cache
from shared.cache.repair import repair_cache
from shared.cache.verify import verify_cache
from shared.errors import CacheCorruptError, CacheFormatError, CacheMismatchError, ResumeError
from tests.shared.cache.test_directory import build
from tests.support.cache_faults import contents, fast_folder, killed_at
from tests.support.cache_rows import IDENTITY, build_options, small_shard


def extend(path, number=1, shards=2, identity=IDENTITY, **changes):
    """Add two shards of source `number`; returns the shards that were written now."""
    source = {"name": f"more-{number}", "split": "train", "digest": f"e{number}", "num_documents": 3 * shards}
    options = build_options(num_shards=shards, sources=[source["digest"]], **changes)
    written = []
    with CacheExtender(path, options, source) as writer:
        if writer.finished:
            return written
        for shard in range(writer.first_shard, writer.first_shard + shards):
            if not writer.has_shard(shard):
                writer.write_shard(shard, small_shard(10 * number + shard), {"first_document": 3 * shard})
                written.append(shard)
        writer.finish(identity, [source])
    return written


@pytest.fixture
def cache(tmp_path):
    build(tmp_path / "cache")
    return tmp_path / "cache"


def test_shards_and_source_are_added(cache):
    before = contents(cache)
    assert extend(cache) == [2, 3]
    assert verify_cache(cache) == []
    opened = Cache(cache)
    assert (opened.num_shards, opened.num_documents, opened.num_tokens) == (4, 12, 52)
    assert [source["name"] for source in opened.manifest["sources"]] == ["s", "more-1"]
    assert opened.tokens(6).tolist() == small_shard(12).tokens[:5].tolist()
    after = contents(cache)
    assert {name for name in after if name not in before} == {
        "build-00002.json", *(f"shard-0000{i}.{end}" for i in (2, 3) for end in ("h5", "json"))
    }  # fmt: skip
    assert [name for name in before if before[name] != after[name]] == ["manifest.json", "manifest.sha256"]
    assert extend(cache) == []
    assert contents(cache) == after
    assert extend(cache, 2, shards=1) == [4]
    assert extend(cache) == extend(cache, 2, shards=1) == []
    assert Cache(cache).num_documents == 15
    build(cache)  # the first build finds itself done
    assert Cache(cache).num_documents == 15


@pytest.fixture
def folder():
    with fast_folder() as folder:
        yield folder


def test_killed_at_any_boundary(folder):
    build(folder / "base")
    shutil.copytree(folder / "base", folder / "whole")
    extend(folder / "whole")
    expected = contents(folder / "whole")
    for boundary in itertools.count(0, 2):
        path = folder / f"killed-{boundary}"
        shutil.copytree(folder / "base", path)
        killed = killed_at(boundary, extend, path)
        assert Cache(path).num_documents in (6, 12)
        Cache(path).targets(5, 1.0)
        extend(path)
        assert contents(path) == expected, boundary
        if not killed:
            break
    assert boundary > 15


def test_an_unfinished_extension_is_reported_and_no_other_one_begun(cache):
    options = build_options(num_shards=2, sources=["e1"])
    with CacheExtender(cache, options, {"name": "more-1"}) as writer:
        writer.write_shard(2, small_shard(12), {})
        with pytest.raises(CacheFormatError, match="a shard is incomplete"):
            writer.finish(IDENTITY, [writer.source])
    assert verify_cache(cache) == [
        f"{name}: of an extension that is not finished"
        for name in ("build-00002.json", "shard-00002.h5", "shard-00002.json")
    ]
    assert Cache(cache).num_documents == 6
    with pytest.raises(ResumeError, match=r"another sources;.*build-00002\.json.*expected: \['e1'\]; got: \['e2'\]"):
        extend(cache, 2)
    assert extend(cache) == [3]
    assert verify_cache(cache) == []


def test_what_is_refused(cache, tmp_path):
    before = contents(cache)
    with pytest.raises(CacheFormatError, match="no such folder"):
        extend(tmp_path / "nowhere")
    other = copy.deepcopy(IDENTITY)
    other["teacher"]["weights_digest"] = "zz"
    shutil.copytree(cache, tmp_path / "other")
    with pytest.raises(CacheMismatchError, match=r"differ in teacher\.weights_digest; expected: .* aa; got: .* zz"):
        extend(tmp_path / "other", identity=other)
    assert Cache(tmp_path / "other").num_documents == 6
    (cache / "shard-00000.h5").write_bytes(b"")
    with pytest.raises(CacheCorruptError, match=r"to extend is damaged.*fix: codedistill cache repair"):
        extend(cache)
    (cache / "shard-00000.h5").write_bytes(before["shard-00000.h5"])
    assert contents(cache) == before


@pytest.mark.parametrize("shard", [0, 2, 3])
def test_damage_is_repaired_by_the_command_that_made_it(cache, shard):
    extend(cache)
    extend(cache, 2, shards=1)
    expected = contents(cache)
    (cache / f"shard-0000{shard}.h5").write_bytes(b"")
    lines = repair_cache(cache)
    if shard < 2:
        assert len(lines) == 1 and lines[0].endswith("the same `codedistill teacher build` makes it again")
        build(cache)
    else:
        assert lines[0].endswith("the same `codedistill teacher build --extend` makes it again")
        assert lines[1].startswith("manifest.json: shards from 2 on are taken out")
        assert Cache(cache).num_documents == 6
        assert extend(cache) == [shard]
    assert contents(cache) == expected
    assert verify_cache(cache) == []


def test_damage_in_both(cache):
    extend(cache)
    expected = contents(cache)
    for shard in (1, 3):
        (cache / f"shard-0000{shard}.h5").unlink()
    assert len(repair_cache(cache)) == 2
    build(cache)
    assert Cache(cache).num_documents == 6
    assert extend(cache) == [3]
    assert contents(cache) == expected


def test_options_of_an_extension_are_restored(cache):
    extend(cache)
    expected = contents(cache)
    (cache / "build-00002.json").write_text(json.dumps({}))
    assert repair_cache(cache)[0].endswith("restored from the manifest")
    assert contents(cache) == expected
