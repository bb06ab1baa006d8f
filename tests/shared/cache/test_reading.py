"""A cache read by document, by other processes, and where its arrays do not fit together."""

import io
import multiprocessing
import pickle
import resource
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest

from shared.cache.encode import encode_shard
from shared.cache.reader import Cache, ShardMemory
from shared.cache.shard import decode_shard
from shared.cache.writer import CacheWriter
from shared.errors import CacheCorruptError
from tests.support.cache_rows import GRID, IDENTITY, SOURCES, build_options, shard_of_logits, small_shard

NUM_SHARDS = 7
OPTIONS = {"codec": "q", "temperatures": GRID, "top_k": 4, "head_width": 64, "tokenizer_size": 64}


def ragged_shard(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (13, 64)).astype(np.float32)
    return shard_of_logits(logits, (5, 1, 7), rng.integers(1, 5, 13), rng.integers(0, 64, 13))


@pytest.fixture(scope="module", params=["q", "f16"])
def path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("reading") / request.param
    with CacheWriter(path, build_options(codec=request.param, num_shards=NUM_SHARDS)) as writer:
        for shard in range(NUM_SHARDS):
            writer.write_shard(shard, ragged_shard(shard) if shard % 2 else small_shard(shard), {})
        writer.finish(IDENTITY, SOURCES)
    return path


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- processes, threads, descriptors ---------------------------------------------------------------------------------


def read_everything(cache, barrier=None):
    if barrier is not None:
        barrier.wait(60)
    found = []
    for doc in np.random.default_rng(1).permutation(cache.num_documents).tolist():
        targets = cache.targets(doc, 1.5)
        arrays = [cache.tokens(doc), cache.loss_mask(doc), targets.k, targets.ids, targets.logp, targets.log_tail]
        found.append((doc, arrays))
    return found


def read_and_send(cache, barrier, queue):
    queue.put(pickle.dumps(read_everything(cache, barrier)))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_read_the_same_documents_at_once(path, method):
    """The parent has shards decoded, checked and indexed when it hands its reader over, and goes on using it."""
    cache = Cache(path, memory=ShardMemory(1))
    expected = read_everything(cache)
    context = multiprocessing.get_context(method)
    barrier, queue = context.Barrier(3), context.Queue()
    processes = [context.Process(target=read_and_send, args=(cache, barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [read_everything(cache, barrier), *(pickle.loads(queue.get(timeout=60)) for _ in processes)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for result in results:
        for (doc, arrays), (expected_doc, expected_arrays) in zip(result, expected, strict=True):
            assert doc == expected_doc
            assert_equal(arrays, expected_arrays)


def test_threads_read_with_a_reader_each(path):
    expected, found = read_everything(Cache(path)), {}

    def read(number):
        found[number] = read_everything(Cache(path, memory=ShardMemory(1)))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for result in found.values():
        for (doc, arrays), (expected_doc, expected_arrays) in zip(result, expected, strict=True):
            assert doc == expected_doc
            assert_equal(arrays, expected_arrays)


def test_more_shards_than_descriptors(path):
    """Nothing stays open: three free descriptors do for seven shards, and none is left afterwards."""
    open_now = Path("/proc/self/fd")
    before = sorted(int(entry.name) for entry in open_now.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[-1] + 4, hard))
        cache = Cache(path)
        assert len(read_everything(cache)) == 3 * NUM_SHARDS
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sorted(int(entry.name) for entry in open_now.iterdir()) == before


# --- shards whose arrays do not fit together -------------------------------------------------------------------------


def replaced(name, change):
    """An image of a good shard in which one data set is another."""
    buffer = io.BytesIO(encode_shard(small_shard(0), **OPTIONS)[0])
    with h5py.File(buffer, "r+") as file:
        values = change(file[name][()])
        del file[name]
        file[name] = values
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("topk_ranks", lambda a: a[:-1]),
        ("topk_ranks", lambda a: a + np.uint16(len(a))),
        ("topk_codes", lambda a: np.append(a, a[:4])),
        ("topk_codes", lambda a: a + np.uint8(99)),
        ("codebook", lambda a: a[:1]),
        ("id_table", lambda a: a[:0]),
        ("k", lambda a: a[:-2]),
        ("k", lambda a: a[None]),
        ("tail", lambda a: a[:-1]),
        ("tail", lambda a: a[:, :-1]),
        ("tokens", lambda a: a[:-1]),
        ("loss_mask", lambda a: a[:-1]),
        ("doc_indptr", lambda a: a[:-1]),
        ("doc_indptr", lambda a: a[::-1].copy()),
        ("doc_meta_indptr", lambda a: a[:-1]),
        ("esc_pos", lambda a: np.array([10**6])),
        ("esc_pos", lambda a: np.array([1, 2])),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(name, change):
    with pytest.raises(CacheCorruptError, match=r"arrays do not fit together; where: some\.h5"):
        decode_shard(replaced(name, change), "some.h5")
