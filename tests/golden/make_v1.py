"""Write the golden caches of format version 1 and what they hold: python tests/golden/make_v1.py

Run once. Every later version must read these very bytes: where the format gains something, add caches beside them.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1]))

from shared.cache.reader import Cache  # noqa: E402
from shared.cache.rows import truncate  # noqa: E402
from shared.cache.writer import CacheWriter  # noqa: E402
from tests.support.cache_rows import GRID, samples_of_logits, shard_of_logits  # noqa: E402

V, TOP_K = 96, 12
IDENTITY = {
    "teacher": {"name": "golden", "weights_digest": "a" * 64, "config_digest": "b" * 64},
    "tokenizer": {"digest": "c" * 64},
    "labels": {"temperatures": list(GRID), "top_k": TOP_K, "dtype": "float32", "head": "float32"},
}
SOURCE = {"name": "golden", "split": "train", "revision": None, "license": "Apache-2.0", "digest": "d" * 64}


def shard(seed):
    """Documents of 4, 1 and 5 tokens: flat rows, sharp rows, rows cut by top-p, a gap beyond every escape, samples."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (10, V)).astype(np.float32)
    logits[0] = 0
    logits[1, rng.integers(V)] = 2_000
    logits[6, 6:] = -90
    tokens = rng.integers(0, V, 10)
    ks = truncate(shard_of_logits(logits, (4, 1, 5), np.full(10, TOP_K), tokens), GRID, top_p=0.8).k
    ks[6] = TOP_K
    arrays = shard_of_logits(logits, (4, 1, 5), ks, tokens)
    return dataclasses.replace(arrays, samples=samples_of_logits(logits, arrays, temperature=1.0, num=8, seed=seed))


def write(path, codec, filter):
    build = {"codec": codec, "filter": filter, "temperatures": list(GRID), "top_k": TOP_K}
    with CacheWriter(path, build | {"head_width": V + 4, "tokenizer_size": V, "num_shards": 1}) as writer:
        (path / "tokenizer").mkdir(exist_ok=True)
        (path / "tokenizer/tokenizer.json").write_text("{}\n")
        writer.write_shard(0, shard(1), {"token_budget": 64})
        identity = IDENTITY | {"labels": IDENTITY["labels"] | {"codec": codec}}
        writer.finish(identity, [SOURCE | {"num_documents": 3}])


def contents(path):
    """What a cache reads to, as JSON values; float32 exactly."""
    cache = Cache(path)
    decoded = cache.load_shard(0)
    documents = []
    for number in range(cache.num_documents):
        samples, k = cache.samples(number), cache.targets(number, 1.0).k
        inside, drawn = np.arange(cache.width) < k[:, None], np.arange(samples.num) < samples.k[:, None]
        at = {}
        for T in cache.temperatures:
            targets = cache.targets(number, T)
            at[f"{T:g}"] = {
                "probabilities": np.exp(targets.logp[inside].astype(np.float64)).tolist(),
                "tails": np.exp(targets.log_tail.astype(np.float64)).tolist(),
            }
        documents.append(
            {
                "meta": cache.meta(number),
                "tokens": cache.tokens(number).tolist(),
                "loss_mask": cache.loss_mask(number).tolist(),
                "k": k.tolist(),
                "ids": cache.targets(number, 1.0).ids[inside].tolist(),
                "targets": at,
                "samples_k": samples.k.tolist(),
                **{f"samples_{name}": getattr(samples, name)[drawn].tolist() for name in ("ids", "counts", "margins")},
            }
        )
    return {
        "label_identity": cache.label_identity,
        "statistics": cache.statistics,
        "margins": decoded.margins.tolist(),
        "tail_codes": decoded.tail.tolist(),
        "samples": [decoded.samples.temperature, decoded.samples.drawn_from, decoded.samples.num],
        "documents": documents,
    }


if __name__ == "__main__":
    for codec, filter in (("q", "gzip"), ("q", "zstd"), ("f16", "gzip")):
        path = FOLDER / "v1" / f"{codec}-{filter}"
        write(path, codec, filter)
        path.with_suffix(".json").write_text(json.dumps(contents(path), separators=(",", ":")) + "\n")
