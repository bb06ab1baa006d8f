"""The lock on a folder: one process, or one job of several, builds or changes what is in it at a time."""

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

from shared.errors import ResumeError
from shared.process import log

LOCK = "lock.json"
REFRESH_SECONDS = 10.0
STALE_SECONDS = 60.0
POLL_SECONDS = 0.5


class Lock:
    """Holds `lock.json` in a folder and refreshes its mtime every ten seconds until `release`.

    A lock whose process ran on this machine and is gone is removed at once. Whether the process of another machine is
    alive, only its refreshes tell: the lock is watched, and removed where nothing of it has changed for 60 seconds of
    this machine's monotonic clock. No clock of another machine and no file date is compared with this one's.

    Args:
        directory: exists.
        work: what is done there, as the refusal of another process says it.

    Raises:
        ResumeError: another live process holds the folder.
    """

    def __init__(self, directory: Path, work: str = "at work in this folder") -> None:
        self.path, self._work = directory / LOCK, work
        self._text = json.dumps(_this_process() | {"token": uuid.uuid4().hex})
        while not self._create():
            self._remove_stale()
        self._released = threading.Event()
        threading.Thread(target=self._refresh, name="lock", daemon=True).start()

    def check(self) -> None:
        """Refuse to go on where another process has taken the folder over.

        Raises:
            ResumeError: the lock is no longer ours.
        """
        text = _look(self.path)[0]
        if text != self._text:
            raise ResumeError(
                "another process has taken this folder over",
                where=self.path.parent,
                got=text or "no lock",
                fix="let the other process finish, then run the command again",
            )

    def release(self) -> None:
        """Give the folder back."""
        self._released.set()
        if _look(self.path)[0] == self._text:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, self._text.encode())
        finally:
            os.close(descriptor)
        return True

    def _remove_stale(self) -> None:
        """Remove the lock that is there if its process is gone; refuse otherwise."""
        seen = text, _ = _look(self.path)
        if text == "":
            time.sleep(POLL_SECONDS)  # a process writes its lock at once; one that is still empty was killed before
            seen = text, _ = _look(self.path)
        if text is None:
            return
        alive = _is_alive(text) if text else False
        if alive is None:
            alive = self._watch(seen)
        if alive:
            raise ResumeError(
                f"another process is {self._work}",
                where=self.path.parent,
                got=_named(text),
                fix=f"wait for it to end; once it is gone, this command takes over within {STALE_SECONDS:.0f} s",
            )
        aside = self.path.with_name(f".{LOCK}.tmp-{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            if _look(aside)[0] == text:
                aside.unlink()
            else:  # a third process removed the stale lock first, and this one is alive
                aside.rename(self.path)

    def _watch(self, seen: tuple[str | None, int]) -> bool:
        """Whether a lock changes within 60 seconds: then its process is alive."""
        log(f"{self.path.parent} is locked by {_named(seen[0])}: watching for {STALE_SECONDS:.0f} s if it lives")
        start = time.monotonic()
        while time.monotonic() - start < STALE_SECONDS:
            time.sleep(POLL_SECONDS)
            now = _look(self.path)
            if now != seen:
                return now[0] is not None
        return False

    def _refresh(self) -> None:
        while not self._released.wait(REFRESH_SECONDS):
            with contextlib.suppress(OSError):
                if _look(self.path)[0] == self._text:
                    os.utime(self.path)


class SharedLock(Lock):
    """The lock that another process of the same job holds for all of them; that process refreshes and releases it.

    Raises:
        ResumeError: nobody holds the folder.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK
        self._text = _look(self.path)[0] or ""
        if not self._text:
            raise ResumeError("nobody has locked this folder", where=directory)

    def release(self) -> None:
        """Leave the lock to its holder."""


def is_locked(directory: Path) -> bool:
    """Whether a folder has a lock whose process is not known to be gone; the process may be another machine's."""
    text = _look(directory / LOCK)[0]
    return text is not None and _is_alive(text) is not False


def is_abandoned(directory: Path) -> bool:
    """Whether a folder has a lock whose process ran on this machine and is gone."""
    return (directory / LOCK).exists() and not is_locked(directory)


def _this_process() -> dict[str, Any]:
    """What tells this process from every other of any machine, also after a reboot or in another container."""
    return {"pid": os.getpid(), "started": (_stat(os.getpid()) or (None, None))[1], **_machine()}


def _machine() -> dict[str, Any]:
    boot: str | None = None
    space: str | None = None
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = str(Path("/proc/self/ns/pid").readlink())
    return {"host": platform.node(), "boot": boot, "pid_namespace": space}


def _is_alive(text: str) -> bool | None:
    """Whether a lock's process is alive; None where it is not one of this machine's, or cannot be known."""
    holder = _parse(text)
    pid = holder.get("pid")
    if type(pid) is not int or pid <= 0 or {key: holder.get(key) for key in _machine()} != _machine():
        return None
    found = _stat(pid)
    if found is not None:
        return found[0] not in "ZX" and holder.get("started") in (found[1], None)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _stat(pid: int) -> tuple[str, int] | None:
    """A process's state, and when it started in ticks since the boot; None where there is no `/proc`, or no process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _look(path: Path) -> tuple[str | None, int]:
    """A lock's text and mtime in ns. Opening the file shows a network file system's newest state."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None, 0


def _named(text: str | None) -> str:
    holder = _parse(text or "")
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _parse(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        holder = json.loads(text)
        if isinstance(holder, dict):
            return holder
    return {}
