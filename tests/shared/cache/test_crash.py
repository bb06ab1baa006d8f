"""Real kills at every system operation of a build and of a change, full disks, and a folder that may not be written."""

import errno
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shared.cache.attach import add_files
from shared.cache.manifest import read_pair
from shared.cache.reader import Cache
from shared.cache.verify import verify_cache
from shared.cache.writer import CacheWriter
from shared.errors import CacheCorruptError, CacheFormatError, ResumeError
from tests.support.cache_faults import (
    as_ordinary_user,
    contents,
    fast_folder,
    file_size_limit,
    killed_at,
    read_all,
    small_disk,
)
from tests.support.cache_rows import IDENTITY, SOURCES, build, build_options, small_shard


@pytest.fixture
def folder():
    with fast_folder() as folder:
        yield folder


def whole_shards(path):
    """The files of shards that verify, by what changes when a file is written again."""
    whole = [shard for shard in range(2) if read_pair(path, shard) is not None]
    files = [path / f"shard-{shard:05d}.{kind}" for shard in whole for kind in ("h5", "json")]
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def test_a_build_killed_at_every_operation_ends_equal(folder):
    """Half of the resumed builds are killed, too. What is whole stays, and nothing unfinished passes for a cache."""
    build(folder / "whole")
    expected, values = contents(folder / "whole"), read_all(folder / "whole")
    rng = np.random.default_rng(0)
    for boundary in itertools.count():
        path = folder / f"killed-{boundary}"
        if not killed_at(boundary, build, path):
            break
        for _ in range(boundary % 2):
            killed_at(int(rng.integers(boundary + 1)), build, path)
        kept = whole_shards(path)
        try:
            assert read_all(path) == values, boundary
        except CacheFormatError:
            assert not (path / "manifest.json").exists(), boundary
        build(path)
        assert contents(path) == expected, boundary
        assert whole_shards(path).items() >= kept.items(), boundary
    assert boundary > 40


def test_a_change_killed_at_every_operation_never_loses_the_cache(folder):
    build(folder / "whole")
    add_files(folder / "whole", {"teacher_eval/a.json": b"old", "teacher_eval/b.json": b"same"})
    base, number = contents(folder / "whole"), Cache(folder / "whole").num_tokens
    new = {"teacher_eval/a.json": b"new", "teacher_eval/b.json": b"same", "teacher_eval/deep/c.json": b"c"}
    new["teacher_eval/d.json"] = b"d"
    add_files(folder / "whole", new)
    expected = contents(folder / "whole")
    for boundary in itertools.count():
        path = folder / f"killed-{boundary}"
        for name, data in base.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        kept = whole_shards(path)
        if not killed_at(boundary, add_files, path, new):
            break
        assert Cache(path).num_tokens == number
        add_files(path, new)
        assert contents(path) == expected, boundary
        assert whole_shards(path) == kept
    assert boundary > 30


def test_a_full_disk(folder):
    """A file system with room for 0, 1, 2, … pages: one line says so; with more room the same build completes."""
    build(folder / "whole")
    expected = contents(folder / "whole")
    page = os.sysconf("SC_PAGE_SIZE")
    with small_disk(folder / "disk", 40 * page) as disk:
        failures = 0
        for pages in range(40):
            if disk is None:
                limit, path = file_size_limit(pages * 100), folder / f"limited-{pages}"
            else:
                ballast, path = disk / "ballast", disk / "cache"
                with ballast.open("wb", buffering=0) as file:
                    file.write(bytes((39 - pages) * page))
                limit = file_size_limit(1 << 30)
            try:
                with limit:
                    build(path)
            except ResumeError as error:
                failures += 1
                assert "cannot be written" in str(error) and "\n" not in str(error)
                assert "No space left" in str(error) or "File too large" in str(error)
            except OSError as error:  # from this test's own tokenizer file
                failures += 1
                assert error.errno == errno.ENOSPC
            kept = whole_shards(path)
            if disk is not None:
                ballast.unlink()
            build(path)
            assert contents(path) == expected, pages
            assert whole_shards(path).items() >= kept.items(), pages
            if disk is not None:
                subprocess.run(["rm", "-r", str(path)], check=True)
        assert 5 < failures < 40


def test_an_ordinary_user_reads_a_folder_that_only_root_may_write(folder):
    build(folder / "cache")
    for file in [folder / "cache", *(folder / "cache").rglob("*")]:
        file.chmod(0o555 if file.is_dir() else 0o444)
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in folder.rglob("*")}
    values = read_all(folder / "cache")

    def read():
        assert read_all(folder / "cache") == values
        assert verify_cache(folder / "cache") == []
        build(folder / "cache")  # finished and equal: nothing to write

    def write():
        for refused in (lambda: add_files(folder / "cache", {"teacher_eval/a": b""}), lambda: build(folder / "new")):
            with pytest.raises(ResumeError, match=r"cannot be written;.*got: Permission denied"):
                refused()

    folder.chmod(0o555)
    assert (as_ordinary_user(read), as_ordinary_user(write)) == (0, 0)
    folder.chmod(0o755)
    assert {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in folder.rglob("*")} == before
    for file in before:
        file.chmod(0o755)


def test_a_second_build_at_once_is_refused_and_leaves_the_first_alone(folder):
    build(folder / "whole")
    code = "import pathlib, sys; from tests.support.cache_rows import build; build(pathlib.Path(sys.argv[1]))"
    paths = [str(Path(__file__).parents[3]), *sys.path]
    path = folder / "cache"
    with CacheWriter(path, build_options()) as writer:
        for shard in range(2):
            writer.write_shard(shard, small_shard(shard), {"token_budget": 64})
            before = contents(path)
            command = [sys.executable, "-c", code, str(path)]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
            second = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert f"another process is building this cache; where: {path}; got: process {os.getpid()}" in second.stderr
            assert contents(path) == before
        (path / "tokenizer").mkdir()
        (path / "tokenizer" / "tokenizer.json").write_text("{}")
        writer.finish(IDENTITY, SOURCES)
    assert contents(path) == contents(folder / "whole")


def test_a_damaged_shard_of_a_killed_build_is_made_again_and_the_other_kept(folder):
    build(folder / "whole")
    path = folder / "cache"
    boundary = next(b for b in itertools.count(20) if killed_at(b, build, path) and len(whole_shards(path)) == 4)
    assert boundary > 20
    shard = path / "shard-00001.h5"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    kept = whole_shards(path)
    assert len(kept) == 2
    with pytest.raises((CacheFormatError, CacheCorruptError)):
        Cache(path)
    build(path)
    assert contents(path) == contents(folder / "whole")
    assert whole_shards(path).items() >= kept.items()
