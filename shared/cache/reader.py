"""Reading a cache: by document, decoded at a temperature of its grid. Writes nothing; keeps no file open."""

import bisect
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache import hdf5
from shared.cache.directory import file_names
from shared.cache.format import DOC_LENGTHS, TOKENIZER, Array, Sampling, indptr, shard_name
from shared.cache.local import Store
from shared.cache.manifest import ShardRecord, parse_record, read_manifest
from shared.cache.remote import local_path, url_of
from shared.cache.shard import SampledTargets, Shard, Targets, decode_shard
from shared.errors import CacheCorruptError, CacheMismatchError, require

DECODED_BYTES = 256 << 20
FIX = "copy the cache again, or codedistill cache repair"


class ShardMemory:
    """Decoded shards of one or more caches, the most recently used ones; the newest is always kept.

    Args:
        limit_bytes: what they may take together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.num_reads = 0  # shards that were read and decoded so far
        self._shards: OrderedDict[tuple[Path, int], Shard] = OrderedDict()
        self._num_bytes = 0

    def get(self, cache: "Cache", number: int) -> Shard:
        """A cache's shard, from memory or read now."""
        key = (cache.path, number)
        if key in self._shards:
            self._shards.move_to_end(key)
            return self._shards[key]
        shard = self._shards[key] = cache.read_shard(number)
        self.num_reads += 1
        self._num_bytes += shard.num_bytes
        while len(self._shards) > 1 and self._num_bytes > self.limit_bytes:
            self._num_bytes -= self._shards.popitem(last=False)[1].num_bytes
        return shard

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardMemory, (self.limit_bytes,)


class Cache:
    """A finished cache. Opening it reads the manifest and lists the folder, however many shards there are.

    Documents are numbered through all shards. A shard is read whole, checked against its SHA-256 once per process,
    decoded, and kept in a small memory of recent shards. An instance can be pickled and used after fork; threads need
    one each.

    Args:
        path: the cache's directory, which may be read-only; or the URL of a cache that lies elsewhere (see `remote`).
        memory: where decoded shards are kept, which several caches may share.
        complete: refuse a cache that lacks a file; else whatever reads that file does.

    Raises:
        CacheFormatError: no cache, an unfinished one, or a version this code does not know.
        CacheCorruptError: the manifest is damaged, or a file is missing.
        ConfigError: a cache that lies elsewhere cannot be reached, or the local cache is too small.
    """

    def __init__(self, path: Path | str, *, memory: ShardMemory | None = None, complete: bool = True) -> None:
        here = local_path(path)
        self.store = Store(str(url_of(path))) if here is None else None
        self.location = self.store.remote.url if self.store else str(here)  # of the Hub with the commit
        self.path = here or Path(self.location)
        self.manifest = self.store.manifest if self.store else read_manifest(self.path)
        self.temperatures = tuple(float(T) for T in self.manifest.temperatures)
        self.tokenizer_size = self.manifest.tokenizer_size
        self.head_width = self.manifest.head_width
        self.label_identity = self.manifest.label_identity
        self.num_documents = self.manifest.num_documents
        self.num_tokens = self.manifest.num_tokens
        self.num_shards = self.manifest.num_shards
        self.statistics = self.manifest.statistics
        self.width = min(self.manifest.top_k, self.tokenizer_size)
        # First document of each shard, and the number of all: `num_shards + 1` values.
        self.shard_indptr: list[int] = indptr(np.array(self.manifest.documents_per_shard)).tolist()
        self.bytes_per_token = 4 * self.width + 40  # of a decoded shard, about
        self.memory = memory or ShardMemory(DECODED_BYTES)
        self.reads_in_order = True  # so the shards after one that is read are fetched ahead
        self._checked: set[str] = set()
        if complete and not self.store and (missing := self.manifest.files.keys() - file_names(self.path)):
            raise CacheCorruptError("a file of the cache is missing", where=self.path / min(missing), fix=FIX)

    def require_targets(self) -> None:
        """Raise `ConfigError` where the cache has nothing to train on and nothing to score."""
        require(
            self.statistics["targets"] > 0,
            "the cache has no targets",
            where=self.path,
            expected="at least one token that is a training target",
            got=f"{self.num_tokens:,} tokens in {self.num_documents:,} documents",
            fix="build it from documents with completions that --max-length and --on-long leave something of",
        )

    def shares_data(self, others: Iterable[Mapping[str, Any]]) -> bool:
        """Whether the cache has a shard or a data set in common with others, as `run.json` records them.

        Args:
            others: records with `shards`, SHA-256 by file name, and `sources`, the manifest's entries.
        """
        theirs = {digest for other in others for digest in other["shards"].values()}
        theirs |= {source["digest"] for other in others for source in other["sources"]}
        ours = set(self.manifest.shard_digests.values())
        return not theirs.isdisjoint(ours | {source.get("digest") for source in self.manifest.sources})

    def read(self, name: str) -> bytes:
        """A file's bytes, checked against its SHA-256 when this process first reads it.

        Raises:
            CacheCorruptError: the manifest does not list it, it cannot be read, or its bytes are others.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise CacheCorruptError("the manifest lacks a file", where=self.path, expected=name)
        if self.store:
            file, fix = self.store.folder / name, "remove this file: it is fetched again"
            return self._checked_bytes(name, self.store.read(name), file, fix)
        file = self.path / name
        if file.exists() and not file.is_file():  # a pipe would block
            raise CacheCorruptError("a file of the cache is no regular file", where=file, fix=FIX)
        try:
            data = file.read_bytes()
        except OSError as error:
            what = "a file of the cache cannot be read"
            raise CacheCorruptError(what, where=file, got=error.strerror, fix=FIX) from error
        return self._checked_bytes(name, data, file, FIX)

    def _checked_bytes(self, name: str, data: bytes, file: Path, fix: str) -> bytes:
        entry = self.manifest.files[name]
        if len(data) != entry.bytes:
            raise CacheCorruptError(
                "a file of the cache has the wrong size",
                where=file,
                expected=f"{entry.bytes} bytes",
                got=f"{len(data)} bytes",
                fix=fix,
            )
        if name not in self._checked:
            digest = hashlib.sha256(data).hexdigest()
            if digest != entry.sha256:
                raise CacheCorruptError(
                    "a file's bytes have changed", where=file, expected=entry.sha256, got=digest, fix=fix
                )
            self._checked.add(name)
        return data

    def record(self, shard: int) -> ShardRecord:
        """A shard's JSON.

        Raises:
            CacheCorruptError: it is damaged.
        """
        name = f"{shard_name(shard)}.json"
        try:
            return parse_record(self.read(name), shard)
        except ValueError as error:
            raise CacheCorruptError("a shard's JSON is damaged", where=self.path / name, got=error, fix=FIX) from error

    def records(self) -> list[ShardRecord]:
        """The JSON of every shard; from elsewhere several are fetched at a time.

        Raises:
            CacheCorruptError: one is damaged.
        """
        if self.store:
            self.store.fetch_all(f"{shard_name(shard)}.json" for shard in range(self.num_shards))
        return [self.record(shard) for shard in range(self.num_shards)]

    def document_meta(self, shard: int) -> list[dict[str, Any]]:
        """The JSON objects of a shard's documents; nothing else of the shard is read, so its SHA-256 is not checked."""
        name = f"{shard_name(shard)}.h5"
        return hdf5.read_document_meta(self.store.fetch(name) if self.store else self.path / name)

    @cached_property
    def tokenizer_path(self) -> Path:
        """The folder of the tokenizer, on this machine."""
        if self.store:
            self.store.fetch_all(name for name in self.manifest.files if name.startswith(f"{TOKENIZER}/"))
        return (self.store.folder if self.store else self.path) / TOKENIZER

    def can_expect(self, num_tokens: int) -> bool:
        """Whether so many tokens are to be fetched, as they lie elsewhere, and fit into the local cache."""
        if self.store is None:
            return False
        return num_tokens / self.num_tokens * sum(self.store.shard_bytes) <= self.store.limit_bytes

    def expect_documents(self, first: int, stop: int) -> None:
        """Fetch the shards of documents `first` to `stop` ahead, in the background."""
        start, last = (bisect.bisect_right(self.shard_indptr, doc) - 1 for doc in (first, stop - 1))
        self.expect(range(start, last + 1))

    def expect(self, shards: Iterable[int]) -> None:
        """Fetch shards ahead, in the background, where the cache lies elsewhere."""
        if self.store:
            self.store.expect(f"{shard_name(shard)}.h5" for shard in shards)

    @cached_property
    def doc_lengths(self) -> Array:
        """Tokens per document in shard order, at least 1: u32 `[D]`."""
        lengths: Array = np.frombuffer(self.read(DOC_LENGTHS), "<u4")
        if (len(lengths), int(lengths.sum())) != (self.num_documents, self.num_tokens) or lengths.min() < 1:
            raise CacheCorruptError(
                "the documents' lengths do not add up to the manifest's counts",
                where=self.path / DOC_LENGTHS,
                expected=f"{self.num_documents} documents, {self.num_tokens} tokens",
                got=f"{len(lengths)} documents, {int(lengths.sum())} tokens",
                fix="codedistill cache verify",
            )
        return lengths

    def tokens(self, doc: int) -> Array:
        """A document's token ids: i64 `[n]`."""
        shard, rows = self._rows(doc)
        return shard.tokens[rows].astype(np.int64)

    def loss_mask(self, doc: int) -> Array:
        """Whether the token after each one is a training target: bool `[n]`."""
        shard, rows = self._rows(doc)
        return shard.loss_mask[rows].astype(bool)

    def meta(self, doc: int) -> dict[str, Any]:
        """A document's JSON object: id, source, origin, digest, target_bytes, …"""
        shard, number = self._find(doc)
        meta: dict[str, Any] = json.loads(self.load_shard(shard).doc_meta[number])
        return meta

    def targets(self, doc: int, temperature: float, start: int = 0, stop: int | None = None) -> Targets:
        """Decode a document's rows `start` to `stop` (all by default); row t belongs to token t+1.

        Every result is padded to the cache's `width`, so that documents can be concatenated.

        Raises:
            CacheMismatchError: the temperature is not on the cache's grid.
        """
        column = self.column(temperature)
        shard, rows = self._rows(doc, start, stop)
        return shard.targets(rows.start, rows.stop, temperature, column, self.width)

    def samples(self, doc: int, start: int = 0, stop: int | None = None) -> SampledTargets:
        """A document's sampled targets, rows `start` to `stop` (all by default); row t belongs to token t+1.

        Raises:
            CacheMismatchError: the cache holds none.
        """
        shard, rows = self._rows(doc, start, stop)
        samples = shard.sampled(rows.start, rows.stop)
        if samples is None:
            raise CacheMismatchError("the cache holds no sampled targets", where=self.path)
        return samples

    @cached_property
    def sampling(self) -> Sampling:
        """How the cache's samples were drawn.

        Raises:
            CacheMismatchError: the cache holds none.
        """
        samples = self.samples(0, 0, 0)
        return Sampling(temperature=samples.temperature, drawn_from=samples.drawn_from, num=samples.num)

    def column(self, temperature: float | None) -> int:
        """Which column of the tails belongs to a temperature.

        Raises:
            CacheMismatchError: it is not on the cache's grid.
        """
        if temperature not in self.temperatures:
            raise CacheMismatchError(
                "the cache holds no tails at this temperature",
                where=self.path,
                expected=f"one of {', '.join(f'{T:g}' for T in self.temperatures)}",
                got=temperature,
            )
        return self.temperatures.index(temperature)

    def locate(self, doc: int) -> tuple[Shard, int]:
        """A document's shard, and its first row in it."""
        shard, number = self._find(doc)
        decoded = self.load_shard(shard)
        return decoded, int(decoded.doc_indptr[number])

    def load_shard(self, shard: int) -> Shard:
        """Read, check and decode a shard, or take it from memory.

        Raises:
            CacheCorruptError: its bytes are not those of the manifest.
        """
        return self.memory.get(self, shard)

    def read_shard(self, number: int) -> Shard:
        """Read, check and decode a shard.

        Raises:
            CacheCorruptError: its bytes are not those of the manifest.
        """
        name = f"{shard_name(number)}.h5"
        if self.reads_in_order:
            self.expect(range(number + 1, min(number + 3, self.num_shards)))
        shard = decode_shard(self.read(name), self.path / name)
        lengths = self.doc_lengths[self.shard_indptr[number] : self.shard_indptr[number + 1]]
        if not np.array_equal(np.diff(shard.doc_indptr), lengths):
            raise CacheCorruptError(
                "a shard's documents are not of the lengths that the cache lists", where=self.path / name, fix=FIX
            )
        return shard

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_checked": set()}

    def _find(self, doc: int) -> tuple[int, int]:
        """A document's shard, and its number in it."""
        if not 0 <= doc < self.num_documents:
            raise IndexError(f"document {doc} of {self.num_documents}")
        shard = bisect.bisect_right(self.shard_indptr, doc) - 1
        return shard, doc - self.shard_indptr[shard]

    def _rows(self, doc: int, start: int = 0, stop: int | None = None) -> tuple[Shard, slice]:
        """A document's shard, and rows of it as a slice of the shard's."""
        shard, number = self._find(doc)
        decoded = self.load_shard(shard)
        first, last = (int(border) for border in decoded.doc_indptr[number : number + 2])
        start, stop, _ = slice(start, stop).indices(last - first)
        return decoded, slice(first + start, first + max(start, stop))
