"""A cache's directory: what belongs in it, what a killed process left, whether it is finished."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.cache.format import (
    BUILD,
    CLAIM,
    EXTENSION_PATTERN,
    MANIFEST,
    MANIFEST_PENDING,
    MANIFEST_SHA256,
    SHARD_PATTERN,
    TEACHER_EVAL,
    TEMPORARY_PATTERN,
    TOKENIZER,
    VERSION,
    shard_name,
)
from shared.cache.lock import is_dead
from shared.cache.manifest import complete_replacement, read_manifest
from shared.errors import CacheCorruptError, CacheFormatError, DistillError, ResumeError
from shared.files import sha256_file, sha256_json

FOLDERS = (TOKENIZER, TEACHER_EVAL)
OWN_FILES = (BUILD, CLAIM, MANIFEST, MANIFEST_SHA256, MANIFEST_PENDING)
UNLISTED = (CLAIM, MANIFEST, MANIFEST_SHA256, MANIFEST_PENDING)


@contextlib.contextmanager
def plain_errors(directory: Path) -> Iterator[None]:
    """Turn the system's refusals (full disk, no rights) into one readable line."""
    try:
        yield
    except DistillError:
        raise
    except OSError as error:
        raise ResumeError(
            "the cache cannot be written",
            where=error.filename or directory,
            got=error.strerror or error,
            fix="make room or give rights, then run the same command again; finished shards are kept",
        ) from error


def list_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file that a manifest lists, by relative name."""
    return {
        name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for name, file in walk(directory)
        if name not in UNLISTED
    }


def walk(directory: Path, *, folders: bool = False) -> Iterator[tuple[str, Path]]:
    """Every file in a cache (and with `folders` every folder) with its relative name, sorted by name.

    Links to folders are not followed; they count as folders.
    """
    found: list[tuple[str, Path]] = []
    for parent, names, files in os.walk(directory):
        found += [((path := Path(parent, name)).relative_to(directory).as_posix(), path) for name in files]
        if folders:
            found += [((path := Path(parent, name)).relative_to(directory).as_posix(), path) for name in names]
    return iter(sorted(found))


def shown(name: str) -> str:
    """A file's name on one line of a terminal, whatever bytes are in it."""
    return name if name.isprintable() else ascii(name)


def read_json_object(file: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is no such file (a pipe would block), or something else is in it."""
    try:
        value = json.loads(file.read_bytes()) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def remove_leftovers(directory: Path) -> None:
    """Clear what a killed process left: temporary files, and a manifest's replacement that it did not complete."""
    for _, file in walk(directory):
        if TEMPORARY_PATTERN.fullmatch(file.name):
            file.unlink(missing_ok=True)
    complete_replacement(directory)


def has_leftovers(directory: Path) -> bool:
    """Whether a killed process left anything that `remove_leftovers` would clear, or its claim."""
    claimed = (directory / CLAIM).exists() and is_dead(directory / CLAIM)
    pending = (directory / MANIFEST_PENDING).exists()
    return claimed or pending or any(TEMPORARY_PATTERN.fullmatch(file.name) for _, file in walk(directory))


def is_ours(entry: Path) -> bool:
    """Whether an entry of a folder is one that a cache may hold."""
    if entry.is_dir():
        return entry.name in FOLDERS
    name = entry.name
    patterns = (SHARD_PATTERN, EXTENSION_PATTERN, TEMPORARY_PATTERN)
    return name in OWN_FILES or any(pattern.fullmatch(name) for pattern in patterns)


def is_finished(directory: Path) -> bool:
    """Whether a valid manifest is there and every file that it lists, byte for byte."""
    try:
        return not damaged_files(directory, read_manifest(directory))
    except (CacheFormatError, CacheCorruptError):
        return False


def damaged_files(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """The listed files that are missing or whose bytes are not those that the manifest names."""
    return [
        name
        for name, entry in manifest["files"].items()
        if not (directory / name).is_file()
        or (directory / name).stat().st_size != entry["bytes"]
        or sha256_file(directory / name) != entry["sha256"]
    ]


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """A shard's JSON with the digest of all its other keys, so that it can be trusted before there is a manifest."""
    body = {key: value for key, value in record.items() if key != "record_sha256"}
    return body | {"record_sha256": sha256_json(body)}


def read_record(directory: Path, shard: int, sha256: str | None = None) -> dict[str, Any] | None:
    """A shard's JSON if it is whole and describes the shard's file; `sha256` is that file's, if known already."""
    data = directory / f"{shard_name(shard)}.h5"
    record = read_json_object(data.with_suffix(".json"))
    try:
        if record is None or record["version"] != VERSION or record["shard"] != shard or seal(record) != record:
            return None
        size = data.stat().st_size
        matches = record["bytes"] == size and record["sha256"] == (sha256 or sha256_file(data))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if matches and isinstance(record.get("statistics"), dict) else None
