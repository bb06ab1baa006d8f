"""Writing a cache: shards one by one into a claimed directory, the manifest last."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np

from shared.cache import codec as codecs
from shared.cache import hdf5
from shared.cache.assemble import assemble, extensions
from shared.cache.checks import check_arrays, check_options
from shared.cache.claim import Claim, SharedClaim
from shared.cache.directory import (
    FOLDERS,
    damaged_files,
    has_leftovers,
    is_finished,
    is_ours,
    plain_errors,
    read_record,
    remove_leftovers,
    seal,
)
from shared.cache.documents import document_rows, join_rows
from shared.cache.layout import (
    BUILD,
    FORMAT,
    MANIFEST,
    MANIFEST_SHA256,
    SHARD_PATTERN,
    VERSION,
    Array,
    ShardArrays,
    indptr,
    shard_name,
)
from shared.cache.manifest import read_manifest, write_manifest
from shared.cache.statistics import measure
from shared.errors import CacheCorruptError, CacheFormatError, ConfigError, ResumeError
from shared.runtime import fsync_directory, log, write_bytes, write_json

SHARD_TOKENS = 32_768


def encode_shard(
    arrays: ShardArrays,
    *,
    codec: str,
    temperatures: Sequence[float],
    head_width: int,
    tokenizer_size: int,
    top_k: int,
    compression: str = "gzip",
) -> tuple[bytes, dict[str, Any]]:
    """Encode a shard as the bytes of an HDF5 file; equal input gives equal bytes.

    Args:
        arrays: the exact rows.
        codec: `q` or `f16`.
        temperatures: the grid that `arrays.tail_log` was summed at; contains 1.
        head_width: rows of the teacher's LM head; tokenizer_size: the vocabulary that rows are normalised over.
        top_k: the requested number of entries per row.
        compression: the filter, `gzip` or `zstd`.

    Returns:
        The bytes and the shard's statistics (FORMAT.md, "Statistics").

    Raises:
        CacheFormatError: what CACHE.md refuses at write time, with document and position.
    """
    sizes = {"top_k": top_k, "head_width": head_width}
    check_options(
        codec=codec, temperatures=temperatures, tokenizer_size=tokenizer_size, compression=compression, **sizes
    )
    check_arrays(arrays, temperatures=temperatures, V=tokenizer_size, **sizes)
    scale = codecs.tail_scale(top_k)
    values, decoded = codecs.encode_margins(arrays.topk_margins, arrays.k, codec)
    last = codecs.last_of_rows(decoded, arrays.k)
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
        "topk_ids": ranks,
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
    statistics = measure(arrays, decoded, tail, temperatures=temperatures, scale=scale)
    return hdf5.to_bytes(datasets, attributes, compression), statistics


def _rank_ids(ids: Array) -> tuple[Array, Array]:
    """The shard's ids by falling frequency (ties by ascending id), and each entry's rank in that table."""
    counts = np.bincount(ids, minlength=1)
    table = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    ranks = np.zeros(len(counts), np.uint16 if len(table) <= 1 << 16 else np.uint32)
    ranks[table] = np.arange(len(table))
    return table.astype(np.uint32), ranks[ids]


class CacheWriter:
    """A cache directory under construction, claimed by this process until `finish` or `close`.

    Shards that are whole stay when a killed build is run again; whatever else it left is cleared. If the cache is
    finished already and `build` is equal, `finished` is true and nothing is written.

    Args:
        path: the cache's directory; made where it is missing.
        build: every option that decides the cache's bytes, as JSON values: at least `codec`, `temperatures`, `top_k`,
            `head_width`, `tokenizer_size`; `filter` unless it is `gzip`; `num_shards` (for `cache info`) where known.

        leads: false in a process that only writes shards, into a directory that another one of its job has claimed.

    Raises:
        ResumeError: an existing build has other options, the folder holds something else, or another process builds.
        CacheFormatError: options that no shard can be written with.
    """

    first_shard = 0
    num_documents_before = 0  # in earlier shards of another build

    def __init__(self, path: Path | str, build: Mapping[str, Any], *, leads: bool = True) -> None:
        self.path = Path(path)
        self.build = resolved(build)
        self._options = shard_options(self.build)
        self._claim: Claim | None = None
        self._buffer: list[ShardArrays] = []
        self._next_shard = self._added = 0
        self._check_folder()
        if not leads:
            self.finished, self._claim = False, SharedClaim(self.path)
            return
        self.finished = self._is_finished()
        if self.finished and not has_leftovers(self.path):
            return
        try:
            with plain_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                self._claim = Claim(self.path)
                self._begin()
        except BaseException:
            self.close()
            raise

    def has_shard(self, shard: int) -> bool:
        """Whether a shard's pair of files is there and its SHA-256 is right."""
        return read_record(self.path, shard) is not None

    def write_shard(self, shard: int, arrays: ShardArrays, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Encode a shard and write its pair of files durably, the JSON last.

        Args:
            shard: its number from 0.
            arrays: its rows.
            extra: further keys for its JSON (`first_document`, token budget, versions) or in place of its own; no
                times, so that bytes are reproducible.

        Returns:
            The shard's JSON.
        """
        self._claimed()
        try:
            data, statistics = encode_shard(arrays, **self._options)
        except CacheFormatError as error:
            where = f"{shard_name(shard)}, {error.where}" if error.where else shard_name(shard)
            raise CacheFormatError(error.what, where=where, expected=error.expected, got=error.got) from error
        record = {
            "format": FORMAT,
            "version": VERSION,
            "shard": shard,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "statistics": statistics,
            "documents": [meta.get("id") for meta in arrays.doc_meta],
            **extra,
        }
        return self._write_pair(shard, data, record)

    def add_document(
        self,
        tokens: Sequence[int] | Array,
        ids: Sequence[Sequence[int] | Array],
        logprobs: Sequence[Sequence[float] | Array],
        *,
        loss_mask: Sequence[int] | Array | None = None,
        gold_logprobs: Sequence[float] | Array | None = None,
        meta: Mapping[str, Any],
    ) -> None:
        """Add a document of top-k log-probabilities; shards are cut as they fill (`shard_tokens` in the build).

        Run again after a kill, add the same documents in the same order: shards that are there are kept. The build
        should hold a digest of what they are made from. The grid must be [1], since tails at other temperatures are not
        known. Arguments: see `documents.document_rows`.

        Raises:
            CacheFormatError: rows that may not be written, with document and position.
            ResumeError: a shard that is there holds other documents.
        """
        self._claimed()
        if list(self.build["temperatures"]) != [1.0]:
            raise CacheFormatError("rows of logprobs at T = 1", expected="the grid [1]", got=self.build["temperatures"])
        document = document_rows(
            tokens,
            ids,
            logprobs,
            tokenizer_size=self.build["tokenizer_size"],
            loss_mask=loss_mask,
            gold_logprobs=gold_logprobs,
            meta=meta,
        )
        buffered = sum(len(other.tokens) for other in self._buffer)
        if self._buffer and buffered + len(document.tokens) > self.build.get("shard_tokens", SHARD_TOKENS):
            self._flush()
        self._buffer.append(document)

    def _flush(self) -> None:
        """Write the buffered documents as the next shard, unless it is there."""
        shard, documents, self._buffer = self._next_shard, self._buffer, []
        self._next_shard += 1
        record = read_record(self.path, shard)
        names = [document.doc_meta[0].get("id") for document in documents]
        if record is None:
            self.write_shard(shard, join_rows(documents), {"first_document": self._added})
        elif record.get("documents") != names:
            where = self.path / f"{shard_name(shard)}.json"
            raise ResumeError("the shard holds other documents", where=where, fix="name another --out")
        self._added += len(documents)

    def copy_shard(self, shard: int, data: bytes, record: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Take over another cache's shard byte for byte under a new number.

        Args:
            shard: its number here.
            data: its file's bytes; record: its JSON there.
            extra: keys of its JSON to replace, such as `first_document`.
        """
        self._write_pair(shard, data, {**record, "shard": shard, **extra})

    def _write_pair(self, shard: int, data: bytes, record: Mapping[str, Any]) -> dict[str, Any]:
        sealed = seal(record)
        self._claimed().check()
        with plain_errors(self.path):
            write_bytes(self.path / f"{shard_name(shard)}.h5", data)
            write_json(self.path / f"{shard_name(shard)}.json", sealed)
        return sealed

    def finish(
        self,
        identity: Mapping[str, Any],
        sources: Sequence[Mapping[str, Any]],
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the manifest over every file in the directory and give the claim back.

        Args:
            identity: who made the labels; see `identity.label_identity`.
            sources: the data sets, each with name, split, revision, licence, digest, num_documents.
            provenance: further keys of the manifest, such as `derived_from`.

        Raises:
            CacheFormatError: no shard, a shard that is missing or damaged, or an identity without its digests.
        """
        self._claimed()
        if self._buffer:
            self._flush()
        self._check_folder()
        found = {int(m[1]) for entry in self.path.iterdir() if (m := SHARD_PATTERN.fullmatch(entry.name))}
        found -= {shard for part in extensions(self.path) for shard in part.shards()}
        num_shards = self.build.get("num_shards", len(found))
        if found != set(range(num_shards)) or not found:
            raise CacheFormatError("shards are missing", where=self.path, expected=max(num_shards, 1), got=len(found))
        self._replace_manifest(num_shards, identity, sources, provenance or {})

    def _replace_manifest(
        self,
        num_shards: int,
        identity: Mapping[str, Any],
        sources: Sequence[Mapping[str, Any]],
        provenance: Mapping[str, Any],
    ) -> None:
        build = self.build
        with plain_errors(self.path):
            manifest = assemble(
                self.path, build=build, num_shards=num_shards, identity=identity, sources=sources, provenance=provenance
            )
            self._claimed().check()
            write_manifest(self.path, manifest)
        self.finished = True
        self.close()

    def close(self) -> None:
        """Give the claim back; what is written stays."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_finished(self) -> bool:
        return is_finished(self.path)

    def _begin(self) -> None:
        """Look again, now that the folder is ours; clear what a killed process left; write `build.json`."""
        self._check_folder()
        remove_leftovers(self.path)
        self.finished = self._is_finished()
        if self.finished:
            self.close()
            return
        with contextlib.suppress(CacheFormatError, CacheCorruptError):  # no manifest: nothing says what is damaged
            for name in damaged_files(self.path, read_manifest(self.path)):
                log(f"{self.path / name} is damaged or missing; removed, to be made again")
                (self.path / name).unlink(missing_ok=True)
        for name in (MANIFEST, MANIFEST_SHA256):
            (self.path / name).unlink(missing_ok=True)
        if not (self.path / BUILD).exists():
            write_json(self.path / BUILD, {"format": FORMAT, "version": VERSION, "options": self.build})

    def _claimed(self) -> Claim:
        if self._claim is None:
            raise ResumeError("this cache is finished or its writer closed", where=self.path)
        return self._claim

    def _check_folder(self) -> None:
        """Refuse a folder that is no cache, or one that was begun with other options."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ResumeError("the cache's path is not a folder", where=self.path, fix="name another --out")
        for entry in self.path.iterdir():
            if not is_ours(entry):
                raise ResumeError(
                    "the folder holds something that is no cache",
                    where=self.path,
                    got=entry.name,
                    fix="name another --out",
                )
        try:
            old = json.loads((self.path / BUILD).read_bytes())
        except FileNotFoundError:
            started = [entry.name for entry in self.path.iterdir() if SHARD_PATTERN.fullmatch(entry.name)]
            if started:
                raise ResumeError(
                    "the folder holds shards and no build.json", where=self.path, got=started[0]
                ) from None
            return
        except ValueError as error:
            raise ResumeError("build.json cannot be read", where=self.path / BUILD, got=error) from error
        if not isinstance(old, dict) or old.get("format") != FORMAT or not isinstance(old.get("options"), dict):
            raise ResumeError("build.json is not that of a cache", where=self.path / BUILD, fix="name another --out")
        if old.get("version") != VERSION:
            raise ResumeError(
                "the build has another version", where=self.path, expected=VERSION, got=old.get("version")
            )
        # Other sources also change the number of shards, which tells nobody anything.
        differences = sorted(option_differences(old["options"], self.build), key=lambda found: found[0] == "num_shards")
        for key, before, now in differences:
            more = ", or add to a finished cache with --extend" if key == "sources" else ""
            raise ResumeError(
                f"the cache was begun with another {key}",
                where=self.path,
                expected=before,
                got=now,
                fix=f"use the old option, or name another --out{more}",
            )


def add_files(path: Path | str, files: Mapping[str, bytes]) -> None:
    """Add files such as `teacher_eval/fidelity.json` to a finished cache, or replace them; the manifest comes last.

    Killed at any point the cache stays readable: files that change leave the manifest first, and each replacement of
    the manifest is recoverable. Running the command again completes it.

    Args:
        path: a finished cache.
        files: contents by name, relative, below `teacher_eval/` or `tokenizer/`.

    Raises:
        ConfigError: a name outside these folders.
        ResumeError: another process is changing the cache.
    """
    directory = Path(path)
    for name in files:
        parts = PurePosixPath(name).parts
        if len(parts) < 2 or parts[0] not in FOLDERS or ".." in parts:
            raise ConfigError(
                "a file cannot be added to a cache", got=name, expected=" or ".join(f"{f}/…" for f in FOLDERS)
            )
    read_manifest(directory)
    with plain_errors(directory):
        claim = Claim(directory)
        try:
            _replace_files(directory, files, claim)
        finally:
            claim.release()


def _replace_files(directory: Path, files: Mapping[str, bytes], claim: Claim) -> None:
    remove_leftovers(directory)
    manifest = read_manifest(directory)
    new = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    listed = manifest["files"]
    kept = {name: entry for name, entry in listed.items() if new.get(name, entry) == entry}
    if kept != listed:
        write_manifest(directory, manifest | {"files": kept})
    for name, data in files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, data)
        fsync_directory(directory)
    claim.check()
    write_manifest(directory, manifest | {"files": dict(sorted((kept | new).items()))})


def resolved(build: Mapping[str, Any]) -> dict[str, Any]:
    """A build's options as `build.json` holds them."""
    options: dict[str, Any] = json.loads(json.dumps({"filter": "gzip"} | dict(build), allow_nan=False))
    return options


def shard_options(build: Mapping[str, Any]) -> dict[str, Any]:
    """What `encode_shard` needs of a build's options.

    Raises:
        CacheFormatError: one is missing, or no shard can be written with it.
    """
    names = ("codec", "temperatures", "top_k", "head_width", "tokenizer_size")
    missing = [name for name in names if name not in build]
    if missing:
        raise CacheFormatError("the build lacks an option", expected=missing[0])
    options = {name: build[name] for name in names} | {"compression": build["filter"]}
    check_options(**options)
    return options


def option_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values differ, dotted for nested objects, with both values."""
    for key in sorted(set(old) | set(new)):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from option_differences(before, now, f"{prefix}{key}.")
        elif before != now or (key in old) != (key in new):
            yield f"{prefix}{key}", before, now
