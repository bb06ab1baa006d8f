"""Read and write speed of the cache beside plain chunked HDF5 and np.memmap with the same decoded output; memory.

All read documents in the same windowed-shuffled order on one core and give ids i64, log-probabilities f32 and the
tail's of the K+1 partition at T = 1. The peers hold f16 margins and u16 ids without compression or checksum; ours
checks SHA-256 (each pass opens the cache anew) and fletcher32. Files are in the page cache.

    OMP_NUM_THREADS=1 python tests/bench/bench_cache_io.py [--cache DIR]

DIR is a cache of K ≥ 50 with a vocabulary of at most 65,536, of which the rows are taken; made-up rows without it.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from shared.cache.format import ShardArrays
from shared.cache.manifest import read_manifest, write_manifest
from shared.cache.reader import Cache
from shared.cache.rows import exact, truncate
from shared.cache.writer import CacheWriter
from stage2_student.order import shuffled_pools
from tests.support.cache_rows import IDENTITY, random_shard

K, GRID = 50, (0.5, 1.0, 1.5, 2.0)
OURS = (("q", "gzip"), ("q", "zstd"), ("f16", "gzip"))
LIMITS = {"q/gzip": 1_000_000, "q/zstd": 1_800_000}
SOURCE = {"name": "s", "split": "train", "revision": None, "license": None, "digest": "dd", "num_documents": 1}


def load_rows(path: str | None) -> tuple[list[ShardArrays], int]:
    """Shards of K entries per row, and the vocabulary's size."""
    if path is None:
        made = [
            random_shard(np.random.default_rng(i), documents=160, length=200, k=K, vocabulary=49_152) for i in range(3)
        ]
        return made, 49_152
    cache = Cache(path)
    shards = [exact(cache.load_shard(shard), cache.temperatures) for shard in range(cache.num_shards)]
    return [truncate(shard, cache.temperatures, top_k=K) for shard in shards], cache.tokenizer_size


def write_ours(path: Path, shards: list[ShardArrays], vocabulary: int, codec: str, compression: str) -> None:
    build = {"codec": codec, "filter": compression, "temperatures": list(GRID), "top_k": K}
    with CacheWriter(path, build | {"head_width": vocabulary, "tokenizer_size": vocabulary}) as writer:
        for number, arrays in enumerate(shards):
            writer.write_shard(number, arrays, {})
        writer.finish(IDENTITY, [SOURCE])


def read_ours(path: Path, order: list[int]) -> Iterator[tuple]:
    for _, rows in Cache(path).stream(1.0, seed=0, epoch=0):
        yield rows.targets.ids, rows.targets.logp, rows.targets.log_tail


def flat(shards: list[ShardArrays]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Margins f16 and ids u16 [S, K], tails f16 [S]; a document's last row is all zeros."""
    rows = np.concatenate([shard.k for shard in shards]) > 0
    margins, ids = np.zeros((len(rows), K), np.float16), np.zeros((len(rows), K), np.uint16)
    margins[rows] = np.concatenate([shard.topk_margins for shard in shards]).reshape(-1, K)
    ids[rows] = np.concatenate([shard.topk_ids for shard in shards]).reshape(-1, K)
    tail = np.concatenate([shard.tail_log[:, GRID.index(1.0)] for shard in shards]).astype(np.float16)
    return margins, ids, tail


def write_hdf5(path: Path, arrays: tuple[np.ndarray, ...]) -> None:
    with h5py.File(path, "w") as file:
        for name, array in zip(("margins", "ids", "tail"), arrays, strict=True):
            file.create_dataset(name, data=array, chunks=(256, *array.shape[1:]))
    _sync(path)


def read_hdf5(path: Path, borders: np.ndarray, order: list[int]) -> Iterator[tuple]:
    with h5py.File(path, "r") as file:
        margins, ids, tail = file["margins"], file["ids"], file["tail"]
        for doc in order:
            rows = slice(borders[doc], borders[doc + 1])
            yield partition(margins[rows], ids[rows], tail[rows])


def write_memmap(path: Path, arrays: tuple[np.ndarray, ...]) -> None:
    path.mkdir(exist_ok=True)
    for number, array in enumerate(arrays):
        np.save(path / f"{number}.npy", array)
        _sync(path / f"{number}.npy")


def read_memmap(path: Path, borders: np.ndarray, order: list[int]) -> Iterator[tuple]:
    margins, ids, tail = (np.load(path / f"{number}.npy", mmap_mode="r") for number in range(3))
    for doc in order:
        rows = slice(borders[doc], borders[doc + 1])
        yield partition(margins[rows], ids[rows], tail[rows])


def partition(margins: np.ndarray, ids: np.ndarray, tail: np.ndarray) -> tuple:
    logp, tail = -margins.astype(np.float32), tail.astype(np.float32)
    total = np.log(np.exp(logp).sum(axis=1) + np.exp(tail))
    return ids.astype(np.int64), logp - total[:, None], tail - total


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def measure(ways: dict[str, Callable[[], object]], num_tokens: int, repeats: int) -> dict[str, tuple]:
    """Tokens per second and per second of processor time of each way, taken in turns."""
    found: dict[str, list] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            wall, processor = time.perf_counter(), time.process_time()
            way()
            found[name].append(
                (num_tokens / (time.perf_counter() - wall), num_tokens / (time.process_time() - processor))
            )
    return {name: tuple(np.array(rates).T) for name, rates in found.items()}


def show(title: str, rates: dict[str, tuple], peer: str, limits: dict[str, int]) -> None:
    print(f"\n{title}, M tokens/s: median (lowest-highest) | per second of processor time | of {peer} | limit")
    reference = np.median(rates[peer][1])
    for name, (wall, processor) in rates.items():
        figures = [f"{np.median(r) / 1e6:5.2f} ({r.min() / 1e6:.2f}-{r.max() / 1e6:.2f})" for r in (wall, processor)]
        limit = f"{limits[name] / 1e6:.1f}" if name in limits else ""
        print(f"  {name:<10} {figures[0]:<20} {figures[1]:<20} {np.median(processor) / reference:5.2f}   {limit}")


def repeat_shards(path: Path, target: Path, times: int) -> None:
    """A cache with every shard of another one so many times, by hard links."""
    manifest = read_manifest(path)
    target.mkdir()
    files, number = {}, 0
    for _ in range(times):
        for shard in range(manifest["num_shards"]):
            for kind in ("h5", "json"):
                new, old = f"shard-{number:05d}.{kind}", f"shard-{shard:05d}.{kind}"
                os.link(path / old, target / new)
                files[new] = manifest["files"][old]
            number += 1
    counts = {key: manifest[key] * times for key in ("num_shards", "num_documents", "num_tokens", "num_entries")}
    write_manifest(target, manifest | counts | {"files": files})


def peak_bytes(path: Path, queue: multiprocessing.Queue) -> None:
    """Read a whole cache as a stream; the peak of this process's memory, beyond what it had before."""
    before = _status_bytes("VmRSS")
    tokens = sum(len(rows.tokens) for _, rows in Cache(path).stream(1.0, seed=0, epoch=0))
    queue.put((tokens, _status_bytes("VmHWM") - before))


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def show_memory(path: Path, folder: Path, num_tokens: int) -> None:
    print("\nmemory of a reader's process beyond its start, whole stream, decoded_bytes 256 MiB")
    for millions in (0.07, 0.7, 3.5, 7):
        target = folder / f"repeated-{millions}"
        repeat_shards(path, target, max(1, round(millions * 1e6 / num_tokens)))
        context = multiprocessing.get_context("spawn")
        queue: multiprocessing.Queue = context.Queue()
        process = context.Process(target=peak_bytes, args=(target, queue))
        process.start()
        tokens, peak = queue.get()
        process.join()
        print(f"  {tokens:>10,} tokens: {peak / 2**20:6.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="artifacts/demo/cache-train")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    shards, vocabulary = load_rows(options.cache)
    num_tokens = sum(len(shard.tokens) for shard in shards)
    borders = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(shard.doc_indptr) for shard in shards]))])
    pools = shuffled_pools(len(borders) - 1, np.random.default_rng((0, 0)))
    order = [int(doc) for pool in pools for doc in pool]
    peer_rows = flat(shards)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        number = iter(range(10_000))
        writes = {
            f"{codec}/{filter_}": lambda c=codec, f=filter_: write_ours(
                folder / f"w{next(number)}", shards, vocabulary, c, f
            )
            for codec, filter_ in OURS
        }
        writes["HDF5"] = lambda: write_hdf5(folder / "peer.h5", peer_rows)
        writes["memmap"] = lambda: write_memmap(folder / "memmap", peer_rows)
        written = measure(writes, num_tokens, 3)
        for codec, filter_ in OURS:
            write_ours(folder / f"{codec}-{filter_}", shards, vocabulary, codec, filter_)
            size = sum(file.stat().st_size for file in (folder / f"{codec}-{filter_}").iterdir())
            print(f"{codec}/{filter_}: {size / num_tokens:.1f} B/token")
        print(f"HDF5, memmap: {sum(array.nbytes for array in peer_rows) / num_tokens:.1f} B/token")
        reads = {
            f"{codec}/{filter_}": lambda p=folder / f"{codec}-{filter_}": sum(len(r[0]) for r in read_ours(p, order))
            for codec, filter_ in OURS
        }
        reads["HDF5"] = lambda: sum(len(r[0]) for r in read_hdf5(folder / "peer.h5", borders, order))
        reads["memmap"] = lambda: sum(len(r[0]) for r in read_memmap(folder / "memmap", borders, order))
        for ours, theirs in zip(
            read_ours(folder / "f16-gzip", order), read_memmap(folder / "memmap", borders, order), strict=True
        ):
            assert np.array_equal(ours[0], theirs[0])
            np.testing.assert_allclose(ours[1][:-1], theirs[1][:-1], atol=0.04)
        print(f"{num_tokens:,} tokens, K = {K}, {len(shards)} shards, load {os.getloadavg()[0]:.1f}")
        show("reading", measure(reads, num_tokens, options.repeats), "HDF5", LIMITS)
        show("writing", written, "HDF5", {})
        show_memory(folder / "q-gzip", folder, num_tokens)


if __name__ == "__main__":
    main()
