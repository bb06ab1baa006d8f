"""Durable files and folders, and strict JSON."""

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from shared.errors import ConfigError, require

_SCRATCH = ".tmp-"
# What macOS, Windows, NFS, FUSE and file servers put into folders at any time, and take away again.
_SYSTEM_FILE = re.compile(r"\._.+|\.DS_Store|Thumbs\.db|desktop\.ini|\.(nfs|fuse_hidden).*")


def output_path(path: Path) -> Path:
    """A path to write to, with a name and a parent of its own: `.` and `..` have none that `Path` knows.

    Raises:
        ConfigError: it is not UTF-8, and the tokenizers library opens no such path.
    """
    path = path if path.name not in ("", "..") else path.resolve()
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ConfigError("a path to write to is not UTF-8", where="--out", got=ascii(str(path))) from error
    return path


def is_system_file(name: str) -> bool:
    """Whether a file of this name is one that operating and file systems leave in any folder."""
    return _SYSTEM_FILE.fullmatch(name) is not None


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that `path` holds either its old content or all of `data`, also after a power cut.

    Temporary name in the same folder → fsync → rename → folder fsync.
    """
    replace_files(path.parent, {path.name: data})


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let the system's errors say which file it was: those of a write to an open file, as on a full disk, do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def replace_files(folder: Path, files: Mapping[str, bytes | None]) -> None:
    """Replace files that belong together; None removes one.

    All new files are durable under temporary names before any old one is touched. Of several, the last says that the
    others are whole: it is removed first and comes back last, so it never stands beside others' content.

    Raises:
        ConfigError: one is a device, a pipe or a socket, which a rename would take away.
    """
    for path in (folder / name for name in files):
        is_replaceable = path.is_file() or path.is_dir() or not path.exists()
        require(is_replaceable, "not a regular file, and not replaced by one", where=path, fix="name a file")
    temporary = {name: folder / f".{name}.tmp-{os.getpid()}" for name, data in files.items() if data is not None}
    try:
        for name, path in temporary.items():
            with naming(folder / name), path.open("wb") as file:
                file.write(files[name] or b"")
                file.flush()
                os.fsync(file.fileno())
        removed = [name for name, data in files.items() if data is None]
        if len(files) > 1:
            removed.insert(0, list(files)[-1])
        for name in removed:
            (folder / name).unlink(missing_ok=True)
        for name, path in temporary.items():
            path.replace(folder / name)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise
    fsync_directory(folder)


def link_file(source: Path, path: Path) -> bool:
    """Give a file a second name, in place of what has that name.

    Returns:
        Whether the file system could: both are on one that knows hard links, and the user may.
    """
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
    try:
        os.link(source.resolve(), temporary)
    except OSError:
        return False
    temporary.replace(path)
    temporary.unlink(missing_ok=True)  # where both were one file already, the system has replaced nothing
    fsync_directory(path.parent)
    return True


@contextlib.contextmanager
def publish_folder(out: Path) -> Iterator[Path]:
    """A new folder that stands at `out` once the block ends, whole, also after a power cut; or not at all.

    Its files have the mode that the umask gives.

    The folder is made beside `out`, in a scratch folder (its parent) that the block may use too and that is removed
    either way. What killed processes of this machine left beside `out` is removed first.

    Raises:
        OSError: `out` is there and is no empty folder.
    """
    out = output_path(out)
    remove_abandoned(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}{_SCRATCH}{platform.node()}-{os.getpid()}-"
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    try:
        folder = scratch / out.name
        folder.mkdir()
        yield folder
        for parent, _, names in os.walk(folder):
            for name in names:
                settle_file(Path(parent, name))
            fsync_directory(Path(parent))
        folder.rename(out)
        fsync_directory(out.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_abandoned(parent: Path) -> None:
    """Remove the scratch folders that killed processes of this machine left in a folder (see `publish_folder`)."""
    own = re.compile(rf"\..+{re.escape(f'{_SCRATCH}{platform.node()}')}-(\d+)-[^-]+")
    for path in parent.iterdir() if parent.is_dir() else ():
        found = own.fullmatch(path.name)
        if found is None:
            continue
        try:
            os.kill(int(found[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (PermissionError, OverflowError):
            pass  # another user's process, or no number of a process


def settle_file(path: Path) -> None:
    """Make a file that a library has written durable, with the mode that the umask gives: safetensors writes 0600."""
    mask = os.umask(0o077)
    os.umask(mask)
    if path.stat().st_mode & 0o7777 != 0o666 & ~mask:  # only its owner may change it
        path.chmod(0o666 & ~mask)
    with naming(path), path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_directory(path: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any) -> str:
    """Strict JSON (no NaN or Infinity), readable, keys in the order given; UTF-8 can hold it.

    Lone surrogates (ids in data, bytes of file names that are no UTF-8) become their escapes.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode(errors="backslashreplace").decode()


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON durably."""
    write_bytes(path, to_json(value).encode())


def read_json(path: Path) -> Any:
    """Read strict JSON.

    Raises:
        ConfigError: the file is missing or is no JSON.
    """
    try:
        return json.loads(path.read_bytes(), parse_constant=_refuse_constant, parse_float=_finite)
    except OSError as error:
        raise ConfigError("cannot read a file", where=path, got=error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError("a file is not valid JSON", where=path, got=error) from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSONL, without a last line that a kill cut short.

    Raises:
        ConfigError: the file is missing, or a line is no JSON object.
    """
    records = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot read a file", where=path, got=error) from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line, parse_constant=_refuse_constant, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            fault = json_fault(error)
            raise ConfigError("a line is not valid JSON", where=f"{path}, line {number}", got=fault) from error
        require(isinstance(record, dict), "a line is no JSON object", where=f"{path}, line {number}", got=line[:80])
        records.append(record)
    return records


def json_fault(error: Exception) -> str:
    """What is wrong with a line of JSONL; the decoder itself counts lines from that one."""
    return f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text)


def sha256_json(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON form: sorted keys, no spaces, ASCII."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
