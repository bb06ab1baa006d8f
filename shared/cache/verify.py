"""Checking a whole cache against its manifest, byte for byte."""

import json
from pathlib import Path

from shared.cache.directory import walk
from shared.cache.layout import MANIFEST, MANIFEST_PENDING, MANIFEST_SHA256, RECORD_FIELDS, shard_name
from shared.cache.manifest import read_manifest
from shared.errors import CacheCorruptError, CacheFormatError
from shared.runtime import progress, sha256_file


def verify_cache(path: Path | str) -> list[str]:
    """Check presence, size and SHA-256 of every file and look for files that do not belong.

    Returns:
        One line per problem; none if the cache is whole.
    """
    directory = Path(path)
    try:
        manifest = read_manifest(directory)
    except (CacheFormatError, CacheCorruptError) as error:
        return [str(error)]
    files, problems = manifest["files"], []
    present = dict(walk(directory))
    with progress("verify", sum(entry["bytes"] for entry in files.values()), "bytes") as bar:
        for name, entry in files.items():
            problem = _check_file(directory / name, entry["bytes"], entry["sha256"])
            if problem:
                problems.append(f"{name}: {problem}")
            bar.advance(entry["bytes"])
    for shard in range(manifest["num_shards"]):
        problems += _check_pair(directory, shard, files)
    if MANIFEST_PENDING in present:
        problems.append(f"{MANIFEST_PENDING}: a change of the cache was interrupted; run that command again")
    known = {*files, MANIFEST, MANIFEST_SHA256, MANIFEST_PENDING}
    return problems + [f"{name}: not listed in the manifest" for name in present if name not in known]


def _check_file(file: Path, size: int, sha256: str) -> str | None:
    try:
        if not file.is_file():
            return "missing"
        found = file.stat().st_size
        if found != size:
            return f"{found} bytes, expected {size}"
        digest = sha256_file(file)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest == sha256 else f"SHA-256 {digest}, expected {sha256}"


def _check_pair(directory: Path, shard: int, files: dict[str, dict[str, object]]) -> list[str]:
    """A shard and its JSON are both listed and name the same bytes."""
    data, text = f"{shard_name(shard)}.h5", f"{shard_name(shard)}.json"
    missing = [f"{name}: not listed in the manifest" for name in (data, text) if name not in files]
    if missing:
        return missing
    try:
        record = json.loads((directory / text).read_bytes())
    except (OSError, ValueError):
        return []  # the file itself is reported already
    lacking = [key for key in RECORD_FIELDS if not isinstance(record, dict) or key not in record]
    if lacking:
        return [f"{text}: lacks a mandatory field: {lacking[0]}"]
    if record["sha256"] != files[data]["sha256"]:
        return [f"{text}: names other bytes than the manifest does for {data}"]
    return []
