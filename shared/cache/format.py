"""What a shard holds: names, constants, and the arrays a shard is written from."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FORMAT = "codedistill-cache"
VERSION = 1
CODECS = {"f16": ("topk_margins",), "q": ("codebook", "topk_codes", "esc_pos", "esc_value")}  # with their data sets
DATASETS = ("tokens", "loss_mask", "doc_indptr", "doc_meta", "doc_meta_indptr", "k", "id_table", "topk_ranks", "tail")
ATTRIBUTES = ("format", "version", "codec", "temperatures", "tail_scale", "top_k", "head_width", "tokenizer_size")
SAMPLES = (  # all or none
    *("samples_k", "samples_ids", "samples_counts", "samples_margins"),
    *("samples_temperature", "samples_from", "samples_num"),
)
IDENTITY_PARTS = ("teacher", "tokenizer", "labels")
FILTERS = ("gzip", "zstd")
MAX_TOP_K = 65_535
MAX_SAMPLES = 65_535
SAMPLED_FROM = ("full", "tail")
MAX_MARGIN = 1_500.0
BLOCK_ROWS = 1_024

BUILD, MANIFEST, DOC_LENGTHS = "build.json", "manifest.json", "doc_lengths.u32"
TOKENIZER, TEACHER_EVAL = "tokenizer", "teacher_eval"
SHARD_PATTERN = re.compile(r"shard-(\d{5,})\.(h5|json)")
TEMPORARY_PATTERN = re.compile(r"\..+\.tmp-\d+")


def shard_name(shard: int) -> str:
    """The shard's file name without its extension."""
    return f"shard-{shard:05d}"


def temperature_key(temperature: float) -> str:
    """A temperature as a key of the JSON files: `0.5`, `1`, `1.5`, `2`."""
    return f"{temperature:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a cache's samples were drawn: at which grid temperature, from `full` or the `tail`, how many per row."""

    temperature: float
    drawn_from: str
    num: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Ids drawn from the teacher's distribution for each of S rows; R distinct ids in all.

    Args:
        k: i64 `[S]`, distinct ids of each row, 0 in a document's last.
        ids: i64 `[R]`, ascending within the row.
        counts: i64 `[R]`, how often each was drawn; a row's counts add up to `num`.
        margins: f32 `[R]`, z_1 − z_i in logits, from which weights at other temperatures are formed.
        temperature: the grid temperature they were drawn at.
        drawn_from: `full`, or `tail`: from the ids outside the row, and not at all where that holds nothing.
        num: draws per row.
    """

    k: Array
    ids: Array
    counts: Array
    margins: Array
    temperature: float
    drawn_from: str
    num: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardArrays:
    """A shard before encoding: D documents, S tokens, E entries, T grid temperatures.

    Row t is the teacher's distribution for token t+1; each document's last row is empty (k = 0) and no other is. A
    row's entries descend by logit, ties by ascending id; entries with a logit of −inf are left out.

    Args:
        tokens: i64 `[S]`, token ids.
        loss_mask: u8 `[S]`, 1 where the next token is a training target.
        doc_indptr: i64 `[D+1]`, first token of each document.
        doc_meta: one JSON object per document; `id` names it in errors, `target_bytes` is summed into the statistics.
        k: i64 `[S]`, entries of each row.
        topk_ids: i64 `[E]`, the rows' token ids, one row after the other; the file holds their ranks.
        topk_margins: f32 `[E]`, z_1 − z_i in logits: 0 first, then ascending within the row.
        tail_log: f64 `[S, T]`, log Σ_{j∉K} exp((z_j − z_1)/T) in nats, −inf where nothing is left.
        gold_logprob: f32 `[S]`, log-probability of the next token at T = 1 in nats, NaN in a document's last row; None
            where it is unknown.
        gold_in_topk: bool `[S]`, whether the next token is among the row's entries.
        entropy_nats: f32 `[S]`, entropy of the full distribution at T = 1; a document's last row is not read; None
            where it is unknown.
        samples: sampled targets, where there are any.
    """

    tokens: Array
    loss_mask: Array
    doc_indptr: Array
    doc_meta: list[dict[str, Any]]
    k: Array
    topk_ids: Array
    topk_margins: Array
    tail_log: Array
    gold_logprob: Array | None
    gold_in_topk: Array
    entropy_nats: Array | None
    samples: Samples | None = None

    def row_indptr(self) -> Array:
        """First entry of each row: i64 `[S+1]`."""
        return indptr(self.k)

    def where(self, row: int) -> str:
        """Name a row by its document and position, for messages."""
        document = int(np.searchsorted(self.doc_indptr, row, side="right")) - 1
        name = self.doc_meta[document].get("id", document)
        return f"document {name!r}, position {row - int(self.doc_indptr[document])}"


def indptr(lengths: Array) -> Array:
    """Offsets of consecutive pieces from their lengths: i64 `[n+1]`, first 0."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def is_in(values: Array, known: Array) -> Array:
    """Which values are among known ones, which ascend: bool `[n]`."""
    if not len(known):
        return np.zeros(len(values), bool)
    found: Array = known[np.searchsorted(known, values).clip(max=len(known) - 1)] == values
    return found


def row_blocks(k: Array, num_rows: int = BLOCK_ROWS) -> Iterator[tuple[slice, slice]]:
    """Rows in blocks that stay in a processor's cache, and the entries of each block; `k` has the entries of a row."""
    borders = indptr(k)
    for start in range(0, len(k), num_rows):
        stop = min(start + num_rows, len(k))
        yield slice(start, stop), slice(int(borders[start]), int(borders[stop]))


def pad_rows(values: Array, k: Array, width: int, fill: Any) -> Array:
    """Rows of lengths k, one after the other, as `[n, width]`; a view where all are full. `fill` may be `[width]`."""
    if len(values) == len(k) * width:
        return values.reshape(len(k), width)
    rows = np.empty((len(k), width), values.dtype)
    rows[:] = fill
    rows[np.arange(width) < k[:, None]] = values
    return rows
