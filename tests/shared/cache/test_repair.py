"""`cache repair`: what is whole stays, what is damaged goes and is named, the same build ends with the same bytes."""

import shutil

import pytest
from click.testing import CliRunner

from shared.cache.attach import add_files
from shared.cache.cli import cache as command
from shared.cache.reader import Cache
from shared.cache.repair import copy_whole_shards, repair_cache
from shared.cache.transform import merge_caches
from shared.cache.verify import verify_cache
from shared.cache.writer import CacheWriter
from shared.errors import CacheCorruptError, CacheFormatError, DistillError, ResumeError
from tests.support.cache_faults import contents
from tests.support.cache_rows import IDENTITY, SOURCES, build_options, small_shard

LENGTHS = ((5, 1, 7), (4,), (3, 3))


def build(path):
    """Three shards of 3, 1 and 2 documents; returns the shards that were written now."""
    written = []
    with CacheWriter(path, build_options(num_shards=3)) as writer:
        first = 0
        for shard, lengths in enumerate(LENGTHS):
            if not writer.finished and not writer.has_shard(shard):
                arrays = small_shard(shard, lengths=lengths)
                for number, meta in enumerate(arrays.doc_meta):
                    meta["id"] = f"d{first + number}"
                writer.write_shard(shard, arrays)
                written.append(shard)
            first += len(lengths)
        if not writer.finished:
            (path / "tokenizer").mkdir(exist_ok=True)
            (path / "tokenizer" / "tokenizer.json").write_text("{}")
            writer.finish(IDENTITY, SOURCES)
    return written


@pytest.fixture
def cache(tmp_path):
    build(tmp_path / "cache")
    return tmp_path / "cache"


def flip(file, position=-1):
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_repair_leaves_the_cache_that_shares_its_shards_as_it_is(cache, tmp_path):
    other, merged = tmp_path / "other", tmp_path / "merged"
    shutil.copytree(cache, other)
    merge_caches([cache, other], merged)
    shard = merged / "shard-00001.h5"
    assert shard.samefile(cache / shard.name)
    flip(shard)  # the bytes of both
    before = contents(cache)
    repair_cache(merged)
    assert not shard.exists() and contents(cache) == before


def test_a_whole_cache_is_left_alone(cache):
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in [cache, *cache.rglob("*")]}
    done = CliRunner().invoke(command, ["repair", str(cache)])
    assert (done.exit_code, done.stdout) == (0, f"{cache}: every file is as the manifest says; nothing changed\n")
    assert {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in [cache, *cache.rglob("*")]} == before


@pytest.mark.parametrize("ends", [["h5"], ["json"], ["h5", "json"]])
@pytest.mark.parametrize("remove", [False, True])
def test_a_damaged_shard_is_removed_named_and_built_again(cache, ends, remove):
    before = contents(cache)
    for end in ends:
        file = cache / f"shard-00000.{end}"
        if remove:
            file.unlink()
        else:
            flip(file, 100 if len(ends) == 1 else 0)
    (line,) = repair_cache(cache)
    known = '["d0", "d1", "d2"]' if len(ends) == 1 else "0 to 2 of the cache's order"
    assert line == (
        f"shard-00000: damaged; removed, with documents {known}: the same `codedistill teacher build` makes it again"
    )
    left = {name: data for name, data in before.items() if not name.startswith("shard-00000.")}
    assert contents(cache) == left
    with pytest.raises(CacheCorruptError, match="missing"):
        Cache(cache)
    assert build(cache) == [0]
    assert contents(cache) == before
    assert repair_cache(cache) == []


def test_positions_between_whole_shards(cache):
    for end in ("h5", "json"):
        (cache / f"shard-00001.{end}").write_bytes(b"")
    assert "documents 3 to 3 of" in repair_cache(cache)[0]


@pytest.mark.parametrize("name", ["build.json", "doc_lengths.u32"])
def test_what_follows_from_the_other_files_is_restored(cache, name):
    before = contents(cache)
    flip(cache / name, 20)
    (line,) = repair_cache(cache)
    assert line.startswith(f"{name}: SHA-256") and line.endswith("restored from the cache's other files")
    assert contents(cache) == before


@pytest.mark.parametrize("edit", [flip, lambda file: file.unlink(), lambda file: file.write_bytes(b"\xff[")])
def test_a_damaged_manifest_is_written_again_by_the_build(cache, edit):
    before = contents(cache)
    edit(cache / "manifest.json")
    flip(cache / "shard-00002.h5", 3000)
    lines = repair_cache(cache)
    assert [line.split(":")[0] for line in lines] == ["manifest.json", "shard-00002"]
    assert '["d4", "d5"]' in lines[1]
    assert build(cache) == [2]
    assert contents(cache) == before


def test_a_flipped_record_is_found_without_a_manifest(cache):
    """Nothing but the JSON's own digest tells that a figure in it changed."""
    before = contents(cache)
    (cache / "manifest.json").unlink()
    text = (cache / "shard-00001.json").read_text()
    (cache / "shard-00001.json").write_text(text.replace('"rows": 3', '"rows": 2'))
    assert text.count('"rows": 3') == 1
    first, second = repair_cache(cache)
    assert first.startswith("manifest.json: damaged or missing") and '"d3"' in second
    assert build(cache) == [1]
    assert contents(cache) == before


def test_the_tokenizer_and_the_teachers_results(cache):
    add_files(cache, {"teacher_eval/a.json": b"a", "teacher_eval/b.json": b"b"})
    flip(cache / "tokenizer" / "tokenizer.json")
    flip(cache / "teacher_eval" / "a.json")
    lines = repair_cache(cache)
    assert [line.split(":")[0] for line in lines] == ["tokenizer/tokenizer.json", "teacher_eval/a.json"] or [
        line.split(":")[0] for line in lines
    ] == ["teacher_eval/a.json", "tokenizer/tokenizer.json"]
    assert any("the same `codedistill teacher build` writes it again" in line for line in lines)
    assert any("removed for good: make it again with `codedistill cache attach`" in line for line in lines)
    assert build(cache) == []
    assert verify_cache(cache) == []
    assert sorted(name for name in contents(cache) if name.startswith("teacher")) == ["teacher_eval/b.json"]


def test_only_the_teachers_results_are_lost(cache):
    before = contents(cache)
    add_files(cache, {"teacher_eval/a.json": b"a"})
    (cache / "teacher_eval" / "a.json").unlink()
    assert len(repair_cache(cache)) == 1
    assert contents(cache) == before


def test_an_unfinished_build(tmp_path):
    path = tmp_path / "cache"
    with CacheWriter(path, build_options(num_shards=3)) as writer:
        for shard in range(2):
            writer.write_shard(shard, small_shard(shard), {})
    assert repair_cache(path) == []
    flip(path / "shard-00001.h5")
    assert repair_cache(path)[0].startswith("shard-00001: damaged; removed")
    assert sorted(contents(path)) == ["build.json", "shard-00000.h5", "shard-00000.json"]


def test_what_a_killed_process_left_is_cleared_and_said(cache):
    before = contents(cache)
    (cache / ".shard-00002.h5.tmp-999999999").write_text("x")
    assert repair_cache(cache) == ["what a killed process left: cleared"]
    assert contents(cache) == before and repair_cache(cache) == []


def test_foreign_files_are_named_and_left(cache):
    (cache / "notes").write_text("mine")
    flip(cache / "shard-00000.h5")
    (cache / "a\nb").write_text("mine")
    assert repair_cache(cache)[-2:] == [
        "'a\\nb': not listed in the manifest; left alone",
        "notes: not listed in the manifest; left alone",
    ]
    assert (cache / "notes").read_text() == "mine"


def test_what_cannot_be_repaired_is_refused(cache, tmp_path):
    with pytest.raises(CacheFormatError, match="no cache here"):
        repair_cache(tmp_path / "nowhere")
    (tmp_path / "notes").mkdir()
    with pytest.raises(CacheFormatError, match="no cache here"):
        repair_cache(tmp_path / "notes")
    with CacheWriter(tmp_path / "c", build_options()), pytest.raises(ResumeError, match="another process"):
        repair_cache(tmp_path / "c")
    flip(cache / "manifest.json")
    flip(cache / "build.json", 0)
    before = contents(cache)
    with pytest.raises(DistillError, match=r"neither the manifest nor build\.json"):
        repair_cache(cache)
    assert contents(cache) == before


def test_the_whole_shards_become_a_cache_of_their_own(cache, tmp_path):
    before = contents(cache)
    flip(cache / "shard-00001.h5")
    damaged = contents(cache)
    assert copy_whole_shards(cache, tmp_path / "out") == [1]
    assert copy_whole_shards(cache, tmp_path / "out") == [1]
    assert contents(cache) == damaged
    assert verify_cache(tmp_path / "out") == []
    out = Cache(tmp_path / "out")
    assert [out.meta(i)["id"] for i in range(out.num_documents)] == ["d0", "d1", "d2", "d4", "d5"]
    assert contents(tmp_path / "out")["shard-00001.h5"] == before["shard-00002.h5"]
    assert out.doc_lengths.tolist() == [5, 1, 7, 3, 3]
    assert out.label_identity == Cache(shutil.copytree(tmp_path / "out", tmp_path / "moved")).label_identity
