"""Uploading a cache: all its files to a URL; the manifest goes last."""

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from shared.cache.card import PLOT, card, plot
from shared.cache.directory import BATCH_FILES, plain_errors, remove_leftovers, stale_names
from shared.cache.format import BUILD, MANIFEST
from shared.cache.info import cache_info
from shared.cache.manifest import FileEntry, Manifest, parse_manifest, read_manifest
from shared.cache.remote import THREADS, Remote, local_path, open_file_system, patiently, split_hub, url_of
from shared.errors import CacheCorruptError, ConfigError, require
from shared.files import sha256_file, write_bytes
from shared.lock import Lock
from shared.progress import progress

T = TypeVar("T")

URLS = "hf://datasets/OWNER/NAME[@BRANCH], s3://…, gs://… or file:///…"


def push_cache(directory: Path, target: str, *, private: bool = False) -> str:
    """Upload a finished cache; a file that is there with the right SHA-256 is skipped.

    Args:
        directory: the cache.
        target: its URL; on the Hub the data set is created where there is none.
        private: create a private data set; an existing one must be private.

    Returns:
        The URL to read it by, on the Hub with its commit.

    Raises:
        CacheFormatError, CacheCorruptError: no finished cache, or a file of it is missing or damaged.
        ConfigError: the target cannot be written, or holds another cache.
    """
    manifest, url = read_manifest(directory), url_of(target)
    if url is None or url.startswith("http"):
        raise ConfigError("a cache cannot be pushed there", where=target, expected=URLS)
    if url.startswith("hf:"):
        return _push_to_hub(directory, manifest, url, private=private)
    require(not private, "--private is for the Hub", where=target)
    with _locked(url):
        _push_to_file_system(directory, manifest, url)
    return url


@contextlib.contextmanager
def _locked(url: str) -> Iterator[None]:
    """Hold the lock of a target on a file system of this machine; object stores know none."""
    folder = local_path(url)
    if folder is None:
        yield
        return
    with plain_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder, "pushing a cache to this folder")
    with lock:
        yield


def _push_to_file_system(directory: Path, manifest: Manifest, url: str) -> None:
    """Upload file by file; `build.json` goes first, and refuses another cache's push until the manifest is there."""
    file_system, folder = open_file_system(url)
    remote = Remote(url)
    data = (directory / MANIFEST).read_bytes()
    there = _refuse_another(remote, manifest, directory)

    def find() -> dict[str, int]:
        return {name: entry["size"] for name, entry in file_system.find(folder, detail=True).items()}

    sizes = {path.removeprefix(f"{folder}/"): size for path, size in _on_target(find, url).items()}
    if there is not None and there != data:
        _on_target(lambda: file_system.rm_file(f"{folder}/{MANIFEST}"), url)  # files change under it

    def put(name: str, entry: FileEntry) -> None:
        path = f"{folder}/{name}"
        _require_whole(directory / name, entry)
        if sizes.get(name) == entry.bytes and remote.digest(name, entry.bytes) == entry.sha256:
            return

        def upload() -> None:
            file_system.makedirs(path.rpartition("/")[0], exist_ok=True)
            file_system.put_file(str(directory / name), path)

        _on_target(upload, f"{url}/{name}")

    if BUILD in manifest.files:
        put(BUILD, manifest.files[BUILD])
    for_each({name: entry for name, entry in manifest.files.items() if name != BUILD}, put, "push")
    if there == data:
        return
    if _refuse_another(remote, manifest, directory) not in (None, data):
        what, fix = "another push has changed the target meanwhile", "run the command again: it continues"
        raise ConfigError(what, where=url, fix=fix)
    if {BUILD, MANIFEST} & sizes.keys():
        for name in stale_names(sizes, manifest.files):
            _on_target(functools.partial(file_system.rm_file, f"{folder}/{name}"), f"{url}/{name}")
    _on_target(lambda: _publish(file_system, f"{folder}/{MANIFEST}", data), f"{url}/{MANIFEST}")


def _push_to_hub(directory: Path, manifest: Manifest, url: str, *, private: bool) -> str:
    """Upload to a data set: files in commits of many, manifest and card in the last one."""
    from shared.hub import listed_digests, open_dataset, push_files, require_repository

    repo_id, branch = split_hub(url)
    require_repository(repo_id)
    head = open_dataset(repo_id, branch, private=private)
    there = listed_digests(repo_id, head)
    is_cache = not there.keys().isdisjoint((BUILD, MANIFEST))
    if is_cache:
        _refuse_another(Remote(f"hf://datasets/{repo_id}@{head}"), manifest, directory)

    missing: dict[str, tuple[Path, str]] = {}

    def look(name: str, entry: FileEntry) -> None:
        _require_whole(directory / name, entry)
        digest = there.get(name)
        if digest is None or (digest != entry.sha256 and digest != _git_digest(directory / name)):
            missing[name] = directory / name, entry.sha256

    for_each(manifest.files, look, "check")
    last: dict[str, bytes | Path] = {
        PLOT: plot(manifest.statistics["captured_mass"]),
        "README.md": card(cache_info(directory), repo_id).encode(),
        MANIFEST: directory / MANIFEST,
    }
    files = {name: missing[name] for name in sorted(missing)}
    stale = stale_names(there, manifest.files) if is_cache else []
    commit = push_files(repo_id, branch, head, files, last=last, stale=stale)
    return f"hf://datasets/{repo_id}@{commit}"


def _refuse_another(remote: Remote, manifest: Manifest, directory: Path) -> bytes | None:
    """The manifest at a target; None where there is none. What is there, finished or not, must be of the same cache."""
    what, fix = "another cache is there", "name another URL, or delete what is there"
    try:
        data = remote.read(MANIFEST)
    except FileNotFoundError:
        with contextlib.suppress(FileNotFoundError):
            build, ours = remote.read(BUILD), directory / BUILD
            is_same = ours.is_file() and ours.read_bytes().startswith(build)  # a killed push may leave half of it
            require(is_same, what, where=f"{remote.url}/{BUILD}", fix=fix)
        return None
    theirs = parse_manifest(data, f"{remote.url}/{MANIFEST}")
    require(theirs.digest == manifest.digest, what, where=remote.url, fix=fix)
    return data


def _require_whole(file: Path, entry: FileEntry) -> None:
    """Refuse to upload a file that is not what the manifest says."""
    digest = sha256_file(file) if file.is_file() else "no such file"
    if digest != entry.sha256:
        fix = "codedistill cache repair; nothing that was pushed is lost"
        raise CacheCorruptError("a file's bytes have changed", where=file, expected=entry.sha256, got=digest, fix=fix)


def _on_target(action: Callable[[], T], where: str) -> T:
    """Ask a file system for something, patiently; a target that is not there is one error."""
    try:
        return patiently(action, where)
    except FileNotFoundError as error:
        raise ConfigError("the target is not there", where=where, got=error, fix="make the bucket first") from error


def _publish(file_system: Any, path: str, data: bytes) -> None:
    """Write the manifest in one step: object stores do, a local folder by a rename."""
    if "file" in file_system.protocol:
        remove_leftovers(Path(path).parent)
        write_bytes(Path(path), data)
    else:
        file_system.pipe_file(path, data)


def _git_digest(file: Path) -> str:
    """The id that git, and so the Hub, gives a small file."""
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def for_each(files: Mapping[str, FileEntry], action: Callable[[str, FileEntry], None], what: str) -> None:
    """Do something with every file, several at a time; the first error ends it."""
    with (
        progress(what, sum(entry.bytes for entry in files.values()), "bytes") as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        names = iter(files)
        try:
            while batch := list(itertools.islice(names, BATCH_FILES)):
                started = [(files[name], pool.submit(action, name, files[name])) for name in batch]
                for entry, done in started:
                    done.result()
                    bar.advance(entry.bytes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
