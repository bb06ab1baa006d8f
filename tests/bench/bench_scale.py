"""Stage 2's reading at scale, through the path that trains: laws, speeds, and how often a shard is inflated.

1. From 10^3 to 10^7 documents of log-normal lengths (median 350, mean 900, at most 8,192 tokens), whose shards are
   a few files many times over: seconds from opening the cache to the first block, memory, time per block.
2. Documents of 180 and of 1,500 tokens through a `DataLoader`: tokens per second of processor time, beside a memmap of
   f16 margins and u16 ids (no compression, no checksum), and the limit: inflating alone.
3. Shards inflated per epoch over 1, 2 and 4 workers, and over 1, 2 and 4 ranks.
4. Encoding and writing, beside h5py's own gzip filter on float16 margins and u16 ids.

    OMP_NUM_THREADS=1 python tests/bench/bench_scale.py [--documents 10000 100000 1000000] [--repeats 3]
"""

import argparse
import dataclasses
import hashlib
import itertools
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

sys.path.insert(0, str(Path(__file__).parents[2]))
from shared.cache.deflate import inflate
from shared.cache.format import DOC_LENGTHS, ShardArrays, shard_name
from shared.cache.manifest import FileEntry, doc_lengths, read_manifest, read_record, write_manifest
from shared.cache.reader import Cache
from shared.cache.writer import CacheWriter
from stage2_student.dataset import PackedBlocks, collate
from tests.support.cache_rows import IDENTITY, random_shard

K, V, BLOCK, BATCH, GRID = 64, 49_152, 1_024, 8, (0.5, 1.0, 1.5, 2.0)
SOURCE = {"name": "s", "split": "train", "revision": None, "license": None, "digest": "dd", "num_documents": 1}
BUILD = {"codec": "q", "temperatures": list(GRID), "top_k": K, "head_width": V, "tokenizer_size": V}


def lognormal(rng: np.random.Generator, tokens: int) -> list[int]:
    """Lengths of documents, median 350, mean 900, at most 8,192, that add up to about so many tokens."""
    sigma = np.sqrt(2 * np.log(900 / 350))
    lengths = np.clip(rng.lognormal(np.log(350), sigma, tokens // 100), 2, 8_192).astype(int)
    return lengths[: max(int(np.searchsorted(np.cumsum(lengths), tokens)), 1)].tolist()


def alike(mean: int) -> Callable[[np.random.Generator, int], list[int]]:
    """Lengths around a mean."""
    return lambda rng, tokens: np.clip(rng.normal(mean, mean / 4, tokens // mean), 2, None).astype(int).tolist()


def make_shards(lengths: Callable[..., list[int]], number: int, tokens: int) -> list[ShardArrays]:
    """Made-up rows of K entries."""
    generators = (np.random.default_rng(seed) for seed in range(number))
    return [random_shard(rng, lengths=lengths(rng, tokens), k=K, vocabulary=V) for rng in generators]


def write(path: Path, shards: list[ShardArrays]) -> Path:
    with CacheWriter(path, BUILD | {"num_shards": len(shards)}) as writer:
        for number, arrays in enumerate(shards):
            writer.write_shard(number, arrays)
        writer.finish(IDENTITY, [SOURCE])
    return path


def repeat(source: Path, target: Path, num_documents: int) -> Path:
    """A cache of at least so many documents: the shards of another, over and over, by hard links."""
    manifest = read_manifest(source)
    records = [read_record(source, shard) for shard in range(manifest.num_shards)]
    used = records * -(-num_documents // manifest.num_documents)
    target.mkdir()
    os.link(source / "build.json", target / "build.json")
    files = {"build.json": manifest.files["build.json"]}
    for number in range(len(used)):
        for end in ("h5", "json"):
            new, old = f"{shard_name(number)}.{end}", f"{shard_name(number % len(records))}.{end}"
            os.link(source / old, target / new)
            files[new] = manifest.files[old]
    data = doc_lengths(used)
    (target / DOC_LENGTHS).write_bytes(data)
    files[DOC_LENGTHS] = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    counts = {f"num_{key}": sum(each.statistics[key] for each in used) for key in ("documents", "tokens", "entries")}
    per_shard = [len(each.documents) for each in used]
    write_manifest(target, dataclasses.replace(manifest, files=files, documents_per_shard=per_shard, **counts))
    return target


# --- laws ------------------------------------------------------------------------------------------------------------


def open_and_read(path: Path, num_blocks: int, queue: multiprocessing.Queue) -> None:
    """In a process of its own: seconds to the first block, peak bytes beyond the imports, seconds per further block."""
    before = _status_bytes("VmRSS")
    start = time.perf_counter()
    data = PackedBlocks([Cache(path)], block_size=BLOCK, seed=0, temperature=1.0, num_epochs=100)
    data[0]
    first = time.perf_counter() - start
    start = time.process_time()
    for index in range(num_blocks):
        data[index]
    each = (time.process_time() - start) / num_blocks
    queue.put((data.caches[0].num_documents, data.num_rows, first, _status_bytes("VmHWM") - before, each))


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def show_laws(folder: Path, numbers: list[int], shard_tokens: int) -> None:
    print(f"\nlog-normal documents, shards of {shard_tokens:,} tokens, blocks of {BLOCK}")
    print("documents     tokens   s to first block   MiB   processor ms a block (and beside the first row)")
    source = write(folder / "lognormal", make_shards(lognormal, 8, shard_tokens))
    reference = None
    for size in numbers:
        path = repeat(source, folder / f"of-{size}", size)
        context = multiprocessing.get_context("spawn")
        queue: multiprocessing.Queue = context.Queue()
        process = context.Process(target=open_and_read, args=(path, 4_096, queue))
        process.start()
        documents, rows, first, peak, each = queue.get()
        process.join()
        reference = reference or each
        sizes = f"{documents:>10,} {rows:>14,} {first:>8.2f} {peak / 2**20:>14.0f}"
        print(f"{sizes} {each * 1e3:>8.2f} ({each / reference:.2f})", flush=True)


# --- reading ---------------------------------------------------------------------------------------------------------


class Counted(PackedBlocks):
    """Blocks that carry how many shards this process has inflated so far."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        block, worker = super().__getitem__(index), get_worker_info()
        return block | {"reads": np.array([worker.id if worker else 0, self.caches[0].memory.num_reads])}


def blocks_of(path: Path) -> Counted:
    return Counted([Cache(path)], block_size=BLOCK, seed=0, temperature=1.0, multiple=BATCH)


def read(path: Path, *, workers: int = 0, rank: int = 0, ranks: int = 1) -> tuple[int, float, float]:
    """Read one rank's share of an epoch: shards inflated, processor seconds of all processes, seconds."""
    data = blocks_of(path)
    batches = [range(start, start + BATCH) for start in range(rank * BATCH, len(data), ranks * BATCH)]
    wall, processor = time.perf_counter(), _processor_seconds()
    loader = DataLoader(data, batch_sampler=batches, num_workers=workers, collate_fn=collate)
    reads = {}
    for batch in loader:
        worker, number = batch["reads"][-1].tolist()
        reads[worker] = number
    del loader
    return sum(reads.values()), _processor_seconds() - processor, time.perf_counter() - wall


def _processor_seconds() -> float:
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def inflate_alone(path: Path) -> None:
    """The limit: every chunk of every shard inflated, and nothing else."""
    for file in sorted(path.glob("shard-*.h5")):
        image = file.read_bytes()
        with h5py.File(h5py.h5f.open_file_image(image)) as handle:
            for dataset in handle.values():
                for number in range(dataset.id.get_num_chunks() if dataset.chunks else 0):
                    chunk = dataset.id.get_chunk_info(number)
                    inflate(image[chunk.byte_offset : chunk.byte_offset + chunk.size - 4])


def write_memmap(path: Path, shards: list[ShardArrays]) -> Path:
    """The naive peer: margins f16, ids u16, tail f16 and tokens u16 `[S, …]`, one file each."""
    path.mkdir()
    rows = np.concatenate([shard.k for shard in shards]) > 0
    for name, kind in (("topk_margins", np.float16), ("topk_ids", np.uint16)):
        table = np.lib.format.open_memmap(path / f"{name}.npy", "w+", kind, (len(rows), K))
        table[rows] = np.concatenate([getattr(shard, name) for shard in shards]).reshape(-1, K)
    np.save(path / "tail.npy", np.concatenate([shard.tail_log[:, 1] for shard in shards]).astype(np.float16))
    np.save(path / "tokens.npy", np.concatenate([shard.tokens for shard in shards]).astype(np.uint16))
    return path


def read_memmap(path: Path, data: PackedBlocks) -> None:
    """The same blocks in the same order, as batches of the same size."""
    names = ("topk_margins", "topk_ids", "tail", "tokens")
    tables = [np.load(path / f"{name}.npy", mmap_mode="r") for name in names]
    first = np.concatenate([[0], np.cumsum(data.caches[0].doc_lengths.astype(np.int64))])
    for start in range(0, data.num_blocks, BATCH):
        batch = [np.zeros((BATCH, BLOCK, *table.shape[1:]), table.dtype) for table in tables]
        for row in range(min(BATCH, data.num_blocks - start)):
            at = 0
            for doc, begin, end in zip(*data.order.block(start + row)[1:], strict=True):
                rows = slice(first[doc] + begin, first[doc] + end)
                for target, table in zip(batch, tables, strict=True):
                    target[row, at : at + end - begin] = table[rows]
                at += end - begin
        [torch.from_numpy(array) for array in batch]


def interleaved(ways: dict[str, Callable[[], object]], tokens: int, repeats: int) -> dict[str, np.ndarray]:
    """M tokens per second of processor time of each way, taken in turns."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = _processor_seconds()
            way()
            found[name].append(tokens / (_processor_seconds() - start) / 1e6)
    return {name: np.array(rates) for name, rates in found.items()}


def show(title: str, rates: dict[str, np.ndarray], reference: str) -> None:
    print(f"\n{title}, M tokens per second of processor time: median (lowest-highest), beside {reference}")
    for name, each in rates.items():
        ratio = np.median(each / rates[reference])
        print(f"  {name:<28} {np.median(each):6.2f} ({each.min():.2f}-{each.max():.2f})  {ratio:5.2f}", flush=True)


def show_reading(folder: Path, repeats: int) -> None:
    for mean in (180, 1_500):
        shards = make_shards(alike(mean), 4, 32_768)
        source = write(folder / f"mean-{mean}", shards)
        path = repeat(source, folder / f"mean-{mean}-repeated", 48 * sum(len(shard.doc_meta) for shard in shards) // 4)
        cache = Cache(path)
        peer = write_memmap(folder / f"memmap-{mean}", shards * (cache.num_shards // 4))
        ways = {
            "ours, in the main process": lambda path=path: read(path),
            "ours, 2 workers": lambda path=path: read(path, workers=2),
            "memmap, 2.5 times the bytes": lambda peer=peer, path=path: read_memmap(peer, blocks_of(path)),
            "limit: inflating alone": lambda path=path: inflate_alone(path),
        }
        title = (
            f"documents of {mean} tokens, {cache.num_tokens:,} tokens in {cache.num_shards} shards, batches of {BATCH}"
        )
        show(title, interleaved(ways, cache.num_tokens, repeats), "ours, in the main process")


def show_inflations(folder: Path) -> None:
    source = folder / "mean-180"
    path = repeat(source, folder / "many", 512 * read_manifest(source).num_documents // 4)
    num_shards = Cache(path).num_shards
    print(f"\nshards inflated per epoch, of {num_shards}; tokens per second, all processes together")
    for workers in (1, 2, 4):
        reads, _, seconds = read(path, workers=workers)
        print(
            f"  {workers} workers: {reads / num_shards:.2f}; {Cache(path).num_tokens / seconds / 1e6:.2f} M/s",
            flush=True,
        )
    for ranks in (1, 2, 4):
        reads = sum(read(path, rank=rank, ranks=ranks)[0] for rank in range(ranks))
        print(f"  {ranks} ranks: {reads / num_shards:.2f}", flush=True)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_hdf5(path: Path, shards: list[ShardArrays]) -> None:
    """The naive peer: f16 margins and u16 ids with h5py's shuffle and gzip 4."""
    with h5py.File(path, "w") as file:
        for number, shard in enumerate(shards):
            for name, kind in (("topk_margins", np.float16), ("topk_ids", np.uint16)):
                values = getattr(shard, name).astype(kind).reshape(-1, K)
                file.create_dataset(f"{name}-{number}", data=values, compression="gzip", shuffle=True, chunks=True)


def show_writing(folder: Path, repeats: int) -> None:
    shards = make_shards(lognormal, 2, 32_768)
    tokens, number = sum(len(shard.tokens) for shard in shards), itertools.count()
    ours = write(folder / "size", shards)
    write_hdf5(folder / "size.h5", shards)
    size = sum(file.stat().st_size for file in ours.iterdir())
    ways = {
        "ours, encoded and written": lambda: write(folder / f"w{next(number)}", shards),
        "h5py, gzip 4": lambda: write_hdf5(folder / f"w{next(number)}.h5", shards),
    }
    show(
        f"encoding and writing ({size / tokens:.1f} B/token, h5py {(folder / 'size.h5').stat().st_size / tokens:.1f})",
        interleaved(ways, tokens, repeats),
        "h5py, gzip 4",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="*", default=[10**4, 10**5, 10**6])
    parser.add_argument("--shard-tokens", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["writing", "reading", "laws"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"K = {K}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "writing" in options.only:
            show_writing(folder, options.repeats)
        if "reading" in options.only:
            show_reading(folder, options.repeats)
            show_inflations(folder)
        if "laws" in options.only:
            show_laws(folder, options.documents, options.shard_tokens)


if __name__ == "__main__":
    main()
