"""One document's rows from plain lists of log-probabilities, for labels that come from elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shared.cache.format import Array, ShardArrays, indptr
from shared.cache.rows import gold_in_rows
from shared.errors import CacheFormatError
from shared.files import sha256_json

MASS_TOLERANCE = 1e-3


def document_rows(
    tokens: Sequence[int] | Array,
    ids: Sequence[Sequence[int] | Array],
    logprobs: Sequence[Sequence[float] | Array],
    *,
    tokenizer_size: int,
    loss_mask: Sequence[int] | Array | None = None,
    gold_logprobs: Sequence[float] | Array | None = None,
    meta: Mapping[str, Any],
) -> ShardArrays:
    """Make a document's rows at T = 1 from the teacher's largest log-probabilities.

    A row's tail is 1 − Σ exp(lp), summed in float64 from the values given; at most what the other ids can hold, each no
    more likely than the row's last. Rows whose sum is above 1 by no more than 1e-3 are divided by it.

    Args:
        tokens: `[n]`, n ≥ 1.
        ids: for each of the first n − 1 tokens the ids of the next token's most likely values, in any order.
        logprobs: their natural log-probabilities over the whole vocabulary at T = 1; −inf entries are left out.
        tokenizer_size: the vocabulary.
        loss_mask: `[n]`, 1 where the next token is a training target; all but the last by default.
        gold_logprobs: `[n − 1]`, log-probabilities of the next tokens, NaN where unknown; those in a row are known.
        meta: the document's JSON object, with `id`; `digest` is made from tokens and mask where it is missing.

    Raises:
        CacheFormatError: names document and position.
    """
    name = f"document {meta.get('id')!r}"
    tokens, mask, flat, flat_ids, rows = _flatten(name, tokens, ids, logprobs, loss_mask)
    S = len(tokens)
    order = np.lexsort((flat_ids, -flat, rows))
    flat, flat_ids = flat[order], flat_ids[order]
    k = np.bincount(rows, minlength=S)
    _refuse(name, k[:-1] == 0, "a row without entries", "at least one finite logprob")
    starts = indptr(k)[: S - 1]
    tail_log = np.full((S, 1), -np.inf)
    tail_log[:-1, 0], shift = _tails(name, flat, k[:-1], tokenizer_size)
    margins = (flat[np.repeat(starts, k[:-1])] - flat).astype(np.float32)
    return ShardArrays(
        tokens=tokens,
        loss_mask=(mask & (np.arange(S) < S - 1)).astype(np.uint8),
        doc_indptr=np.array([0, S]),
        doc_meta=[{"digest": sha256_json([tokens.tolist(), mask.tolist()]), "origin": "corpus", **meta}],
        k=k,
        topk_ids=flat_ids,
        topk_margins=margins,
        tail_log=tail_log,
        gold_logprob=_gold(tokens, k, flat_ids, flat - np.repeat(shift, k[:-1]), gold_logprobs),
        gold_in_topk=gold_in_rows(tokens, k, flat_ids),
        entropy_nats=None,
    )


def _flatten(
    name: str,
    tokens: Sequence[int] | Array,
    ids: Sequence[Sequence[int] | Array],
    logprobs: Sequence[Sequence[float] | Array],
    loss_mask: Sequence[int] | Array | None,
) -> tuple[Array, Array, Array, Array, Array]:
    """Tokens i64 `[S]`, mask bool `[S]`, and of all finite entries logprob f64, id i64 and row i64 `[E]`, checked."""
    try:
        tokens = np.asarray(tokens, np.int64)
        mask = np.arange(len(tokens)) < len(tokens) - 1 if loss_mask is None else np.asarray(loss_mask) != 0
        lengths = np.array([len(row) for row in ids], np.int64)
        flat_ids = np.concatenate([np.zeros(0, np.int64), *(np.asarray(row).ravel() for row in ids if len(row))])
        flat = np.concatenate([np.zeros(0), *(np.asarray(row, np.float64).ravel() for row in logprobs)])
    except (TypeError, ValueError, OverflowError) as error:
        raise CacheFormatError("a document's rows are not lists of numbers", where=name, got=error) from error
    S = len(tokens)
    if tokens.ndim != 1 or S == 0 or len(lengths) != S - 1 or len(logprobs) != S - 1 or mask.shape != (S,):
        expected = f"{max(S - 1, 0)} rows for {S} tokens, and a mask of {S}"
        got = f"{len(lengths)} rows of ids, {len(logprobs)} of logprobs, a mask of {len(mask)}"
        raise CacheFormatError("a document's rows do not fit its tokens", where=name, expected=expected, got=got)
    given = np.array([len(row) for row in logprobs], np.int64)
    _refuse(name, given != lengths, "a row's ids and logprobs are of unequal lengths", "as many of each", given)
    if not np.issubdtype(flat_ids.dtype, np.integer):
        raise CacheFormatError("ids that are no integers", where=name, got=flat_ids.dtype)
    rows = np.repeat(np.arange(S - 1), lengths)
    bad = np.bincount(rows[np.isnan(flat) | (flat == np.inf)], minlength=S - 1) > 0
    _refuse(name, bad, "a logprob is not a number", "finite, or −inf")
    kept = flat > -np.inf
    return tokens, mask, flat[kept], flat_ids[kept].astype(np.int64), rows[kept]


def _tails(name: str, flat: Array, k: Array, tokenizer_size: int) -> tuple[Array, Array]:
    """Log tail relative to each row's first entry, and the log of what a row's sum is above 1: f64 `[S − 1]` each."""
    if len(k) == 0:
        return np.zeros(0), np.zeros(0)
    borders = indptr(k)
    starts, ends = borders[:-1], borders[1:]
    mass = np.add.reduceat(np.exp(flat), starts)
    heavy = mass > 1 + MASS_TOLERANCE
    _refuse(name, heavy, "a row's probabilities add up to more than 1", "at most 1.001", mass)
    with np.errstate(divide="ignore"):
        tail = np.log1p(-np.minimum(mass, 1.0))
        most = np.log((tokenizer_size - k).clip(0)) + flat[ends - 1]
    beyond = np.exp(tail) > np.exp(most) + MASS_TOLERANCE
    what = "a row lacks more mass than ids less likely than its last can hold"
    _refuse(name, beyond, what, "the most likely ids", mass)
    return np.minimum(tail, most) - flat[starts], np.log(np.maximum(mass, 1.0))


def _refuse(name: str, bad: Array, what: str, expected: object, values: Array | None = None) -> None:
    """Raise for the first row of a mask `[S − 1]`, where there is one."""
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        got = None if values is None else values[row]
        raise CacheFormatError(what, where=f"{name}, position {row}", expected=expected, got=got)


def join_rows(parts: Sequence[ShardArrays]) -> ShardArrays:
    """Several shards' rows as one's, without samples; a figure that one of them lacks is unknown for all."""
    names = ("tokens", "loss_mask", "k", "topk_ids", "topk_margins", "tail_log", "gold_in_topk")
    joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    gold = [part.gold_logprob for part in parts if part.gold_logprob is not None]
    return replace(
        parts[0],
        doc_indptr=indptr(np.concatenate([np.diff(part.doc_indptr) for part in parts])),
        doc_meta=[meta for part in parts for meta in part.doc_meta],
        gold_logprob=np.concatenate(gold) if len(gold) == len(parts) else None,
        entropy_nats=None,
        samples=None,
        **joined,
    )


def _gold(tokens: Array, k: Array, ids: Array, logprobs: Array, given: Sequence[float] | Array | None) -> Array | None:
    """Log-probabilities of the next tokens, f32 `[S]`, NaN in the last row; None where one is unknown."""
    gold = np.full(len(tokens), np.nan)
    if given is not None:
        gold[:-1] = np.asarray(given, np.float64)
    rows = np.repeat(np.arange(len(k)), k)
    hits = ids == np.append(tokens[1:], -1)[rows]
    gold[rows[hits]] = logprobs[hits]
    return None if np.isnan(gold[:-1]).any() else np.minimum(gold, 0).astype(np.float32)
