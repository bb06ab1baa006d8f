"""Sharing a cache: all its files to a URL, or from one; the manifest goes last."""

import contextlib
import hashlib
import io
import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from shared.cache.directory import BATCH_FILES, is_ours, plain_errors, remove_leftovers, walk
from shared.cache.format import BUILD, MANIFEST
from shared.cache.info import cache_info
from shared.cache.manifest import FileEntry, Manifest, parse_manifest, read_manifest
from shared.cache.remote import THREADS, Remote, open_file_system, patiently, split_hub, url_of
from shared.errors import CacheCorruptError, CacheFormatError, ConfigError, require
from shared.files import sha256_file, write_bytes
from shared.lock import LOCK, Lock
from shared.progress import progress

T = TypeVar("T")

PLOT = "captured_mass.png"
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
    file_system, folder = open_file_system(url)
    remote = Remote(url)
    data = (directory / MANIFEST).read_bytes()
    there = _refuse_another(remote, manifest, directory)

    def find() -> dict[str, int]:
        return {name: entry["size"] for name, entry in file_system.find(folder, detail=True).items()}

    sizes = _on_target(find, url)
    if there is not None and there != data:
        _on_target(lambda: file_system.rm_file(f"{folder}/{MANIFEST}"), url)  # files change under it

    def put(name: str, entry: FileEntry) -> None:
        path = f"{folder}/{name}"
        _require_whole(directory / name, entry)
        if sizes.get(path) == entry.bytes and remote.digest(name, entry.bytes) == entry.sha256:
            return

        def upload() -> None:
            file_system.makedirs(path.rpartition("/")[0], exist_ok=True)
            file_system.put_file(str(directory / name), path)

        _on_target(upload, f"{url}/{name}")

    _for_each(manifest.files, put, "push")
    if there != data:
        _on_target(lambda: _publish(file_system, f"{folder}/{MANIFEST}", data), f"{url}/{MANIFEST}")
    return url


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
    is_same = not out.is_dir() or _holds_part_of(out, manifest)
    require(is_same, "the folder holds another cache", where=out, fix="name another folder")
    with plain_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = Lock(out, "pulling a cache to this folder")
        try:
            if (out / MANIFEST).exists() and (out / MANIFEST).read_bytes() != data:
                (out / MANIFEST).unlink()

            def get(name: str, entry: FileEntry) -> None:
                file = out / name
                if not (file.is_file() and file.stat().st_size == entry.bytes and sha256_file(file) == entry.sha256):
                    remote.download(name, entry, file)

            _for_each(manifest.files, get, "pull")
            for name, file in walk(out):
                if name not in manifest.files and name not in (LOCK, MANIFEST) and name.endswith((".h5", ".json")):
                    file.unlink()  # of the earlier manifest
            remove_leftovers(out)
            write_bytes(out / MANIFEST, data)
        finally:
            lock.release()


def _push_to_hub(directory: Path, manifest: Manifest, url: str, *, private: bool) -> str:
    """Upload to a data set: files in commits of many, manifest and card in the last one."""
    from shared.hub import listed_digests, open_dataset, push_files, require_repository

    repo_id, branch = split_hub(url)
    require_repository(repo_id)
    open_dataset(repo_id, branch, private=private)
    there = listed_digests(repo_id, branch)
    if MANIFEST in there:
        _refuse_another(Remote(url), manifest, directory)

    missing: dict[str, bytes | Path] = {}

    def look(name: str, entry: FileEntry) -> None:
        _require_whole(directory / name, entry)
        digest = there.get(name)
        if digest != entry.sha256 and digest != _git_digest(directory / name):
            missing[name] = directory / name

    _for_each(manifest.files, look, "check")
    last: dict[str, bytes | Path] = {
        PLOT: _plot(manifest.statistics["captured_mass"]),
        "README.md": card(cache_info(directory), repo_id).encode(),
        MANIFEST: directory / MANIFEST,
    }
    commit = push_files(repo_id, branch, {name: missing[name] for name in sorted(missing)}, last)
    return f"hf://datasets/{repo_id}@{commit}"


def _holds_part_of(directory: Path, manifest: Manifest) -> bool:
    """Whether what a folder has of a cache is this one's, as its manifest says, or else its build's options."""
    with contextlib.suppress(CacheFormatError, CacheCorruptError):
        return read_manifest(directory).digest == manifest.digest
    build, entry = directory / BUILD, manifest.files.get(BUILD)
    return not build.is_file() or (entry is not None and sha256_file(build) == entry.sha256)


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


def _for_each(files: Mapping[str, FileEntry], action: Callable[[str, FileEntry], None], what: str) -> None:
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


def card(info: Mapping[str, Any], repo_id: str) -> str:
    """The data set card of a cache: what it is, whose, its figures, how to train from it."""
    licenses = sorted({str(source["license"]) for source in info["sources"] if source.get("license")})
    front = ["---", "tags:", "- code", "- knowledge-distillation", "- codedistill"]
    front += ["license: other", f"license_name: {' AND '.join(licenses)!r}"] if licenses else []
    teacher, statistics = info["teacher"] or {}, info["statistics"]
    rows = [
        ("documents", f"{info['num_documents']:,} in {info['num_shards']:,} shards"),
        ("tokens", f"{info['num_tokens']:,}, {statistics['targets']:,} of them targets"),
        ("entries", f"{info['num_entries']:,} (top-k {info['top_k']})"),
        ("size", f"{info['total_bytes']:,} bytes, {info['bytes_per_token']:.1f} per token for the labels"),
        ("label identity", f"`{info['label_identity']}`"),
        ("teacher", f"{teacher.get('name')}, commit {teacher.get('commit') or 'unknown'}"),
    ]
    masses = [
        f"| {T} | {mass['mean']:.4f} | {mass['p10']:.4f} | {mass['p1']:.4f} | {info['encoding_kl_mean_nats'][T]:.1e} |"
        for T, mass in statistics["captured_mass"].items()
    ]
    sources = [
        f"- {source.get('name')} ({source.get('split')}), license {source.get('license') or 'not stated'}"
        for source in info["sources"]
    ]
    return "\n".join([
        *front, "---", "",
        f"# Logits of {teacher.get('name')}", "",
        "A codedistill cache: for every token of its documents the teacher's most probable next tokens with their",
        "logits, and the exact probability mass of all others. A student trains from it without the teacher:", "",
        "```bash",
        f"codedistill student train --cache hf://datasets/{repo_id} --out runs/student",
        "```", "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows), "",
        "## Captured mass", "",
        f"![Captured mass by temperature]({PLOT})", "",
        "| T | mean | p10 | p1 | encoding KL, nats |", "|---|---|---|---|---|", *masses, "",
        "## Sources and licenses", "",
        *sources, "",
    ])  # fmt: skip


def _plot(captured_mass: Mapping[str, Mapping[str, float | None]]) -> bytes:
    """Bars of the captured mass by temperature, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes, out = figure.subplots(), io.BytesIO()
    for at, key in enumerate(("mean", "p10", "p1")):
        places = [number + 0.27 * (at - 1) for number in range(len(captured_mass))]
        axes.bar(places, [mass[key] or 0 for mass in captured_mass.values()], 0.25, label=key)
    axes.set_xticks(range(len(captured_mass)), list(captured_mass))
    axes.set(xlabel="temperature", ylabel="probability mass in the rows", ylim=(0, 1))
    axes.legend(loc="lower left")
    figure.savefig(out, format="png", dpi=120, metadata={"Software": None})
    return out.getvalue()
