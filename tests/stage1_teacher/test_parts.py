"""`teacher build --part I/N`: builds that know nothing of one another, and the cache that merging makes of them."""

import json
import os
import shutil

import click
import pytest

from shared.cache.reader import Cache
from shared.cache.transform import merge_caches
from shared.cache.verify import verify_cache
from shared.errors import ConfigError, ResumeError
from stage1_teacher import capture, store
from tests.stage1_teacher.test_build import build, shards

OPTIONS = ("--top-k", "5", "--shard-tokens", "120", "--samples", "2")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Long documents, whose segments lie in several shards, and documents that occur twice."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [{"prompt": f"# task {i % 9}", "completion": "\n" + "y = x\n" * (3 + 25 * (i % 3))} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


@pytest.fixture(scope="module")
def whole(teacher, rows, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        cache, _ = build(teacher, rows, tmp_path_factory.mktemp("whole") / "whole", *OPTIONS)
    digests = [cache.meta(i)["digest"] for i in range(cache.num_documents)]
    borders = cache.shard_indptr[1:-1]
    assert any(digests[border - 1] == digests[border] for border in borders)  # a document lies on both sides
    return cache


def parts_of(teacher, rows, tmp_path, count):
    outs = [tmp_path / f"part-{i}" for i in range(1, count + 1)]
    return [build(teacher, rows, out, *OPTIONS, "--part", f"{i}/{count}")[0] for i, out in enumerate(outs, start=1)]


def test_the_parts_make_the_shards_of_the_whole(teacher, rows, whole, tmp_path, monkeypatch):
    parts = parts_of(teacher, rows, tmp_path, 3)
    assert [verify_cache(part.path) for part in parts] == [[], [], []]
    sizes = [part.num_shards for part in parts]
    assert sum(sizes) == whole.num_shards and max(sizes) - min(sizes) <= 1
    for name, links in (("linked", 2), ("copied", 1)):
        if name == "copied":
            monkeypatch.setattr(os, "link", refuse)
        assert merge_caches([parts[i].path for i in (2, 0, 1)], tmp_path / name) == 0
        assert verify_cache(tmp_path / name) == []
        assert shards(tmp_path / name) == shards(whole.path)
        merged = Cache(tmp_path / name)
        assert merged.manifest.digest == whole.manifest.digest
        assert merged.statistics == whole.statistics
        assert {file.stat().st_nlink for file in merged.path.glob("shard-*.h5")} == {links}
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["copied", "linked", "part-1", "part-2", "part-3"]


def refuse(source, path):
    raise OSError("another file system")


def test_a_part_beside_another_cache_keeps_what_both_hold_once(teacher, rows, whole, tmp_path):
    parts = parts_of(teacher, rows, tmp_path, 2)
    merged = [parts[1].path, whole.path]
    assert merge_caches(merged, tmp_path / "merged") > 0
    digests = [Cache(tmp_path / "merged").meta(i)["digest"] for i in range(Cache(tmp_path / "merged").num_documents)]
    assert set(digests) == {whole.meta(i)["digest"] for i in range(whole.num_documents)}
    with pytest.raises(ConfigError, match=r"a part is given twice; where: .*part-1"):
        merge_caches([parts[0].path, parts[0].path], tmp_path / "twice")


@pytest.mark.parametrize("damaged", [False, True])
def test_a_part_takes_the_tokens_of_another(teacher, rows, whole, tmp_path, monkeypatch, capsys, damaged):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(capture, "capture_shard", interrupt)
        build(teacher, rows, tmp_path / "part-1", *OPTIONS, "--part", "1/2")
    tokens = tmp_path / ".part-1.tokens/tokens.u32"
    before = tokens.read_bytes()
    if damaged:
        tokens.write_bytes(before[:-4] + b"none")
    with monkeypatch.context() as patch:
        if not damaged:
            patch.setattr(store, "cut_documents", None)  # nothing is tokenised
        _, result = build(teacher, rows, tmp_path / "part-2", *OPTIONS, "--part", "2/2")
        assert (f"12 documents are tokenised already, in {tokens.parent}" in result.stderr) != damaged
        assert (f"{tokens.parent} is damaged" in result.stderr) == damaged
        assert (tokens.read_bytes() == before) != damaged
        build(teacher, rows, tmp_path / "part-1", *OPTIONS, "--part", "1/2")
    merge_caches([tmp_path / "part-1", tmp_path / "part-2"], tmp_path / "merged")
    assert Cache(tmp_path / "merged").manifest.digest == whole.manifest.digest
    assert not list(tmp_path.glob(".*"))


def test_tokens_that_are_removed_while_they_are_taken_are_made_again(teacher, rows, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(capture, "capture_shard", interrupt)
        build(teacher, rows, tmp_path / "other", *OPTIONS)
    contents = (tmp_path / ".other.tokens/tokens.u32").read_bytes()
    linked, kept = [], tmp_path / "kept.u32"

    def link_file(source, path):
        os.link(source, path)
        if not linked:
            os.link(source, kept)
            shutil.rmtree(source.parent)
        linked.append(path)
        return True

    monkeypatch.setattr(store, "link_file", link_file)
    cache, _ = build(teacher, rows, tmp_path / "cache", *OPTIONS)
    assert len(linked) == 1 and cache.manifest.digest == whole.manifest.digest
    assert kept.read_bytes() == contents  # what was linked before is not written over


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_part_is_resumed_as_that_part_only(teacher, rows, tmp_path):
    first, _ = build(teacher, rows, tmp_path / "part", *OPTIONS, "--part", "1/2")
    _, result = build(teacher, rows, tmp_path / "part", *OPTIONS, "--part", "1/2")
    assert "up to date" in result.stderr
    for other in (("--part", "2/2"), ("--part", "1/3"), ()):
        with pytest.raises(ResumeError, match="the cache was begun with another part"):
            build(teacher, rows, tmp_path / "part", *OPTIONS, *other)
    assert Cache(tmp_path / "part").manifest == first.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part"]


def test_parts_that_cannot_be_are_refused(teacher, rows, tmp_path):
    with pytest.raises(ConfigError, match=r"the part has no shard; where: --part 1/99; got: \d+ shards in all"):
        build(teacher, rows, tmp_path / "part", *OPTIONS, "--part", "1/99")
    for text in ("0/2", "3/2", "2", "a/b", "1/2/3", "-1/2"):
        with pytest.raises((click.BadParameter, SystemExit)):
            build(teacher, rows, tmp_path / "part", *OPTIONS, "--part", text)
    assert not list(tmp_path.iterdir())
