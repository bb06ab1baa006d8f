"""Mending a damaged cache: keep what is whole, remove what is not, say what is to be made again and how."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache import hdf5
from shared.cache.directory import build_options, check_files, has_leftovers, plain_errors, remove_leftovers, shown
from shared.cache.format import BUILD, DOC_LENGTHS, MANIFEST, SHARD_PATTERN, TEACHER_EVAL, shard_name
from shared.cache.manifest import (
    Manifest,
    build_file,
    doc_lengths,
    read_manifest,
    read_pair,
    read_record,
    write_manifest,
)
from shared.cache.reader import Cache
from shared.cache.transform import Part, write_derived
from shared.cache.verify import foreign_files
from shared.errors import CacheCorruptError, CacheFormatError, DistillError
from shared.files import to_json, write_bytes
from shared.lock import LOCK, Lock


def repair_cache(path: Path | str) -> list[str]:
    """Bring a damaged cache into a state that the command which made it completes, or make it whole at once.

    Damaged shards are removed with their JSON, their documents named. The manifest stays as the record of what is to be
    made again; readers refuse the cache until then. Options (`build.json`) and the lengths of the documents are
    restored where the manifest proves them; the teacher's results can only be dropped. A whole cache is left alone, and
    what is not of the cache too.

    Returns:
        One line per thing that was found and what became of it; none if the cache is whole.

    Raises:
        CacheFormatError: there is no cache here, or one of an unknown version.
        ResumeError: another process is at work on it.
    """
    directory = Path(path)
    if not directory.is_dir() or not any(
        entry.name in (BUILD, MANIFEST) or SHARD_PATTERN.fullmatch(entry.name) for entry in directory.iterdir()
    ):
        raise CacheFormatError("there is no cache here", where=directory)
    manifest = _manifest(directory)
    if manifest is not None and not has_leftovers(directory) and not check_files(directory, manifest.files):
        return [f"{shown(name)}: {what}; left alone" for name, what in foreign_files(directory, manifest)]
    cleared = ["what a killed process left: cleared"] if has_leftovers(directory) else []
    with plain_errors(directory), Lock(directory, "changing this cache"):
        remove_leftovers(directory)
        return [*cleared, *_repair(directory, _manifest(directory))]


def copy_whole_shards(path: Path | str, out: Path | str) -> list[int]:
    """Write the whole shards of a damaged cache as a smaller cache, for where what made it is gone.

    Returns:
        The numbers of the shards that are lost.

    Raises:
        CacheFormatError, CacheCorruptError: the manifest or all shards are lost.
    """
    cache = Cache(path, complete=False)
    names = {f"{shard_name(shard)}.{end}" for shard in range(cache.num_shards) for end in ("h5", "json")}
    shards = {name: entry for name, entry in cache.manifest.files.items() if name in names}
    lost = sorted({_number(name) for name in check_files(cache.path, shards)})
    kept = [shard for shard in range(cache.num_shards) if shard not in lost]
    if not kept:
        raise CacheCorruptError("no shard of the cache is whole", where=path)
    made = {"command": "cache repair", "lost_shards": lost}
    documents = cache.manifest.documents_per_shard
    write_derived(
        Path(out),
        [Part(source=cache, shard=shard, keep=np.ones(documents[shard], bool)) for shard in kept],
        build={**made, "inputs": [cache.manifest.digest], **cache.manifest.head_options},
        identity=cache.manifest.identity,
        sources=cache.manifest.sources,
        derived_from={**made, "inputs": [cache.manifest.as_input]},
        files=cache,
    )
    return lost


def _manifest(directory: Path) -> Manifest | None:
    """The manifest; None where there is none or it is damaged."""
    try:
        return read_manifest(directory)
    except CacheCorruptError:
        return None
    except CacheFormatError:
        if (directory / MANIFEST).exists():
            raise
        return None


def _repair(directory: Path, manifest: Manifest | None) -> Iterator[str]:
    if manifest is None:
        yield from _repair_unfinished(directory)
        return
    files, damaged = dict(manifest.files), check_files(directory, manifest.files)
    for name in [name for name in damaged if not SHARD_PATTERN.fullmatch(name)]:
        (directory / name).unlink(missing_ok=True)
        if _restore(directory, name, manifest):
            yield f"{name}: {damaged[name]}; restored from the cache's other files"
        elif name.startswith(f"{TEACHER_EVAL}/"):
            del files[name]
            with contextlib.suppress(OSError):  # not empty
                (directory / name).parent.rmdir()
            yield f"{name}: {damaged[name]}; removed for good: make it again with `codedistill cache attach`"
        else:
            yield f"{name}: {damaged[name]}; removed: {_command(directory)} writes it again"
    yield from _remove_shards(directory, sorted({_number(name) for name in damaged} - {-1}), manifest)
    if files != manifest.files:
        manifest = replace(manifest, files=files)
        write_manifest(directory, manifest)
    foreign = ((name, what) for name, what in foreign_files(directory, manifest) if name != LOCK)  # the lock is ours
    yield from (f"{shown(name)}: {what}; left alone" for name, what in foreign)


def _repair_unfinished(directory: Path) -> Iterator[str]:
    """Nothing says what the files were but the shards' own JSON."""
    if (directory / MANIFEST).exists() or (directory / DOC_LENGTHS).exists():  # the build had come to its end
        yield f"{MANIFEST}: damaged or missing; {_command(directory)} writes it again"
    if build_options(directory) is None:
        what = "neither the manifest nor build.json can be read: nothing says what this cache was made of"
        raise DistillError(what, where=directory, fix="copy the cache again, or make it anew")
    shards = sorted({int(m[1]) for entry in directory.iterdir() if (m := SHARD_PATTERN.fullmatch(entry.name))})
    yield from _remove_shards(directory, [shard for shard in shards if read_pair(directory, shard) is None], None)


def _remove_shards(directory: Path, shards: list[int], manifest: Manifest | None) -> Iterator[str]:
    """Remove pairs; name their documents, from whichever file of the pair still tells, else by position."""
    for shard in shards:
        known = _documents(directory, shard)
        what = f"documents {json.dumps(known, ensure_ascii=False)}" if known else _positions(shard, manifest)
        for end in ("h5", "json"):
            (directory / f"{shard_name(shard)}.{end}").unlink(missing_ok=True)
        yield f"{shard_name(shard)}: damaged; removed, with {what}: {_command(directory)} makes it again"


def _documents(directory: Path, shard: int) -> list[Any] | None:
    if (record := read_record(directory, shard)) is not None:
        return record.documents
    try:
        return [meta.get("id") for meta in hdf5.read_document_meta(directory / f"{shard_name(shard)}.h5")]
    except (CacheCorruptError, CacheFormatError, AttributeError):
        return None


def _positions(shard: int, manifest: Manifest | None) -> str:
    """Where a shard's documents are in the order of the cache."""
    if manifest is None:
        return "documents that nothing names any more"
    first = sum(manifest.documents_per_shard[:shard])
    return f"documents {first} to {first + manifest.documents_per_shard[shard] - 1} of the cache's order"


def _restore(directory: Path, name: str, manifest: Manifest) -> bool:
    """Write a file again that follows from the other files, if that gives the listed bytes."""
    records = [read_record(directory, shard) for shard in range(manifest.num_shards)]
    if name == BUILD and manifest.build is not None:
        data = to_json(build_file(manifest.build)).encode()
    elif name == DOC_LENGTHS and None not in records:
        data = doc_lengths([record for record in records if record is not None])
    else:
        return False
    if hashlib.sha256(data).hexdigest() != manifest.files[name].sha256:
        return False
    write_bytes(directory / name, data)
    return True


def _command(directory: Path) -> str:
    """The command that makes what was removed."""
    return f"the same `codedistill {(build_options(directory) or {}).get('command', 'teacher build')}`"


def _number(name: str) -> int:
    match = SHARD_PATTERN.fullmatch(name)
    return int(match[1]) if match else -1
