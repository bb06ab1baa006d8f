"""Adding shards to a finished cache, which stays valid throughout: its manifest is replaced last."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.cache.assemble import extensions
from shared.cache.directory import is_finished, remove_leftovers
from shared.cache.format import FORMAT, VERSION
from shared.cache.identity import require_same_labels
from shared.cache.manifest import read_manifest
from shared.cache.writer import CacheWriter, option_differences, resolved
from shared.errors import CacheCorruptError, ResumeError
from shared.files import write_json


class CacheExtender(CacheWriter):
    """An extension under construction; used like a `CacheWriter`, with shards numbered on from those that are there.

    Run again after a kill it continues; once it is in the manifest, `finished` is true and nothing is written.

    Args:
        path: a finished cache.
        build: as for `CacheWriter`, with `num_shards` new ones.
        source: the record of the data set that they come from.
        leads: as for `CacheWriter`.

    Raises:
        CacheFormatError: there is no cache, or an unfinished one.
        CacheCorruptError: the cache is damaged.
        ResumeError: another extension is unfinished, or another process changes the cache.
    """

    def __init__(
        self, path: Path | str, build: Mapping[str, Any], source: Mapping[str, Any], *, leads: bool = True
    ) -> None:
        self.source = dict(source)
        manifest = read_manifest(Path(path))
        self.first_shard = manifest["num_shards"]
        self.num_documents_before = manifest["num_documents"]
        for part in extensions(Path(path)):
            if part.name in manifest["files"] and not [*option_differences(part.options, resolved(build))]:
                self.first_shard = part.first_shard
        super().__init__(path, build, leads=leads)

    def _check_folder(self) -> None:
        """Refuse a damaged cache, and one whose unfinished extension is another one."""
        if not is_finished(self.path):
            raise CacheCorruptError("the cache to extend is damaged", where=self.path, fix="codedistill cache repair")
        for part in extensions(self.path):
            if part.first_shard == self.first_shard:
                differences = option_differences(part.options, self.build)
                for key, before, now in sorted(differences, key=lambda found: found[0] == "num_shards"):
                    raise ResumeError(
                        f"an unfinished extension of this cache has another {key}",
                        where=self.path / part.name,
                        expected=before,
                        got=now,
                        fix=f"finish that one first, or remove {part.name} and the shards from {part.first_shard} on",
                    )

    def _is_finished(self) -> bool:
        return self._build_file in read_manifest(self.path)["files"]

    def _begin(self) -> None:
        """Look again, now that the folder is ours; write the extension's own `build-NNNNN.json`."""
        remove_leftovers(self.path)
        self._check_folder()
        self.finished = self._is_finished()
        if self.finished:
            self.close()
            return
        content = {"format": FORMAT, "version": VERSION, "options": self.build, "source": self.source}
        write_json(self.path / self._build_file, content)

    @property
    def _build_file(self) -> str:
        return f"build-{self.first_shard:05d}.json"

    def finish(
        self,
        identity: Mapping[str, Any],
        sources: Sequence[Mapping[str, Any]],
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the new shards and their sources into the manifest, which keeps its own provenance.

        Raises:
            CacheMismatchError: the labels are not of the cache's own label identity.
            CacheFormatError: a shard is missing or damaged.
        """
        manifest = read_manifest(self.path)
        require_same_labels(manifest["identity"], identity, ours_name=self.path, theirs_name="the extension")
        self._replace_manifest(
            self.first_shard + self.build["num_shards"],
            manifest["identity"],
            [*manifest["sources"], *sources],
            {key: manifest[key] for key in ("derived_from",) if key in manifest} | dict(provenance or {}),
        )
