"""Rows for the cache's tests, from dense logits that an exact float64 reference can be made of."""

import numpy as np

from shared.cache.format import Samples, ShardArrays
from shared.cache.writer import CacheWriter

GRID = (0.5, 1.0, 1.5, 2.0)
IDENTITY = {
    "teacher": {"name": "random", "weights_digest": "aa", "config_digest": "bb"},
    "tokenizer": {"digest": "cc"},
    "labels": {"top_k": 4},
}


SOURCES = [{"name": "s", "split": "train", "revision": None, "license": None, "digest": "dd", "num_documents": 6}]


def build_options(**changes):
    options = {"codec": "f16", "temperatures": list(GRID), "top_k": 4, "head_width": 64, "tokenizer_size": 64}
    return options | {"num_shards": 2} | changes


def build(path, **changes):
    """A finished cache of two small shards, with a tokenizer's file; run again it resumes."""
    with CacheWriter(path, build_options(**changes)) as writer:
        if writer.finished:
            return
        for shard in range(2):
            if not writer.has_shard(shard):
                writer.write_shard(shard, small_shard(shard), {"token_budget": 64})
        (path / "tokenizer").mkdir(exist_ok=True)
        (path / "tokenizer" / "tokenizer.json").write_text("{}")
        writer.finish(IDENTITY, SOURCES)


def shard_of_logits(logits_SV, lengths, ks, tokens, grid=GRID, loss_mask=None):
    """A shard from dense float32 logits, −inf among them; `ks`: entries per row, where so many are finite."""
    S, V = logits_SV.shape
    z = logits_SV.astype(np.float64)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    last = np.zeros(S, bool)
    last[ends[1:] - 1] = True
    k = np.where(last, 0, np.minimum(ks, np.isfinite(z).sum(1))).astype(np.int64)
    order = np.argsort(-z, axis=1, kind="stable")
    kept = np.arange(V) < k[:, None]
    descending = np.take_along_axis(z, order, 1)
    margins = descending[:, :1] - descending
    tail = np.full((S, len(grid)), -np.inf)
    nearest = np.where(kept, np.inf, margins).min(1, keepdims=True)
    some = np.flatnonzero(np.isfinite(nearest))
    for column, T in enumerate(grid):
        distance = np.minimum(nearest[some] - margins[some], 0)
        weights = np.where(kept[some], 0.0, np.exp(distance / T))
        tail[some, column] = np.log(weights.sum(1)) - nearest[some, 0] / T
    gold = np.append(tokens[1:], 0)
    logp = -margins - np.log(np.exp(-margins).sum(1, keepdims=True))
    probabilities = np.exp(logp)
    entropy = -(probabilities * np.where(probabilities > 0, logp, 0)).sum(1)  # 0 log 0 = 0
    rank = np.argmax(order == gold[:, None], axis=1)
    if loss_mask is None:
        loss_mask = ~last
    return ShardArrays(
        tokens=tokens.astype(np.int64),
        loss_mask=np.asarray(loss_mask).astype(np.uint8),
        doc_indptr=ends.astype(np.int64),
        doc_meta=[
            {"id": f"doc/{i}", "source": "s", "origin": "corpus", "target_bytes": 7} for i in range(len(lengths))
        ],
        k=k,
        topk_ids=order[kept],
        topk_margins=margins[kept].astype(np.float32),
        tail_log=tail,
        gold_logprob=np.where(last, np.nan, logp[np.arange(S), rank]).astype(np.float32),
        gold_in_topk=(rank < k) & ~last,
        entropy_nats=entropy.astype(np.float32),
    )


def small_shard(seed, V=64, k=4, lengths=(5, 1, 7)):
    rng = np.random.default_rng(seed)
    S = sum(lengths)
    logits = rng.normal(0, 3, (S, V)).astype(np.float32)
    return shard_of_logits(logits, lengths, np.full(S, k), rng.integers(0, V, S))


def samples_of_logits(logits_SV, arrays, *, temperature, num, drawn_from="full", seed=0):
    """`num` draws per row from softmax(z / temperature), or from the part of it that is outside the row."""
    rng = np.random.default_rng(seed)
    starts = arrays.row_indptr()
    k, ids, counts, margins = np.zeros(len(arrays.k), np.int64), [], [], []
    for row in np.flatnonzero(arrays.k):
        z = logits_SV[row].astype(np.float64)
        weights = np.exp((z - z.max()) / temperature)
        if drawn_from == "tail":
            weights[arrays.topk_ids[starts[row] : starts[row + 1]]] = 0
        if weights.sum() == 0:
            continue
        drawn, times = np.unique(rng.choice(len(z), num, p=weights / weights.sum()), return_counts=True)
        k[row] = len(drawn)
        ids.append(drawn)
        counts.append(times)
        margins.append((z.max() - z[drawn]).astype(np.float32))
    return Samples(
        k=k,
        ids=np.concatenate(ids),
        counts=np.concatenate(counts),
        margins=np.concatenate(margins),
        temperature=temperature,
        drawn_from=drawn_from,
        num=num,
    )


def random_shard(rng, *, lengths, k, vocabulary):
    """A large shard without dense logits: margins, ids and tails distributed about as a code model's are."""
    S, ends = sum(lengths), np.cumsum([0, *lengths])
    last = np.zeros(S, bool)
    last[ends[1:] - 1] = True
    sharpness = rng.gamma(1.5, 2.0, (S, 1)) + 0.3
    steps = rng.exponential(1.0, (S, k)) / (np.arange(k) + 1) ** 0.9 * np.where(np.arange(k) == 1, sharpness, 1.5)
    margins = np.cumsum(np.where(np.arange(k) == 0, 0.0, steps), axis=1).astype(np.float32)
    popular = np.argsort(rng.permutation(vocabulary))
    ids = popular[np.minimum(rng.pareto(0.55, (S, 3 * k)) * 20, vocabulary - 1).astype(np.int64)]
    ids = np.sort(ids, axis=1)
    keep = np.diff(ids, axis=1, prepend=-1) > 0
    short = keep.sum(1) < k
    ids[short] = np.arange(3 * k)
    keep[short] = True
    chosen = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    ids = rng.permuted(np.take_along_axis(ids, chosen, 1), axis=1)
    ks = np.where(last, 0, k)
    grid = np.array(GRID)
    tail = -margins[:, -1:] / grid + np.log(vocabulary) * rng.uniform(0.2, 0.6, (S, 1))
    log_total = np.logaddexp(np.log(np.exp(-margins.astype(np.float64)).sum(1)), tail[:, 1])
    pick = np.minimum(rng.geometric(0.6, S) - 1, k - 1)
    tokens = np.zeros(S, np.int64)
    tokens[1:] = ids[np.arange(S), pick][:-1]
    tail[last] = -np.inf
    return ShardArrays(
        tokens=tokens,
        loss_mask=(~last).astype(np.uint8),
        doc_indptr=ends,
        doc_meta=[
            {"id": f"doc/{i}", "source": "s", "origin": "corpus", "digest": f"{i:064x}"} for i in range(len(lengths))
        ],
        k=ks,
        topk_ids=ids[~last].ravel(),
        topk_margins=margins[~last].ravel(),
        tail_log=tail,
        gold_logprob=np.where(last, np.nan, -margins[np.arange(S), pick] - log_total).astype(np.float32),
        gold_in_topk=~last,
        entropy_nats=np.where(last, 0, 1.0).astype(np.float32),
    )
