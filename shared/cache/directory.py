"""A cache's directory: what belongs in it, what a killed process left, whether it is finished."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.cache.claim import is_dead
from shared.cache.layout import (
    BUILD,
    CLAIM,
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
from shared.cache.manifest import complete_replacement, read_manifest
from shared.errors import CacheCorruptError, CacheFormatError, DistillError, ResumeError
from shared.runtime import sha256_file

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


def walk(directory: Path) -> Iterator[tuple[str, Path]]:
    """Every file in a cache with its relative name, sorted by name."""
    files = ((file.relative_to(directory).as_posix(), file) for file in directory.rglob("*") if not file.is_dir())
    return iter(sorted(files))


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
    return name in OWN_FILES or bool(SHARD_PATTERN.fullmatch(name) or TEMPORARY_PATTERN.fullmatch(name))


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


def read_record(directory: Path, shard: int, sha256: str | None = None) -> dict[str, Any] | None:
    """A shard's JSON if it describes the shard's file; `sha256` is that file's, if known already."""
    data = directory / f"{shard_name(shard)}.h5"
    try:
        record = json.loads(data.with_suffix(".json").read_bytes())
        if record["version"] != VERSION or record["shard"] != shard or record["bytes"] != data.stat().st_size:
            return None
        matches = record["sha256"] == (sha256 or sha256_file(data)) and isinstance(record["statistics"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if matches else None
