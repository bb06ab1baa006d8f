"""The local cache: files of caches that lie elsewhere, on this machine, fetched when they are needed.

It is a folder of bounded size that all processes of this machine share. It holds `<SHA-256 of the manifest>/<file>`, so
copies of one cache share their files.
"""

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shared.cache.directory import plain_errors
from shared.cache.format import MANIFEST, SHARD_PATTERN
from shared.cache.remote import THREADS, Remote, part_of
from shared.errors import DistillError, ResumeError, require
from shared.files import write_bytes
from shared.lock import Lock, is_locked
from shared.process import log

LOCAL_CACHE, LOCAL_BYTES = "CODEDISTILL_LOCAL_CACHE", "CODEDISTILL_LOCAL_BYTES"  # environment, for child processes too
DEFAULT_BYTES = 50 << 30
AHEAD = 4  # files that one process fetches ahead at a time
POLL_SECONDS = 0.02
_PART = re.compile(r"\..+\.tmp-(\d+)")
_OWN_FOLDER = re.compile(r"[0-9a-f]{32}")


class Store:
    """A remote cache whose files are kept on this machine, in the local cache.

    A file is fetched once, however many processes of this machine ask for it. Only shards, which were fetched here, are
    evicted: those used longest ago. What is stored decides when a file arrives, never what is read.

    Args:
        url: of the cache.

    Raises:
        CacheFormatError, CacheCorruptError: see `Remote.manifest`.
        ConfigError: the cache cannot be reached, or the local cache is too small for one of its shards.
    """

    def __init__(self, url: str) -> None:
        self.remote = Remote(url)
        self.manifest, data = self.remote.manifest()
        self.root, self.limit_bytes = local_cache()
        self.folder = self.root / hashlib.sha256(data).hexdigest()[:32]
        sizes = {name: entry.bytes for name, entry in self.manifest.files.items()}
        self.shard_bytes = [size for name, size in sizes.items() if _is_shard(name)]
        need = sum(sizes.values()) - sum(self.shard_bytes) + max(self.shard_bytes) + len(data)
        self._require_room(need)
        with plain_errors(self.root), _locked(self.root / ".lock"):
            if not (self.folder / MANIFEST).exists():
                self.folder.mkdir(exist_ok=True)
                write_bytes(self.folder / MANIFEST, data)
        self._coming: tuple[int, set[str]] = (os.getpid(), set())

    def read(self, name: str) -> bytes:
        """A file's bytes, from this machine or fetched now.

        Raises:
            CacheCorruptError, ConfigError: see `Remote.download`.
        """
        while True:
            file = self.fetch(name)
            with contextlib.suppress(FileNotFoundError):  # evicted by another process
                os.utime(file)
                return file.read_bytes()

    def fetch(self, name: str) -> Path:
        """A file's path on this machine, after it was fetched and checked; a shard may be evicted again."""
        file, entry = self.folder / name, self.manifest.files[name]
        while not self.has(name):
            with plain_errors(file), _locked(self._lock(file)):
                if not self.has(name):
                    self._make_room(part_of(file, entry), entry.bytes)
                    self.remote.download(name, entry, file)
        return file

    def fetch_all(self, names: Iterable[str]) -> None:
        """Fetch several files at a time."""
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(self.fetch, [name for name in names if not self.has(name)]))

    def has(self, name: str) -> bool:
        """Whether a file is here, whole."""
        try:
            return (self.folder / name).stat().st_size == self.manifest.files[name].bytes
        except OSError:
            return False

    def expect(self, names: Iterable[str]) -> None:
        """Fetch files that will be read soon, a few at a time in the background; `read` repeats what fails."""
        if self._coming[0] != os.getpid():
            self._coming = (os.getpid(), set())  # threads do not survive a fork
        coming = self._coming[1]
        for name in names:
            if len(coming) >= AHEAD:
                return
            if name not in coming and not self.has(name):
                coming.add(name)
                threading.Thread(target=self._fetch_ahead, args=(name, coming), daemon=True).start()

    def _fetch_ahead(self, name: str, coming: set[str]) -> None:
        try:
            self.fetch(name)
        except (DistillError, OSError) as error:
            log(f"not fetched ahead: {error}")
        finally:
            coming.discard(name)

    def _make_room(self, part: Path, num_bytes: int) -> None:
        """Reserve a file's bytes by its temporary name, after evicting the shards used longest ago."""
        while True:
            with _locked(self.root / ".lock"):
                files = [(file, _reserved(file)) for file in _files(self.root) if file != part]
                excess = sum(size for _, size in files) + num_bytes - self.limit_bytes
                for _, file, size in sorted((_used(file), file, size) for file, size in files if self._may_go(file)):
                    if excess <= 0:
                        break
                    file.unlink(missing_ok=True)
                    excess -= size
                if excess <= 0:
                    part.parent.mkdir(parents=True, exist_ok=True)
                    part.touch()
                    return
            if not any(_PART.fullmatch(file.name) and self._is_ours(file) for file, _ in files):
                self._require_room(self.limit_bytes + excess)
            time.sleep(POLL_SECONDS)  # another process holds room for what it fetches

    def _may_go(self, file: Path) -> bool:
        """Whether a file was fetched here, can be fetched again, and nobody fetches it now."""
        if not self._is_ours(file):
            return False
        if _PART.fullmatch(file.name):
            return not is_locked(self._lock(file.with_name(file.name[1:].rpartition(".tmp-")[0])))
        return _is_shard(file.name)

    def _is_ours(self, file: Path) -> bool:
        return _OWN_FOLDER.fullmatch(file.relative_to(self.root).parts[0]) is not None

    def _require_room(self, need: int) -> None:
        require(
            need <= self.limit_bytes,
            "the local cache is too small for this cache",
            where=self.root,
            expected=f"--local-bytes {need:,} or more",
            got=f"{self.limit_bytes:,}",
            fix="a higher --local-bytes, another --local-cache, or remove what is there",
        )

    def _lock(self, file: Path) -> Path:
        """The folder of the lock under which a file is fetched."""
        return self.root / ".locks" / "-".join(file.relative_to(self.root).parts)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_coming": (0, set())}


def local_cache() -> tuple[Path, int]:
    """The folder of the local cache and its greatest size in bytes, from the environment or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get(LOCAL_CACHE) or Path(base) / "codedistill" / "caches"
    text = os.environ.get(LOCAL_BYTES) or str(DEFAULT_BYTES)
    require(text.isdigit(), "not a number of bytes", where=LOCAL_BYTES, got=text)
    return Path(folder).absolute(), int(text)


def _is_shard(name: str) -> bool:
    found = SHARD_PATTERN.fullmatch(name)
    return found is not None and found[2] == "h5"


def _files(root: Path) -> Iterator[Path]:
    """What the local cache holds, without its locks."""
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".lock")]
        yield from (Path(parent, name) for name in names)


def _reserved(file: Path) -> int:
    if found := _PART.fullmatch(file.name):
        return int(found[1])
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_size
    return 0


def _used(file: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_mtime
    return 0.0


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, after whoever has it."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            lock = Lock(folder, "fetching")
            break
        except ResumeError:
            time.sleep(POLL_SECONDS)
    with lock:
        yield
