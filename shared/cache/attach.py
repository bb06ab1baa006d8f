"""Adding files about the teacher to a finished cache."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from shared.cache.directory import FOLDERS, is_side_file, plain_errors, remove_leftovers
from shared.cache.manifest import FileEntry, read_manifest, write_manifest
from shared.errors import require
from shared.files import fsync_directory, read_json, write_bytes
from shared.lock import Lock


def find_results(folder: Path) -> dict[str, Path]:
    """A teacher's results in a folder by relative name: JSON files, and folders with `result.json` of a benchmark.

    W&B's folder and what systems leave are passed over.

    Raises:
        ConfigError: the folder holds anything else, or no result.
    """
    files = list[Path]()
    for entry in sorted(folder.iterdir()):
        if entry.name == "wandb" or is_side_file(entry.name):
            continue
        result = entry / "result.json" if entry.is_dir() else entry
        record = read_json(result) if result.suffix == ".json" and result.is_file() else None
        require(
            isinstance(record, dict) and "inputs" in record,
            "the folder holds something that is no result",
            where=folder,
            expected="the teacher's results only, as `codedistill eval` wrote them",
            got=entry.name,
        )
        files += sorted(entry.rglob("*")) if entry.is_dir() else [entry]
    require(files, "the folder holds no result", where=folder, expected="files that `codedistill eval` wrote")
    names = {file.relative_to(folder).as_posix(): file for file in files if file.is_file()}
    return {name: file for name, file in names.items() if not is_side_file(name)}


def add_files(path: Path | str, files: Mapping[str, bytes]) -> None:
    """Add files such as `teacher_eval/fidelity.json` to a finished cache, or replace them; the manifest comes last.

    Files that are there with the same bytes stay as they are.

    Killed at any point the cache stays readable: files that change leave the manifest first. Running the command again
    completes it.

    Raises:
        ConfigError: a name outside these folders.
        ResumeError: another process is changing the cache.
    """
    directory = Path(path)
    for name in files:
        parts = PurePosixPath(name).parts
        is_inside = len(parts) > 1 and parts[0] in FOLDERS and ".." not in parts
        expected = " or ".join(f"{folder}/…" for folder in FOLDERS)
        require(is_inside, "a file cannot be added to a cache", got=name, expected=expected)
    read_manifest(directory)
    new = {name: FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    with plain_errors(directory), Lock(directory, "changing this cache") as lock:
        remove_leftovers(directory)
        manifest = read_manifest(directory)
        kept = {name: entry for name, entry in manifest.files.items() if new.get(name, entry) == entry}
        if kept != manifest.files:
            write_manifest(directory, replace(manifest, files=kept))
        for name, data in files.items():
            target = directory / name
            if target.is_file() and target.read_bytes() == data:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(target, data)
            fsync_directory(directory)
        lock.check()
        if kept | new != manifest.files:
            write_manifest(directory, replace(manifest, files=dict(sorted((kept | new).items()))))
