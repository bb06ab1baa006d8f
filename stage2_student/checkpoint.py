"""Which checkpoints count: only one that bears `COMPLETE`, written last and fsynced, and whose files are as it says.

Files that were not sealed with a checkpoint never count for or against it: systems and people leave files anywhere.
Nothing that may still be of use is removed; a damaged checkpoint is set aside under another name.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.errors import ConfigError, ResumeError, require
from shared.files import fsync_directory, is_system_file, read_json, settle_file, sha256_file, write_json
from shared.lock import LOCK
from shared.process import log

RUN_FORMAT, RUN_VERSION = "codedistill-run", 2  # of run.json
MARKER = "COMPLETE"
WINDOW = "window.json"  # the last file that training writes into a checkpoint: the loss sums since the last log
# What a save writes; anything else that lies in a checkpoint's folder by then is somebody else's.
_SAVED = {".safetensors", ".pt", ".pth", ".bin", ".json", ".distcp"}


def seal(checkpoint: Path) -> None:
    """Make a saved checkpoint durable and as readable as other files, then mark it complete.

    The marker holds size and SHA-256 of each file.
    """
    files = {}
    for file in _files(checkpoint):
        settle_file(file)
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
    if not isinstance(sealed, dict) or not isinstance(sealed.get("files"), dict) or not sealed["files"]:
        return f"{MARKER} names no files"
    for name, expected in sealed["files"].items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if (got := _describe(file)) != expected:
            return f"{name} is not what was saved (expected: {expected}, got: {got})"
    return None


def checkpoints(run: Path) -> list[Path]:
    """All checkpoint folders of a run, oldest first."""
    found = (path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir())
    return sorted(found, key=step_of)


def require_no_file(checkpoint: Path) -> None:
    """Raise `ResumeError` where a file that is no checkpoint stands under a checkpoint's name."""
    require(
        checkpoint.is_dir() or not (checkpoint.exists() or checkpoint.is_symlink()),
        "a file stands where a checkpoint goes",
        error=ResumeError,
        where=checkpoint,
        fix="move it elsewhere",
    )


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.partition("-")[2])


def newest_whole(run: Path) -> Path | None:
    """The checkpoint to resume from, or None where the run has never finished one.

    Newer checkpoints that are damaged are named and set aside as `damaged-checkpoint-N`. What a kill left of a save or
    of a removal is cleared away.

    Raises:
        ResumeError: the run had checkpoints, and none is whole. Nothing is changed.
    """
    unsealed = [path for path in checkpoints(run) if not (path / MARKER).exists()]
    sealed = [path for path in checkpoints(run) if (path / MARKER).exists()]
    damaged: dict[Path, str] = {}
    whole = None
    for path in reversed(sealed):
        if (wrong := damage(path)) is None:
            whole = path
            break
        damaged[path] = wrong
    # Without sealed ones a kill leaves one unsealed checkpoint, of the first save; more have lost their markers.
    earlier = [path for path in run.glob("damaged-checkpoint-*") if (path / MARKER).exists()]
    lost = [*damaged, *earlier] or (unsealed if len(unsealed) > 1 else [])
    if whole is None and lost:
        words = dict.fromkeys(unsealed, f"no {MARKER}") | dict.fromkeys(earlier, "set aside earlier") | damaged
        named = "; ".join(f"{path.name}: {words[path]}" for path in lost)
        raise ResumeError(
            "no checkpoint of this run is whole",
            where=run,
            got=named,
            fix="restore a checkpoint from a copy; or start over: choose another --out, or delete this folder",
        )
    for path, wrong in damaged.items():
        _set_aside(path, wrong)
    for path in unsealed:
        if whole is not None and step_of(path) < step_of(whole):
            _remove(path)  # a removal that was killed
        elif (path / WINDOW).exists():
            _set_aside(path, f"{MARKER} is missing")
        else:
            log(f"{path} was never finished; removed")
            _remove(path)
    return whole


def _set_aside(path: Path, wrong: str) -> None:
    names = (f"damaged-{path.name}{suffix}" for suffix in ("", *(f".{number}" for number in range(1, 1000))))
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    path.rename(target)
    log(f"{path} is damaged and set aside as {target.name}: {wrong}")


def is_leftover(path: Path) -> bool:
    """Whether a file is what a kill leaves of `shared.files.write_bytes` or of a lock."""
    return path.name == LOCK or re.fullmatch(r"\..+\.tmp-\d+", path.name) is not None


def remove_leftovers(run: Path) -> None:
    """Remove the temporary files that a killed process left."""
    for path in list(run.iterdir()):
        if is_leftover(path) and path.name != LOCK and path.is_file():
            path.unlink(missing_ok=True)


def rotate(run: Path, keep: int, best: str | None = None) -> None:
    """Remove the oldest complete checkpoints beyond `keep`, but never the best; called after the newest was sealed."""
    for path in [path for path in checkpoints(run) if (path / MARKER).exists()][:-keep]:
        if best is None or path.name != Path(best).name:  # the run may have been moved since
            _remove(path)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; what cannot be removed is named and left, since training is worth more."""
    try:
        if checkpoint.is_symlink():  # what it leads to is not ours to remove
            checkpoint.unlink()
            return
        with contextlib.suppress(FileNotFoundError):
            (checkpoint / MARKER).unlink()  # first, so that a half-removed folder never counts
        shutil.rmtree(checkpoint)
    except OSError as error:
        log(f"{checkpoint} cannot be removed: {error}")


def _files(checkpoint: Path) -> Iterator[Path]:
    """What training wrote: by name, and `.metadata` of torch's distributed checkpoints."""
    for file in sorted(checkpoint.rglob("*")):
        is_saved = file.suffix in _SAVED or file.name == ".metadata"
        if file.is_file() and is_saved and not is_system_file(file.name):
            yield file


def _describe(file: Path) -> dict[str, Any]:
    return {"size_bytes": file.stat().st_size, "sha256": sha256_file(file)}
