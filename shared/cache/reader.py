"""Reading a cache: by document, decoded at a temperature of its grid. Writes nothing; keeps no file open."""

import bisect
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache import hdf5
from shared.cache.format import TOKENIZER, Array, indptr, shard_name
from shared.cache.manifest import read_manifest
from shared.cache.order import shuffled_pools
from shared.cache.shard import SampledTargets, Shard, Targets, decode_shard
from shared.errors import CacheCorruptError, CacheMismatchError, require

DECODED_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """n consecutive rows of a cache.

    Args:
        tokens: i64 `[n]`, token ids.
        loss_mask: bool `[n]`, whether the next token is a training target.
        targets: the teacher's distributions for the next tokens.
    """

    tokens: Array
    loss_mask: Array
    targets: Targets


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
    def shard_digests(self) -> dict[str, str]:
        """SHA-256 of each shard, by file name."""
        return {name: entry["sha256"] for name, entry in self.manifest["files"].items() if name.endswith(".h5")}

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
        ours = set(self.shard_digests.values())
        return not theirs.isdisjoint(ours | {source.get("digest") for source in self.manifest["sources"]})

    @property
    def doc_lengths(self) -> Array:
        """Tokens per document in shard order: i64 `[D]`."""
        return self._index[0]

    @property
    def shard_indptr(self) -> list[int]:
        """First document of each shard, and the number of all: `num_shards + 1` values."""
        return self._index[1]

    @cached_property
    def doc_indptr(self) -> Array:
        """First token of each document, all documents laid end to end: i64 `[D+1]`."""
        return indptr(self.doc_lengths)

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
        meta: dict[str, Any] = json.loads(shard.doc_meta[number])
        return meta

    def targets(self, doc: int, temperature: float, start: int = 0, stop: int | None = None) -> Targets:
        """Decode a document's rows `start` to `stop` (all by default); row t belongs to token t+1.

        Every result is padded to the cache's `width`, so that documents can be concatenated.

        Raises:
            CacheMismatchError: the temperature is not on the cache's grid.
        """
        return self.document(doc, temperature, start, stop).targets

    def samples(self, doc: int, start: int = 0, stop: int | None = None) -> SampledTargets:
        """A document's sampled targets, rows `start` to `stop` (all by default); row t belongs to token t+1.

        Raises:
            CacheMismatchError: the cache holds none.
        """
        shard, first, last, _ = self._locate(doc)
        start, stop, _ = slice(start, stop).indices(last - first)
        samples = shard.sampled(first + start, first + max(start, stop))
        if samples is None:
            raise CacheMismatchError("the cache holds no sampled targets", where=self.path)
        return samples

    def document(self, doc: int, temperature: float, start: int = 0, stop: int | None = None) -> Rows:
        """A document's tokens, loss mask and targets, rows `start` to `stop` (all by default).

        Raises:
            CacheMismatchError: the temperature is not on the cache's grid.
        """
        column = self._column(temperature)
        shard, first, last, _ = self._locate(doc)
        start, stop, _ = slice(start, stop).indices(last - first)
        start, stop = first + start, first + max(start, stop)
        return Rows(
            tokens=shard.tokens[start:stop].astype(np.int64),
            loss_mask=shard.loss_mask[start:stop].astype(bool),
            targets=shard.targets(start, stop, temperature, column, self.width),
        )

    def rows(self, start: int, stop: int, temperature: float) -> Rows:
        """Rows `start` to `stop` of all documents laid end to end; document d's are `doc_indptr[d : d + 2]`.

        Raises:
            CacheMismatchError: the temperature is not on the cache's grid.
            IndexError: not 0 ≤ start < stop ≤ num_tokens.
        """
        if not 0 <= start < stop <= self.num_tokens:
            raise IndexError(f"rows {start} to {stop} of {self.num_tokens}")
        borders = self.doc_indptr
        docs = range(np.searchsorted(borders, start, side="right") - 1, np.searchsorted(borders, stop))
        parts = [
            self.document(doc, temperature, max(start - int(borders[doc]), 0), stop - int(borders[doc])) for doc in docs
        ]
        targets = [part.targets for part in parts]
        return Rows(
            tokens=np.concatenate([part.tokens for part in parts]),
            loss_mask=np.concatenate([part.loss_mask for part in parts]),
            targets=Targets(
                k=np.concatenate([part.k for part in targets]),
                ids=np.concatenate([part.ids for part in targets]),
                logp=np.concatenate([part.logp for part in targets]),
                log_tail=np.concatenate([part.log_tail for part in targets]),
            ),
        )

    def stream(self, temperature: float, *, seed: int, epoch: int) -> Iterator[tuple[int, Rows]]:
        """Every document once, by number and with its rows, in an order that `seed` and `epoch` alone decide.

        It is the order of `order.shuffled_pools`. Memory stays within `decoded_bytes`; where that holds the shards of a
        pool (2,048 documents), each shard is read about once per epoch.

        Raises:
            CacheMismatchError: the temperature is not on the cache's grid.
        """
        for pool in shuffled_pools(self.num_documents, np.random.default_rng((seed, epoch))):
            for doc in pool.tolist():
                yield doc, self.document(doc, temperature)

    def load_shard(self, shard: int) -> Shard:
        """Read, check and decode a shard, or take it from memory.

        Raises:
            CacheCorruptError: its bytes are not those of the manifest.
        """
        if shard in self._decoded:
            self._decoded.move_to_end(shard)
            return self._decoded[shard]
        decoded = self._decoded[shard] = self._read_shard(shard)
        while len(self._decoded) > 1 and sum(s.num_bytes for s in self._decoded.values()) > self._decoded_bytes:
            self._decoded.popitem(last=False)
        return decoded

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_decoded": OrderedDict(), "_checked": set()}

    def _column(self, temperature: float) -> int:
        if temperature not in self.temperatures:
            raise CacheMismatchError(
                "the cache holds no tails at this temperature",
                where=self.path,
                expected=f"one of {', '.join(f'{T:g}' for T in self.temperatures)}",
                got=temperature,
            )
        return self.temperatures.index(temperature)

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
                    fix="copy the cache again, or run the command that made it again",
                )

    @cached_property
    def _index(self) -> tuple[Array, list[int]]:
        """Lengths of all documents, and the first document of each shard, and of one beyond the last."""
        lengths = [np.diff(self._read_indptr(shard)) for shard in range(self.num_shards)]
        first = indptr(np.array([len(part) for part in lengths], np.int64)).tolist()
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
        borders = hdf5.read_array(file, "doc_indptr")
        if borders.ndim != 1 or borders.dtype != np.int64 or np.any(np.diff(borders) < 1):
            raise CacheCorruptError("a shard's doc_indptr does not ascend", where=file, fix="codedistill cache verify")
        return borders

    def _locate(self, doc: int) -> tuple[Shard, int, int, int]:
        """A document's shard, the borders of its tokens in it, and its number in it."""
        if not 0 <= doc < self.num_documents:
            raise IndexError(f"document {doc} of {self.num_documents}")
        first = self._index[1]
        number = bisect.bisect_right(first, doc) - 1
        shard = self.load_shard(number)
        local = doc - first[number]
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
                    fix="copy the cache again, or run the command that made it again",
                )
            self._checked.add(shard)
        return decode_shard(image, self.path / name)
