"""The manifest of a cache from what lies in its folder: the shards of its build, then those of each whole extension."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.cache.directory import list_files, read_json_object, read_record
from shared.cache.format import BUILD, EXTENSION_PATTERN, FORMAT, SHARD_PATTERN, VERSION, shard_name
from shared.cache.identity import label_identity
from shared.cache.statistics import combine
from shared.errors import CacheFormatError

HEAD_KEYS = ("codec", "filter", "temperatures", "top_k", "tokenizer_size", "head_width")


@dataclass(frozen=True, kw_only=True, slots=True)
class Extension:
    """What a `teacher build --extend` adds: shards from `first_shard` on, and one source.

    Its file `build-NNNNN.json`, named after the first shard, is written before them, as `build.json` is.
    """

    name: str
    first_shard: int
    num_shards: int
    options: dict[str, Any]
    source: dict[str, Any]

    def shards(self) -> range:
        """Numbers of its shards."""
        return range(self.first_shard, self.first_shard + self.num_shards)

    def files(self) -> list[str]:
        """Names of all its files."""
        return [self.name, *(f"{shard_name(shard)}.{end}" for shard in self.shards() for end in ("h5", "json"))]


def extensions(directory: Path) -> list[Extension]:
    """The extensions that were begun in a cache's folder, whole or not, in order; unreadable ones are left out."""
    found = []
    for entry in sorted(directory.iterdir()):
        if match := EXTENSION_PATTERN.fullmatch(entry.name):
            content = read_json_object(entry) or {}
            options, source = content.get("options"), content.get("source")
            if content.get("format") == FORMAT and isinstance(options, dict) and isinstance(source, dict):
                num_shards = options.get("num_shards")
                if type(num_shards) is int and 0 < num_shards < 10_000_000:
                    part = {"first_shard": int(match[1]), "num_shards": num_shards}
                    found.append(Extension(name=entry.name, options=options, source=source, **part))
    return sorted(found, key=lambda part: part.first_shard)


def assemble(
    directory: Path,
    *,
    build: Mapping[str, Any],
    num_shards: int,
    identity: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest of a folder.

    Args:
        directory: the cache's.
        build: the options in `build.json`.
        num_shards: shards of the build, and of extensions that are whole; further whole extensions are added.
        identity: who made the labels; sources: the data sets of these shards.
        provenance: further keys of the manifest, such as `derived_from`.

    Raises:
        CacheFormatError: one of the shards is missing or damaged.
    """
    files = list_files(directory)
    records = []
    for shard in range(num_shards):
        record = read_record(directory, shard, files.get(f"{shard_name(shard)}.h5", {}).get("sha256"))
        if record is None:
            raise CacheFormatError("a shard is incomplete", where=directory / shard_name(shard))
        records.append(record)
    builds = [BUILD]
    for part in extensions(directory):
        if part.first_shard < num_shards:
            builds.append(part.name)
            continue
        if part.first_shard > num_shards:
            break
        more = [read_record(directory, shard) for shard in part.shards()]
        if None in more:
            break
        records += [record for record in more if record is not None]
        num_shards += part.num_shards
        builds.append(part.name)
        sources = [*sources, part.source]
    statistics = combine([record["statistics"] for record in records])
    return {
        "format": FORMAT,
        "version": VERSION,
        "label_identity": label_identity(identity),
        "identity": dict(identity),
        "sources": [dict(source) for source in sources],
        **{key: build[key] for key in HEAD_KEYS},
        "num_shards": num_shards,
        "num_documents": statistics["documents"],
        "num_tokens": statistics["tokens"],
        "num_entries": statistics["entries"],
        **provenance,
        "statistics": statistics,
        "builds": {name: read_json_object(directory / name) for name in builds},
        "files": {name: entry for name, entry in files.items() if _belongs(name, num_shards, builds)},
    }


def _belongs(name: str, num_shards: int, builds: list[str]) -> bool:
    if match := SHARD_PATTERN.fullmatch(name):
        return int(match[1]) < num_shards
    return name in builds or not EXTENSION_PATTERN.fullmatch(name)
