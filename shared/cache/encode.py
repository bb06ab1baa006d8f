"""A shard's rows as the bytes of its file."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shared.cache import codec as codecs
from shared.cache import hdf5
from shared.cache.format import FORMAT, VERSION, Array, ShardArrays, indptr
from shared.cache.manifest import HEAD_KEYS
from shared.cache.statistics import measure
from shared.cache.validate import check_arrays, check_options
from shared.errors import CacheFormatError


def encode_shard(
    arrays: ShardArrays,
    *,
    codec: str,
    temperatures: Sequence[float],
    head_width: int,
    tokenizer_size: int,
    top_k: int,
    filter: str = "gzip",
) -> tuple[bytes, dict[str, Any]]:
    """Encode a shard as the bytes of an HDF5 file; equal input gives equal bytes.

    Args:
        arrays: the exact rows.
        codec: `q` or `f16`.
        temperatures: the grid that `arrays.tail_log` was summed at; contains 1.
        head_width: rows of the teacher's LM head; tokenizer_size: the vocabulary that rows are normalised over.
        top_k: the requested number of entries per row.
        filter: the filter, `gzip` or `zstd`.

    Returns:
        The bytes and the shard's statistics (FORMAT.md, "Statistics").

    Raises:
        CacheFormatError: labels that FORMAT.md does not allow to be written, with document and position.
    """
    sizes = {"top_k": top_k, "head_width": head_width}
    check_options(codec=codec, temperatures=temperatures, tokenizer_size=tokenizer_size, filter=filter, **sizes)
    heads = check_arrays(arrays, temperatures=temperatures, V=tokenizer_size, **sizes)
    scale = codecs.tail_scale(top_k)
    values, codes, codebook = codecs.encode_margins(arrays.topk_margins, arrays.k, codec)
    last = codecs.last_margins(codes, codebook, arrays.k)
    tail = codecs.encode_tail(arrays.tail_log, last, arrays.k, temperatures, scale, tokenizer_size)
    id_table, ranks = _rank_ids(arrays.topk_ids)
    blobs = [json.dumps(meta, separators=(",", ":"), allow_nan=False).encode() for meta in arrays.doc_meta]
    datasets = {
        "tokens": arrays.tokens.astype(np.uint16 if tokenizer_size <= 1 << 16 else np.uint32),
        "loss_mask": arrays.loss_mask.astype(np.uint8),
        "doc_indptr": arrays.doc_indptr.astype(np.int64),
        "doc_meta": np.frombuffer(b"".join(blobs), np.uint8),
        "doc_meta_indptr": indptr(np.array([len(blob) for blob in blobs])),
        "k": arrays.k.astype(np.uint8 if top_k <= 255 else np.uint16),
        "id_table": id_table,
        "topk_ranks": ranks,
        **values,
        "tail": tail,
    }
    attributes: dict[str, object] = {
        "format": FORMAT,
        "version": VERSION,
        "codec": codec,
        "temperatures": np.asarray(temperatures, np.float64),
        "tail_scale": scale,
        "top_k": top_k,
        "head_width": head_width,
        "tokenizer_size": tokenizer_size,
    }
    if arrays.samples is not None:
        samples = arrays.samples
        datasets |= {
            "samples_k": samples.k.astype(np.uint16),
            "samples_ids": samples.ids.astype(np.uint32),
            "samples_counts": samples.counts.astype(np.uint16),
            "samples_margins": samples.margins.astype(np.float32),
        }
        attributes |= {
            "samples_temperature": samples.temperature,
            "samples_from": samples.drawn_from,
            "samples_num": samples.num,
        }
    statistics = measure(arrays, heads, codes, codebook, tail, temperatures=temperatures, scale=scale)
    return hdf5.to_bytes(datasets, attributes, filter), statistics


def _rank_ids(ids: Array) -> tuple[Array, Array]:
    """The shard's ids by falling frequency (ties by ascending id), and each entry's rank in that table."""
    counts = np.bincount(ids, minlength=1)
    present = np.flatnonzero(counts)
    table = np.sort(present - counts[present] * len(counts)) % len(counts)  # one number for both orders
    ranks = np.zeros(len(counts), np.uint16 if len(table) <= 1 << 16 else np.uint32)
    ranks[table] = np.arange(len(table))
    return table.astype(np.uint32), ranks.take(ids, mode="clip")  # none is out of bounds, and "clip" does not look


def shard_options(build: Mapping[str, Any]) -> dict[str, Any]:
    """What `encode_shard` needs of a build's options.

    Raises:
        CacheFormatError: one is missing, or no shard can be written with it.
    """
    missing = [name for name in HEAD_KEYS if name not in build]
    if missing:
        raise CacheFormatError("the build lacks an option", expected=missing[0])
    options = {name: build[name] for name in HEAD_KEYS}
    check_options(**options)
    return options
