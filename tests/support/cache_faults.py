"""Faults for the cache's tests: real kills at chosen system operations, an ordinary user, full disks, damaged files."""

import contextlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from shared.cache.reader import Cache
from shared.errors import DistillError

NOBODY = 65_534


@contextlib.contextmanager
def fast_folder():
    """A folder in memory where there is one, since the tests of kills sync hundreds of times; others may enter it."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(dir=parent))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


# --- kills -----------------------------------------------------------------------------------------------------------


def killed_at(boundary, function, *arguments):
    """Run a function in a forked child that dies by SIGKILL just before its boundary-th system operation.

    Operations are those that change a folder or make it durable: create, write (killed half-way), fsync, rename,
    replace, unlink, mkdir.

    Returns:
        Whether it was killed; false if it ended before that many operations.
    """

    def child():
        left = [boundary]

        def tick():
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def wrap(operation):
            def wrapped(*args, **kwargs):
                tick()
                return operation(*args, **kwargs)

            return wrapped

        def open_file(file, mode="r", *args, **kwargs):
            if "w" not in mode:
                return real_open(file, mode, *args, **kwargs)
            tick()
            return HalfWriter(real_open(file, mode, *args, **kwargs), tick)

        def open_descriptor(file, flags, *args, **kwargs):
            if flags & os.O_CREAT:
                tick()
            return real_open_descriptor(file, flags, *args, **kwargs)

        real_open, real_open_descriptor = io.open, os.open
        io.open, os.open = open_file, open_descriptor
        for name in ("fsync", "replace", "rename", "unlink", "mkdir", "write"):
            setattr(os, name, wrap(getattr(os, name)))
        function(*arguments)

    status = in_child(child)
    assert status in (0, -signal.SIGKILL), status
    return status != 0


class HalfWriter:
    """A file that reaches the disk by halves, with a boundary between them."""

    def __init__(self, file, tick):
        self._file, self._tick = file, tick

    def write(self, data):
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._tick()
        return half + self._file.write(data[half:])

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


def in_child(function):
    """Run a function in a forked child: its exit status, 1 after an exception, −n after signal n."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def as_ordinary_user(function):
    """Run a function in a forked child without root's rights: its exit status."""

    def child():
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        function()

    return in_child(child)


# --- full disks ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder, size_bytes):
    """A file system of its own of so many bytes, where this user may mount one; else None."""
    folder.mkdir(exist_ok=True)
    options = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=755", "none", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(options, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def file_size_limit(size_bytes):
    """No file of this process grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


# --- damage ----------------------------------------------------------------------------------------------------------


def contents(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def read_all(path):
    """Everything that a reader gives, as bytes."""
    cache = Cache(path)
    parts = [cache.doc_lengths.tobytes(), repr(cache.manifest).encode()]
    for doc in range(cache.num_documents):
        parts += [repr(cache.meta(doc)).encode(), cache.loss_mask(doc).tobytes(), cache.tokens(doc).tobytes()]
        for T in cache.temperatures:
            targets = cache.targets(doc, T)
            parts += [array.tobytes() for array in (targets.k, targets.ids, targets.logp, targets.log_tail)]
    return b"\0".join(parts)


def random_damage(path, rng):
    """Damage a cache in one of many ways.

    Returns:
        What was done, and how to undo it.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = files[rng.integers(len(files))]
    data = file.read_bytes()

    def restore():
        file.write_bytes(data)

    kind = ["flip", "flip", "flip", "byte", "cut", "grow", "missing", "rename", "swap", "extra"][rng.integers(10)]
    what = f"{kind} {file.relative_to(path)}"
    if kind in ("flip", "byte"):
        at = int(rng.integers(len(data)))
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(8)) if kind == "flip" else int(rng.integers(1, 256))
        file.write_bytes(changed)
        return f"{what} at {at}", restore
    if kind == "cut":
        length = int(rng.integers(len(data)))
        file.write_bytes(data[:length])
        return f"{what} to {length}", restore
    if kind == "grow":
        file.write_bytes(data + rng.bytes(int(rng.integers(1, 50))))
        return what, restore
    if kind == "missing":
        file.unlink()
        return what, restore
    names = [
        "notes",
        "shard-00099.h5",
        "shard-00099.json",
        "tokenizer/x",
        ".a.tmp-9",
        "lock.json",
    ]
    new = path / names[rng.integers(len(names))]
    if kind == "rename":
        file.rename(new)
        return f"{what} to {new.name}", lambda: (new.unlink(), restore())
    if kind == "swap":
        others = [other for other in files if other.read_bytes() != data]
        other = others[rng.integers(len(others))]
        other_data = other.read_bytes()
        file.write_bytes(other_data)
        other.write_bytes(data)
        return f"{what} and {other.relative_to(path)}", lambda: (restore(), other.write_bytes(other_data))
    new.write_bytes([b"", data, rng.bytes(99)][rng.integers(3)])
    return f"{kind} {new.name}", new.unlink


def unnoticed(path, expected, verify):
    """What is wrong with how a damaged cache is met: None if it is noticed and never read wrong."""
    try:
        if not verify(path):
            return "not noticed by verify"
        if read_all(path) != expected:
            return "read wrong"
    except DistillError as error:
        return "an error of several lines" if "\n" in str(error) else None
    return None


CLI = [sys.executable, "-c", "from shared.__main__ import main; main()"]
