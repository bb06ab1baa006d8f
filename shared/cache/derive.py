"""A cache made from the shards of others: copied byte for byte, or decoded, cut and encoded again."""

import errno
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from shared.cache.assemble import HEAD_KEYS
from shared.cache.directory import plain_errors, read_json_object
from shared.cache.encode import encode_shard, shard_options
from shared.cache.format import TEACHER_EVAL, TOKENIZER, Array, Samples, ShardArrays, indptr, shard_name
from shared.cache.hdf5 import load_filters
from shared.cache.manifest import read_manifest
from shared.cache.rows import exact
from shared.cache.shard import decode_shard
from shared.cache.writer import CacheWriter
from shared.errors import CacheCorruptError, CacheFormatError
from shared.files import sha256_json, write_bytes
from shared.progress import progress

SUPPORTING = (TOKENIZER, TEACHER_EVAL)
TEACHERS_OWN = ("entropy_nats", "teacher_nll_nats", "teacher_nll_all_nats")  # figures of no row that is stored


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """A finished cache that shards are taken from."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> "Input":
        """Read its manifest; refuses what is no finished cache."""
        return cls(path=Path(path), manifest=read_manifest(Path(path)))

    def digest(self) -> str:
        """SHA-256 of what it holds: labels, sources and shards, and not what was measured of the teacher."""
        files, shards = self.manifest["files"], range(self.manifest["num_shards"])
        digests = [files[f"{shard_name(shard)}.h5"]["sha256"] for shard in shards]
        return sha256_json([self.manifest["label_identity"], self.manifest["sources"], digests])

    def record(self) -> dict[str, Any]:
        """What a cache that is made from it says of it: its digest, and what it was made from itself."""
        own = self.manifest.get("derived_from")
        return {"digest": self.digest()} | ({"derived_from": own} if own else {})

    def read(self, name: str) -> bytes:
        """A file's bytes.

        Raises:
            CacheCorruptError: it is missing, or its bytes are not those of the manifest.
        """
        expected, file = self.manifest["files"].get(name, {}).get("sha256"), self.path / name
        try:
            if file.exists() and not file.is_file():  # a pipe would block
                raise OSError(errno.EINVAL, "no regular file")
            data = file.read_bytes()
        except OSError as error:
            raise CacheCorruptError(
                "a file of a cache cannot be read", where=file, got=error.strerror, fix="cache repair"
            ) from error
        digest = hashlib.sha256(data).hexdigest()
        if digest != expected:
            fix = "copy the cache again, or codedistill cache repair"
            raise CacheCorruptError(
                "a file's bytes have changed", where=self.path / name, expected=expected, got=digest, fix=fix
            )
        return data

    def shard(self, shard: int) -> tuple[bytes, dict[str, Any]]:
        """A shard's bytes and its JSON, both checked."""
        self.read(f"{shard_name(shard)}.json")
        record = read_json_object(self.path / f"{shard_name(shard)}.json")
        if record is None:
            raise CacheCorruptError("a shard's JSON cannot be read", where=self.path / f"{shard_name(shard)}.json")
        return self.read(f"{shard_name(shard)}.h5"), record

    def documents(self, shard: int) -> list[dict[str, Any]]:
        """The JSON objects of a shard's documents; nothing else of it is read, so its SHA-256 is not checked."""
        file = self.path / f"{shard_name(shard)}.h5"
        try:
            with h5py.File(file, "r", locking=False) as handle:
                load_filters(handle)
                blob, borders = handle["doc_meta"][()].tobytes(), handle["doc_meta_indptr"][()]
            return [json.loads(blob[start:stop]) for start, stop in itertools.pairwise(borders)]
        except CacheFormatError:
            raise
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise CacheCorruptError("a shard cannot be read", where=file, got=error, fix="cache repair") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Documents of one shard of an input: `keep` is a mask over them, bool `[D]`, not all False."""

    source: Input
    shard: int
    keep: Array


def write_derived(
    out: Path,
    parts: Sequence[Part],
    *,
    build: Mapping[str, Any],
    identity: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
    cut: Callable[[ShardArrays], ShardArrays] | None = None,
    files: Input,
    teacher_eval: Input | None = None,
) -> None:
    """Write a cache from parts of others; run again after a kill it continues.

    A shard that is wholly kept is copied byte for byte unless `cut` or the filter changes it. Figures that no stored
    row tells (the teacher's entropy and likelihood) stay with a shard that is wholly kept, and are unknown for one
    that is not.

    Args:
        out: the new cache's directory.
        parts: its shards, in order.
        build: the options that decide its bytes; codec, filter and sizes among them.
        identity, sources, provenance: for the manifest.
        cut: changes the rows; the encoding's error is then measured against the rows before it. Without it, values are
            encoded as they were and their error is that of the shard they come from.
        files: the input whose `tokenizer/` is taken; teacher_eval: the one whose `teacher_eval/` is.
    """
    with CacheWriter(out, {**build, "num_shards": len(parts)}) as writer:
        if writer.finished:
            return
        first_document = 0
        with progress("writing", len(parts), "shards") as bar:
            for number, part in enumerate(parts):
                if not writer.has_shard(number):
                    data, record = _encode(part, writer.build, cut)
                    writer.copy_shard(number, data, record, {"first_document": first_document})
                first_document += int(part.keep.sum())
                bar.advance(1)
        for source, folder in ((files, TOKENIZER), (teacher_eval, TEACHER_EVAL)):
            names = [name for name in source.manifest["files"] if name.startswith(f"{folder}/")] if source else []
            for name in names:
                with plain_errors(out):
                    (out / name).parent.mkdir(parents=True, exist_ok=True)
                    write_bytes(out / name, source.read(name) if source else b"")
        writer.finish(identity, sources, provenance)


def _encode(
    part: Part, build: Mapping[str, Any], cut: Callable[[ShardArrays], ShardArrays] | None
) -> tuple[bytes, dict[str, Any]]:
    data, record = part.source.shard(part.shard)
    whole = bool(part.keep.all())
    if whole and cut is None and build["filter"] == part.source.manifest["filter"]:
        return data, record
    where = part.source.path / f"{shard_name(part.shard)}.h5"
    arrays = exact(decode_shard(data, where), part.source.manifest["temperatures"])
    if not whole:
        arrays = select(arrays, part.keep)
    data, statistics = encode_shard(arrays if cut is None else cut(arrays), **shard_options(build))
    before = record["statistics"]
    if whole:
        statistics |= {key: before[key] for key in TEACHERS_OWN}
    if cut is None:
        statistics["codec_kl_nats"] = before["codec_kl_nats"]
    sizes = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return data, {
        **record,
        **sizes,
        "statistics": statistics,
        "documents": [meta.get("id") for meta in arrays.doc_meta],
    }


def select(arrays: ShardArrays, keep: Array) -> ShardArrays:
    """The rows of some documents: `keep` is bool `[D]`."""
    lengths = np.diff(arrays.doc_indptr)
    rows = np.repeat(keep, lengths)
    entries = np.repeat(rows, arrays.k)
    samples = arrays.samples
    if samples is not None:
        samples = _select_samples(samples, rows)
    return replace(
        arrays,
        tokens=arrays.tokens[rows],
        loss_mask=arrays.loss_mask[rows],
        doc_indptr=indptr(lengths[keep]),
        doc_meta=[meta for meta, kept in zip(arrays.doc_meta, keep, strict=True) if kept],
        k=arrays.k[rows],
        topk_ids=arrays.topk_ids[entries],
        topk_margins=arrays.topk_margins[entries],
        tail_log=arrays.tail_log[rows],
        gold_logprob=None if arrays.gold_logprob is None else arrays.gold_logprob[rows],
        gold_in_topk=arrays.gold_in_topk[rows],
        entropy_nats=None if arrays.entropy_nats is None else arrays.entropy_nats[rows],
        samples=samples,
    )


def _select_samples(samples: Samples, rows: Array) -> Samples:
    drawn = np.repeat(rows, samples.k)
    return replace(
        samples,
        k=samples.k[rows],
        ids=samples.ids[drawn],
        counts=samples.counts[drawn],
        margins=samples.margins[drawn],
    )


def head_options(source: Input) -> dict[str, Any]:
    """The options that a cache's shards are encoded with."""
    return {key: source.manifest[key] for key in HEAD_KEYS}
