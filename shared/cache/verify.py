"""Checking a whole cache against its manifest, byte for byte."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from shared.cache.assemble import extensions
from shared.cache.directory import read_json_object, shown, walk
from shared.cache.format import MANIFEST, MANIFEST_PENDING, MANIFEST_SHA256, RECORD_FIELDS, shard_name
from shared.cache.identity import label_identity
from shared.cache.manifest import read_manifest
from shared.errors import CacheCorruptError, CacheFormatError
from shared.files import sha256_file
from shared.progress import progress

MAX_THREADS = 16


def verify_cache(path: Path | str) -> list[str]:
    """Check presence, size and SHA-256 of every file, look for what does not belong, and recompute the figures.

    Files are hashed by as many threads as there are processors (hashing releases Python's lock).

    Returns:
        One line per problem; none if the cache is whole.
    """
    directory = Path(path)
    try:
        manifest = read_manifest(directory)
    except (CacheFormatError, CacheCorruptError) as error:
        return [str(error)]
    files = manifest["files"]
    found = check_files(directory, files)
    problems = [f"{shown(name)}: {found[name]}" for name in files if name in found]
    problems += _check_records(directory, manifest)
    return problems + [f"{shown(name)}: {what}" for name, what in foreign_files(directory, files)]


def check_files(directory: Path, files: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What is wrong with listed files, by name: missing, of another size, other bytes.

    Args:
        directory: the cache's.
        files: `bytes` and `sha256` by relative name.
    """
    problems: dict[str, str] = {}
    threads = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4, MAX_THREADS)
    total = sum(entry["bytes"] for entry in files.values())
    with ThreadPoolExecutor(threads) as pool, progress("verify", total, "bytes") as bar:
        tasks = {pool.submit(_check_file, directory / name, entry): name for name, entry in files.items()}
        for task in as_completed(tasks):
            if problem := task.result():
                problems[tasks[task]] = problem
            bar.advance(files[tasks[task]]["bytes"])
    return problems


def _check_file(file: Path, entry: dict[str, Any]) -> str | None:
    try:
        if not file.is_file():
            return "no regular file" if os.path.lexists(file) else "missing"
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"{size} bytes, expected {entry['bytes']}"
        digest = sha256_file(file)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest == entry["sha256"] else f"SHA-256 {digest}, expected {entry['sha256']}"


def _check_records(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """Each shard's JSON names the same bytes as the manifest, and together they give its counts."""
    problems, records = [], []
    for shard in range(manifest["num_shards"]):
        data, text = f"{shard_name(shard)}.h5", f"{shard_name(shard)}.json"
        missing = [name for name in (data, text) if name not in manifest["files"]]
        problems += [f"{name}: not listed in the manifest" for name in missing]
        record = read_json_object(directory / text)
        if missing or record is None:
            continue  # a damaged file is reported already
        records.append(record)
        if lacking := [key for key in RECORD_FIELDS if key not in record]:
            problems.append(f"{text}: lacks a mandatory field: {lacking[0]}")
        elif record["sha256"] != manifest["files"][data]["sha256"]:
            problems.append(f"{text}: names other bytes than the manifest does for {data}")
    if len(records) < manifest["num_shards"] or problems:
        return problems
    try:
        for key in ("documents", "tokens", "entries"):
            total = sum(record["statistics"][key] for record in records)
            if manifest[f"num_{key}"] != total:
                problems.append(f"{MANIFEST}: {manifest[f'num_{key}']} {key}, but the shards hold {total}")
        if label_identity(manifest["identity"]) != manifest["label_identity"]:
            problems.append(f"{MANIFEST}: its label identity is not that of its identity")
    except (KeyError, TypeError, ValueError) as error:
        problems.append(f"{MANIFEST}: its figures cannot be computed again: {type(error).__name__} {error}")
    return problems


def foreign_files(directory: Path, files: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What lies in the folder and is not of the cache: files, links, folders that hold none of its files."""
    folders = {parent.as_posix() for name in files for parent in Path(name).parents}
    known = {*files, MANIFEST, MANIFEST_SHA256}
    pending = {file for part in extensions(directory) for file in part.files()}
    for name, entry in walk(directory, folders=True):
        if name == MANIFEST_PENDING:
            yield name, "a change of the cache was interrupted; run that command again"
        elif entry.is_dir() and not entry.is_symlink():
            if name not in folders and name not in known:
                yield name, "a folder that is not of the cache"
        elif name not in known and not (entry.is_symlink() and name in folders):
            yield name, "of an extension that is not finished" if name in pending else "not listed in the manifest"
