"""Which checkpoints count: only one that bears `COMPLETE`, written last and fsynced, and whose files are as it says."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.cache.format import CLAIM
from shared.errors import ConfigError
from shared.files import fsync_directory, read_json, sha256_file, write_json
from shared.process import log

RUN_FORMAT, RUN_VERSION = "codedistill-run", 2  # of run.json
MARKER = "COMPLETE"


def seal(checkpoint: Path) -> None:
    """Make a saved checkpoint durable, then mark it complete, with size and SHA-256 of each of its files."""
    files = {}
    for file in _files(checkpoint):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        files[str(file.relative_to(checkpoint))] = _describe(file)
    fsync_directory(checkpoint)
    write_json(checkpoint / MARKER, {"files": files})
    fsync_directory(checkpoint.parent)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a sealed checkpoint, in words; None where every file is as it was when it was sealed."""
    try:
        sealed = read_json(checkpoint / MARKER)
    except ConfigError as error:
        return str(error)
    if not isinstance(sealed, dict) or not isinstance(sealed.get("files"), dict):
        return f"{MARKER} names no files"
    for name, expected in sealed["files"].items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if (got := _describe(file)) != expected:
            return f"{name} is not what was saved (expected: {expected}, got: {got})"
    more = {str(file.relative_to(checkpoint)) for file in _files(checkpoint)} - sealed["files"].keys()
    return f"{min(more)} was not there when it was saved" if more else None


def checkpoints(run: Path) -> list[Path]:
    """All checkpoint folders of a run, oldest first."""
    found = (path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.partition("-")[2])


def latest_complete(run: Path) -> Path | None:
    """The newest checkpoint that is whole, or None; newer ones that are damaged are named and removed."""
    for path in reversed(checkpoints(run)):
        if not (path / MARKER).exists():
            continue
        if (wrong := damage(path)) is None:
            return path
        log(f"{path} is damaged and removed: {wrong}")
        _remove(path)
    return None


def is_leftover(path: Path) -> bool:
    """Whether a file is what a kill leaves of `shared.files.write_bytes` or of a claim."""
    return path.name == CLAIM or re.fullmatch(r"\..+\.tmp-\d+", path.name) is not None


def remove_incomplete(run: Path) -> None:
    """Remove what a killed save left behind."""
    for path in list(run.iterdir()):
        if is_leftover(path) and path.name != CLAIM:
            path.unlink(missing_ok=True)
    for path in checkpoints(run):
        if not (path / MARKER).exists():
            log(f"{path} was never finished; removed")
            shutil.rmtree(path)


def rotate(run: Path, keep: int, best: str | None = None) -> None:
    """Remove the oldest complete checkpoints beyond `keep`, but never the best; called after the newest was sealed."""
    for path in [path for path in checkpoints(run) if (path / MARKER).exists()][:-keep]:
        if best is None or path != Path(best):
            _remove(path)


def _remove(checkpoint: Path) -> None:
    (checkpoint / MARKER).unlink()  # first, so that a half-removed folder never counts
    shutil.rmtree(checkpoint)


def _files(checkpoint: Path) -> Iterator[Path]:
    return (file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file != checkpoint / MARKER)


def _describe(file: Path) -> dict[str, Any]:
    return {"size_bytes": file.stat().st_size, "sha256": sha256_file(file)}
