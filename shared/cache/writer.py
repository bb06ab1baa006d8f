"""Writing a cache: shards one by one into a claimed directory, the manifest last."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from shared.cache.assemble import assemble, extensions
from shared.cache.directory import (
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
from shared.cache.encode import encode_shard, shard_options
from shared.cache.format import (
    BUILD,
    FORMAT,
    MANIFEST,
    MANIFEST_SHA256,
    SHARD_PATTERN,
    VERSION,
    Array,
    ShardArrays,
    shard_name,
)
from shared.cache.lock import Claim, SharedClaim
from shared.cache.manifest import read_manifest, write_manifest
from shared.errors import CacheCorruptError, CacheFormatError, ResumeError
from shared.files import write_bytes, write_json
from shared.process import log

SHARD_TOKENS = 32_768


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
            sources: the data sets, each with name, split, revision, license, digest, num_documents.
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
            more = ""
            if key == "sources":
                more = f"; with --skip-in {self.path} a new cache holds only what this one does not"
                before, now = (
                    ", ".join(f"{s.get('name')} {s.get('split')}, digest {s.get('digest')}" for s in sources)
                    for sources in (before, now)
                )
            raise ResumeError(
                f"the cache was begun with another {key}"
                if key != "sources"
                else "the cache was begun with other sources",
                where=self.path,
                expected=before,
                got=now,
                fix=f"use the old option, or name another --out{more}",
            )


def resolved(build: Mapping[str, Any]) -> dict[str, Any]:
    """A build's options as `build.json` holds them."""
    options: dict[str, Any] = json.loads(json.dumps({"filter": "gzip"} | dict(build), allow_nan=False))
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
