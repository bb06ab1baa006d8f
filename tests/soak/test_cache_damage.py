"""A long campaign of random damage to caches: none goes unnoticed, none gives a traceback or a wrong value."""

import subprocess

import numpy as np
import pytest

from shared.cache.attach import add_files
from shared.cache.verify import verify_cache
from shared.cache.writer import CacheWriter
from tests.support.cache_faults import CLI, contents, fast_folder, random_damage, read_all, unnoticed
from tests.support.cache_rows import IDENTITY, SOURCES, build_options, random_shard, small_shard

NUM_DAMAGED, NUM_COMMANDS = 2_000, 60


def larger_shard(seed):
    """Several pages of codes and ids, so that most damage is to them."""
    return random_shard(np.random.default_rng(seed), lengths=[60] * 4, k=4, vocabulary=64)


@pytest.fixture(params=[("q", "gzip", small_shard), ("f16", "gzip", small_shard), ("q", "zstd", larger_shard)])
def cache(request):
    codec, compression, make = request.param
    with fast_folder() as folder:
        path = folder / "cache"
        with CacheWriter(path, build_options(codec=codec, filter=compression, num_shards=3)) as writer:
            for shard in range(3):
                writer.write_shard(shard, make(shard), {})
            (path / "tokenizer").mkdir()
            (path / "tokenizer" / "tokenizer.json").write_text('{"a": 1}')
            writer.finish(IDENTITY, SOURCES)
        add_files(path, {"teacher_eval/fidelity.json": b"{}\n"})
        yield path


def test_random_damage(cache):
    expected, before = read_all(cache), contents(cache)
    rng = np.random.default_rng(1)
    for number in range(NUM_DAMAGED):
        what, undo = random_damage(cache, rng)
        problem = unnoticed(cache, expected, verify_cache)
        undo()
        assert problem is None, (number, what, problem)
    assert contents(cache) == before


def test_random_damage_through_the_command_line(cache):
    rng = np.random.default_rng(2)
    for number in range(NUM_COMMANDS // 3):
        what, undo = random_damage(cache, rng)
        for command in ("verify", "info"):
            result = subprocess.run([*CLI, "cache", command, str(cache)], capture_output=True, text=True, timeout=120)
            assert "Traceback" not in result.stderr, (number, what, result.stderr)
            assert result.returncode in (0, 1), (number, what, result.returncode)
            assert command == "info" or result.returncode == 1, (number, what)
        undo()
    assert verify_cache(cache) == []
