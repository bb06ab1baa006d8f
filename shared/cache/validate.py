"""What is refused at write time: labels that no reader should ever meet, named by document and position."""

import math
from collections.abc import Sequence

import numpy as np

from shared.cache.format import (
    CODECS,
    FILTERS,
    MAX_SAMPLES,
    MAX_TOP_K,
    SAMPLED_FROM,
    Array,
    Samples,
    ShardArrays,
    pad_rows,
    row_blocks,
)
from shared.cache.hdf5 import load_filter
from shared.cache.statistics import head_sums
from shared.errors import CacheFormatError

TAIL_TOLERANCE_NATS = 1 / 32 + 1e-3
GOLD_TOLERANCE_NATS = 1e-2


def check_options(
    *, codec: str, temperatures: Sequence[float], top_k: int, head_width: int, tokenizer_size: int, filter: str
) -> None:
    """Refuse options that no shard can be written with.

    Raises:
        CacheFormatError: an unknown codec or filter, a grid that does not ascend or lacks 1, a size out of range.
    """
    if codec not in CODECS:
        raise CacheFormatError("unknown codec", expected=" or ".join(CODECS), got=codec)
    if filter not in FILTERS:
        raise CacheFormatError("unknown filter", expected=" or ".join(FILTERS), got=filter)
    grid = list(temperatures)
    if grid != sorted(set(grid)) or 1.0 not in grid or not all(0 < t < math.inf for t in grid):
        raise CacheFormatError("the temperature grid cannot be used", expected="ascending, 1 among them", got=grid)
    load_filter(filter)
    if not 1 <= top_k <= MAX_TOP_K:
        raise CacheFormatError("top-k is out of range", expected=f"1 to {MAX_TOP_K}", got=top_k)
    if min(head_width, tokenizer_size) < 1:
        raise CacheFormatError("an empty vocabulary", got=f"head width {head_width}, tokenizer size {tokenizer_size}")


def check_arrays(a: ShardArrays, *, temperatures: Sequence[float], top_k: int, head_width: int, V: int) -> Array:
    """Refuse a shard whose arrays break the format's rules; V is the tokenizer's size.

    Returns:
        f64 `[S, T]`: `head_sums` of each row, 1 in empty rows.

    Raises:
        CacheFormatError: the rule, with the document's id and the position in it.
    """
    _check_shapes(a, len(temperatures))
    last = np.zeros(len(a.tokens), bool)
    last[a.doc_indptr[1:] - 1] = True
    num_ids = min(head_width, V)

    _refuse(a, (a.tokens < 0) | (a.tokens >= num_ids), "a token id is out of range", f"0 to {num_ids - 1}", a.tokens)
    _refuse(a, (a.loss_mask != 0) & ((a.loss_mask != 1) | last), "a loss mask that is wrong", "0 or 1, 0 at the end")
    _refuse(a, (a.k == 0) & ~last, "a row without entries that is not its document's last", "at least one finite logit")
    _refuse(a, (a.k != 0) & last, "a document's last row has entries", "none: there is no next token", a.k)
    _refuse(a, a.k > min(top_k, num_ids), "a row has too many entries", f"at most {min(top_k, num_ids)}", a.k)

    heads, gold_margins = np.ones((len(a.k), len(temperatures))), np.full(len(a.k), np.nan)
    for rows, entries in row_blocks(a.k):
        some = rows.start + np.flatnonzero(a.k[rows])
        width = int(a.k[rows].max())
        margins = pad_rows(a.topk_margins[entries], a.k[some], width, np.inf)
        hits = _check_ids(a, some, entries, width, num_ids, V)
        _check_margins(a, some, entries, margins)
        gold_margins[some[hits // width]] = margins.reshape(-1)[hits]
        heads[some] = head_sums(margins, temperatures)
    _check_tail(a, last, temperatures, V)
    _check_gold(a, last, gold_margins, heads[:, list(temperatures).index(1.0)], list(temperatures).index(1.0))
    if a.samples is not None:
        _check_samples(a, a.samples, last, temperatures, num_ids)
    return heads


def _check_ids(a: ShardArrays, some: Array, entries: slice, width: int, num_ids: int, V: int) -> Array:
    """Ids of some rows `[n]` with entries; where, among their n · width places, the next tokens are."""
    ids, k = a.topk_ids[entries], a.k[some]
    wrong = ids.view(f"u{ids.itemsize}") >= num_ids  # negative ones, too
    if wrong.any():
        _refuse(a, np.repeat(some, k)[wrong], "an entry's id is out of range", f"0 to {num_ids - 1}")
    narrow = np.min_scalar_type(V + width)
    padded = pad_rows(ids.astype(narrow), k, width, V + np.arange(width))
    hits = np.flatnonzero(padded == a.tokens[some + 1].astype(narrow)[:, None])
    padded.sort(axis=1)
    twice = padded[:, 1:] == padded[:, :-1]
    if twice.any():
        _refuse(a, some[twice.any(axis=1)], "an id is twice in a row", "distinct ids")
    return hits


def _check_margins(a: ShardArrays, some: Array, entries: slice, margins: Array) -> None:
    """Margins `[n, width]` of some rows with entries, +inf as padding."""
    finite = np.isfinite(a.topk_margins[entries])
    if not finite.all():
        row = np.repeat(some, a.k[some])[~finite]
        _refuse(a, row, "a logit is not finite", "finite logits; entries of −inf are left out")
    _refuse(a, some[(margins[:, :1] != 0).any(axis=1)], "a row's first margin is not 0", "z_1 − z_1 = 0")
    falls = margins[:, 1:] < margins[:, :-1]
    if falls.any():
        _refuse(a, some[falls.any(axis=1)], "a row does not descend by logit", "ascending margins")


def _check_shapes(a: ShardArrays, num_temperatures: int) -> None:
    S, E, ends = len(a.tokens), len(a.topk_ids), a.doc_indptr
    if S == 0 or len(a.doc_meta) == 0:
        raise CacheFormatError("an empty shard", expected="at least one document", got="none")
    if len(ends) != len(a.doc_meta) + 1 or ends[0] != 0 or ends[-1] != S or np.any(np.diff(ends) < 1):
        raise CacheFormatError("document borders that are wrong", expected=f"ascending from 0 to {S}", got=ends)
    per_row = ("loss_mask", "k", "gold_logprob", "gold_in_topk", "entropy_nats")
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(per_row, (S,))
    expected |= {"topk_ids": (E,), "topk_margins": (E,), "tail_log": (S, num_temperatures)}
    for name, shape in expected.items():
        array = getattr(a, name)
        if array is not None and array.shape != shape:
            raise CacheFormatError(f"{name} has the wrong shape", expected=shape, got=array.shape)
    _refuse(a, a.k < 0, "a row has a negative number of entries", "0 or more", a.k)
    if int(a.k.sum()) != E:
        raise CacheFormatError("k does not add up to the entries", expected=E, got=int(a.k.sum()))


def _check_tail(a: ShardArrays, last: Array, temperatures: Sequence[float], V: int) -> None:
    """A tail of V − k ids, none above the row's last entry, cannot weigh more than (V − k) exp(−m_K/T).

    A row that was decoded from a shard may be off by the rounding of its tail (to 1/16 nat) and of its m_K (`q`: by at
    most 0.1; `f16`: to 11 bits).
    """
    rows = np.flatnonzero(~last)
    if not len(rows):
        return
    margins = a.topk_margins[a.row_indptr()[rows + 1] - 1].astype(np.float64)[:, None]
    with np.errstate(divide="ignore"):
        most = np.log(V - a.k[rows])[:, None] + (0.1 + margins / 2048 - margins) / np.asarray(temperatures)
    tail = a.tail_log[rows]
    wrong = ~(tail <= most + TAIL_TOLERANCE_NATS)
    if wrong.any():
        _refuse(a, rows[(np.isnan(tail) | (tail == np.inf)).any(1)], "a tail is not a number", "a finite log or −inf")
        what, expected = "a tail heavier than V − k entries below the row's last can be", "tail_log ≤ log(V−k) − m_K/T"
        _refuse(a, rows[wrong.any(1)], what, expected)


def _check_gold(a: ShardArrays, last: Array, margins: Array, heads: Array, unit: int) -> None:
    """The next token's own figures must agree with its row: it catches rows that are shifted or wrongly normalised.

    Args:
        margins: f64 `[S]`, the next token's, NaN where it is not in its row; heads: f64 `[S]`, Σ exp(−m) at T = 1.
        unit: the column of T = 1.
    """
    found = ~np.isnan(margins)
    _refuse(a, ~last & (found != a.gold_in_topk), "gold_in_topk disagrees with the row's ids", "the next token's state")
    if a.entropy_nats is not None:
        _refuse(a, ~last & ~np.isfinite(a.entropy_nats), "an entropy is not finite", "nats, at least 0", a.entropy_nats)
    if a.gold_logprob is None:
        return
    _refuse(a, ~last & ~(a.gold_logprob <= GOLD_TOLERANCE_NATS), "gold_logprob is not a log-probability", "at most 0")
    with np.errstate(over="ignore"):  # nothing has checked the tails of empty rows
        difference = a.gold_logprob + margins + np.log(heads + np.exp(a.tail_log[:, unit]))
    wrong = found & ~(np.abs(difference) <= GOLD_TOLERANCE_NATS * (1 + margins / 100))
    _refuse(
        a, wrong, "gold_logprob disagrees with the row", "the log-probability of the next token under head and tail"
    )


def _check_samples(a: ShardArrays, s: Samples, last: Array, temperatures: Sequence[float], num_ids: int) -> None:
    S, R = len(a.tokens), len(s.ids)
    if s.drawn_from not in SAMPLED_FROM:
        raise CacheFormatError("samples of something unknown", expected=" or ".join(SAMPLED_FROM), got=s.drawn_from)
    if s.temperature not in temperatures:
        raise CacheFormatError("samples off the temperature grid", expected=list(temperatures), got=s.temperature)
    if not 1 <= s.num <= MAX_SAMPLES:
        raise CacheFormatError("the number of samples is out of range", expected=f"1 to {MAX_SAMPLES}", got=s.num)
    shapes = {"k": (S,), "ids": (R,), "counts": (R,), "margins": (R,)}
    for name, shape in shapes.items():
        if getattr(s, name).shape != shape:
            raise CacheFormatError(f"samples_{name} has the wrong shape", expected=shape, got=getattr(s, name).shape)
    _refuse(a, s.k < 0, "a row has a negative number of samples", "0 or more", s.k)
    if int(s.k.sum()) != R:
        raise CacheFormatError("samples_k does not add up to the samples", expected=R, got=int(s.k.sum()))
    sample_rows = np.repeat(np.arange(S), s.k)
    _refuse(a, sample_rows[(s.ids < 0) | (s.ids >= num_ids)], "a sampled id is out of range", f"0 to {num_ids - 1}")
    keys = sample_rows * num_ids + s.ids
    _refuse(a, sample_rows[1:][np.diff(keys) <= 0], "sampled ids do not ascend", "distinct ids, ascending")
    _refuse(a, sample_rows[s.counts < 1], "a sampled id was never drawn", "a count of at least 1")
    valid = np.isfinite(s.margins) & (s.margins >= 0)
    _refuse(a, sample_rows[~valid], "a sample's margin is not z_1 − z_i", "finite, at least 0")
    drawn = np.bincount(sample_rows, weights=s.counts, minlength=S)
    _refuse(a, last & (drawn != 0), "a document's last row has samples", "none: there is no next token")
    missing = (drawn != s.num) & ~last
    if s.drawn_from == "tail":
        missing &= drawn != 0
        inside = np.isin(keys, np.repeat(np.arange(S), a.k) * num_ids + a.topk_ids)
        _refuse(a, sample_rows[inside], "a sample of the tail is an entry of the row", "ids outside the row")
    _refuse(a, missing, "a row's samples do not add up", f"{s.num} draws", drawn)


def _refuse(a: ShardArrays, rows: Array, what: str, expected: str, values: Array | None = None) -> None:
    """Raise for the first row of a mask `[S]` or of a list of rows, where there is one."""
    if rows.dtype == bool:
        rows = np.flatnonzero(rows)
    if len(rows):
        row = int(rows[0])
        got = None if values is None else values[row]
        raise CacheFormatError(what, where=a.where(row), expected=expected, got=got)
