"""What is at hand: caches, runs, models and data files under some folders, found by what they hold, not by name."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from shared.cache.derive import Input
from shared.cache.format import MANIFEST, MANIFEST_PENDING
from shared.cache.manifest import read_manifest
from shared.checkpoints import weight_files, weights_sha256
from shared.errors import ConfigError, DistillError
from shared.eval.report.provenance import read_result
from shared.files import sha256_file, sha256_json

MAX_DEPTH = 6
PRUNED = {"wandb", "tokenizer", "teacher_eval", "__pycache__", "node_modules", "site-packages"}
DATA = (".jsonl", ".parquet")


@dataclass(frozen=True, slots=True)
class _Folders:
    caches: list[Path] = field(default_factory=list)
    runs: list[Path] = field(default_factory=list)
    models: list[Path] = field(default_factory=list)
    data: list[Path] = field(default_factory=list)


class Holdings:
    """Pieces under some folders, at most `MAX_DEPTH` deep; hidden folders, checkpoints and links are passed over.

    Args:
        roots: where to look.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = roots
        self._digests: dict[Path, str] = {}

    def sha256(self, file: Path) -> str | None:
        """A file's digest, formed once; None where there is no such file, or it cannot be read."""
        if file not in self._digests:
            try:
                if not file.is_file():
                    return None
                self._digests[file] = sha256_file(file)
            except OSError:
                return None
        return self._digests[file]

    def weights_sha256(self, model: Path) -> str | None:
        """The digest of a model's one file of weights, or over the digests of several, as `init_from` records it."""
        digests = self._weight_digests(model)
        return weights_sha256([*digests.values()]) if digests else None

    def teacher_digests(self, model: Path) -> tuple[str | None, str | None]:
        """`weights_digest` and `config_digest` of a teacher's folder, as a cache's identity has them."""
        digests = self._weight_digests(model)
        return (sha256_json(digests) if digests else None), self.sha256(model / "config.json")

    def _weight_digests(self, model: Path) -> dict[str, str]:
        """The digests of the files that a model is loaded from, by name; empty where one cannot be read."""
        try:
            digests = {file.name: self.sha256(file) for file in weight_files(model)}
        except ConfigError:
            return {}
        return {name: digest for name, digest in digests.items() if digest} if all(digests.values()) else {}

    @cached_property
    def caches(self) -> dict[Path, dict[str, Any]]:
        """Finished caches by folder: their manifests."""
        return {path: manifest for path, manifest in self._manifests.items() if isinstance(manifest, dict)}

    @cached_property
    def damaged_caches(self) -> dict[Path, str]:
        """Folders with a manifest that cannot be trusted, and why."""
        return {path: manifest for path, manifest in self._manifests.items() if isinstance(manifest, str)}

    @cached_property
    def _manifests(self) -> dict[Path, dict[str, Any] | str]:
        found: dict[Path, dict[str, Any] | str] = {}
        for path in self._found.caches:
            try:
                found[path] = read_manifest(path)
            except DistillError as error:
                found[path] = str(error)
        return found

    @cached_property
    def runs(self) -> dict[Path, dict[str, Any]]:
        """Runs by folder: their records, of any state."""
        found = {}
        for path in self._found.runs:
            try:
                found[path] = read_result(path / "run.json")
            except ConfigError:
                continue
        return found

    @property
    def models(self) -> list[Path]:
        """Folders that hold config.json and safetensors."""
        return self._found.models

    @property
    def data(self) -> list[Path]:
        """Files of documents."""
        return self._found.data

    def cache_by_digest(self, digest: str) -> Path | None:
        """The cache that another was made from, by what it holds."""
        return next(
            (path for path in self.caches if Input(path=path, manifest=self.caches[path]).digest() == digest), None
        )

    @cached_property
    def _found(self) -> _Folders:
        found, seen = _Folders(), set()
        for folder, names in _walk(self.roots):
            if (real := folder.resolve()) in seen:
                continue
            seen.add(real)
            if MANIFEST in names or MANIFEST_PENDING in names:
                found.caches.append(folder)
            if "run.json" in names:
                found.runs.append(folder)
            if "config.json" in names and any(name.endswith(".safetensors") for name in names):
                found.models.append(folder)
            found.data.extend(folder / name for name in sorted(names) if name.endswith(DATA))
        return found


def _walk(roots: Sequence[Path]) -> Iterator[tuple[Path, set[str]]]:
    """Folders with the names of their files."""
    for root in roots:
        for path, folders, names in os.walk(root):
            depth = len(Path(path).relative_to(root).parts)
            kept = [f for f in sorted(folders) if not f.startswith((".", "checkpoint-")) and f not in PRUNED]
            folders[:] = kept if depth < MAX_DEPTH else []
            yield Path(path), set(names)


def shards_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The digests of a cache's shards by name."""
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".h5")}
