"""What training order costs in shuffling quality, on a cache whose documents lie in order by source.

1. Likeness of neighbouring blocks: each block's tokens by the first folder of their documents' ids (`numpy/...`), less
   the mean over the epoch; the mean product of block i and i + 1 over the mean square. 0 where neighbours have nothing
   in common beyond chance, 1 where they are alike. Likewise the variance of batch means, as a multiple of what
   independent draws have.
2. With --steps: the same student, trained from the same weights, only on the text, for so many steps in either order,
   with paired seeds; NLL and KL on a held-out cache, and the paired differences with Student's 95 % interval.

The orders: `cache` (documents as they lie), `pools` (ours), `full` (one pool of everything, so a full shuffle).

    OMP_NUM_THREADS=1 python tests/bench/bench_order.py CACHE [--validation CACHE --steps 200 --seeds 5]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from shared.cache.reader import Cache
from stage2_student import dataset, order

BATCH = 8


def compositions(cache: Cache, orders: str, block_size: int) -> np.ndarray:
    """Of each block of the first epoch, the share of each source among its rows: f64 [N, sources]."""
    sources = [str(cache.meta(doc)["id"]).split("/")[0] for doc in range(cache.num_documents)]
    names = {name: number for number, name in enumerate(sorted(set(sources)))}
    if orders == "cache":
        rows = np.repeat([names[source] for source in sources], np.asarray(cache.doc_lengths, np.int64) - 1)
        rows = rows[: len(rows) // block_size * block_size].reshape(-1, block_size)
        return np.stack([np.bincount(row, minlength=len(names)) for row in rows]) / block_size
    blocks = dataset.PackedBlocks([cache], block_size=block_size, seed=0, temperature=None)
    print(f"{orders}: {blocks.order.num_lanes} lanes")
    shares = np.zeros((len(blocks), len(names)))
    for block in range(len(blocks)):
        _, docs, starts, stops = blocks.order.block(block)
        counted: Counter[int] = Counter()
        for doc, start, stop in zip(docs.tolist(), starts.tolist(), stops.tolist(), strict=True):
            counted[names[sources[doc]]] += stop - start
        for source, count in counted.items():
            shares[block, source] = count / sum(counted.values())
    return shares


def likeness(shares: np.ndarray) -> tuple[float, float]:
    """The correlation of neighbouring blocks, and the variance of batch means beside that of independent draws."""
    centred = shares - shares.mean(0)
    square = (centred**2).sum(1).mean()
    batches = centred[: len(centred) // BATCH * BATCH].reshape(-1, BATCH, centred.shape[1]).mean(1)
    return float((centred[1:] * centred[:-1]).sum(1).mean() / square), float(
        (batches**2).sum(1).mean() * BATCH / square
    )


def shuffle_fully() -> None:
    """All shards form one pool; memory for all of it."""
    order.POOL_BLOCKS, dataset.SHARD_BYTES = 1 << 40, 8 << 30


def train(orders: str, shard_bytes: int, arguments: list[str]) -> None:
    """`student train` in this process, in either order."""
    from stage2_student.cli import student

    dataset.SHARD_BYTES = shard_bytes
    if orders == "full":
        shuffle_fully()
    student(["train", *arguments])


def trained(arguments: argparse.Namespace, orders: str, seed: int, out: Path) -> dict[str, float]:
    """Validation figures of one student, trained in a process of its own."""
    settings = [f"max_steps={arguments.steps}", f"seed={seed}", "num_hidden_layers=2", "hidden_size=64", "alpha=0"]
    settings += ["intermediate_size=256", "num_attention_heads=2", "num_key_value_heads=2", "learning_rate=3e-3"]
    run = out / f"{orders}-{seed}"
    options = ["--cache", arguments.cache, "--validation", arguments.validation, "--out", str(run), "--preset", "tiny"]
    options += [f"--set={setting}" for setting in settings]
    program = f"import bench_order; bench_order.train({orders!r}, {arguments.shard_bytes}, {options!r})"
    environment = os.environ | {"WANDB_MODE": "disabled", "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, env=environment)
    history = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    last = next(entry for entry in reversed(history) if "eval_ce" in entry)
    return {"NLL": last["eval_ce"], "KL": last["eval_kd"]}


def compare(arguments: argparse.Namespace) -> None:
    from stage2_student.experiments.statistics import paired_difference

    with tempfile.TemporaryDirectory() as folder:
        runs = [
            {orders: trained(arguments, orders, seed, Path(folder)) for orders in ("pools", "full")}
            for seed in range(1, arguments.seeds + 1)
        ]
    for figure in ("NLL", "KL"):
        ours, full = ([run[orders][figure] for run in runs] for orders in ("pools", "full"))
        print(
            figure, "pools", np.round(ours, 4), "full", np.round(full, 4), "difference", paired_difference(ours, full)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("--validation")
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument(
        "--shard-bytes", type=int, default=dataset.SHARD_BYTES, help="memory for shards; fewer: fewer lanes"
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    dataset.SHARD_BYTES = arguments.shard_bytes
    cache = Cache(arguments.cache)
    pools = likeness(compositions(cache, "pools", arguments.block_size))
    in_order = likeness(compositions(cache, "cache", arguments.block_size))
    shuffle_fully()
    full = likeness(compositions(cache, "full", arguments.block_size))
    print(
        f"{cache.num_documents} documents, {cache.num_tokens} tokens; neighbours' correlation, variance of batch means"
    )
    for name, (correlation, variance) in (("cache", in_order), ("pools", pools), ("full", full)):
        print(f"{name:6} {correlation:+.3f} {variance:.2f}")
    if arguments.steps:
        compare(arguments)


if __name__ == "__main__":
    main()
