"""What sharing costs: push and pull against the client library's own copying, and the wait for data from a slow server.

python tests/bench/bench_remote.py [MEGABYTES]
"""

import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from shared.cache.reader import Cache
from shared.cache.writer import CacheWriter
from tests.support.cache_rows import IDENTITY, build_options, random_shard
from tests.support.file_server import FileServer
from tests.support.loopback_hub import OWNER, TOKEN, Hub

MEGABYTES = int(sys.argv[1]) if len(sys.argv) > 1 else 200
ROUNDS = 3


def make(folder):
    """A cache of shards of about 4.3 MB, with random rows, which do not compress; they differ by their documents."""
    from tests.support.student_cache import SOURCE, save_tokenizer  # the Hub's client reads its address when imported

    path, num_shards, vocabulary, k, lengths = folder / "cache", round(MEGABYTES / 4.28), 257, 50, [400] * 100
    rows = random_shard(np.random.default_rng(0), lengths=lengths, k=k, vocabulary=vocabulary)
    options = build_options(top_k=k, head_width=vocabulary, tokenizer_size=vocabulary, num_shards=num_shards)
    writer = CacheWriter(path, options)
    save_tokenizer(path / "tokenizer")
    for number in range(num_shards):
        documents = [meta | {"id": f"doc/{number}/{i}"} for i, meta in enumerate(rows.doc_meta)]
        writer.write_shard(number, dataclasses.replace(rows, doc_meta=documents), {})
    writer.finish(IDENTITY, [SOURCE | {"num_documents": len(lengths) * num_shards}])
    return Cache(path)


def timed(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def ratio(name, ours, theirs, num_bytes):
    """The least times of alternating rounds."""
    times = np.array([[timed(ours), timed(theirs)] for _ in range(ROUNDS)]).min(0)
    print(
        f"{name}: ours {times[0]:.2f} s, client {times[1]:.2f} s, ratio {times[0] / times[1]:.2f}, {num_bytes:,} bytes"
    )


def main():
    with tempfile.TemporaryDirectory() as scratch, Hub() as hub:
        folder = Path(scratch)
        os.environ |= hub.environment(folder / "home", HF_TOKEN=TOKEN)
        os.environ["CODEDISTILL_LOCAL_CACHE"] = str(folder / "local")
        from huggingface_hub import HfApi, snapshot_download

        from shared.cache.pull import pull_cache
        from shared.cache.push import push_cache

        cache = make(folder)
        num_bytes = sum(entry.bytes for entry in cache.manifest.files.values())
        counter = iter(range(1000))

        def ours_push():
            hub.lfs_objects.clear()
            push_cache(cache.path, f"hf://datasets/{OWNER}/ours{next(counter)}")

        def plain_push():
            hub.lfs_objects.clear()
            name = f"{OWNER}/plain{next(counter)}"
            HfApi().create_repo(name, repo_type="dataset")
            HfApi().upload_folder(repo_id=name, folder_path=cache.path, repo_type="dataset")

        ratio("push to the Hub", ours_push, plain_push, num_bytes)
        push_cache(cache.path, f"hf://datasets/{OWNER}/pull")
        ratio(
            "pull from the Hub",
            lambda: pull_cache(f"hf://datasets/{OWNER}/pull", folder / f"ours{next(counter)}"),
            lambda: snapshot_download(f"{OWNER}/pull", repo_type="dataset", local_dir=folder / f"plain{next(counter)}"),
            num_bytes,
        )
        with FileServer(cache.path, delay_seconds=0.02, bytes_per_second=50e6) as server:
            start = time.perf_counter()
            opened = Cache(server.url)
            opened.tokens(0)
            print(f"first document after {time.perf_counter() - start:.2f} s, requests: {server.requests[:3]}")
        wait_for_data(cache, folder)


def wait_for_data(cache, folder, steps=400, step_seconds=0.05, rows=512):
    """The share of the time that a step of 50 ms waits for its block, from disk and from a slow server."""
    from stage2_student.dataset import PackedBlocks

    os.environ["CODEDISTILL_LOCAL_CACHE"] = str(folder / "waits")
    with FileServer(cache.path, delay_seconds=0.02, bytes_per_second=50e6) as server:
        for place in (cache.path, server.url):
            blocks = PackedBlocks([Cache(place)], block_size=rows, seed=0, temperature=1.0)
            waits = []
            for index in range(min(steps, len(blocks))):
                start = time.perf_counter()
                blocks[index]
                waits.append(time.perf_counter() - start)
                time.sleep(step_seconds)
            lanes, total = blocks.order.num_lanes, len(waits)
            late = sum(waits[lanes:]) / (step_seconds * (total - lanes))
            name = "disk" if place == cache.path else "50 MB/s, 20 ms a request"
            print(
                f"{name}: waits {sum(waits):.2f} s in {total} steps, {lanes} lanes; after the first {lanes}: {late:.2%}"
            )


if __name__ == "__main__":
    main()
