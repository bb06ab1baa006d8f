"""Writing a cache: shards one by one into a locked folder, the manifest last."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache.directory import (
    check_files,
    has_leftovers,
    is_finished,
    is_ours,
    list_files,
    plain_errors,
    remove_leftovers,
    require_outside_caches,
)
from shared.cache.documents import document_rows, join_rows
from shared.cache.encode import encode_shard, shard_options
from shared.cache.format import (
    BUILD,
    DOC_LENGTHS,
    FORMAT,
    MANIFEST,
    SHARD_PATTERN,
    VERSION,
    Array,
    ShardArrays,
    shard_name,
)
from shared.cache.identity import label_identity
from shared.cache.manifest import (
    HEAD_KEYS,
    FileEntry,
    Manifest,
    ShardRecord,
    build_file,
    doc_lengths,
    read_manifest,
    read_pair,
    read_record,
    write_manifest,
    write_record,
)
from shared.cache.statistics import combine
from shared.errors import CacheCorruptError, CacheFormatError, ResumeError
from shared.files import link_file, write_bytes, write_json
from shared.lock import Lock, SharedLock
from shared.process import log

SHARD_TOKENS = 32_768


class CacheWriter:
    """A cache directory under construction, locked by this process until `finish` or `close`.

    Shards that are whole stay when a killed build is run again; whatever else it left is cleared. If the cache is
    finished already and `build` is equal, `finished` is true and nothing is written.

    Args:
        path: the cache's directory; made where it is missing.
        build: every option that decides the cache's bytes, as JSON values: at least `codec`, `temperatures`, `top_k`,
            `head_width`, `tokenizer_size`; `filter` unless it is `gzip`; `num_shards` (for `cache info`) where known.
        is_main_process: false in a process that only writes shards, into a folder that another one of its job has
            locked.

    Raises:
        ResumeError: an existing build has other options, the folder holds something else, or another process builds.
        CacheFormatError: options that no shard can be written with.
    """

    def __init__(self, path: Path | str, build: Mapping[str, Any], *, is_main_process: bool = True) -> None:
        self.path = Path(path)
        self.build: dict[str, Any] = json.loads(json.dumps({"filter": "gzip"} | dict(build), allow_nan=False))
        self._options = shard_options(self.build)
        self._lock: Lock | None = None
        self._buffer: list[ShardArrays] = []
        self._next_shard = 0
        check_folder(self.path, self.build)
        if not is_main_process:
            self.finished, self._lock = False, SharedLock(self.path)
            return
        self.finished = is_finished(self.path)
        if self.finished and not has_leftovers(self.path):
            return
        try:
            with plain_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = Lock(self.path, "building this cache")
                self._begin()
        except BaseException:
            self.close()
            raise

    def has_shard(self, shard: int) -> bool:
        """Whether a shard's pair of files is there and its SHA-256 is right."""
        return read_pair(self.path, shard) is not None

    def write_shard(self, shard: int, arrays: ShardArrays, capture: Mapping[str, Any] | None = None) -> ShardRecord:
        """Encode a shard and write its pair of files durably, the JSON last.

        Args:
            shard: its number from 0.
            arrays: its rows.
            capture: how its labels were made, for its JSON.
        """
        self._locked()
        try:
            data, statistics = encode_shard(arrays, **self._options)
        except CacheFormatError as error:
            where = f"{shard_name(shard)}, {error.where}" if error.where else shard_name(shard)
            raise CacheFormatError(error.what, where=where, expected=error.expected, got=error.got) from error
        return self.copy_shard(
            data,
            ShardRecord(
                shard=shard,
                bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
                statistics=statistics,
                documents=[meta.get("id") for meta in arrays.doc_meta],
                doc_lengths=np.diff(arrays.doc_indptr).tolist(),
                capture=dict(capture or {}),
            ),
        )

    def copy_shard(self, data: bytes, record: ShardRecord, *, source: Path | None = None) -> ShardRecord:
        """Write a shard that is encoded already; where the file system can, as a second name of `source`, its file."""
        self._locked().check()
        file = self.path / f"{shard_name(record.shard)}.h5"
        with plain_errors(self.path):
            if source is None or not link_file(source, file):
                write_bytes(file, data)
            write_record(self.path, record)
        return record

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
        self._locked()
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
        record = read_pair(self.path, shard)
        names = [document.doc_meta[0].get("id") for document in documents]
        if record is None:
            self.write_shard(shard, join_rows(documents))
        elif record.documents != names:
            where = self.path / f"{shard_name(shard)}.json"
            raise ResumeError("the shard holds other documents", where=where, fix="name another --out")

    def finish(
        self,
        identity: Mapping[str, Any],
        sources: Sequence[Mapping[str, Any]],
        derived_from: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the lengths of all documents, then the manifest over every file in the folder; release the lock.

        Args:
            identity: who made the labels; see `identity.label_identity`.
            sources: the data sets, each with name, split, revision, license, digest, num_documents.
            derived_from: the caches that this one is made from, where it is.

        Raises:
            CacheFormatError: no shard, a shard that is missing or damaged, or an identity without its digests.
        """
        self._locked()
        if self._buffer:
            self._flush()
        check_folder(self.path, self.build)
        found = {int(m[1]) for entry in self.path.iterdir() if (m := SHARD_PATTERN.fullmatch(entry.name))}
        num_shards = self.build.get("num_shards", len(found))
        if found != set(range(num_shards)) or not found:
            raise CacheFormatError("shards are missing", where=self.path, expected=max(num_shards, 1), got=len(found))
        with plain_errors(self.path):
            manifest = self._manifest(num_shards, identity, sources, derived_from)
            self._locked().check()
            write_manifest(self.path, manifest)
        self.finished = True
        self.close()

    def _manifest(
        self,
        num_shards: int,
        identity: Mapping[str, Any],
        sources: Sequence[Mapping[str, Any]],
        derived_from: Mapping[str, Any] | None,
    ) -> Manifest:
        files, lengths = list_files(self.path), bytearray()
        documents_per_shard: list[int] = []

        def each_statistics() -> Iterator[dict[str, Any]]:
            for shard in range(num_shards):
                record, entry = read_record(self.path, shard), files.get(f"{shard_name(shard)}.h5")
                if record is None or entry is None or record.sha256 != entry.sha256:
                    raise CacheFormatError("a shard is incomplete", where=self.path / shard_name(shard))
                documents_per_shard.append(len(record.documents))
                lengths.extend(doc_lengths([record]))
                yield record.statistics

        statistics = combine(each_statistics())
        write_bytes(self.path / DOC_LENGTHS, bytes(lengths))
        files[DOC_LENGTHS] = FileEntry(bytes=len(lengths), sha256=hashlib.sha256(lengths).hexdigest())
        return Manifest(
            label_identity=label_identity(identity),
            identity=dict(identity),
            sources=[dict(source) for source in sources],
            **{key: self.build[key] for key in HEAD_KEYS},
            documents_per_shard=documents_per_shard,
            num_documents=statistics["documents"],
            num_tokens=statistics["tokens"],
            num_entries=statistics["entries"],
            statistics=statistics,
            files=dict(sorted(files.items())),
            build=self.build,
            derived_from=None if derived_from is None else dict(derived_from),
        )

    def close(self) -> None:
        """Release the lock; what is written stays."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        """Look again, now that the folder is ours; clear what a killed process left; write `build.json`."""
        check_folder(self.path, self.build)
        remove_leftovers(self.path)
        self.finished = is_finished(self.path)
        if self.finished:
            self.close()
            return
        with contextlib.suppress(CacheFormatError, CacheCorruptError):  # no manifest: nothing says what is damaged
            for name in check_files(self.path, read_manifest(self.path).files):
                log(f"{self.path / name} is damaged or missing; removed, to be made again")
                (self.path / name).unlink(missing_ok=True)
        (self.path / MANIFEST).unlink(missing_ok=True)
        if not (self.path / BUILD).exists():
            write_json(self.path / BUILD, build_file(self.build))

    def _locked(self) -> Lock:
        if self._lock is None:
            raise ResumeError("this cache is finished or its writer closed", where=self.path)
        return self._lock


def check_folder(path: Path, options: Mapping[str, Any], *, partly: bool = False) -> None:
    """Refuse a folder that is no cache, or one that was begun with other options.

    Args:
        path: need not be there.
        options: of the build, as JSON values; with `partly` those that are known yet.

    Raises:
        ResumeError: with what differs.
    """
    require_outside_caches(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise ResumeError("the cache's path is not a folder", where=path, fix="name another --out")
    for entry in path.iterdir():
        if not is_ours(entry):
            what, fix = "the folder holds something that is no cache", "name another --out"
            raise ResumeError(what, where=path, got=entry.name, fix=fix)
    try:
        old = json.loads((path / BUILD).read_bytes())
    except FileNotFoundError:
        started = [entry.name for entry in path.iterdir() if SHARD_PATTERN.fullmatch(entry.name)]
        if started:
            raise ResumeError("the folder holds shards and no build.json", where=path, got=started[0]) from None
        return
    except ValueError as error:
        raise ResumeError("build.json cannot be read", where=path / BUILD, got=error) from error
    if not isinstance(old, dict) or old.get("format") != FORMAT or not isinstance(old.get("options"), dict):
        raise ResumeError("build.json is not that of a cache", where=path / BUILD, fix="name another --out")
    if old.get("version") != VERSION:
        raise ResumeError("the build has another version", where=path, expected=VERSION, got=old.get("version"))
    begun = {key: value for key, value in old["options"].items() if not partly or key in options}
    # Other sources also change the number of shards, which tells nobody anything.
    differences = sorted(option_differences(begun, options), key=lambda found: found[0] == "num_shards")
    for key, before, now in differences:
        more = ""
        if key == "sources":
            more = f"; with --skip-in {path} a new cache holds only what this one does not"
            before, now = (
                ", ".join(f"{s.get('name')} {s.get('split')}, digest {s.get('digest')}" for s in sources)
                for sources in (before, now)
            )
        raise ResumeError(
            f"the cache was begun with {'other sources' if key == 'sources' else f'another {key}'}",
            where=path,
            expected=before,
            got=now,
            fix=f"use the old option, or name another --out{more}",
        )


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
