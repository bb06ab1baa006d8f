"""Rows cut shorter, the rows of some documents, and a decoded shard as rows that can be encoded again."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shared.cache.codec import decode_tail
from shared.cache.format import Array, Samples, ShardArrays, indptr
from shared.cache.shard import Shard
from shared.errors import ConfigError


def truncate(
    arrays: ShardArrays, temperatures: Sequence[float], *, top_k: int | None = None, top_p: float | None = None
) -> ShardArrays:
    """Keep fewer entries per row and merge the dropped ones into its tail, in float64, at every grid temperature.

    Args:
        arrays: any rows.
        temperatures: the grid that `arrays.tail_log` was summed at.
        top_k: most entries of a row.
        top_p: a row keeps its shortest prefix whose probability at T = 1, of the whole distribution, reaches this; at
            least one entry, and all of them where they do not reach it.

    Raises:
        ConfigError: a top-k below 1, a top-p outside (0, 1], or samples of a tail, which would be another one.
    """
    if top_k is not None and top_k < 1:
        raise ConfigError("top-k is out of range", expected="at least 1", got=top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError("top-p is out of range", expected="above 0, at most 1", got=top_p)
    if arrays.samples is not None and arrays.samples.drawn_from == "tail":
        raise ConfigError("rows with samples of their tail cannot be cut", fix="sample from the full distribution")
    starts = arrays.row_indptr()[:-1]
    k = arrays.k if top_k is None else np.minimum(arrays.k, top_k)
    if top_p is not None:
        k = np.minimum(k, _prefix_lengths(arrays, arrays.tail_log[:, list(temperatures).index(1.0)], top_p))
    position = np.arange(len(arrays.topk_ids)) - np.repeat(starts, arrays.k)
    kept = position < np.repeat(k, arrays.k)
    cut = np.flatnonzero(k < arrays.k)
    dropped = arrays.topk_margins[~kept].astype(np.float64)
    tail_log = arrays.tail_log.copy()
    if len(cut):
        counts = arrays.k[cut] - k[cut]
        first = np.cumsum(counts) - counts
        for column, T in enumerate(temperatures):
            weights = np.exp((np.repeat(dropped[first], counts) - dropped) / T)
            log_dropped = np.log(np.add.reduceat(weights, first)) - dropped[first] / T
            tail_log[cut, column] = np.logaddexp(tail_log[cut, column], log_dropped)
    ids = arrays.topk_ids[kept]
    return replace(
        arrays,
        k=k,
        topk_ids=ids,
        topk_margins=arrays.topk_margins[kept],
        tail_log=tail_log,
        gold_in_topk=gold_in_rows(arrays.tokens, k, ids),
    )


def select(arrays: ShardArrays, keep: Array) -> ShardArrays:
    """The rows of some documents: `keep` is bool `[D]`."""
    lengths = np.diff(arrays.doc_indptr)
    rows = np.repeat(keep, lengths)
    entries = np.repeat(rows, arrays.k)
    samples = arrays.samples
    if samples is not None:
        samples = _select_samples(samples, rows)
    return replace(
        arrays,
        tokens=arrays.tokens[rows],
        loss_mask=arrays.loss_mask[rows],
        doc_indptr=indptr(lengths[keep]),
        doc_meta=[meta for meta, kept in zip(arrays.doc_meta, keep, strict=True) if kept],
        k=arrays.k[rows],
        topk_ids=arrays.topk_ids[entries],
        topk_margins=arrays.topk_margins[entries],
        tail_log=arrays.tail_log[rows],
        gold_logprob=None if arrays.gold_logprob is None else arrays.gold_logprob[rows],
        gold_in_topk=arrays.gold_in_topk[rows],
        entropy_nats=None if arrays.entropy_nats is None else arrays.entropy_nats[rows],
        samples=samples,
    )


def _select_samples(samples: Samples, rows: Array) -> Samples:
    drawn = np.repeat(rows, samples.k)
    return replace(
        samples,
        k=samples.k[rows],
        ids=samples.ids[drawn],
        counts=samples.counts[drawn],
        margins=samples.margins[drawn],
    )


def exact(shard: Shard, temperatures: Sequence[float]) -> ShardArrays:
    """A decoded shard as rows to encode: with the same options they give the same bytes.

    What a shard does not hold is unknown: the log-probability of a next token outside its row, and the entropy.

    Args:
        shard: the decoded shard.
        temperatures: its grid.
    """
    tails = [
        decode_tail(shard.tail[:, column], shard.last_margins, T, shard.tail_scale)
        for column, T in enumerate(temperatures)
    ]
    ids = shard.ids.astype(np.int64)
    return ShardArrays(
        tokens=shard.tokens.astype(np.int64),
        loss_mask=shard.loss_mask,
        doc_indptr=shard.doc_indptr,
        doc_meta=list(shard.meta),
        k=shard.k,
        topk_ids=ids,
        topk_margins=shard.margins,
        tail_log=np.stack(tails, axis=1),
        gold_logprob=None,
        gold_in_topk=gold_in_rows(shard.tokens, shard.k, ids),
        entropy_nats=None,
        samples=shard.samples,
    )


def gold_in_rows(tokens: Array, k: Array, ids: Array) -> Array:
    """Whether each row's next token is among its entries: bool `[S]` from i64 `[S]`, `[S]` and `[E]`."""
    rows = np.repeat(np.arange(len(k)), k)
    found = np.zeros(len(k), bool)
    found[rows[ids == np.append(tokens[1:], 0)[rows]]] = True
    return found


def _prefix_lengths(arrays: ShardArrays, tail_log: Array, top_p: float) -> Array:
    """Entries of each row until their probability at T = 1 reaches `top_p`: i64 `[S]`, at least 1."""
    inside = np.arange(arrays.k.max(initial=0)) < arrays.k[:, None]
    weights_SK = np.zeros(inside.shape)
    weights_SK[inside] = np.exp(-arrays.topk_margins.astype(np.float64))
    np.cumsum(weights_SK, axis=1, out=weights_SK)
    total = weights_SK[:, -1:] + np.exp(tail_log)[:, None]
    short: Array = (weights_SK < top_p * total).sum(axis=1)
    return short + 1
