"""A cache's directory: what belongs in it, what a killed process left, whether it is finished."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shared.cache.format import (
    BUILD,
    DOC_LENGTHS,
    FORMAT,
    MANIFEST,
    SHARD_PATTERN,
    TEACHER_EVAL,
    TEMPORARY_PATTERN,
    TOKENIZER,
)
from shared.cache.manifest import FileEntry, is_hidden, read_manifest
from shared.errors import CacheCorruptError, CacheFormatError, DistillError, ResumeError
from shared.files import is_system_file, sha256_file
from shared.lock import LOCK, is_abandoned
from shared.machine import num_processors
from shared.progress import progress

FOLDERS = (TOKENIZER, TEACHER_EVAL)
_PREFIXES = tuple(f"{folder}/" for folder in FOLDERS)
OWN_FILES = (BUILD, LOCK, MANIFEST, DOC_LENGTHS)
MAX_THREADS = 16
BATCH_FILES = 1_024  # that wait for a thread at a time
# What the Hub's client, Git and `cache push` put into a folder that they carry, beside what systems do.
SIDE_FILES = re.compile(r"\.cache/huggingface/.+|\.git/.+|\.git(attributes|ignore)|README\.md|captured_mass\.png")


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


def list_files(directory: Path) -> dict[str, FileEntry]:
    """Size and SHA-256 of every file that a manifest lists, by relative name."""
    return {
        name: FileEntry(bytes=file.stat().st_size, sha256=sha256_file(file))
        for name, file in walk(directory)
        if name not in (LOCK, MANIFEST) and not is_side_file(name) and not is_hidden(name)
    }


def is_side_file(name: str) -> bool:
    """Whether a file, by its relative name, is one that a transport or a system put there."""
    return SIDE_FILES.fullmatch(name) is not None or is_system_file(name.rpartition("/")[2])


def stale_names(names: Iterable[str], files: Mapping[str, FileEntry]) -> list[str]:
    """Names that only a cache gives its files and that a manifest does not list: of an earlier manifest."""
    fixed = (BUILD, DOC_LENGTHS)
    ours = [name for name in names if name in fixed or name.startswith(_PREFIXES) or SHARD_PATTERN.fullmatch(name)]
    return sorted(name for name in ours if name not in files)


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


def file_names(directory: Path) -> set[str]:
    """Relative names of all files; the folder is listed, and no file looked at."""
    names: set[str] = set()
    for parent, _, files in os.walk(directory):
        prefix = "" if parent == str(directory) else f"{Path(parent).relative_to(directory).as_posix()}/"
        names.update(prefix + name for name in files)
    return names


def shown(name: str) -> str:
    """A file's name on one line of a terminal, whatever bytes are in it."""
    return name if name.isprintable() else ascii(name)


def build_options(directory: Path) -> dict[str, Any] | None:
    """The options in `build.json`; None where it is missing, damaged or not a cache's."""
    file = directory / BUILD
    try:
        value = json.loads(file.read_bytes()) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    options = value.get("options") if isinstance(value, dict) and value.get("format") == FORMAT else None
    return options if isinstance(options, dict) else None


def require_outside_caches(out: Path) -> None:
    """Refuse a folder that lies in a cache, which then would no longer be as its manifest says.

    Raises:
        ResumeError: with the cache.
    """
    for parent in out.resolve().parents:
        if build_options(parent) is not None:
            raise ResumeError(
                "the folder lies in another cache", where=out, got=parent, fix="name an --out that is not in a cache"
            )


def remove_leftovers(directory: Path) -> None:
    """Clear the temporary files that a killed process left."""
    for _, file in walk(directory):
        if TEMPORARY_PATTERN.fullmatch(file.name):
            file.unlink(missing_ok=True)


def has_leftovers(directory: Path) -> bool:
    """Whether a killed process left anything that `remove_leftovers` would clear, or its lock."""
    return is_abandoned(directory) or any(TEMPORARY_PATTERN.fullmatch(file.name) for _, file in walk(directory))


def is_ours(entry: Path) -> bool:
    """Whether an entry of a folder is one that a cache may hold, or that a transport left."""
    name = entry.name
    if entry.is_dir():
        is_hub_folder = name == ".cache" and [path.name for path in entry.iterdir()] == ["huggingface"]
        return is_hub_folder or name in (*FOLDERS, ".git")
    patterns = (SHARD_PATTERN, TEMPORARY_PATTERN)
    return name in OWN_FILES or is_side_file(name) or any(pattern.fullmatch(name) for pattern in patterns)


def is_finished(directory: Path) -> bool:
    """Whether a valid manifest is there and every file that it lists, byte for byte."""
    try:
        return not check_files(directory, read_manifest(directory).files)
    except (CacheFormatError, CacheCorruptError):
        return False


def check_files(directory: Path, files: Mapping[str, FileEntry]) -> dict[str, str]:
    """What is wrong with listed files, by name: missing, of another size, other bytes.

    Files are hashed by as many threads as there are processors (hashing releases Python's lock).
    """
    problems: dict[str, str] = {}
    threads = min(num_processors(), MAX_THREADS)
    total = sum(entry.bytes for entry in files.values())
    with ThreadPoolExecutor(threads) as pool, progress("verify", total, "bytes") as bar:
        names = iter(files)
        while batch := list(itertools.islice(names, BATCH_FILES)):
            found = pool.map(lambda name: _check_file(directory / name, files[name]), batch)
            for name, problem in zip(batch, found, strict=True):
                if problem:
                    problems[name] = problem
                bar.advance(files[name].bytes)
    return problems


def _check_file(file: Path, entry: FileEntry) -> str | None:
    try:
        if not file.is_file():
            return "no regular file" if os.path.lexists(file) else "missing"
        size = file.stat().st_size
        if size != entry.bytes:
            return f"{size} bytes, expected {entry.bytes}"
        digest = sha256_file(file)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest == entry.sha256 else f"SHA-256 {digest}, expected {entry.sha256}"
