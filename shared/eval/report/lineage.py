"""What a student was made from: export → run → caches → teacher and documents, each verified by its digest.

The records of each part (`lineage.json`, `run.json`, manifests, `report.json`) say what it was made from. A part is
looked for where the record says, and in the folders that the user names and their subfolders, never deeper.
"""

import contextlib
import dataclasses
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shared.cache.directory import check_files
from shared.cache.format import MANIFEST
from shared.cache.identity import label_identity
from shared.cache.manifest import read_manifest, written_text
from shared.checkpoints import WEIGHTS, weight_files, weights_digest, weights_sha256
from shared.errors import ConfigError, DistillError, require
from shared.eval.report.provenance import REPORT_FORMAT
from shared.files import read_json, sha256_file

WHOLE, ALTERED, MISSING, UNRECORDED, ELSEWHERE = "whole", "altered", "missing", "not recorded", "not at hand"
Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part of a lineage: its kind and name, where it lies, its recorded digest, and the parts it was made from.

    `state` is `whole` (its bytes have the recorded digests), `altered`, `missing`, `not recorded` (nothing says what it
    should be), or `not at hand`: only the digest is known here, as is usual on the student's machine.
    """

    kind: str
    name: str
    state: str = ELSEWHERE
    at: str | None = None
    digest: str | None = None
    notes: list[str] = field(default_factory=list)
    made_from: list["Part"] = field(default_factory=list)


def trace_lineage(path: Path, look_in: Sequence[Path] = ()) -> dict[str, Any]:
    """Follow a run, an export, a cache or a report to what it was made from.

    Args:
        path: its folder, or report.json.
        look_in: folders that are such parts, or hold them.

    Returns:
        A `Part` and those below it, as JSON data.

    Raises:
        ConfigError: none of these, or a record that cannot be read.
    """
    tracer = _Tracer([folder for place in look_in for folder in (place, *sorted(filter(Path.is_dir, place.glob("*"))))])
    records = {"run.json": tracer.run, MANIFEST: tracer.cache, "lineage.json": tracer.export,
               "report.json": tracer.report}  # fmt: skip
    folder = path.parent if path.name == "report.json" else path
    follow = next((follow for name, follow in records.items() if (folder / name).is_file()), None)
    if follow is None:
        raise ConfigError("nothing that can be traced", where=path, expected="a run, an export, a cache or a report",
                          got="none of them" if path.exists() else "no such path")  # fmt: skip
    try:
        return dataclasses.asdict(follow(folder))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError("a record of another form", where=path, got=repr(error)) from error


def broken_links(part: Record) -> list[str]:
    """Each place where a lineage breaks, in words, once."""
    own = [f"{part['kind']} {part['name']}: {part['state']}: {'; '.join(part['notes'])}"]
    below = [text for other in part["made_from"] for text in broken_links(other)]
    return list(dict.fromkeys(below if part["state"] in (WHOLE, ELSEWHERE) else own + below))


def lineage_text(part: Record) -> str:
    """A lineage as a tree, with what is broken below it."""
    end = [f"broken: {text}" for text in broken_links(part)] or ["nothing is broken in what is at hand"]
    return "\n".join([*_lines(part, "", ""), *end])


def _lines(part: Record, first: str, rest: str) -> Iterator[str]:
    place = f" at {part['at']}" if part["at"] else ""
    digest = f"  {part['digest'][:16]}" if part["digest"] else ""
    yield f"{first}{part['kind']} {part['name']}: {part['state']}{place}{digest}"
    yield from (f"{rest}    {note}" for note in part["notes"])
    for other in part["made_from"]:
        last = other is part["made_from"][-1]
        yield from _lines(other, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))


def _sha256(file: Path) -> str | None:
    return sha256_file(file) if file.is_file() else None


def _check(file: Path, recorded: str | None) -> tuple[str, list[str]]:
    """A file's state, and what differs from its record."""
    found = _sha256(file)
    if found == recorded:
        return WHOLE, []
    note = f"{file.name}: {f'SHA-256 {found}' if found else 'missing'}, recorded {recorded}"
    return ALTERED if found else MISSING, [note]


def _at(kind: str, path: Path, notes: list[str], **others: Any) -> Part:
    """A part that lies at a path, and what is wrong with it."""
    found = {"name": path.name, "state": ALTERED if notes else WHOLE, "at": str(path), "notes": notes}
    return Part(kind=kind, **found | others)


@dataclass(frozen=True)
class _Tracer:
    """Follows records; `places` are the folders in which parts are looked for, `followed` the runs on the way."""

    places: Sequence[Path]
    followed: set[Path] = field(default_factory=set)

    def find(self, is_it: Callable[[Path], bool], *recorded: Path) -> Path | None:
        """Where a part lies: one of the paths that a record names for it, or one of the places."""
        return next((place for place in (*recorded, *self.places) if is_it(place)), None)

    def export(self, path: Path) -> Part:
        lineage = read_json(path / "lineage.json")
        files, digest = {WEIGHTS: None, **lineage["files"]}, lineage["run"]["sha256"]
        notes = [note for name, recorded in files.items() for note in _check(path / name, recorded)[1]]
        if place := self.find(lambda place: _sha256(place / "run.json") == digest):
            run = self.run(place)
        else:
            run = Part(kind="run", name=lineage["run"]["name"], digest=digest, made_from=self.inputs(lineage))
        return _at("export", path, notes, digest=files[WEIGHTS], made_from=[run])

    def run(self, path: Path) -> Part:
        self.followed.add(path.resolve())
        record = read_json(path / "run.json")
        digest = record.get("weights_sha256")
        state, notes = _check(path / WEIGHTS, digest)
        if record.get("state") != "finished" or digest is None:
            state, notes = UNRECORDED, [f"run.json, state {record.get('state')}, records no digest of the weights"]
        return _at("run", path, notes, state=state, digest=digest, made_from=self.inputs(record))

    def inputs(self, record: Record) -> list[Part]:
        """The caches and starting weights that a run's record or an export's lineage names."""
        paths = [Path(path) for path in record.get("cache_paths") or []]
        parts = [self.recorded_cache("cache", cache, paths) for cache in record["caches"]]
        if record["validation"]:
            parts.append(self.recorded_cache("validation cache", record["validation"], paths))
        starts = (("starting weights", record["init_from"]), ("starting embedding", record.get("init_embedding")))
        return [*parts, *(self.start(kind, start) for kind, start in starts if start)]

    def recorded_cache(self, kind: str, record: Record, paths: Sequence[Path]) -> Part:
        """A cache that a run was trained on: the first one here that has its shards, or else a damaged one."""
        damaged = []
        for place in [place for place in (*paths, *self.places) if (place / MANIFEST).exists()]:
            try:
                shards = read_manifest(place).shard_digests
            except DistillError:
                damaged.append(place)
                continue
            if record["shards"].items() <= shards.items():
                return self.cache(place, kind)
        if damaged:
            return self.cache(damaged[0], kind)
        name = ", ".join(f"{source['name']} ({source['split']})" for source in record["sources"])
        documents = [self.documents(source) for source in record["sources"]]
        return Part(kind=kind, name=name, made_from=[self.teacher(record["teacher"]), *documents])

    def cache(self, path: Path, kind: str = "cache") -> Part:
        try:
            manifest = read_manifest(path)
        except DistillError as error:
            return _at(kind, path, [str(error)])
        notes = [f"{name}: {what}" for name, what in check_files(path, manifest.files).items()]
        if label_identity(manifest.identity) != manifest.label_identity:
            notes.append("its label identity is not that of its teacher, tokenizer and options")
        made_from = [self.teacher(manifest.identity["teacher"])]
        made_from += [self.derived_from(part["digest"]) for part in (manifest.derived_from or {}).get("inputs", [])]
        made_from += [self.documents(source) for source in manifest.sources]
        return _at(kind, path, notes, digest=manifest.digest, made_from=made_from)

    def derived_from(self, digest: str) -> Part:
        """A cache that another was merged or cut from."""
        kind = "derived from cache"
        place = self.find(lambda place: (place / MANIFEST).exists() and read_manifest(place).digest == digest)
        return self.cache(place, kind) if place else Part(kind=kind, name=digest[:16], digest=digest)

    def start(self, kind: str, record: Record) -> Part:
        """The weights or the embedding that a run started from, and the run that they come from where it is here."""
        digest = record["weights_sha256"]
        recorded = [Path(record["path"])] if "path" in record else []

        def holds_them(place: Path) -> bool:
            is_new = (place / "config.json").is_file() and place.resolve() not in self.followed
            with contextlib.suppress(DistillError):  # a folder without weights
                return is_new and weights_sha256([sha256_file(file) for file in weight_files(place)]) == digest
            return False

        if place := self.find(holds_them, *recorded):
            runs = [self.run(place)] if (place / "run.json").is_file() else []
            return _at(kind, place, [], digest=digest, made_from=runs)
        return Part(kind=kind, name=recorded[0].name if recorded else "", digest=digest)

    def teacher(self, record: Record) -> Part:
        name, digest = str(record.get("name")), record["weights_digest"]
        notes = [f"commit {record['commit']}"] if record.get("commit") else []
        models = [place for place in self.places if (place / "config.json").is_file()]
        alike = [place for place in models if sha256_file(place / "config.json") == record["config_digest"]]
        if whole := next((place for place in alike if weights_digest(place) == digest), None):
            return _at("teacher", whole, notes, name=name, state=WHOLE, digest=digest)
        if near := [*alike, *(place for place in models if place.resolve().name == name)]:
            notes.append("the folder of that name holds another model, or other weights")
            return _at("teacher", near[0], notes, name=name, digest=digest)
        return Part(kind="teacher", name=name, digest=digest, notes=notes)

    def documents(self, source: Record) -> Part:
        """A data set: its file where one of that name is here, or the library of a Python of that version."""
        from data.load import load_documents

        place = self.find(lambda place: (place / source["name"]).is_file())
        is_library = source["name"] == "stdlib" and source.get("revision") == platform.python_version()
        file = "stdlib" if is_library else str(place / source["name"]) if place else None
        name = f"{source['name']} ({source['split']}), {source['num_documents']} documents"
        notes = [f"revision {source['revision']}"] if source.get("revision") else []
        notes += written_text([source])
        part = Part(kind="documents", name=name, at=file, digest=source["digest"], notes=notes)
        if file is None:
            return part
        columns = (source.get("config") or {}).get("columns")
        try:
            read = load_documents(file, source["split"], limit_docs=source["num_documents"], columns=columns)
            require(read.digest == source["digest"], "it holds other documents")
        except DistillError as error:
            return replace(part, state=ALTERED, notes=[*notes, str(error)])
        return replace(part, state=WHOLE)

    def report(self, path: Path) -> Part:
        """A report: its files as they lie, then the runs and caches among them."""
        file, follow = path / "report.json", {"run.json": self.run, MANIFEST: self.cache}
        report = read_json(file)
        is_report = isinstance(report, dict) and report.get("format") == REPORT_FORMAT
        require(is_report, "not a report", where=file, expected=REPORT_FORMAT)
        parts = []
        for name, entry in report["files"].items():
            source, digest = path.parent / name, entry["sha256"]
            state, notes = _check(source, digest)
            below = [follow[source.name](source.parent)] if source.name in follow and state == WHOLE else []
            parts.append(Part(kind="file", name=name, state=state, digest=digest, notes=notes, made_from=below))
        return _at("report", path, report["headline"][:1], state=WHOLE, at=str(file), digest=sha256_file(file),
                   made_from=parts)  # fmt: skip
