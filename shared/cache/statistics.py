"""A shard's statistics, the measured error of its encoding among them, and their sum over a cache."""

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from shared.cache.codec import decode_tail, last_of_rows
from shared.cache.format import Array, ShardArrays, indptr, row_blocks, temperature_key

MASS_BINS = 200
WHOLE_ROWS, EVERY = 4_096, 8
QUANTILES = {"p1": 0.01, "p10": 0.10}
COUNTS = ("documents", "tokens", "rows", "targets", "entries", "target_bytes")
MEANS = {  # each with the count it is over
    "entropy_nats": "rows",
    "gold_in_topk": "rows",
    "teacher_nll_nats": "targets",
    "teacher_nll_all_nats": "rows",
}


def measure(
    a: ShardArrays, codes: Array, codebook: Array, tail: Array, *, temperatures: Sequence[float], scale: int
) -> dict[str, Any]:
    """Compute a shard's statistics in float64.

    The encoding's error is measured on every row of a shard of up to `WHOLE_ROWS` rows, and on every `EVERY`-th row of
    a larger one.

    Args:
        codes, codebook: `[E]` and f32, from which a reader decodes margins.
        tail: i16 `[S, T]`, the stored tails; scale: their steps.

    Returns:
        JSON values; means over no rows, and of what is unknown, are null.
    """
    rows = a.k > 0
    targets = rows & (a.loss_mask == 1)
    nll = None if a.gold_logprob is None else -a.gold_logprob
    k, tail_log = a.k[rows], a.tail_log[rows]  # rows without entries have none among the entries either
    every = EVERY if len(k) > WHOLE_ROWS else 1
    entries = np.repeat(np.arange(len(k)) % every == 0, k)
    head_mass = _head_mass(a.topk_margins, k, tail_log, temperatures)
    row_kl = _row_kl(
        a.topk_margins[entries],
        codebook.take(codes[entries]),
        k[::every],
        tail_log[::every],
        tail[rows][::every],
        temperatures,
        scale,
    )
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


def _head_mass(margins: Array, k: Array, tail_log: Array, temperatures: Sequence[float]) -> Array:
    """Probability of each row's entries: f64 `[n, T]`; k: entries of each row, above 0."""
    mass = np.empty(tail_log.shape)
    for rows, entries in row_blocks(k):
        starts = indptr(k[rows])[:-1]
        for column, weights in enumerate(_weights(margins[entries].astype(np.float64), temperatures)):
            head = np.add.reduceat(weights, starts)
            with np.errstate(over="ignore"):
                mass[rows, column] = head / (head + np.exp(tail_log[rows, column]))
    return mass


def _weights(margins: Array, temperatures: Sequence[float]) -> list[Array]:
    """exp(−m/T) at each temperature; at T/2 the square of that at T, which takes a tenth of the time."""
    found: dict[float, Array] = {}
    for T in sorted(temperatures, reverse=True):
        found[T] = np.square(found[2 * T]) if 2 * T in found else np.exp(margins * (-1 / T))
    return [found[T] for T in temperatures]


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
        exact, decoded: f32 margins of the rows' entries; k: of each row, above 0.
        tail_log: f64 `[n, T]`, the exact tails; tail_codes: i16 `[n, T]`, the stored ones; scale: their steps per nat.
    """
    kl = np.empty(tail_log.shape)
    last = last_of_rows(decoded, k)
    for rows, entries in row_blocks(k):
        starts = indptr(k[rows])[:-1]
        margins, margins_decoded = exact[entries].astype(np.float64), decoded[entries].astype(np.float64)
        ways = zip(temperatures, _weights(margins, temperatures), _weights(margins_decoded, temperatures), strict=True)
        for column, (T, weights, weights_decoded) in enumerate(ways):
            tail, tail_decoded = tail_log[rows, column], decode_tail(tail_codes[rows, column], last[rows], T, scale)
            log_total = np.logaddexp(np.log(np.add.reduceat(weights, starts)), tail)
            log_total_decoded = np.logaddexp(np.log(np.add.reduceat(weights_decoded, starts)), tail_decoded)
            tail_weights = np.exp(tail)
            tail_error = np.subtract(tail_decoded, tail, out=np.zeros(len(tail)), where=tail_weights > 0)
            errors = np.add.reduceat(weights * (margins - margins_decoded), starts) / T + tail_weights * tail_error
            kl[rows, column] = np.maximum(log_total_decoded - log_total - errors * np.exp(-log_total), 0.0)
    return kl


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
