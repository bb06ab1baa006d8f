"""Caches that lie elsewhere: what a URL names, and its files, read patiently."""

import errno
import hashlib
import os
import re
import time
import urllib.error
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from shared.cache.format import MANIFEST
from shared.cache.manifest import FileEntry, Manifest, parse_manifest
from shared.errors import CacheCorruptError, CacheFormatError, ConfigError, DistillError, require
from shared.files import fsync_directory
from shared.hub import find_commit
from shared.process import log

T = TypeVar("T")

PAUSES_SECONDS = (0.5, 1, 2, 4, 8, 16, 32)
TIMEOUT_SECONDS = 30.0  # without a byte
PIECE_BYTES = 32 << 20  # of one request
MAX_MANIFEST_BYTES = 1 << 30
THREADS = 8
EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}
_URL = re.compile(r"(hf|s3|gs|https?|file):/+(.+)")
_HUB = re.compile(r"datasets/([^/@]+/[^/@]+)(?:@(.+))?")


def url_of(place: Path | str) -> str | None:
    """A cache's URL; None for a path. `Path` folds the slashes behind a scheme into one, which is undone.

    Raises:
        ConfigError: the URL holds a password or a signature, which logs and records of runs would then hold too.
    """
    found = _URL.fullmatch(str(place).rstrip("/"))
    if found is None:
        return None
    scheme, rest = found[1], found[2]
    host, query = rest.partition("/")[0], rest.partition("?")[1] if scheme.startswith("http") else ""
    if scheme != "file" and ("@" in host or query):
        where, fix = f"{scheme}://{host.rpartition('@')[2]}/…", "pass keys by the environment or the client's files"
        raise ConfigError("a cache's URL holds no credentials and no query", where=where, fix=fix)
    return f"{scheme}://{'/' if scheme == 'file' else ''}{rest}"


def local_path(place: Path | str) -> Path | None:
    """The path of a cache on a file system of this machine; None where it lies elsewhere."""
    url = url_of(place)
    if url is None:
        return Path(place)
    return Path(url.removeprefix("file://")) if url.startswith("file:") else None


class Remote:
    """A folder that a URL names.

    Args:
        url: `hf://datasets/OWNER/NAME[@REV]`, `s3://…`, `gs://…`, `http(s)://…` or `file:///…`. Of a data
            set on the Hub the commit that REV stands for now is read.

    Raises:
        ConfigError: no such URL, a library is missing, or the Hub has no such data set.
    """

    def __init__(self, url: str) -> None:
        self.scheme = url.partition(":")[0]
        self.url = url
        if self.scheme == "hf":
            self.repo_id, revision = split_hub(url)
            self.revision = find_commit(self.repo_id, "dataset", revision)
            fix = "unset HF_HUB_OFFLINE, or `codedistill cache pull` while it is unset"
            require(self.revision is not None, "the Hub is switched off (HF_HUB_OFFLINE=1)", where=url, fix=fix)
            self.url = f"hf://datasets/{self.repo_id}@{self.revision}"

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes of a file from `start` on; of one that ends at `stop`, a piece. A dropped connection is retried.

        Raises:
            FileNotFoundError: there is no such file.
            ConfigError: the server refuses, or cannot be reached for a minute.
        """
        return patiently(lambda: self._read(name, start, stop), f"{self.url}/{name}")

    def _read(self, name: str, start: int, stop: int | None) -> bytes:
        if self.scheme == "hf":
            from huggingface_hub import hf_hub_url
            from huggingface_hub.utils import build_hf_headers

            url = hf_hub_url(self.repo_id, name, repo_type="dataset", revision=self.revision)
            return _http(url, build_hf_headers(), start, stop)
        if self.scheme in ("http", "https"):
            return _http(f"{self.url}/{urllib.parse.quote(name)}", {}, start, stop)
        file_system, folder = open_file_system(self.url)
        end = stop and min(start + PIECE_BYTES, stop)
        data: bytes = file_system.cat_file(f"{folder}/{name}", start=start, end=end)
        return data

    def digest(self, name: str, num_bytes: int) -> str | None:
        """SHA-256 of a file as it lies there; None where it is missing or of another size."""
        digest, at = hashlib.sha256(), 0
        try:
            while at < num_bytes:
                data = self.read(name, at, num_bytes)
                digest.update(data)
                at += len(data)
                if not data:
                    return None
            return digest.hexdigest() if at == num_bytes else None
        except FileNotFoundError:
            return None

    def download(self, name: str, entry: FileEntry, file: Path) -> None:
        """Fetch a file under a temporary name, go on where an earlier attempt ended, check it, rename it.

        Raises:
            CacheCorruptError: it is missing, or its bytes are not those of the manifest.
            ConfigError: the server refuses, or cannot be reached.
        """
        where, part = f"{self.url}/{name}", part_of(file, entry)
        part.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with part.open("a+b") as out:
            out.seek(0)
            while data := out.read(1 << 20):
                digest.update(data)
            resumed = at = out.tell()
            while at < entry.bytes:
                try:
                    data = self.read(name, at, entry.bytes)
                except FileNotFoundError as error:
                    raise CacheCorruptError("a file of the cache is missing", where=where) from error
                if not data or at + len(data) > entry.bytes:
                    part.unlink()
                    got = f"{at + len(data)} bytes"
                    what = "a file of the cache has the wrong size"
                    raise CacheCorruptError(what, where=where, expected=f"{entry.bytes} bytes", got=got)
                out.write(data)
                digest.update(data)
                at += len(data)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != entry.sha256:
            part.unlink()
            if resumed:  # what an earlier attempt left may be to blame
                return self.download(name, entry, file)
            raise CacheCorruptError(
                "a file's bytes have changed",
                where=where,
                expected=entry.sha256,
                got=digest.hexdigest(),
                fix="codedistill cache push, from a whole copy; or try again if the network is to blame",
            )
        part.replace(file)
        fsync_directory(file.parent)

    def manifest(self) -> tuple[Manifest, bytes]:
        """The cache's manifest, and its bytes.

        Raises:
            CacheFormatError: there is no finished cache, or an unknown version.
            CacheCorruptError: a byte of the manifest has changed.
        """
        where = f"{self.url}/{MANIFEST}"
        try:
            data = self.read(MANIFEST)
        except FileNotFoundError as error:
            what, fix = "there is no finished cache here", "check the URL; a push that was cut off is run again"
            raise CacheFormatError(what, where=self.url, expected=MANIFEST, fix=fix) from error
        if not data.startswith(b"{"):
            got = f"a file that begins with {data[:40]!r}"
            raise CacheFormatError("there is no cache here", where=where, got=got, fix="check the URL")
        return parse_manifest(data, where), data


def split_hub(url: str) -> tuple[str, str | None]:
    """A data set's `OWNER/NAME` and revision, if the URL names one.

    Raises:
        ConfigError: it is no such URL.
    """
    found = _HUB.fullmatch(url.removeprefix("hf://"))
    if found is None:
        raise ConfigError("not a data set on the Hub", where=url, expected="hf://datasets/OWNER/NAME[@REV]")
    return found[1], found[2]


def open_file_system(url: str) -> tuple[Any, str]:
    """An fsspec file system of this process, and the folder in it.

    Raises:
        ConfigError: its library is not installed.
    """
    import fsspec

    try:
        file_system, folder = fsspec.url_to_fs(url)
    except ImportError as error:
        scheme = url.partition(":")[0]
        what, fix = f"{scheme}:// needs {EXTRAS.get(scheme)}", f"pip install 'codedistill[{scheme}]'"
        raise ConfigError(what, where=url, got=error, fix=fix) from error
    return file_system, str(folder).rstrip("/")


def patiently(action: Callable[[], T], where: str) -> T:
    """Run a request; repeat it with growing pauses while the connection, and not the request, is to blame.

    Raises:
        FileNotFoundError: as the request raised it.
        ConfigError: the server refuses, or the last attempt failed too.
    """
    for pause in (*PAUSES_SECONDS, None):
        try:
            return action()
        except (DistillError, FileNotFoundError):
            raise
        except Exception as error:  # each client has its own errors
            got = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if _is_refusal(error):
                fix = "check the name and your rights: `hf auth login`, AWS or Google credentials; ask for access"
                raise ConfigError("access to a remote cache is refused", where=where, got=got, fix=fix) from error
            if pause is None:
                what, fix = "a remote cache cannot be reached", "run the command again later: it continues"
                raise ConfigError(what, where=where, got=got, fix=fix) from error
            log(f"{where}: {got}; again in {pause:g} s")
            time.sleep(pause)
    raise AssertionError


def _is_refusal(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return 400 <= error.code < 500 and error.code not in (408, 429)
    is_place = isinstance(error, (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError))
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return is_place or is_full or isinstance(error, ValueError) or "Credentials" in type(error).__name__


def _http(url: str, headers: dict[str, str], start: int, stop: int | None) -> bytes:
    """A piece of a file that ends at `stop`, from `start` on; all of the rest where a server knows no ranges."""
    import http.client
    import urllib.request

    request = urllib.request.Request(url)
    for key, value in headers.items():
        request.add_unredirected_header(key, value)  # storage that the Hub redirects to gets no token
    if stop is not None:
        request.add_header("Range", f"bytes={start}-{min(start + PIECE_BYTES, stop) - 1}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            is_part = answer.status == 206
            if is_part and not answer.headers.get("Content-Range", f"bytes {start}-").startswith(f"bytes {start}-"):
                raise http.client.HTTPException("the server sent another range")
            # One byte too many tells of a longer file; its end, which may never come, is not waited for.
            limit = (stop or MAX_MANIFEST_BYTES) + 1 - (start if is_part else 0)
            data: bytes = answer.read(limit)
            length = answer.headers.get("Content-Length")
            if length and len(data) < min(int(length), limit):
                raise http.client.IncompleteRead(data)
            return data if is_part else data[start:]
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 404:
                raise FileNotFoundError(url) from error
            if error.code == 416:  # the file ends before `start`
                return b""
            raise


def part_of(file: Path, entry: FileEntry) -> Path:
    """The temporary name of a file that is being fetched; its number is the file's size."""
    return file.with_name(f".{file.name}.tmp-{entry.bytes}")
