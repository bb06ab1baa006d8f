"""What a student was made from: export → run → caches → teacher and documents, each verified by its digest.

The records of each part (`lineage.json`, `run.json`, manifests, `report.json`) say what it was made from. A part is
looked for where the record says, and in the folders that the user names and their subfolders, never deeper.
"""

import dataclasses
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.cache.directory import check_files
from shared.cache.format import MANIFEST
from shared.cache.identity import label_identity
from shared.cache.manifest import read_manifest
from shared.checkpoints import WEIGHTS, weight_files, weights_digest, weights_sha256
from shared.errors import ConfigError, DistillError, require
from shared.eval.report.provenance import REPORT_FORMAT
from shared.files import read_json, sha256_file

WHOLE, ALTERED, MISSING, UNRECORDED, ELSEWHERE = "whole", "altered", "missing", "not recorded", "not at hand"
BREAKS = (ALTERED, MISSING, UNRECORDED)
Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part of a lineage.

    Args:
        kind: such as `run`.
        name: as its record gives it.
        state: `whole` (its bytes have the recorded digests), `altered`, `missing`, `not recorded` (nothing says what it
            should be), or `not at hand`: only the digest is known here, as is usual on the student's machine.
        at: where it lies.
        digest: as recorded.
        notes: what else is known of it.
        made_from: the parts that it was made from.
    """

    kind: str
    name: str
    state: str
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
    tracer = _Tracer([folder for place in look_in for folder in (place, *_subfolders(place))])
    for name, follow in (("run.json", tracer.run), (MANIFEST, tracer.cache), ("lineage.json", tracer.export)):
        if (path / name).is_file():
            return dataclasses.asdict(_recorded(follow, path))
    report = path / "report.json" if path.is_dir() else path
    if report.is_file():
        return dataclasses.asdict(_recorded(tracer.report, report))
    raise ConfigError("nothing that can be traced", where=path, expected="a run, an export, a cache or a report",
                      got="none of them" if path.exists() else "no such path")  # fmt: skip


def broken_links(part: Record) -> list[str]:
    """Each place where a lineage breaks, in words, once."""
    own = [f"{part['kind']} {part['name']}: {part['state']}: {'; '.join(part['notes'])}"]
    below = [text for other in part["made_from"] for text in broken_links(other)]
    return list(dict.fromkeys([*(own if part["state"] in BREAKS else []), *below]))


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


def _recorded(follow: Callable[[Path], Part], path: Path) -> Part:
    """A part from its own record; a record that lacks keys is refused by name."""
    try:
        return follow(path)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError("a record of another form", where=path, got=repr(error)) from error


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _sha256(file: Path) -> str | None:
    return sha256_file(file) if file.is_file() else None


def _difference(name: str, found: str | None, recorded: object) -> list[str]:
    """What is to be said of a file that is not as recorded."""
    return [] if found == recorded else [f"{name}: {f'SHA-256 {found}' if found else 'missing'}, recorded {recorded}"]


class _Tracer:
    """Follows records; `places` are the folders in which parts are looked for."""

    def __init__(self, places: Sequence[Path]) -> None:
        self._places = places
        self._followed: set[Path] = set()  # runs; none of them can have started from itself

    def export(self, path: Path) -> Part:
        lineage = read_json(path / "lineage.json")
        files = lineage["files"]
        notes = [note for name in files for note in _difference(name, _sha256(path / name), files[name])]
        notes += [] if WEIGHTS in files else [f"lineage.json does not name {WEIGHTS}"]
        digest = lineage["run"]["sha256"]
        place = next((p for p in self._places if _sha256(p / "run.json") == digest), None)
        run = self.run(place) if place else Part(
            kind="run", name=lineage["run"]["name"], state=ELSEWHERE, digest=digest, made_from=self._inputs(lineage)
        )  # fmt: skip
        return Part(kind="export", name=path.name, state=ALTERED if notes else WHOLE, at=str(path),
                    digest=files.get(WEIGHTS), notes=notes, made_from=[run])  # fmt: skip

    def run(self, path: Path) -> Part:
        self._followed.add(path.resolve())
        record = read_json(path / "run.json")
        recorded, found = record.get("weights_sha256"), _sha256(path / WEIGHTS)
        notes = _difference(WEIGHTS, found, recorded)
        state = (ALTERED if found else MISSING) if notes else WHOLE
        if record.get("state") != "finished" or recorded is None:
            state = UNRECORDED
            notes = [f"run.json, state {record.get('state')}, records no digest of the weights"]
        return Part(kind="run", name=path.name, state=state, at=str(path), digest=found, notes=notes,
                    made_from=self._inputs(record))  # fmt: skip

    def _inputs(self, record: Record) -> list[Part]:
        """The caches and starting weights that a run's record or an export's lineage names."""
        paths = [Path(path) for path in record.get("cache_paths") or []]
        parts = [self._recorded_cache("cache", part, paths) for part in record["caches"]]
        if record["validation"]:
            parts.append(self._recorded_cache("validation cache", record["validation"], paths))
        start = record["init_from"]
        return [*parts, self._start(start)] if start else parts

    def _recorded_cache(self, kind: str, record: Record, paths: Sequence[Path]) -> Part:
        """A cache that a run was trained on: the first one here that has its shards, or a damaged one of its labels."""
        damaged = None
        for place in [*paths, *self._places]:
            try:
                manifest = read_manifest(place) if (place / MANIFEST).exists() else None
            except DistillError as error:
                damaged = damaged or Part(kind=kind, name=place.name, state=ALTERED, at=str(place), notes=[str(error)])
                continue
            shards = manifest.shard_digests if manifest else {}
            if manifest and record["shards"].items() <= shards.items():
                return self.cache(place, kind)
        if damaged:
            return damaged
        name = ", ".join(f"{source['name']} ({source['split']})" for source in record["sources"])
        documents = [self._documents(source) for source in record["sources"]]
        return Part(kind=kind, name=name, state=ELSEWHERE, made_from=[self._teacher(record["teacher"]), *documents])

    def cache(self, path: Path, kind: str = "cache") -> Part:
        try:
            manifest = read_manifest(path)
        except DistillError as error:
            return Part(kind=kind, name=path.name, state=ALTERED, at=str(path), notes=[str(error)])
        notes = [f"{name}: {what}" for name, what in check_files(path, manifest.files).items()]
        if label_identity(manifest.identity) != manifest.label_identity:
            notes.append("its label identity is not that of its teacher, tokenizer and options")
        made_from = [self._teacher(manifest.identity["teacher"])]
        made_from += [self._cache_by_digest(part["digest"]) for part in (manifest.derived_from or {}).get("inputs", [])]
        made_from += [self._documents(source) for source in manifest.sources]
        return Part(kind=kind, name=path.name, state=ALTERED if notes else WHOLE, at=str(path), notes=notes,
                    digest=manifest.digest, made_from=made_from)  # fmt: skip

    def _cache_by_digest(self, digest: str) -> Part:
        """A cache that another was merged or cut from."""
        for place in self._places:
            if (place / MANIFEST).exists() and read_manifest(place).digest == digest:
                return self.cache(place, "derived from cache")
        return Part(kind="derived from cache", name=digest[:16], state=ELSEWHERE, digest=digest)

    def _start(self, record: Record) -> Part:
        """The weights that a run started from, and the run that they come from where it is here."""
        digest, kind = record["weights_sha256"], "starting weights"
        recorded = [Path(record["path"])] if "path" in record else []
        for place in [p for p in [*recorded, *self._places] if (p / "config.json").is_file()]:
            if place.resolve() in self._followed:
                continue
            if weights_sha256([sha256_file(file) for file in weight_files(place)]) == digest:
                made_from = [self.run(place)] if (place / "run.json").is_file() else []
                return Part(kind=kind, name=place.name, state=WHOLE, at=str(place), digest=digest, made_from=made_from)
        return Part(kind=kind, name=recorded[0].name if recorded else "", state=ELSEWHERE, digest=digest)

    def _teacher(self, record: Record) -> Part:
        name, digest = str(record.get("name")), record["weights_digest"]
        notes = [f"commit {record['commit']}"] if record.get("commit") else []
        state, at = ELSEWHERE, None
        for place in [p for p in self._places if (p / "config.json").is_file()]:
            same_config = sha256_file(place / "config.json") == record["config_digest"]
            if not same_config and place.resolve().name != name:
                continue  # not worth reading gigabytes of weights
            state, at = (WHOLE if same_config and weights_digest(place) == digest else ALTERED), str(place)
            if state == WHOLE:
                break
        notes += ["the folder of that name holds another model, or other weights"] if state == ALTERED else []
        return Part(kind="teacher", name=name, state=state, at=at, digest=digest, notes=notes)

    def _documents(self, source: Record) -> Part:
        """A data set: its file where one of that name is here, or the library of a Python of that version."""
        from data.load import load_documents

        files = [str(place / source["name"]) for place in self._places if (place / source["name"]).is_file()]
        if source["name"] == "stdlib" and source.get("revision") == platform.python_version():
            files = ["stdlib"]
        state, notes = ELSEWHERE, [f"revision {source['revision']}"] if source.get("revision") else []
        for file in files[:1]:
            columns = (source.get("config") or {}).get("columns")
            try:
                read = load_documents(file, source["split"], limit_docs=source["num_documents"], columns=columns)
                state = WHOLE if read.digest == source["digest"] else ALTERED
            except DistillError as error:
                state, notes = ALTERED, [*notes, str(error)]
            notes += ["it holds other documents"] if state == ALTERED else []
        words = f"{source['name']} ({source['split']}), {source['num_documents']} documents"
        return Part(kind="documents", name=words, state=state, at=next(iter(files), None), digest=source["digest"],
                    notes=notes)  # fmt: skip

    def report(self, file: Path) -> Part:
        """A report: its files as they lie, then the runs and caches among them."""
        report, base = read_json(file), file.parent.parent
        require(isinstance(report, dict) and report.get("format") == REPORT_FORMAT, "not a report", where=file,
                expected=REPORT_FORMAT)  # fmt: skip
        parts = []
        for name, entry in report["files"].items():
            path, found = base / name, _sha256(base / name)
            notes = _difference(name, found, entry["sha256"])
            follow = {"run.json": self.run, MANIFEST: self.cache}.get(path.name)
            parts.append(Part(
                kind="file", name=name, state=(ALTERED if found else MISSING) if notes else WHOLE, digest=found,
                notes=notes, made_from=[follow(path.parent)] if follow and not notes else [],
            ))  # fmt: skip
        return Part(kind="report", name=file.parent.name, state=WHOLE, at=str(file), digest=sha256_file(file),
                    notes=report["headline"][:1], made_from=parts)  # fmt: skip
