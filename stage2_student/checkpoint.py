"""Which checkpoints count: only one that bears `COMPLETE`, written last and fsynced, is ever resumed from."""

import os
import re
import shutil
from pathlib import Path

from shared.runtime import fsync_directory, log, write_bytes

RUN_FORMAT, RUN_VERSION = "codedistill-run", 2  # of run.json
MARKER = "COMPLETE"


def seal(checkpoint: Path) -> None:
    """Make a saved checkpoint durable, then mark it complete."""
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    fsync_directory(checkpoint)
    write_bytes(checkpoint / MARKER, b"")
    fsync_directory(checkpoint.parent)


def checkpoints(run: Path) -> list[Path]:
    """All checkpoint folders of a run, oldest first."""
    found = [
        (int(match[1]), path)
        for path in run.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]


def latest_complete(run: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return next((path for path in reversed(checkpoints(run)) if (path / MARKER).exists()), None)


def is_leftover(path: Path) -> bool:
    """Whether a file is what a kill leaves of `shared.runtime.write_bytes`."""
    return re.fullmatch(r"\..+\.tmp-\d+", path.name) is not None


def remove_incomplete(run: Path) -> None:
    """Remove what a killed save left behind."""
    for path in filter(is_leftover, list(run.iterdir())):
        path.unlink(missing_ok=True)
    for path in checkpoints(run):
        if not (path / MARKER).exists():
            log(f"{path} was never finished; removed")
            shutil.rmtree(path)


def rotate(run: Path, keep: int) -> None:
    """Remove the oldest complete checkpoints beyond `keep`; called after the newest was sealed."""
    for path in [path for path in checkpoints(run) if (path / MARKER).exists()][:-keep]:
        (path / MARKER).unlink()  # first, so that a half-removed folder never counts
        shutil.rmtree(path)
