"""Damage to a cache, anywhere and of any kind: verify finds it, and a reader never returns a wrong value."""

import numpy as np
import pytest

from shared.cache.attach import add_files
from shared.cache.verify import verify_cache
from tests.support.cache_faults import contents, fast_folder, random_damage, read_all, unnoticed
from tests.support.cache_rows import build


@pytest.fixture(scope="module")
def cache():
    with fast_folder() as folder:
        path = folder / "cache"
        build(path, codec="q")
        add_files(path, {"teacher_eval/fidelity.json": b"{}\n"})
        yield path


def test_every_byte_of_the_small_files(cache):
    """One bit of each, another one from byte to byte."""
    small = ("manifest.json", "doc_lengths.u32", "build.json", "tokenizer/tokenizer.json", "teacher_eval/fidelity.json")
    for name in small:
        data = (cache / name).read_bytes()
        for at in range(len(data)):
            changed = bytearray(data)
            changed[at] ^= 1 << at % 8
            (cache / name).write_bytes(changed)
            assert verify_cache(cache), (name, at)
        (cache / name).write_bytes(data)
    assert verify_cache(cache) == []


def test_random_damage(cache):
    expected, before = read_all(cache), contents(cache)
    rng = np.random.default_rng(0)
    for number in range(150):
        what, undo = random_damage(cache, rng)
        problem = unnoticed(cache, expected, verify_cache)
        undo()
        assert problem is None, (number, what, problem)
        assert contents(cache) == before, what
    assert verify_cache(cache) == []
