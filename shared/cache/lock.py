"""The claim on a cache directory: one process builds or changes it at a time."""

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from shared.cache.format import CLAIM
from shared.errors import ResumeError

REFRESH_SECONDS = 10.0
LAPSE_SECONDS = 60.0


class Claim:
    """Holds `claim.json` (pid, host) in a directory and refreshes its mtime every ten seconds until `release`.

    A claim whose process on this host is dead does not block; any other lapses after 60 s without refresh.

    Args:
        directory: exists.
        work: what is done there, as the refusal of another process says it.

    Raises:
        ResumeError: another live process holds the directory.
    """

    def __init__(self, directory: Path, work: str = "building this cache") -> None:
        self.path, self._work = directory / CLAIM, work
        self._text = json.dumps({"pid": os.getpid(), "host": platform.node(), "token": uuid.uuid4().hex})
        while not self._create():
            self._remove_dead()
        self._released = threading.Event()
        threading.Thread(target=self._refresh, name="cache-claim", daemon=True).start()

    def check(self) -> None:
        """Refuse to go on where another process has taken the directory over.

        Raises:
            ResumeError: the claim is no longer ours.
        """
        if _read(self.path) != self._text:
            raise ResumeError(
                "another process has taken this cache over",
                where=self.path.parent,
                got=_read(self.path) or "no claim",
                fix="let the other build finish, then run the command again",
            )

    def release(self) -> None:
        """Give the directory back."""
        self._released.set()
        if _read(self.path) == self._text:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, self._text.encode())
        finally:
            os.close(descriptor)
        return True

    def _remove_dead(self) -> None:
        text = _read(self.path)
        if text == "":
            time.sleep(0.5)  # a process writes its claim at once; one that is still empty was killed while claiming
            text = _read(self.path)
        if text is None:
            return
        if text and not is_dead(self.path):
            holder = _parse(text)
            raise ResumeError(
                f"another process is {self._work}",
                where=self.path.parent,
                got=f"process {holder.get('pid')} on {holder.get('host')}",
                fix=f"wait for it to end; a process that is gone is forgotten after {LAPSE_SECONDS:.0f} s",
            )
        aside = self.path.with_name(f".{CLAIM}.tmp-{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            if _read(aside) == text:
                aside.unlink()
            else:  # a third process removed the dead claim first, and this one is alive
                aside.rename(self.path)

    def _refresh(self) -> None:
        while not self._released.wait(REFRESH_SECONDS):
            with contextlib.suppress(OSError):
                if _read(self.path) == self._text:
                    os.utime(self.path)


class SharedClaim(Claim):
    """The claim that another process of the same job holds for all of them; it refreshes it and gives it back.

    Raises:
        ResumeError: nobody holds the directory.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / CLAIM
        self._text = _read(self.path) or ""
        if not self._text:
            raise ResumeError("nobody has claimed this cache", where=directory)

    def release(self) -> None:
        """Leave the claim to its holder."""


def is_dead(path: Path) -> bool:
    """Whether a claim file no longer protects its directory."""
    try:
        age_seconds = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return True
    holder = _parse(_read(path) or "")
    if holder.get("host") == platform.node() and isinstance(holder.get("pid"), int):
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return age_seconds > LAPSE_SECONDS


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _parse(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        holder = json.loads(text)
        if isinstance(holder, dict):
            return holder
    return {}
