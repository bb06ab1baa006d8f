"""The manifest and its digest: read as a pair, replaced as a pair.

Two files cannot be renamed at once, so a replacement goes: the new manifest in full as `manifest.json.new`, then
`manifest.sha256`, then the rename of `manifest.json.new` to `manifest.json`. The manifest is whichever of the two files
matches `manifest.sha256`. Killed before the digest's rename, the old manifest holds; killed after it, the new one; a
command that writes to the cache then completes the rename.
"""

import contextlib
import hashlib
import json
import math
from pathlib import Path, PurePosixPath
from typing import Any

from shared.cache.format import (
    BUILD,
    CODECS,
    FILTERS,
    FORMAT,
    IDENTITY_PARTS,
    MANIFEST,
    MANIFEST_PENDING,
    MANIFEST_SHA256,
    MAX_TOP_K,
    SHARD_PATTERN,
    VERSION,
    temperature_key,
)
from shared.errors import CacheCorruptError, CacheFormatError
from shared.files import fsync_directory, to_json, write_bytes

REQUIRED = {
    "label_identity": str,
    "identity": dict,
    "sources": list,
    "codec": str,
    "filter": str,
    "temperatures": list,
    "top_k": int,
    "tokenizer_size": int,
    "head_width": int,
    "num_shards": int,
    "num_documents": int,
    "num_tokens": int,
    "num_entries": int,
    "statistics": dict,
    "files": dict,
}


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest that `manifest.sha256` vouches for; writes nothing.

    Raises:
        CacheFormatError: no cache, an unfinished one, an unknown version, or a mandatory field is missing.
        CacheCorruptError: manifest and digest do not match.
    """
    data = _current(directory)[1]
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CacheFormatError("the manifest is not JSON", where=directory / MANIFEST, got=error) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CacheFormatError("this is no logit cache", where=directory / MANIFEST, expected=FORMAT)
    if manifest.get("version") != VERSION:
        raise CacheFormatError(
            "unknown version of the cache format",
            where=directory,
            expected=VERSION,
            got=manifest.get("version"),
            fix="read it with a newer codedistill",
        )
    for key, kind in REQUIRED.items():
        if not isinstance(manifest.get(key), kind):
            raise CacheFormatError("the manifest lacks a field", where=directory, expected=f"{key} ({kind.__name__})")
    _check_values(directory, manifest)
    for key, known in (("codec", tuple(CODECS)), ("filter", FILTERS)):
        if manifest[key] not in known:
            fix = "read it with a newer codedistill"
            raise CacheFormatError(
                f"unknown {key}", where=directory, expected=" or ".join(known), got=manifest[key], fix=fix
            )
    for name, entry in manifest["files"].items():
        if not _is_relative(name) or not _is_entry(entry):
            raise CacheFormatError("the manifest lists a file wrongly", where=directory, got=ascii(name))
    shards = sum(1 for name in manifest["files"] if (m := SHARD_PATTERN.fullmatch(name)) and m[2] == "h5")
    if manifest["num_shards"] != shards:
        raise CacheFormatError(
            "the manifest lists another number of shards", where=directory, expected=manifest["num_shards"], got=shards
        )
    return manifest


def _check_values(directory: Path, manifest: dict[str, Any]) -> None:
    """Refuse values that no writer makes, so that nobody who reads them further on stumbles."""
    grid, sources, statistics = manifest["temperatures"], manifest["sources"], manifest["statistics"]
    if not all(type(T) in (int, float) and 0 < T < math.inf for T in grid) or 1.0 not in grid:
        raise CacheFormatError("the manifest's temperatures cannot be used", where=directory, got=grid)
    for key in ("top_k", "tokenizer_size", "head_width", "num_shards", "num_documents", "num_tokens"):
        if manifest[key] < 1 or (key == "top_k" and manifest[key] > MAX_TOP_K):
            raise CacheFormatError(f"the manifest's {key} is out of range", where=directory, got=manifest[key])
    parts: dict[str, Any] = {f"identity.{key}": manifest["identity"].get(key) for key in IDENTITY_PARTS}
    parts |= {f"sources[{at}]": source for at, source in enumerate(sources)}
    for name in ("captured_mass", "codec_kl_nats"):
        by_temperature = statistics.get(name)
        for T in map(temperature_key, grid):
            parts[f"statistics.{name}.{T}"] = by_temperature.get(T) if isinstance(by_temperature, dict) else None
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise CacheFormatError("the manifest lacks a field", where=directory, expected=f"{name} (dict)")


def _is_relative(name: str) -> bool:
    """Whether a name stays inside the folder, in its one plain spelling."""
    path = PurePosixPath(name)
    return "\0" not in name and not path.is_absolute() and ".." not in path.parts and path.as_posix() == name != "."


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Replace manifest and digest so that a kill at any point leaves the old or the new one readable."""
    data = to_json(manifest).encode()
    write_bytes(directory / MANIFEST_PENDING, data)
    write_bytes(directory / MANIFEST_SHA256, hashlib.sha256(data).hexdigest().encode())
    _complete(directory)


def complete_replacement(directory: Path) -> None:
    """Finish or undo a replacement of the manifest that was killed half-way."""
    if not (directory / MANIFEST_PENDING).exists():
        return
    with contextlib.suppress(CacheFormatError, CacheCorruptError):
        if _current(directory)[0] == MANIFEST_PENDING:
            _complete(directory)
    (directory / MANIFEST_PENDING).unlink(missing_ok=True)


def _complete(directory: Path) -> None:
    (directory / MANIFEST_PENDING).replace(directory / MANIFEST)
    fsync_directory(directory)


def _current(directory: Path) -> tuple[str, bytes]:
    """Name and bytes of the manifest that matches the digest; looks twice, for a writer may be at it."""
    for _ in range(2):
        files = {name: _read(directory / name) for name in (MANIFEST_SHA256, MANIFEST, MANIFEST_PENDING)}
        expected = files.pop(MANIFEST_SHA256)
        for name, data in files.items():
            if data is not None and hashlib.sha256(data).hexdigest().encode() == expected:
                return name, data
    found = files[MANIFEST]
    if not directory.is_dir():
        raise CacheFormatError("there is no cache here", where=directory, got="no such folder")
    names = {entry.name for entry in directory.iterdir()}
    shards = {m[1] for name in names if (m := SHARD_PATTERN.fullmatch(name))}
    if not (shards or names & {BUILD, MANIFEST_SHA256}):
        raise CacheFormatError("not a logit cache", where=directory, expected=f"{MANIFEST}, {MANIFEST_SHA256}, shards")
    if found is None:
        raise CacheFormatError(
            "an unfinished logit cache",
            where=directory,
            expected=MANIFEST,
            got=f"{len(shards)} shards and no manifest",
            fix="run the command that makes it again; it keeps what is done",
        )
    raise CacheCorruptError(
        "the manifest does not match its digest",
        where=directory / MANIFEST,
        expected=(expected or b"no manifest.sha256").decode(errors="replace"),
        got=hashlib.sha256(found).hexdigest(),
        fix="copy the cache again, or run the command that made it again",
    )


def _read(path: Path) -> bytes | None:
    try:
        if path.exists() and not path.is_file():  # a folder; a pipe, which would block
            return None
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # no rights, a loop of links
        raise CacheCorruptError("a file of the cache cannot be read", where=path, got=error.strerror) from error
