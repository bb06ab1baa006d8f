"""Checking a whole cache against its manifest, byte for byte."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shared.cache.directory import check_files, is_side_file, shown, walk
from shared.cache.format import DOC_LENGTHS, MANIFEST, shard_name
from shared.cache.identity import label_identity
from shared.cache.local import Store
from shared.cache.manifest import Manifest, doc_lengths, parse_record, read_manifest
from shared.cache.remote import THREADS, local_path, url_of
from shared.errors import CacheCorruptError, CacheFormatError
from shared.progress import progress


def verify_cache(path: Path | str, *, strict: bool = False) -> list[str]:
    """Check presence, size and SHA-256 of every file, look for what does not belong, and recompute the figures.

    Args:
        path: the cache's directory.
        strict: what a transport left is a problem too; see `side_files`.

    Returns:
        One line per problem; none if the cache is whole.
    """
    directory = local_path(path)
    try:
        if directory is None:
            return _verify_remote(Store(str(url_of(path))))
        manifest = read_manifest(directory)
    except (CacheFormatError, CacheCorruptError) as error:
        return [str(error)]
    found = check_files(directory, manifest.files)
    problems = [f"{shown(name)}: {what}" for name, what in found.items()]
    problems += _check_records(directory, manifest, damaged=set(found))
    problems += [f"{shown(name)}: {what}" for name, what in foreign_files(directory, manifest)]
    return problems + [f"{shown(name)}: left by a transport" for name in side_files(directory) if strict]


def _verify_remote(store: Store) -> list[str]:
    """Read every file where it lies; only what shards say of themselves is kept on this machine."""
    manifest, problems = store.manifest, {}
    total = sum(entry.bytes for entry in manifest.files.values())
    with ThreadPoolExecutor(THREADS) as pool, progress("verify", total, "bytes") as bar:
        digests = pool.map(lambda name: store.remote.digest(name, manifest.files[name].bytes), manifest.files)
        for (name, entry), digest in zip(manifest.files.items(), digests, strict=True):
            if digest != entry.sha256:
                what = f"SHA-256 {digest}, expected {entry.sha256}" if digest else "missing, or of another size"
                problems[name] = what
            bar.advance(entry.bytes)
    texts = [name for name in manifest.files if name.endswith(".json") and name not in problems]
    store.fetch_all(texts)
    lines = [f"{shown(name)}: {what}" for name, what in problems.items()]
    return lines + _check_records(store.folder, manifest, damaged=set(problems))


def side_files(directory: Path) -> list[str]:
    """What the Hub's client, Git, operating and file systems left in a cache's folder; it does no harm."""
    return [name for name, _ in walk(directory) if is_side_file(name)]


def _check_records(directory: Path, manifest: Manifest, *, damaged: set[str]) -> list[str]:
    """Each shard's JSON names the same bytes as the manifest, and together they give its counts."""
    problems: list[str] = []
    counts: dict[str, list[Any]] = {"documents": [], "tokens": [], "entries": []}
    documents_per_shard, lengths = [], hashlib.sha256()
    for shard in range(manifest.num_shards):
        data, text = f"{shard_name(shard)}.h5", f"{shard_name(shard)}.json"
        if text not in manifest.files:
            problems.append(f"{text}: not listed in the manifest")
        elif text not in damaged:
            try:
                record = parse_record((directory / text).read_bytes(), shard)
            except (OSError, ValueError) as error:
                problems.append(f"{text}: {error}")
                continue
            documents_per_shard.append(len(record.documents))
            lengths.update(doc_lengths([record]))
            for key in counts:
                counts[key].append(record.statistics.get(key))
            if record.sha256 != manifest.files[data].sha256:
                problems.append(f"{text}: names other bytes than the manifest does for {data}")
    if len(documents_per_shard) < manifest.num_shards or problems:
        return problems
    if DOC_LENGTHS not in manifest.files:
        problems.append(f"{DOC_LENGTHS}: not listed in the manifest")
    elif DOC_LENGTHS not in damaged and manifest.files[DOC_LENGTHS].sha256 != lengths.hexdigest():
        problems.append(f"{DOC_LENGTHS}: not the lengths of the shards' documents")
    if manifest.documents_per_shard != documents_per_shard:
        problems.append(f"{MANIFEST}: documents_per_shard is not what the shards hold")
    try:
        for key in counts:
            stated, total = getattr(manifest, f"num_{key}"), sum(counts[key])
            if stated != total:
                problems.append(f"{MANIFEST}: {stated} {key}, but the shards hold {total}")
        if label_identity(manifest.identity) != manifest.label_identity:
            problems.append(f"{MANIFEST}: its label identity is not that of its identity")
    except (KeyError, TypeError, ValueError) as error:
        problems.append(f"{MANIFEST}: its figures cannot be computed again: {type(error).__name__} {error}")
    return problems


def foreign_files(directory: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What lies in the folder and is not of the cache: files, links, folders that hold none of its files."""
    side = [name for name, _ in walk(directory) if is_side_file(name)]
    folders = {parent.as_posix() for name in (*manifest.files, *side) for parent in Path(name).parents}
    for name, entry in walk(directory, folders=True):
        if name == MANIFEST or name in manifest.files or is_side_file(name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            if name not in folders and not is_side_file(name):  # Git has empty folders
                yield name, "a folder that is not of the cache"
        elif not (entry.is_symlink() and name in folders):
            yield name, "not listed in the manifest"
