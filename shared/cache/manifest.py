"""The JSON files of a cache: the manifest, and one record a shard. Each seals itself with a digest of its own bytes."""

import hashlib
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from shared.cache.format import (
    BUILD,
    CODECS,
    FILTERS,
    FORMAT,
    IDENTITY_PARTS,
    MANIFEST,
    MAX_TOP_K,
    SHARD_PATTERN,
    VERSION,
    shard_name,
    temperature_key,
)
from shared.errors import CacheCorruptError, CacheFormatError
from shared.files import sha256_file, sha256_json, to_json, write_bytes
from shared.lock import LOCK
from shared.records import from_dict, to_dict

HEAD_KEYS = ("codec", "filter", "temperatures", "top_k", "tokenizer_size", "head_width")  # what shards are encoded with
NEWER = "read it with a newer codedistill"
_SEAL = re.compile(rb',\n  "digest": "([0-9a-f]{64})"\n}\n\Z')


class FileEntry(NamedTuple):
    """Size and SHA-256 (hex) of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What `manifest.json` says of a finished cache; FORMAT.md describes each field."""

    label_identity: str
    identity: dict[str, Any]
    sources: list[dict[str, Any]]
    codec: str
    filter: str
    temperatures: list[float]
    top_k: int
    tokenizer_size: int
    head_width: int
    documents_per_shard: list[int]
    num_documents: int
    num_tokens: int
    num_entries: int
    statistics: dict[str, Any]
    files: dict[str, FileEntry]
    build: dict[str, Any] | None = None
    derived_from: dict[str, Any] | None = None

    @property
    def num_shards(self) -> int:
        """Shards are numbered from 0."""
        return len(self.documents_per_shard)

    @property
    def shard_digests(self) -> dict[str, str]:
        """SHA-256 of each shard, by file name."""
        names = (f"{shard_name(shard)}.h5" for shard in range(self.num_shards))
        return {name: self.files[name].sha256 for name in names}

    @property
    def head_options(self) -> dict[str, Any]:
        """The options that the shards are encoded with."""
        return {key: getattr(self, key) for key in HEAD_KEYS}

    @property
    def digest(self) -> str:
        """SHA-256 of what the cache holds: labels, sources and shards, and not what was measured of the teacher."""
        return sha256_json([self.label_identity, self.sources, list(self.shard_digests.values())])

    @property
    def as_input(self) -> dict[str, Any]:
        """What a cache that is made from this one says of it: its digest, and what it was made from itself."""
        own = {"derived_from": self.derived_from} if self.derived_from else {}
        return {"digest": self.digest, **own}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """What a shard's JSON says of it and of its `.h5` file."""

    shard: int  # its number
    bytes: int
    sha256: str
    statistics: dict[str, Any]  # FORMAT.md, "Statistics"
    documents: list[Any]  # their ids
    doc_lengths: list[int]  # their tokens
    capture: dict[str, Any] = field(default_factory=dict)  # token budget, versions, …; no times: bytes are reproducible


def written_text(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many documents of these data sets models wrote, by who wrote them; nothing where none did."""
    total: dict[str, Counter[str]] = {}
    for source in sources:
        for origin, counts in source.get("written", {}).items():
            total.setdefault(origin, Counter()).update(counts)
    return [
        f"{counts['documents']:,} documents were written by a {origin}; {counts['passed']:,} passed their tests"
        for origin, counts in total.items()
    ]


def seal(value: Mapping[str, Any]) -> bytes:
    """JSON whose last key, `digest`, is the SHA-256 of all bytes before it."""
    body = to_json(dict(value)).encode().removesuffix(b"\n}\n")
    return body + b',\n  "digest": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def unseal(data: bytes) -> dict[str, Any]:
    """The value of sealed JSON, without its digest.

    Raises:
        ValueError: no such JSON, or a byte of it has changed.
    """
    found = _SEAL.search(data)
    if found is None:
        raise ValueError("its last line is no digest")
    digest = hashlib.sha256(data[: found.start()]).hexdigest()
    if digest != found[1].decode():
        raise ValueError(f"SHA-256 {digest}, expected {found[1].decode()}")
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    value.pop("digest")
    return value


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace the manifest: the old one or the new one is there, whole, whenever the process is killed."""
    fields = {key: value for key, value in to_dict(replace(manifest, files={})).items() if value is not None}
    fields["files"] = {name: entry._asdict() for name, entry in manifest.files.items()}
    write_bytes(directory / MANIFEST, seal({"format": FORMAT, "version": VERSION, **fields}))


def read_manifest(directory: Path) -> Manifest:
    """Read a cache's manifest.

    Raises:
        CacheFormatError: no cache, an unfinished one, an unknown version, or a mandatory field is missing.
        CacheCorruptError: the manifest cannot be read, or a byte of it has changed.
    """
    file = directory / MANIFEST
    try:
        data = file.read_bytes() if file.is_file() or not file.exists() else None  # reading a pipe would block
    except (FileNotFoundError, NotADirectoryError):
        raise _no_manifest(directory) from None
    except OSError as error:  # no rights, a loop of links
        raise CacheCorruptError("a file of the cache cannot be read", where=file, got=error.strerror) from error
    if data is None:
        raise CacheCorruptError("the manifest is no regular file", where=file)
    return parse_manifest(data, file)


def parse_manifest(data: bytes, file: Path | str) -> Manifest:
    """A manifest's content; `file` is where it lies. Raises as `read_manifest`."""
    try:
        value = unseal(data)
    except ValueError as error:
        _check_version(_json_object(data), file)  # another version may be sealed otherwise
        fix = "copy the cache again, or run the command that made it again"
        raise CacheCorruptError("the manifest is damaged", where=file, got=error, fix=fix) from error
    _check_version(value, file)
    files = _entries(value.get("files"), file)
    record = from_dict(Manifest, value | {"files": {}}, where=str(file), error=CacheFormatError, strict=False)
    manifest = replace(record, files=files)
    _check_values(file, manifest)
    return manifest


def write_record(directory: Path, record: ShardRecord) -> None:
    """Write a shard's JSON; it comes after its `.h5` file, so that the pair is complete exactly if the two agree."""
    value = {"format": FORMAT, "version": VERSION, **to_dict(record)}
    write_bytes(directory / f"{shard_name(record.shard)}.json", seal(value))


def parse_record(data: bytes, shard: int) -> ShardRecord:
    """A shard's JSON.

    Raises:
        ValueError: a byte has changed, a field is missing, or it is another shard's.
    """
    value = unseal(data)
    if (value.get("format"), value.get("version"), value.get("shard")) != (FORMAT, VERSION, shard):
        raise ValueError(f"it is not the record of {shard_name(shard)}, {FORMAT} {VERSION}")
    record = from_dict(ShardRecord, value, where=f"{shard_name(shard)}.json", error=CacheFormatError, strict=False)
    if len(record.documents) != len(record.doc_lengths):
        raise ValueError("documents and doc_lengths are of unequal lengths")
    return record


def read_record(directory: Path, shard: int) -> ShardRecord | None:
    """A shard's record if it is whole itself, whatever became of the shard."""
    file = directory / f"{shard_name(shard)}.json"
    try:
        return parse_record(file.read_bytes(), shard) if file.is_file() else None
    except (OSError, ValueError):
        return None


def read_pair(directory: Path, shard: int) -> ShardRecord | None:
    """A shard's record if it is whole and describes the shard's file, byte for byte."""
    record, file = read_record(directory, shard), directory / f"{shard_name(shard)}.h5"
    try:
        if record is None or not file.is_file() or file.stat().st_size != record.bytes:
            return None
        return record if sha256_file(file) == record.sha256 else None
    except OSError:
        return None


def build_file(options: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `build.json`."""
    return {"format": FORMAT, "version": VERSION, "options": dict(options)}


def doc_lengths(records: Sequence[ShardRecord]) -> bytes:
    """The content of `doc_lengths.u32`: tokens of every document of the cache, in order."""
    lengths = [length for record in records for length in record.doc_lengths]
    return struct.pack(f"<{len(lengths)}I", *lengths)


def _no_manifest(directory: Path) -> CacheFormatError:
    """Why a folder without a manifest is no finished cache."""
    if not directory.is_dir():
        return CacheFormatError("there is no cache here", where=directory, got="no such folder")
    names = {entry.name for entry in directory.iterdir()}
    shards = {m[1] for name in names if (m := SHARD_PATTERN.fullmatch(name))}
    if not shards and BUILD not in names:
        return CacheFormatError("not a logit cache", where=directory, expected=f"{MANIFEST} and shards")
    return CacheFormatError(
        "an unfinished logit cache",
        where=directory,
        expected=MANIFEST,
        got=f"{len(shards)} shards and no manifest",
        fix="run again the command that began it: it keeps finished shards",
    )


def _json_object(data: bytes) -> Any:
    """What JSON gives; the format's name and version alone where it gives nothing, since the seal tells of damage."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return {"format": FORMAT, "version": VERSION}


def _check_version(value: Any, file: Path | str) -> None:
    """Refuse JSON of another format or version."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise CacheFormatError("not a logit cache", where=file, expected=FORMAT)
    if (got := value.get("version")) != VERSION:
        raise CacheFormatError("unknown version of the cache format", where=file, expected=VERSION, got=got, fix=NEWER)


def _entries(files: Any, file: Path | str) -> dict[str, FileEntry]:
    """The list of files, of which there may be a million."""
    entries = {}
    for name, entry in files.items() if isinstance(files, dict) else [("files", None)]:
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or type(digest) is not str:
            raise CacheFormatError("the manifest lists a file wrongly", where=file, got=ascii(name))
        entries[name] = FileEntry(size, digest)
    return entries


def is_hidden(name: str) -> bool:
    """Whether a part of a relative name begins with a dot, as `..` and `.git` do: no file of a cache is named so."""
    return "/." in f"/{name}"


def _check_values(file: Path | str, manifest: Manifest) -> None:
    """Refuse values that no writer makes, so that nobody who reads them further on stumbles."""

    def refuse(what: str, expected: Any = None, got: Any = None, fix: str | None = None) -> None:
        raise CacheFormatError(what, where=file, expected=expected, got=got, fix=fix)

    for key, known in (("codec", tuple(CODECS)), ("filter", FILTERS)):
        if getattr(manifest, key) not in known:
            refuse(f"unknown {key}", " or ".join(known), getattr(manifest, key), NEWER)
    grid = manifest.temperatures
    if not all(0 < T < math.inf for T in grid) or 1.0 not in grid:
        refuse("the manifest's temperatures cannot be used", got=grid)
    for key in ("top_k", "tokenizer_size", "head_width", "num_shards", "num_documents", "num_tokens"):
        if getattr(manifest, key) < 1 or (key == "top_k" and manifest.top_k > MAX_TOP_K):
            refuse(f"the manifest's {key} is out of range", got=getattr(manifest, key))
    if min(manifest.documents_per_shard) < 1 or sum(manifest.documents_per_shard) != manifest.num_documents:
        refuse("documents_per_shard does not add up to num_documents", manifest.num_documents)
    shards = set()
    for name in manifest.files:
        if match := SHARD_PATTERN.fullmatch(name):
            if match[2] == "h5":
                shards.add(name)
            continue
        path = PurePosixPath(name)  # it stays inside the folder, in its one plain spelling, and is not what Git reads
        is_plain = not path.is_absolute() and path.as_posix() == name and "\0" not in name
        if not is_plain or is_hidden(name) or name in (MANIFEST, LOCK):
            refuse("the manifest lists a file wrongly", got=ascii(name))
    if shards != {f"{shard_name(shard)}.h5" for shard in range(manifest.num_shards)}:
        refuse("the manifest lists other shards", f"{manifest.num_shards} from {shard_name(0)} on", len(shards))
    parts = {f"identity.{key}": manifest.identity.get(key) for key in IDENTITY_PARTS}
    for key in ("captured_mass", "codec_kl_nats"):
        by_temperature = manifest.statistics.get(key)
        for T in map(temperature_key, grid):
            parts[f"statistics.{key}.{T}"] = by_temperature.get(T) if isinstance(by_temperature, dict) else None
    for key, part in parts.items():
        if not isinstance(part, dict):
            refuse("the manifest lacks a field", f"{key} (dict)")
