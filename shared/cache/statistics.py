"""A shard's statistics, the measured error of its encoding among them, and their sum over a cache."""

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from shared.cache.codec import decode_tail
from shared.cache.format import BLOCK_ROWS, Array, ShardArrays, pad_rows, row_blocks, temperature_key

MASS_BINS = 200
WHOLE_ROWS, EVERY = 4_096, 8
FAR = np.float32(1e9)  # beyond a row's end: exp(−m) is 0, and differences of such margins are, too
QUANTILES = {"p1": 0.01, "p10": 0.10}
COUNTS = ("documents", "tokens", "rows", "targets", "entries", "target_bytes")
MEANS = {  # each with the count it is over
    "entropy_nats": "rows",
    "gold_in_topk": "rows",
    "teacher_nll_nats": "targets",
    "teacher_nll_all_nats": "rows",
}


def measure(
    a: ShardArrays,
    heads: Array,
    codes: Array,
    codebook: Array,
    tail: Array,
    *,
    temperatures: Sequence[float],
    scale: int,
) -> dict[str, Any]:
    """Compute a shard's statistics in float64.

    The encoding's error is measured on every row of a shard of up to `WHOLE_ROWS` rows, and on every `EVERY`-th row of
    a larger one.

    Args:
        heads: f64 `[S, T]`, `head_sums` of the rows.
        codes, codebook: `[E]` and f32, from which a reader decodes margins.
        tail: i16 `[S, T]`, the stored tails; scale: their steps.

    Returns:
        JSON values; means over no rows, and of what is unknown, are null.
    """
    rows = a.k > 0
    targets = rows & (a.loss_mask == 1)
    nll = None if a.gold_logprob is None else -a.gold_logprob
    k, tail_log, tail = a.k[rows], a.tail_log[rows], tail[rows]  # rows without entries have none among the entries
    with np.errstate(over="ignore"):
        head_mass = heads[rows] / (heads[rows] + np.exp(tail_log))
    row_kl = np.empty(tail_log.shape)
    every = EVERY if len(k) > WHOLE_ROWS else 1
    for block, entries in row_blocks(k, every * BLOCK_ROWS):
        width, some = int(k[block].max()), slice(block.start, block.stop, every)
        exact = pad_rows(a.topk_margins[entries], k[block], width, FAR)[::every]
        decoded = codebook.take(pad_rows(codes[entries], k[block], width, 0)[::every])
        decoded[np.arange(width) >= k[some, None]] = FAR
        row_kl[some] = _row_kl(exact, decoded, k[some], tail_log[some], tail[some], temperatures, scale)
    row_kl = row_kl[::every]
    mass: dict[str, Any] = {}
    kl: dict[str, Any] = {}
    for T, head, error in zip(map(temperature_key, temperatures), head_mass.T, row_kl.T, strict=True):
        counts = np.bincount(np.minimum((head * MASS_BINS).astype(np.int64), MASS_BINS - 1), minlength=MASS_BINS)
        mass[T] = {"mean": _mean(head), **_quantiles(counts), "histogram": counts.tolist()}
        kl[T] = {"mean": _mean(error), "max": float(error.max()) if len(error) else None}
    return {
        "documents": len(a.doc_meta),
        "tokens": len(a.tokens),
        "rows": int(rows.sum()),
        "targets": int(targets.sum()),
        "entries": len(a.topk_ids),
        "target_bytes": sum(int(meta.get("target_bytes", 0)) for meta in a.doc_meta),
        "captured_mass": mass,
        "entropy_nats": _mean_of(a.entropy_nats, rows),
        "gold_in_topk": _mean_of(a.gold_in_topk, rows),
        "teacher_nll_nats": _mean_of(nll, targets),
        "teacher_nll_all_nats": _mean_of(nll, rows),
        "codec_kl_nats": kl,
    }


def head_sums(margins: Array, temperatures: Sequence[float]) -> Array:
    """Σ exp(−m/T) over each row's entries: f64 `[n, T]` from margins f32 `[n, K]`, +inf as padding."""
    sums = np.empty((len(margins), len(temperatures)))
    for column, weights in _weights(margins, temperatures):
        sums[:, column] = np.einsum("ij->i", weights)
    return sums


def _weights(margins: Array, temperatures: Sequence[float]) -> Iterator[tuple[int, Array]]:
    """Each temperature's column and exp(−m/T) in f64, which the next overwrites.

    At T/2 it is the square of that at T, which takes a tenth of the time.
    """
    margins, weights = margins.astype(np.float64), np.empty(margins.shape)
    for T in temperatures:
        if 2 * T in temperatures:
            continue
        np.multiply(margins, -1 / T, out=weights)
        np.exp(weights, out=weights)
        yield temperatures.index(T), weights
        while (T := T / 2) in temperatures:
            np.square(weights, out=weights)
            yield temperatures.index(T), weights


def _row_kl(
    exact: Array,
    decoded: Array,
    k: Array,
    tail_log: Array,
    tail_codes: Array,
    temperatures: Sequence[float],
    scale: int,
) -> Array:
    """KL(exact‖decoded) of the K+1 partition of rows, in nats: f64 `[n, T]`.

    Args:
        exact, decoded: f32 margins `[n, K]`, `FAR` as padding; k: entries of each row, above 0.
        tail_log: f64 `[n, T]`, the exact tails; tail_codes: i16 `[n, T]`, the stored ones; scale: their steps per nat.
    """
    sums, errors = np.empty(tail_log.shape), np.empty(tail_log.shape)
    differences = exact.astype(np.float64) - decoded
    for column, weights in _weights(exact, temperatures):
        sums[:, column] = np.einsum("ij->i", weights)
        errors[:, column] = np.einsum("ij,ij->i", weights, differences)
    grid, last = np.asarray(temperatures), decoded[np.arange(len(k)), k - 1]
    tail_decoded, tail_weights = decode_tail(tail_codes, last[:, None], grid, scale), np.exp(tail_log)
    totals, totals_decoded = sums + tail_weights, head_sums(decoded, temperatures) + np.exp(tail_decoded)
    tail_errors = np.subtract(tail_decoded, tail_log, out=np.zeros(tail_log.shape), where=tail_weights > 0)
    kl: Array = np.log(totals_decoded / totals) - (errors / grid + tail_weights * tail_errors) / totals
    return np.maximum(kl, 0.0)


def combine(shards: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The statistics of a whole cache from those of its shards: sums, weighted means, largest errors.

    Shards are taken one by one; a dozen numbers are kept of each.
    """
    total = dict.fromkeys(COUNTS, 0)
    means: defaultdict[tuple[str, ...], array[float]] = defaultdict(lambda: array("d"))  # times the rows they are over
    histograms: dict[str, Array] = {}
    largest: dict[str, float] = {}

    def add(key: tuple[str, ...], mean: float | None, weight: int) -> None:
        if weight:
            means[key].append(math.nan if mean is None else mean * weight)

    for shard in shards:
        for key in COUNTS:
            total[key] += shard[key]
        for key, weight in MEANS.items():
            add((key,), shard[key], shard[weight])
        for T, mass in shard["captured_mass"].items():
            add(("captured_mass", T), mass["mean"], shard["rows"])
            histograms[T] = histograms.get(T, np.zeros(MASS_BINS, np.int64)) + np.array(mass["histogram"])
        for T, error in shard["codec_kl_nats"].items():
            add(("codec_kl_nats", T), error["mean"], shard["rows"])
            if error["max"] is not None:
                largest[T] = max(error["max"], largest.get(T, error["max"]))

    def mean(*key: str) -> float | None:
        weighted = math.fsum(means[key])
        weight = total[MEANS.get(key[0], "rows")]
        return weighted / weight if weight and math.isfinite(weighted) else None

    return total | {
        "captured_mass": {T: {"mean": mean("captured_mass", T), **_quantiles(histograms[T])} for T in histograms},
        **{key: mean(key) for key in MEANS},
        "codec_kl_nats": {T: {"mean": mean("codec_kl_nats", T), "max": largest.get(T)} for T in histograms},
    }


def _quantiles(counts: Array) -> dict[str, float | None]:
    """Quantiles as the lower edge of their bin of 1/200, so that shards and their sum state them alike."""
    below = np.cumsum(counts)
    if below[-1] == 0:
        return dict.fromkeys(QUANTILES)
    return {key: int(np.searchsorted(below, q * below[-1], side="right")) / MASS_BINS for key, q in QUANTILES.items()}


def _mean_of(values: Array | None, rows: Array) -> float | None:
    return None if values is None else _mean(values[rows].astype(np.float64))


def _mean(values: Array) -> float | None:
    mean = float(values.mean()) if len(values) else math.nan
    return mean if math.isfinite(mean) else None
