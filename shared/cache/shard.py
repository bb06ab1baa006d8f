"""A shard in memory: decoded but for the last steps, which take a row's codes to log-probabilities."""

import itertools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.cache import hdf5
from shared.cache.codec import decode_codes, decode_tail, last_margins
from shared.cache.format import ATTRIBUTES, CODECS, DATASETS, FORMAT, SAMPLES, VERSION, Array, Samples, indptr, pad_rows
from shared.errors import CacheCorruptError, CacheFormatError


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The teacher's distributions for n consecutive rows at one temperature.

    Args:
        k: i64 `[n]`, entries of each row, 0 in a document's last.
        ids: i64 `[n, Kmax]`, token ids, 0 as padding.
        logp: f32 `[n, Kmax]`, log-probabilities in nats under the K+1 partition, −inf as padding.
        log_tail: f32 `[n]`, log-probability of all ids outside the row, −inf where there are none.
    """

    k: Array
    ids: Array
    logp: Array
    log_tail: Array


class SampledTargets(Samples):
    """Samples of n consecutive rows, `num` draws each: k `[n]`; ids, counts and margins `[n, num]`, 0 as padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A shard as narrow arrays, 3 or 4 bytes per entry, so that many fit in memory; rows are decoded when asked for.

    Args:
        tokens, loss_mask, doc_indptr, tail: as stored (FORMAT.md).
        doc_meta: UTF-8 JSON of each document.
        k: i64 `[S]`, entries of each row; row_indptr: i64 `[S+1]`, the first of them.
        ids: u16, or u32 where the vocabulary is larger, `[E]`: each entry's token id.
        codebook: f32; codes: u8 or wider `[E]`, each margin's place in it.
        last_margins: f32 `[S]`, the row's last margin.
        tail_scale: steps of a tail per nat.
        samples: sampled targets, where the shard has any.
    """

    tokens: Array
    loss_mask: Array
    doc_indptr: Array
    doc_meta: tuple[bytes, ...]
    k: Array
    row_indptr: Array
    ids: Array
    codebook: Array
    codes: Array
    last_margins: Array
    tail: Array
    tail_scale: int
    samples: Samples | None

    @property
    def margins(self) -> Array:
        """Every entry's z_1 − z_i: f32 `[E]`."""
        margins: Array = self.codebook[self.codes]
        return margins

    @property
    def meta(self) -> tuple[dict[str, Any], ...]:
        """Each document's JSON object."""
        return tuple(json.loads(text) for text in self.doc_meta)

    @property
    def num_bytes(self) -> int:
        """Memory that the arrays take."""
        arrays = [self.tokens, self.loss_mask, self.k, self.row_indptr, self.ids, self.codes]
        arrays += [self.last_margins, self.tail]
        if self.samples is not None:
            arrays += [self.samples.k, self.samples.ids, self.samples.counts, self.samples.margins]
        return sum(array.nbytes for array in arrays) + sum(map(len, self.doc_meta))

    def targets(self, start: int, stop: int, temperature: float, column: int, width: int) -> Targets:
        """Decode rows `start` to `stop` at the temperature of a tail column, padded to `width`."""
        k = self.k[start:stop]
        first, last = int(self.row_indptr[start]), int(self.row_indptr[stop])
        ids = pad_rows(self.ids[first:last].astype(np.int64), k, width, 0)
        logp = pad_rows(self.codebook[self.codes[first:last]] / np.float32(-temperature), k, width, -np.inf)
        log_tail = self.log_tails(slice(start, stop), column, temperature)
        # Weights are relative to the row's first entry: the sum is at least 1 and at most V, but in an empty row.
        total = np.einsum("ij->i", np.exp(logp)) + np.exp(log_tail)
        total[k == 0] = 1
        log_total = np.log(total)
        logp -= log_total.astype(np.float32)[:, None]
        return Targets(k=k, ids=ids, logp=logp, log_tail=(log_tail - log_total).astype(np.float32))

    def log_tails(self, rows: slice, column: int, temperature: float) -> Array:
        """Log weights of the rows' tails relative to their first entries, at the temperature of a column: f64 `[n]`."""
        return decode_tail(self.tail[rows, column], self.last_margins[rows], temperature, self.tail_scale)

    def sampled(self, start: int, stop: int) -> SampledTargets | None:
        """The samples of rows `start` to `stop`, padded to the number of draws; None where the shard has none."""
        samples = self.samples
        if samples is None:
            return None
        k, first = samples.k[start:stop], int(samples.k[:start].sum())
        entries = slice(first, first + int(k.sum()))
        return SampledTargets(
            k=k,
            ids=pad_rows(samples.ids[entries], k, samples.num, 0),
            counts=pad_rows(samples.counts[entries], k, samples.num, 0),
            margins=pad_rows(samples.margins[entries], k, samples.num, 0),
            temperature=samples.temperature,
            drawn_from=samples.drawn_from,
            num=samples.num,
        )


def decode_shard(image: bytes, where: object) -> Shard:
    """Decode a shard from the bytes of its file; `where` names it in errors.

    Raises:
        CacheFormatError: another format, version or codec, or a data set or attribute is missing.
        CacheCorruptError: the bytes are no HDF5 file, a checksum in it fails, or its arrays do not fit together.
    """
    arrays, attributes = hdf5.from_bytes(image, where)
    if attributes.get("format") != FORMAT or attributes.get("version") != VERSION:
        got = f"{attributes.get('format')} {attributes.get('version')}"
        raise CacheFormatError("unknown shard format", where=where, expected=f"{FORMAT} {VERSION}", got=got)
    codec = str(attributes.get("codec", ""))
    missing = [name for name in ATTRIBUTES if name not in attributes]
    missing += [name for name in (*DATASETS, *CODECS.get(codec, ())) if name not in arrays]
    if missing:
        raise CacheFormatError("a shard lacks a mandatory field", where=where, expected=missing[0])
    if codec not in CODECS:
        raise CacheFormatError("unknown codec", where=where, expected=" or ".join(CODECS), got=codec)
    samples = _samples(arrays, attributes, where)
    try:
        return _decode(arrays, attributes, samples)
    except (ValueError, IndexError, TypeError, OverflowError) as error:
        raise CacheCorruptError("a shard's arrays do not fit together", where=where, got=error) from error


def _decode(arrays: dict[str, Array], attributes: dict[str, Any], samples: Samples | None) -> Shard:
    k = arrays["k"].astype(np.int64)
    codes, codebook = decode_codes(arrays, k, str(attributes["codec"]))
    id_table, doc_indptr = arrays["id_table"], arrays["doc_indptr"]
    S, D, E = len(k), len(doc_indptr) - 1, int(k.sum())
    shapes = {"k": (S,), "tokens": (S,), "loss_mask": (S,), "tail": (S, len(attributes["temperatures"]))}
    shapes |= {"doc_meta_indptr": (D + 1,), "topk_ranks": (E,)}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} is {arrays[name].shape}, expected {shape}")
    if codes.shape != (E,) or codes.max(initial=0) >= max(len(codebook), 1):
        raise ValueError(f"codes of {len(codes)} entries, expected {E}, all in a codebook of {len(codebook)}")
    if arrays["topk_ranks"].max(initial=0) >= max(len(id_table), 1):
        raise ValueError(f"topk_ranks beyond the {len(id_table)} of id_table")
    if doc_indptr[0] != 0 or doc_indptr[-1] != S or np.any(np.diff(doc_indptr) < 1):
        raise ValueError("doc_indptr does not ascend from 0 to the number of tokens")
    blob = arrays["doc_meta"].tobytes()
    return Shard(
        tokens=arrays["tokens"],
        loss_mask=arrays["loss_mask"],
        doc_indptr=doc_indptr,
        doc_meta=tuple(blob[a:b] for a, b in itertools.pairwise(arrays["doc_meta_indptr"].tolist())),
        k=k,
        row_indptr=indptr(k),
        ids=_narrow(id_table).take(arrays["topk_ranks"]),
        codebook=codebook,
        codes=codes,
        last_margins=last_margins(codes, codebook, k),
        tail=arrays["tail"],
        tail_scale=int(attributes["tail_scale"]),
        samples=samples,
    )


def _samples(arrays: dict[str, Array], attributes: dict[str, Any], where: object) -> Samples | None:
    """A shard's sampled targets, where it has any: then every data set and attribute of theirs."""
    present = {*arrays, *attributes} & set(SAMPLES)
    if not present:
        return None
    for name in SAMPLES:
        if name not in present:
            raise CacheFormatError("a shard lacks a mandatory field", where=where, expected=name)
    return Samples(
        k=arrays["samples_k"].astype(np.int64),
        ids=arrays["samples_ids"].astype(np.int64),
        counts=arrays["samples_counts"].astype(np.int64),
        margins=arrays["samples_margins"],
        temperature=attributes["samples_temperature"],
        drawn_from=attributes["samples_from"],
        num=attributes["samples_num"],
    )


def _narrow(ids: Array) -> Array:
    """Ids in the narrowest type, u16 or u32, that holds them."""
    return ids.astype(np.uint16 if ids.max(initial=0) < 1 << 16 else np.uint32)
