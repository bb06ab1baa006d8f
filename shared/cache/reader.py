"""Reading a cache: by document, decoded at a temperature of its grid. Writes nothing; keeps no file open."""

import hashlib
import itertools
import json
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from shared.cache import hdf5
from shared.cache.codec import decode_margins, decode_tail, last_of_rows
from shared.cache.layout import (
    ATTRIBUTES,
    CODECS,
    DATASETS,
    FORMAT,
    SAMPLES,
    TOKENIZER,
    VERSION,
    Array,
    Samples,
    indptr,
    shard_name,
)
from shared.cache.manifest import read_manifest
from shared.errors import CacheCorruptError, CacheFormatError, CacheMismatchError

DECODED_BYTES = 256 << 20


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


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledTargets:
    """Ids drawn from the teacher's distributions for n consecutive rows; S draws per row.

    Args:
        k: i64 `[n]`, distinct ids of each row, 0 in a document's last.
        ids: i64 `[n, S]`, token ids, 0 as padding.
        counts: i64 `[n, S]`, how often each was drawn, 0 as padding.
        margins: f32 `[n, S]`, z_1 − z_i in logits, 0 as padding.
        temperature: the temperature they were drawn at; drawn_from: `full` or `tail`; num: S.
    """

    k: Array
    ids: Array
    counts: Array
    margins: Array
    temperature: float
    drawn_from: str
    num: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A decoded shard: everything but the division by temperature."""

    tokens: Array
    loss_mask: Array
    doc_indptr: Array
    meta: tuple[dict[str, Any], ...]
    k: Array
    row_indptr: Array
    ids: Array
    margins: Array
    last_margins: Array
    tail: Array
    tail_scale: int
    samples: Samples | None

    @property
    def num_bytes(self) -> int:
        """Memory that the arrays take."""
        arrays = [self.tokens, self.loss_mask, self.k, self.row_indptr, self.ids, self.margins, self.tail]
        if self.samples is not None:
            arrays += [self.samples.k, self.samples.ids, self.samples.counts, self.samples.margins]
        return sum(array.nbytes for array in arrays)

    def targets(self, start: int, stop: int, temperature: float, column: int, width: int) -> Targets:
        """Decode rows `start` to `stop` at the temperature of a tail column, padded to `width`."""
        k = self.k[start:stop]
        entries = slice(self.row_indptr[start], self.row_indptr[stop])
        last = self.last_margins[start:stop]
        log_tail = decode_tail(self.tail[start:stop, column], last, temperature, self.tail_scale)
        ids = _pad(self.ids[entries], k, width, np.int64, 0)
        logp = _pad(self.margins[entries] / np.float32(-temperature), k, width, np.float32, -np.inf)
        with np.errstate(divide="ignore"):
            log_total = np.logaddexp(np.log(np.exp(logp).sum(axis=1, dtype=np.float64)), log_tail)
        log_total[k == 0] = 0
        logp -= log_total.astype(np.float32)[:, None]
        return Targets(k=k, ids=ids, logp=logp, log_tail=(log_tail - log_total).astype(np.float32))


def _sampled(samples: Samples, start: int, stop: int) -> SampledTargets:
    """Rows `start` to `stop` of a shard's samples, padded to the number of draws."""
    k, first = samples.k[start:stop], int(samples.k[:start].sum())
    entries = slice(first, first + int(k.sum()))
    return SampledTargets(
        k=k,
        ids=_pad(samples.ids[entries], k, samples.num, np.int64, 0),
        counts=_pad(samples.counts[entries], k, samples.num, np.int64, 0),
        margins=_pad(samples.margins[entries], k, samples.num, np.float32, 0),
        temperature=samples.temperature,
        drawn_from=samples.drawn_from,
        num=samples.num,
    )


class Cache:
    """A finished cache.

    Documents are numbered through all shards. A shard is read whole, checked against its SHA-256 once per process,
    decoded, and kept in a small memory of recent shards. An instance can be pickled and used after fork; threads need
    one each.

    Args:
        path: the cache's directory, which may be read-only.
        decoded_bytes: memory for decoded shards; the newest one is always kept.

    Raises:
        CacheFormatError: no cache, an unfinished one, or a version this code does not know.
        CacheCorruptError: the manifest's digest, or a file's presence or size, is wrong.
    """

    def __init__(self, path: Path | str, *, decoded_bytes: int = DECODED_BYTES) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.temperatures = tuple(float(T) for T in self.manifest["temperatures"])
        self.tokenizer_size: int = self.manifest["tokenizer_size"]
        self.head_width: int = self.manifest["head_width"]
        self.label_identity: str = self.manifest["label_identity"]
        self.num_documents: int = self.manifest["num_documents"]
        self.num_tokens: int = self.manifest["num_tokens"]
        self.num_shards: int = self.manifest["num_shards"]
        self.statistics: dict[str, Any] = self.manifest["statistics"]
        self.tokenizer_path = self.path / TOKENIZER
        self.width = min(self.manifest["top_k"], self.tokenizer_size)
        self._decoded_bytes = decoded_bytes
        self._checked: set[int] = set()
        self._decoded: OrderedDict[int, Shard] = OrderedDict()
        self._check_files()

    @property
    def doc_lengths(self) -> Array:
        """Tokens per document in shard order: i64 `[D]`."""
        return self._index[0]

    def tokens(self, doc: int) -> Array:
        """A document's token ids: i64 `[n]`."""
        shard, start, stop, _ = self._locate(doc)
        return shard.tokens[start:stop].astype(np.int64)

    def loss_mask(self, doc: int) -> Array:
        """Whether the token after each one is a training target: bool `[n]`."""
        shard, start, stop, _ = self._locate(doc)
        return shard.loss_mask[start:stop].astype(bool)

    def meta(self, doc: int) -> dict[str, Any]:
        """A document's JSON object: id, source, origin, digest, target_bytes, …"""
        shard, _, _, number = self._locate(doc)
        return dict(shard.meta[number])

    def targets(self, doc: int, temperature: float, start: int = 0, stop: int | None = None) -> Targets:
        """Decode a document's rows `start` to `stop` (all by default); row t belongs to token t+1.

        Every result is padded to the cache's `width`, so that documents can be concatenated.

        Raises:
            CacheMismatchError: the temperature is not on the cache's grid.
        """
        if temperature not in self.temperatures:
            raise CacheMismatchError(
                "the cache holds no tails at this temperature",
                where=self.path,
                expected=f"one of {', '.join(f'{T:g}' for T in self.temperatures)}",
                got=temperature,
            )
        shard, first, last, _ = self._locate(doc)
        start, stop, _ = slice(start, stop).indices(last - first)
        column = self.temperatures.index(temperature)
        return shard.targets(first + start, first + max(start, stop), temperature, column, self.width)

    def samples(self, doc: int, start: int = 0, stop: int | None = None) -> SampledTargets:
        """A document's sampled targets, rows `start` to `stop` (all by default); row t belongs to token t+1.

        Raises:
            CacheMismatchError: the cache holds none.
        """
        shard, first, last, _ = self._locate(doc)
        if shard.samples is None:
            raise CacheMismatchError("the cache holds no sampled targets", where=self.path)
        start, stop, _ = slice(start, stop).indices(last - first)
        return _sampled(shard.samples, first + start, first + max(start, stop))

    def load_shard(self, shard: int) -> Shard:
        """Read, check and decode a shard, or take it from memory.

        Raises:
            CacheCorruptError: its bytes are not those of the manifest.
        """
        decoded = self._decoded.pop(shard, None)
        if decoded is None:
            decoded = self._read_shard(shard)
        self._decoded[shard] = decoded
        while len(self._decoded) > 1 and sum(s.num_bytes for s in self._decoded.values()) > self._decoded_bytes:
            self._decoded.popitem(last=False)
        return decoded

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_decoded": OrderedDict(), "_checked": set()}

    def _check_files(self) -> None:
        for name, entry in self.manifest["files"].items():
            file = self.path / name
            size = file.stat().st_size if file.is_file() else None
            if size != entry["bytes"]:
                raise CacheCorruptError(
                    "a file of the cache is missing" if size is None else "a file of the cache has the wrong size",
                    where=file,
                    expected=f"{entry['bytes']} bytes",
                    got="no file" if size is None else f"{size} bytes",
                    fix="copy the cache again, or run the same `codedistill teacher build` again",
                )

    @cached_property
    def _index(self) -> tuple[Array, Array]:
        """Lengths of all documents, and the first document of each shard `[num_shards + 1]`."""
        lengths = [np.diff(self._read_indptr(shard)) for shard in range(self.num_shards)]
        first = indptr(np.array([len(part) for part in lengths], np.int64))
        joined = np.concatenate(lengths)
        if (len(joined), int(joined.sum())) != (self.num_documents, self.num_tokens):
            raise CacheCorruptError(
                "the shards do not add up to the manifest's counts",
                where=self.path,
                expected=f"{self.num_documents} documents, {self.num_tokens} tokens",
                got=f"{len(joined)} documents, {int(joined.sum())} tokens",
                fix="codedistill cache verify",
            )
        return joined, first

    def _read_indptr(self, shard: int) -> Array:
        file = self.path / f"{shard_name(shard)}.h5"
        try:
            with h5py.File(file, "r", locking=False) as handle:
                hdf5.load_filters(handle)
                borders: Array = handle["doc_indptr"][()]
                return borders
        except (OSError, KeyError, RuntimeError) as error:
            raise CacheCorruptError("a shard cannot be read", where=file, got=error, fix="cache verify") from error

    def _locate(self, doc: int) -> tuple[Shard, int, int, int]:
        """A document's shard, the borders of its tokens in it, and its number in it."""
        if not 0 <= doc < self.num_documents:
            raise IndexError(f"document {doc} of {self.num_documents}")
        first = self._index[1]
        number = int(np.searchsorted(first, doc, side="right")) - 1
        shard = self.load_shard(number)
        local = doc - int(first[number])
        return shard, int(shard.doc_indptr[local]), int(shard.doc_indptr[local + 1]), local

    def _read_shard(self, shard: int) -> Shard:
        name = f"{shard_name(shard)}.h5"
        try:
            image = (self.path / name).read_bytes()
        except OSError as error:
            raise CacheCorruptError("a shard cannot be read", where=self.path / name, got=error.strerror) from error
        if shard not in self._checked:
            expected = self.manifest["files"].get(name, {}).get("sha256")
            digest = hashlib.sha256(image).hexdigest()
            if digest != expected:
                raise CacheCorruptError(
                    "a shard's bytes have changed",
                    where=self.path / name,
                    expected=expected,
                    got=digest,
                    fix="copy the cache again, or run the same `codedistill teacher build` again",
                )
            self._checked.add(shard)
        return decode_shard(image, self.path / name)


def decode_shard(image: bytes, where: object) -> Shard:
    """Decode a shard from the bytes of its file; `where` names it in errors.

    Raises:
        CacheFormatError: another format, version or codec, or a data set or attribute is missing.
        CacheCorruptError: the bytes are no HDF5 file, or a checksum in it fails.
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
    k = arrays["k"].astype(np.int64)
    margins = decode_margins(arrays, k, codec)
    blob, borders = arrays["doc_meta"].tobytes(), arrays["doc_meta_indptr"]
    return Shard(
        tokens=arrays["tokens"],
        loss_mask=arrays["loss_mask"],
        doc_indptr=arrays["doc_indptr"],
        meta=tuple(json.loads(blob[a:b]) for a, b in itertools.pairwise(borders)),
        k=k,
        row_indptr=indptr(k),
        ids=arrays["id_table"][arrays["topk_ids"]],
        margins=margins,
        last_margins=last_of_rows(margins, k),
        tail=arrays["tail"],
        tail_scale=int(str(attributes["tail_scale"])),
        samples=_samples(arrays, attributes, where),
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


def _pad(values: Array, k: Array, width: int, dtype: Any, fill: float) -> Array:
    """Rows of lengths k, one after the other, as `[n, width]`."""
    padded = np.full((len(k), width), fill, dtype)
    full = k == width
    if np.count_nonzero(full) * width == len(values):  # all rows are full or empty, as with a fixed k: a plain copy
        padded[full] = values.reshape(-1, width)
    else:
        padded[np.arange(width) < k[:, None]] = values
    return padded
