"""Downloading a cache: all its files from a URL; the manifest goes last."""

import contextlib
from pathlib import Path

from shared.cache.directory import file_names, is_ours, plain_errors, remove_leftovers, stale_names
from shared.cache.format import BUILD, MANIFEST
from shared.cache.manifest import FileEntry, Manifest, read_manifest
from shared.cache.push import URLS, for_each
from shared.cache.remote import Remote, url_of
from shared.errors import CacheCorruptError, CacheFormatError, ConfigError, require
from shared.files import sha256_file, write_bytes
from shared.lock import Lock


def pull_cache(source: str, out: Path) -> None:
    """Download a cache to a folder, or continue; a file that is there with the right SHA-256 is skipped.

    Raises:
        CacheFormatError: there is no finished cache at the URL.
        CacheCorruptError: a file there is missing, or its bytes are not those of the manifest.
        ConfigError: the URL cannot be read, or the folder holds something else.
    """
    url = url_of(source)
    if url is None:
        raise ConfigError("not the URL of a cache", where=source, expected=f"http(s)://…, {URLS}")
    remote = Remote(url)
    manifest, data = remote.manifest()
    strange = [path.name for path in out.iterdir() if not is_ours(path)] if out.is_dir() else []
    require(not strange, "the folder holds something that is no cache", where=out, got=", ".join(strange[:3]))
    with plain_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with Lock(out, "pulling a cache to this folder"):
            is_same = _holds_part_of(out, manifest)
            require(is_same, "the folder holds another cache", where=out, fix="name another folder")
            if (out / MANIFEST).exists() and (out / MANIFEST).read_bytes() != data:
                (out / MANIFEST).unlink()

            def get(name: str, entry: FileEntry) -> None:
                file = out / name
                if not (file.is_file() and file.stat().st_size == entry.bytes and sha256_file(file) == entry.sha256):
                    remote.download(name, entry, file)

            for_each(manifest.files, get, "pull")
            for name in stale_names(file_names(out), manifest.files):
                (out / name).unlink()
            remove_leftovers(out)
            write_bytes(out / MANIFEST, data)


def _holds_part_of(directory: Path, manifest: Manifest) -> bool:
    """Whether what a folder has of a cache is this one's, as its manifest says, or else its build's options."""
    with contextlib.suppress(CacheFormatError, CacheCorruptError):
        return read_manifest(directory).digest == manifest.digest
    build, entry = directory / BUILD, manifest.files.get(BUILD)
    return not build.is_file() or (entry is not None and sha256_file(build) == entry.sha256)
