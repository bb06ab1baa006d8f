"""Mending a damaged cache: keep what is whole, remove what is not, say what is to be made again and how."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache.assemble import Extension, assemble, extensions
from shared.cache.derive import Input, Part, head_options, write_derived
from shared.cache.directory import (
    has_leftovers,
    plain_errors,
    read_json_object,
    read_record,
    remove_leftovers,
    seal,
    shown,
)
from shared.cache.format import (
    BUILD,
    CLAIM,
    EXTENSION_PATTERN,
    MANIFEST,
    MANIFEST_SHA256,
    SHARD_PATTERN,
    TEACHER_EVAL,
    shard_name,
)
from shared.cache.lock import Claim
from shared.cache.manifest import read_manifest, write_manifest
from shared.cache.verify import check_files, foreign_files
from shared.errors import CacheCorruptError, CacheFormatError, DistillError
from shared.files import to_json, write_bytes

SURE_DIGITS = 56  # of the 64 of a SHA-256; so many do not agree by chance


def repair_cache(path: Path | str) -> list[str]:
    """Bring a damaged cache into a state that the command which made it completes, or make it whole at once.

    Damaged shards are removed with their JSON, their documents named. The manifest stays as the record of what is to be
    made again; readers refuse the cache until then. Options (`build.json`) and the manifest's digest are restored where
    the manifest proves them; the teacher's results can only be dropped; an extension that lost shards is taken out, so
    that the rest is a whole cache. A whole cache is left alone, and what is not of the cache too.

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
    if manifest is not None and not has_leftovers(directory) and not check_files(directory, manifest["files"]):
        return [f"{shown(name)}: {what}; left alone" for name, what in foreign_files(directory, manifest["files"])]
    cleared = ["what a killed process left: cleared"] if has_leftovers(directory) else []
    with plain_errors(directory):
        claim = Claim(directory)
        try:
            remove_leftovers(directory)
            return [*cleared, *_repair(directory, _manifest(directory))]
        finally:
            claim.release()


def copy_whole_shards(path: Path | str, out: Path | str) -> list[int]:
    """Write the whole shards of a damaged cache as a smaller cache, for where what made it is gone.

    Returns:
        The numbers of the shards that are lost.

    Raises:
        CacheFormatError, CacheCorruptError: the manifest or all shards are lost.
    """
    source = Input.open(path)
    names = {f"{shard_name(shard)}.{end}" for shard in range(source.manifest["num_shards"]) for end in ("h5", "json")}
    shards = {name: entry for name, entry in source.manifest["files"].items() if name in names}
    lost = sorted({_number(name) for name in check_files(source.path, shards)})
    kept = [shard for shard in range(source.manifest["num_shards"]) if shard not in lost]
    if not kept:
        raise CacheCorruptError("no shard of the cache is whole", where=path)
    provenance = {"command": "cache repair", "inputs": [source.record()], "lost_shards": lost}
    write_derived(
        Path(out),
        [Part(source=source, shard=shard, keep=np.ones(len(source.documents(shard)), bool)) for shard in kept],
        build={"command": "cache repair", "inputs": [source.digest()], "lost_shards": lost, **head_options(source)},
        identity=source.manifest["identity"],
        sources=source.manifest["sources"],
        provenance={"derived_from": provenance},
        files=source,
    )
    return lost


def _manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest; None where there is none or it is damaged."""
    try:
        return read_manifest(directory)
    except CacheCorruptError:
        return None
    except CacheFormatError:
        if (directory / MANIFEST).exists():
            raise
        return None


def _repair(directory: Path, manifest: dict[str, Any] | None) -> Iterator[str]:
    if manifest is None and _mend_digest(directory):
        yield f"{MANIFEST_SHA256}: damaged; written again"
        manifest = read_manifest(directory)
    parts = extensions(directory)
    if manifest is None:
        yield from _repair_unfinished(directory, parts)
        return
    files = manifest["files"]
    damaged = check_files(directory, files)
    missing, unlisted = list[str](), False
    for name in [name for name in damaged if not SHARD_PATTERN.fullmatch(name)]:
        (directory / name).unlink(missing_ok=True)
        if _restore_build(directory, name, manifest):
            yield f"{name}: {damaged[name]}; restored from the manifest"
        elif name.startswith(f"{TEACHER_EVAL}/"):
            files = {key: entry for key, entry in files.items() if key != name}
            unlisted = True
            with contextlib.suppress(OSError):  # not empty
                (directory / name).parent.rmdir()
            yield f"{name}: {damaged[name]}; removed for good: make it again with `codedistill cache attach`"
        else:
            missing.append(name)
            yield f"{name}: {damaged[name]}; removed: {_command(directory, None)} writes it again"
    shards = sorted({_number(name) for name in damaged if SHARD_PATTERN.fullmatch(name)})
    yield from _remove_shards(directory, shards, parts, manifest)
    cut = next((part for part in extensions(directory) if set(shards) & set(part.shards())), None)
    if cut is not None and min(shards) >= cut.first_shard and not missing:
        yield from _take_out(directory, cut, manifest | {"files": files})
    elif unlisted:
        write_manifest(directory, manifest | {"files": files})
    foreign = ((name, what) for name, what in foreign_files(directory, files) if name != CLAIM)  # the claim is ours
    yield from (f"{shown(name)}: {what}; left alone" for name, what in foreign)


def _repair_unfinished(directory: Path, parts: list[Extension]) -> Iterator[str]:
    """Nothing says what the files were but the shards' own JSON."""
    names = {entry.name for entry in directory.iterdir()}
    if MANIFEST in names or MANIFEST_SHA256 in names:
        yield f"{MANIFEST}: does not match its digest; {_command(directory, None)} writes it again"
    if read_json_object(directory / BUILD) is None:
        raise DistillError(
            "neither the manifest nor build.json can be read: nothing says what this cache was made of",
            where=directory,
            fix="copy the cache again, or make it anew",
        )
    shards = sorted({int(m[1]) for name in names if (m := SHARD_PATTERN.fullmatch(name))})
    damaged = [shard for shard in shards if read_record(directory, shard) is None]
    yield from _remove_shards(directory, damaged, parts, None)


def _remove_shards(
    directory: Path, shards: list[int], parts: list[Extension], manifest: dict[str, Any] | None
) -> Iterator[str]:
    """Remove pairs; name their documents, from whichever file of the pair still tells, else by position."""
    lines = []
    for shard in shards:
        part = next((part for part in parts if shard in part.shards()), None)
        known = _documents(directory, shard)
        what = f"documents {json.dumps(known, ensure_ascii=False)}" if known else _positions(directory, shard, manifest)
        lines.append(f"{shard_name(shard)}: damaged; removed, with {what}: {_command(directory, part)} makes it again")
    for shard in shards:
        for end in ("h5", "json"):
            (directory / f"{shard_name(shard)}.{end}").unlink(missing_ok=True)
    yield from lines


def _documents(directory: Path, shard: int) -> list[Any] | None:
    record = _sealed(directory, shard)
    if record is not None and isinstance(record.get("documents"), list):
        return list(record["documents"])
    try:
        return [meta.get("id") for meta in Input(path=directory, manifest={}).documents(shard)]
    except (CacheCorruptError, CacheFormatError, AttributeError):
        return None


def _positions(directory: Path, shard: int, manifest: dict[str, Any] | None) -> str:
    """Where a shard's documents are in the order of the cache, from the nearest shards that are whole."""
    before = next((r for s in range(shard - 1, -1, -1) if (r := _sealed(directory, s))), None)
    count = 0 if manifest is None else manifest["num_shards"]
    after = next((r for s in range(shard + 1, count) if (r := _sealed(directory, s))), None)
    first: Any = 0 if before is None else before.get("first_document", 0) + len(before["documents"])
    stop: Any = after.get("first_document") if after else manifest and manifest["num_documents"]
    if stop is None:
        return f"documents from position {first} on"
    return f"documents among positions {first} to {stop - 1} of the cache's order"


def _sealed(directory: Path, shard: int) -> dict[str, Any] | None:
    """A shard's JSON if it is whole itself, whatever became of the shard."""
    record = read_json_object(directory / f"{shard_name(shard)}.json")
    return record if record is not None and seal(record) == record and record.get("shard") == shard else None


def _restore_build(directory: Path, name: str, manifest: dict[str, Any]) -> bool:
    """Write `build.json` (or an extension's) anew from the manifest's copy, if that gives the listed bytes."""
    content = manifest.get("builds", {}).get(name)
    data = to_json(content).encode()
    if content is None or hashlib.sha256(data).hexdigest() != manifest["files"][name]["sha256"]:
        return False
    write_bytes(directory / name, data)
    return True


def _take_out(directory: Path, cut: Extension, manifest: dict[str, Any]) -> Iterator[str]:
    """A manifest without an extension and those after it: what is left is whole, and the extension can go on."""
    gone = [part.source for part in extensions(directory) if part.first_shard >= cut.first_shard]
    kept = assemble(
        directory,
        build=manifest,
        num_shards=cut.first_shard,
        identity=manifest["identity"],
        sources=[source for source in manifest["sources"] if source not in gone],
        provenance={key: manifest[key] for key in ("derived_from",) if key in manifest},
    )
    write_manifest(directory, kept)
    yield f"{MANIFEST}: shards from {cut.first_shard} on are taken out until their extension is completed"


def _mend_digest(directory: Path) -> bool:
    """Write `manifest.sha256` again where it alone is damaged: a few digits of it are wrong, and all others right."""
    try:
        data, stated = (directory / MANIFEST).read_bytes(), (directory / MANIFEST_SHA256).read_bytes()
    except OSError:
        return False
    digest = hashlib.sha256(data).hexdigest().encode()
    if sum(a == b for a, b in zip(digest, stated, strict=False)) < SURE_DIGITS:
        return False
    write_bytes(directory / MANIFEST_SHA256, digest)
    return True


def _command(directory: Path, part: Extension | None) -> str:
    """The command that makes what was removed."""
    options = (read_json_object(directory / BUILD) or {}).get("options", {})
    command = options.get("command", "teacher build") if isinstance(options, dict) else "teacher build"
    return f"the same `codedistill {command}{' --extend' if part else ''}`"


def _number(name: str) -> int:
    match = SHARD_PATTERN.fullmatch(name) or EXTENSION_PATTERN.fullmatch(name)
    return int(match[1]) if match else -1
