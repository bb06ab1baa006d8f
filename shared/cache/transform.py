"""Caches made from others, shard by shard: merged, sliced. Shards are copied, or decoded, cut and encoded again."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache.directory import plain_errors
from shared.cache.encode import encode_shard, shard_options
from shared.cache.format import TEACHER_EVAL, TOKENIZER, Array, ShardArrays, is_in, shard_name
from shared.cache.identity import require_same_labels
from shared.cache.manifest import ShardRecord
from shared.cache.reader import Cache
from shared.cache.rows import exact, select, truncate
from shared.cache.shard import decode_shard
from shared.cache.writer import CacheWriter
from shared.errors import CacheMismatchError, ConfigError, require
from shared.files import sha256_json, write_bytes
from shared.progress import progress

TEACHERS_OWN = ("entropy_nats", "teacher_nll_nats", "teacher_nll_all_nats")  # figures of no row that is stored


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Documents of one shard of a cache: `keep` is a mask over them, bool `[D]`, not all False."""

    source: Cache
    shard: int
    keep: Array


def merge_caches(paths: Sequence[Path | str], out: Path | str) -> int:
    """Write the documents of several caches, in order, as one cache; run again after a kill it continues.

    Shards are taken byte for byte, where the file system can as hard links. A document whose digest an earlier cache
    holds is left out, which encodes its shard again. Parts of one build (`teacher build --part`) hold different
    documents by construction: nothing is left out between them, and they are put in order if nothing else is merged.
    `teacher_eval/` comes from the first cache that has one.

    Returns:
        The number of documents left out.

    Raises:
        ConfigError: fewer than two caches, or a part twice.
        CacheMismatchError: the caches' labels or encodings differ; both are named, and in what.
        CacheFormatError, CacheCorruptError: one of them is no finished cache, or damaged.
    """
    if len(paths) < 2:
        raise ConfigError("nothing to merge", expected="two caches or more", got=len(paths))
    inputs = _in_order([Cache(path, complete=False) for path in paths])
    first = inputs[0]
    for other in inputs[1:]:
        require_same_labels(
            first.manifest.identity, other.manifest.identity, ours_name=first.path, theirs_name=other.path
        )
        for key, value in first.manifest.head_options.items():
            if (got := other.manifest.head_options[key]) != value:
                what = f"the {key} of {first.path} and {other.path} differ"
                fix = "codedistill cache slice --filter makes a copy of either" if key == "filter" else None
                raise CacheMismatchError(what, expected=value, got=got, fix=fix)
    parts, num_duplicates = _merged(inputs)
    sources: list[dict[str, Any]] = []
    for source in (source for cache in inputs for source in cache.manifest.sources):
        if source not in sources:
            sources.append(source)
    derived_from = {
        "command": "cache merge",
        "inputs": [cache.manifest.as_input | {"sources": len(cache.manifest.sources)} for cache in inputs],
        "num_duplicates": num_duplicates,
    }
    digests = [cache.manifest.digest for cache in inputs]
    write_derived(
        Path(out),
        parts,
        build={"command": "cache merge", "inputs": digests, **first.manifest.head_options},
        identity=first.manifest.identity,
        sources=sources,
        derived_from=derived_from,
        files=first,
        teacher_eval=next((cache for cache in inputs if _has_results(cache)), None),
    )
    return num_duplicates


def _part_of_build(cache: Cache) -> tuple[str, int] | None:
    """The build that a cache is a part of, and which part; None for a cache that is a whole."""
    build = dict(cache.manifest.build or {})
    match build.pop("part", None):
        case [int(number), int(count)]:
            build.pop("num_shards", None)
            return sha256_json([build, count]), number
    return None


def _in_order(caches: list[Cache]) -> list[Cache]:
    """The caches as given, or by number where all are parts of one build."""
    found = [_part_of_build(cache) for cache in caches]
    parts = [part for part in found if part is not None]
    for part, cache in zip(found, caches, strict=True):
        require(part is None or parts.count(part) == 1, "a part is given twice", where=cache.path)
    if len(parts) < len(caches) or len({build for build, _ in parts}) > 1:
        return caches
    return [cache for _, cache in sorted(zip(parts, caches, strict=True), key=lambda pair: pair[0][1])]


def _merged(inputs: Sequence[Cache]) -> tuple[list[Part], int]:
    """The shards to write, and how many documents are in an earlier cache already."""
    parts, num_duplicates = [], 0
    owned: dict[Any, list[Array]] = {}  # by cache or build: fingerprints of the documents it was the first to hold
    for number, cache in enumerate(inputs):
        part = _part_of_build(cache)
        here = number if part is None else part[0]
        earlier = [known for owner, several in owned.items() if owner != here for known in several]
        ours = []
        for shard in range(cache.num_shards):
            digests = [meta.get("digest") for meta in cache.document_meta(shard)]
            fingerprints = _fingerprints(digests)
            keep = np.array([digest is None for digest in digests])
            keep |= ~np.any([is_in(fingerprints, known) for known in earlier], axis=0) if earlier else True
            ours.append(fingerprints[keep])
            num_duplicates += int((~keep).sum())
            if keep.any():
                parts.append(Part(source=cache, shard=shard, keep=keep))
        owned.setdefault(here, []).append(np.sort(np.concatenate(ours)))
    return parts, num_duplicates


def _fingerprints(digests: Sequence[Any]) -> Array:
    """16 bytes for each digest, so that those of all documents fit in memory."""
    return np.array([hashlib.sha256(repr(digest).encode()).digest()[:16] for digest in digests], "S16")


def _has_results(cache: Cache) -> bool:
    return any(name.startswith(f"{TEACHER_EVAL}/") for name in cache.manifest.files)


def slice_cache(
    path: Path | str,
    out: Path | str,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    documents: int | None = None,
    source: str | None = None,
    codec: str | None = None,
    filter: str | None = None,
) -> None:
    """Write part of a cache as a cache of its own; run again after a kill it continues.

    Entries that are dropped join their row's tail. Fewer entries or another codec are another label identity, whose
    label options record them and the identity they come from; fewer documents or another filter are not.

    Args:
        top_k: most entries of a row.
        top_p: rows keep their shortest prefix of this probability at T = 1.
        documents: keep the first so many, parts of a split document counted one by one; after `source`.
        source: keep only the documents of this data set.
        codec: `q` or `f16`; filter: `gzip` or `zstd`.

    Raises:
        ConfigError: options that keep nothing or ask for more than there is.
        CacheFormatError, CacheCorruptError: no finished cache, or a damaged one.
    """
    whole = Cache(path, complete=False)
    manifest = whole.manifest
    if top_k is not None and not 1 <= top_k <= manifest.top_k:
        raise ConfigError("top-k is out of range", where=path, expected=f"1 to the cache's {manifest.top_k}", got=top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError("top-p is out of range", expected="above 0, at most 1", got=top_p)
    if documents is not None and documents < 1:
        raise ConfigError("nothing would be kept", where="documents", expected="at least 1", got=documents)
    head = manifest.head_options
    changes: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "codec": codec}
    changes = {key: value for key, value in changes.items() if value is not None and value != head.get(key)}
    head |= {key: value for key, value in changes.items() if key in head}
    head |= {} if filter is None else {"filter": filter}
    identity, sources = manifest.identity, manifest.sources
    if changes:
        labels = identity["labels"] | changes | {"derived_from": manifest.label_identity}
        identity = identity | {"labels": labels}
    if source is not None:
        names = sorted({str(known.get("name")) for known in sources})
        sources = [known for known in sources if known.get("name") == source]
        if not sources:
            raise ConfigError("the cache has no such source", where=path, expected=" or ".join(names), got=source)
    options = {"source": source, "documents": documents, **changes}

    def cut(arrays: ShardArrays) -> ShardArrays:
        return truncate(arrays, head["temperatures"], top_k=changes.get("top_k"), top_p=changes.get("top_p"))

    write_derived(
        Path(out),
        _kept(whole, documents, source),
        build={"command": "cache slice", "inputs": [manifest.digest], "slice": options, **head},
        identity=identity,
        sources=sources,
        derived_from={
            "command": "cache slice",
            "inputs": [manifest.as_input | {"label_identity": manifest.label_identity}],
            "options": options,
            **({"codec_kl_nats": manifest.statistics["codec_kl_nats"]} if changes else {}),
        },
        cut=cut if changes else None,
        files=whole,
        teacher_eval=whole,
    )


def _kept(whole: Cache, documents: int | None, source: str | None) -> list[Part]:
    parts, left = [], documents
    for shard in range(whole.num_shards):
        metas = whole.document_meta(shard)
        keep = np.array([source is None or meta.get("source") == source for meta in metas])
        if left is not None:
            keep &= np.cumsum(keep) <= left
            left -= int(keep.sum())
        if keep.any():
            parts.append(Part(source=whole, shard=shard, keep=keep))
        if left == 0:
            break
    if not parts:
        raise ConfigError("nothing would be kept", where=whole.path, got=f"no document of {source}")
    return parts


def write_derived(
    out: Path,
    parts: Sequence[Part],
    *,
    build: Mapping[str, Any],
    identity: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    derived_from: Mapping[str, Any],
    cut: Callable[[ShardArrays], ShardArrays] | None = None,
    files: Cache,
    teacher_eval: Cache | None = None,
) -> None:
    """Write a cache from parts of others; run again after a kill it continues.

    A shard that is wholly kept is copied byte for byte unless `cut` or the filter changes it. Figures that no stored
    row tells (the teacher's entropy and likelihood) stay with a shard that is wholly kept, and are unknown for one
    that is not.

    Args:
        build: the options that decide its bytes; codec, filter and sizes among them.
        identity, sources, derived_from: for the manifest.
        cut: changes the rows; the encoding's error is then measured against the rows before it. Without it, values are
            encoded as they were and their error is that of the shard they come from.
        files: the cache whose `tokenizer/` is taken; teacher_eval: the one whose `teacher_eval/` is.
    """
    with CacheWriter(out, {**build, "num_shards": len(parts)}) as writer:
        if writer.finished:
            return
        with progress("writing", len(parts), "shards") as bar:
            for number, part in enumerate(parts):
                if not writer.has_shard(number):
                    data, record, file = _encode(part, writer.build, cut)
                    writer.copy_shard(data, replace(record, shard=number), source=file)
                bar.advance(1)
        for source, folder in ((files, TOKENIZER), (teacher_eval, TEACHER_EVAL)):
            names = [name for name in source.manifest.files if name.startswith(f"{folder}/")] if source else []
            for name in names:
                with plain_errors(out):
                    (out / name).parent.mkdir(parents=True, exist_ok=True)
                    write_bytes(out / name, source.read(name) if source else b"")
        writer.finish(identity, sources, derived_from)


def _encode(
    part: Part, build: Mapping[str, Any], cut: Callable[[ShardArrays], ShardArrays] | None
) -> tuple[bytes, ShardRecord, Path | None]:
    """A part's bytes and record, and the file that has these bytes where one does."""
    cache, name = part.source, f"{shard_name(part.shard)}.h5"
    record, data = cache.record(part.shard), cache.read(name)
    whole = bool(part.keep.all())
    if whole and cut is None and build["filter"] == cache.manifest.filter:
        return data, record, cache.path / name
    arrays = exact(decode_shard(data, cache.path / name), cache.temperatures)
    if not whole:
        arrays = select(arrays, part.keep)
    data, statistics = encode_shard(arrays if cut is None else cut(arrays), **shard_options(build))
    if whole:
        statistics |= {key: record.statistics[key] for key in TEACHERS_OWN}
    if cut is None:
        statistics["codec_kl_nats"] = record.statistics["codec_kl_nats"]
    record = replace(
        record,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        statistics=statistics,
        documents=[meta.get("id") for meta in arrays.doc_meta],
        doc_lengths=np.diff(arrays.doc_indptr).tolist(),
    )
    return data, record, None
