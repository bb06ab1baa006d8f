"""Where a student comes from: student → run → caches → teacher and documents, by digest, and where that chain breaks.

Each piece is a node: what it is, where it lies, its state, what is said of it, and the pieces it was made from. Names
and places prove nothing: a piece is known by its digest, which is formed again from its bytes.
"""

import functools
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.cache.derive import Input
from shared.cache.format import MANIFEST, MANIFEST_PENDING
from shared.cache.identity import label_identity
from shared.cache.reader import Cache
from shared.cache.verify import check_files
from shared.errors import ConfigError, DistillError
from shared.eval.report.index import Holdings, shards_of
from shared.eval.report.provenance import read_result
from shared.eval.report.tables import mapping
from shared.files import sha256_json

Node = dict[str, Any]

WHOLE, ALTERED, MISSING, UNRECORDED, RECORDED = "whole", "altered", "missing", "unrecorded", "not at hand"
BREAKS = (ALTERED, MISSING, UNRECORDED)
WEIGHTS, LINEAGE = "model.safetensors", "lineage.json"


def trace(path: Path, look_in: Sequence[Path]) -> Node:
    """Walk from a run, an export, a cache or a report to what it was made from.

    A piece is `whole` (its digests were formed again and are as recorded), `altered`, `missing`, `unrecorded` (nothing
    says what it should be), or `not at hand`: a teacher or documents of which only the digest is known here, as is
    usual on the student's machine.

    Args:
        path: a run's, export's, cache's or report's folder, or report.json.
        look_in: folders under which the pieces are looked for.

    Raises:
        ConfigError: none of these, or one whose record cannot be read.
    """
    at_hand = Holdings([path if path.is_dir() else path.parent, *look_in])
    report = path / "report.json" if path.is_dir() else path
    if path.is_dir() and (path / "run.json").is_file():
        return _run(path, read_result(path / "run.json"), at_hand)
    if path.is_dir() and ((path / MANIFEST).is_file() or (path / MANIFEST_PENDING).is_file()):
        return _cache(path, at_hand)
    if report.is_file():
        return _report(report, at_hand)
    if (path / "config.json").is_file():
        return _export(path, at_hand)
    raise ConfigError("nothing that can be traced", where=path, expected="a run, an export, a cache or a report",
                      got="none of them" if path.exists() else "no such path")  # fmt: skip


def breaks(node: Node) -> list[str]:
    """Each place where the chain breaks, in words, once."""
    own = [f"{node['kind']} {node['name']}: {node['state']}: {'; '.join(node['notes'])}"]
    below = [text for part in node["made_from"] for text in breaks(part)]
    return list(dict.fromkeys([*(own if node["state"] in BREAKS else []), *below]))


def describe(node: Node) -> str:
    """The chain as a tree, with what is broken below it."""
    broken = breaks(node)
    end = [f"broken: {text}" for text in broken] or ["the chain is whole, as far as its pieces are at hand"]
    return "\n".join([*_lines(node, "", "", set()), *end])


def _lines(node: Node, first: str, rest: str, told: set[tuple[str, str]]) -> list[str]:
    """A piece and what it was made from; what has been told of a piece is not told again."""
    place = f" at {node['at']}" if node["at"] else ""
    digest = f"  {node['digest'][:16]}" if node["digest"] else ""
    lines = [f"{first}{node['kind']} {node['name']}: {node['state']}{place}{digest}"]
    if node["made_from"] and node["at"]:
        if (node["kind"], node["at"]) in told:
            return [f"{lines[0]}, as above"]
        told.add((node["kind"], node["at"]))
    lines += [f"{rest}    {note}" for note in node["notes"]]
    for number, part in enumerate(node["made_from"], 1):
        last = number == len(node["made_from"])
        lines += _lines(part, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "), told)
    return lines


def _node(
    kind: str,
    name: object,
    state: str,
    *,
    at: Path | None = None,
    digest: object = None,
    notes: Sequence[str] = (),
    made_from: Sequence[Node] = (),
) -> Node:
    return {
        "kind": kind,
        "name": str(name),
        "state": state,
        "at": str(at) if at else None,
        "digest": digest if isinstance(digest, str) else None,
        "notes": list(notes),
        "made_from": list(made_from),
    }


# --- student ---------------------------------------------------------------------------------------------------------


def _export(path: Path, at_hand: Holdings) -> Node:
    weights = at_hand.weights_sha256(path)
    lineage = read_result(path / LINEAGE) if (path / LINEAGE).is_file() else None
    if lineage is None:  # an older export, or any model: known by its weights alone
        runs = [run for run, record in at_hand.runs.items() if weights and record.get("weights_sha256") == weights]
        notes = [f"it has no {LINEAGE}: its run is looked for by its weights"]
        made_from = [_run(run, at_hand.runs[run], at_hand) for run in runs[:1]]
        made_from = made_from or [_node("run", "unknown", MISSING, notes=["no run of these weights is at hand"])]
        return _node("export", path.name, WHOLE, at=path, digest=weights, notes=notes, made_from=made_from)
    files = mapping(lineage.get("files"))
    notes = [
        f"{name}: {'missing' if found is None else f'SHA-256 {found}, recorded {digest}'}"
        for name, digest in files.items()
        if (found := at_hand.sha256(path / name)) != digest
    ]
    notes += [] if WEIGHTS in files else [f"{LINEAGE} does not name {WEIGHTS}"]
    run = mapping(lineage.get("run"))
    place = next((folder for folder in at_hand.runs if at_hand.sha256(folder / "run.json") == run.get("sha256")), None)
    if place is not None:
        made_from = [_run(place, at_hand.runs[place], at_hand)]
    else:  # the export records the caches too, so that the chain goes on without the run's folder
        note = f"no run.json with SHA-256 {run.get('sha256')} is at hand"
        made_from = [_node("run", run.get("name"), MISSING, digest=run.get("sha256"), notes=[note],
                           made_from=_caches_of(lineage, at_hand))]  # fmt: skip
    return _node(
        "export", path.name, ALTERED if notes else WHOLE, at=path, digest=weights, notes=notes, made_from=made_from
    )


def _run(path: Path, record: Mapping[str, Any], at_hand: Holdings, descendants: Sequence[Path] = ()) -> Node:
    """A run; `descendants` are those that started from its weights, none of which it can have started from."""
    recorded, found = record.get("weights_sha256"), at_hand.sha256(path / WEIGHTS)
    state, notes = WHOLE, []
    if record.get("state") != "finished":
        state, notes = UNRECORDED, [f"training is not finished (state {record.get('state')})"]
    elif recorded is None:
        state, notes = UNRECORDED, ["run.json records no digest of the weights"]
    elif found != recorded:
        state = MISSING if found is None else ALTERED
        notes = [f"{WEIGHTS}: {f'SHA-256 {found}' if found else 'missing'}, recorded {recorded}"]
    made_from = _caches_of(record, at_hand)
    if start := mapping(record.get("init_from")):
        made_from.append(_start(start, at_hand, (*descendants, path)))
    return _node("run", path.name, state, at=path, digest=found, notes=notes, made_from=made_from)


def _start(start: Mapping[str, Any], at_hand: Holdings, descendants: Sequence[Path]) -> Node:
    digest = start.get("weights_sha256")
    name = Path(str(start.get("path"))).name
    others = [model for model in at_hand.models if model not in descendants]
    place = next((model for model in others if digest and at_hand.weights_sha256(model) == digest), None)
    if place is None:
        note = f"no weights with SHA-256 {digest} are at hand"
        return _node("starting weights", name, RECORDED, digest=digest, notes=[note])
    made_from = [_run(place, at_hand.runs[place], at_hand, descendants)] if place in at_hand.runs else []
    return _node("starting weights", name, WHOLE, at=place, digest=digest, made_from=made_from)


def _caches_of(record: Mapping[str, Any], at_hand: Holdings) -> list[Node]:
    """The caches that a run's record or an export's lineage names."""
    parts = [("cache", part) for part in record.get("caches") or [record.get("cache")]]
    parts += [("validation cache", record["validation"])] if record.get("validation") else []
    return [_recorded_cache(kind, mapping(part), at_hand) for kind, part in parts]


# --- caches ----------------------------------------------------------------------------------------------------------


def _recorded_cache(kind: str, part: Mapping[str, Any], at_hand: Holdings) -> Node:
    """A cache known by its shards' digests: found and checked, or what is known of it without."""
    shards, labels = mapping(part.get("shards")), part.get("label_identity")
    documents = [source.get("digest") for source in part.get("sources") or []]
    digest = sha256_json([labels, part.get("sources"), list(shards.values())])  # as `derived_from` names it
    same, alike = [], None
    for path, manifest in at_hand.caches.items():
        if manifest["label_identity"] != labels:
            continue
        held = shards_of(manifest)
        if shards and all(held.get(name) == sha256 for name, sha256 in shards.items()):
            same.append(path)
        elif [source.get("digest") for source in manifest["sources"]] == documents:
            alike = alike or path
    if same:
        nodes = [_cache(path, at_hand, kind=kind) for path in same]
        node = next((node for node in nodes if node["state"] == WHOLE), nodes[0])
        if len(shards_of(at_hand.caches[Path(node["at"])])) > len(shards):
            node["notes"].append("it has grown since: the run read its first shards")
        return node | {"digest": digest}
    notes = ["no cache with these shards is at hand"]
    state = MISSING
    if alike is not None:
        state, notes = ALTERED, ["a cache of the same labels and documents has other shards"]
    notes += [f"{path} cannot be read: {why}" for path, why in at_hand.damaged_caches.items()]
    teacher, sources = mapping(part.get("teacher")), part.get("sources") or []
    name = ", ".join(f"{source.get('name')} ({source.get('split')})" for source in sources) or "unknown"
    made_from = [_teacher(teacher, at_hand), *(_documents(source, at_hand, None) for source in sources)]
    return _node(kind, name, state, at=alike, digest=digest, notes=notes, made_from=made_from)


def _cache(path: Path, at_hand: Holdings, kind: str = "cache") -> Node:
    if path not in at_hand.caches:  # the piece that was asked about
        why = at_hand.damaged_caches.get(path, "it cannot be read")
        return _node(kind, path.name, ALTERED, at=path, notes=[why])
    manifest = at_hand.caches[path]
    notes = [f"{name}: {what}" for name, what in check_files(path, manifest["files"]).items()]
    try:
        if label_identity(manifest["identity"]) != manifest["label_identity"]:
            notes.append("its label identity is not that of its teacher, tokenizer and options")
    except DistillError as error:
        notes.append(str(error))
    state = ALTERED if notes else WHOLE
    made_from = [_teacher(manifest["identity"]["teacher"], at_hand)]
    for part in mapping(manifest.get("derived_from")).get("inputs") or []:
        made_from.append(_input(mapping(part), at_hand))
    derived = bool(manifest.get("derived_from"))
    listed = _listed(path) if state == WHOLE and not derived and len(manifest["sources"]) == 1 else None
    made_from += [_documents(source, at_hand, listed) for source in manifest["sources"]]
    digest = Input(path=path, manifest=manifest).digest()
    return _node(kind, path.name, state, at=path, digest=digest, notes=notes, made_from=made_from)


def _input(part: Mapping[str, Any], at_hand: Holdings) -> Node:
    """A cache that another was merged or cut from."""
    digest = str(part.get("digest"))
    place = at_hand.cache_by_digest(digest)
    if place is not None:
        return _cache(place, at_hand, kind="derived from cache")
    return _node(
        "derived from cache", digest[:16], RECORDED, digest=digest, notes=["no cache of this digest is at hand"]
    )


def _listed(path: Path) -> str:
    """The digest of a cache's documents, from the ids and digests that it keeps of each."""
    cache = Cache(path)
    metas = [cache.meta(doc) for doc in range(cache.num_documents)]
    return sha256_json([[meta.get("id"), meta.get("digest")] for meta in metas])


# --- teacher and documents -------------------------------------------------------------------------------------------


def _teacher(teacher: Mapping[str, Any], at_hand: Holdings) -> Node:
    name, weights, config = (teacher.get(key) for key in ("name", "weights_digest", "config_digest"))
    commit = teacher.get("commit")
    notes = [f"commit {commit}"] if commit else []
    other = None
    for model in at_hand.models:
        named = model.resolve().name == name
        if not named and at_hand.sha256(model / "config.json") != config:
            continue  # not worth reading gigabytes of weights
        if at_hand.teacher_digests(model) == (weights, config):
            return _node("teacher", name, WHOLE, at=model, digest=weights, notes=notes)
        other = model if named else other
    if other is not None:
        notes.append("the folder of that name holds another model, or other weights")
        return _node("teacher", name, ALTERED, at=other, digest=weights, notes=notes)
    return _node("teacher", name, RECORDED, digest=weights, notes=notes)


def _documents(source: Mapping[str, Any], at_hand: Holdings, listed: str | None) -> Node:
    """A data set; `listed` is the digest of the documents that its cache lists, where that is known."""
    from data import mbpp

    name, split, digest = (source.get(key) for key in ("name", "split", "digest"))
    words = f"{name} ({split}), {source.get('num_documents')} documents"
    revision = f"revision {source['revision']}" if source.get("revision") else None
    notes = [revision] if revision else []
    read_as = (str(split), source.get("num_documents"), mapping(source.get("config")).get("columns"))
    for file in at_hand.data:
        if file.name != name and not (name == mbpp.NAME and "mbpp" in file.name.lower()):
            continue
        if digest in (at_hand.sha256(file), found := _digest_of(str(file), *read_as)):
            return _node("documents", words, WHOLE, at=file, digest=digest, notes=notes)
        notes.append(f"the file of that name holds others: {found or 'it cannot be read like them'}")
        return _node("documents", words, ALTERED, at=file, digest=digest, notes=notes)
    if name == "stdlib" and source.get("revision") == platform.python_version():
        if _digest_of("stdlib", *read_as) == digest:
            notes.append("read again from the library of this Python")
            return _node("documents", words, WHOLE, digest=digest, notes=notes)
        notes.append("the library of this Python, of the same version, gives others")
    if listed == digest:
        notes.append("the cache lists just these documents by their digests; the text itself is not at hand")
    return _node("documents", words, RECORDED, digest=digest, notes=notes)


@functools.cache
def _digest_of(dataset: str, split: str, limit: int | None, columns: str | None) -> str | None:
    """The digest of a data set's documents, read as the build read them; None where they cannot be read so."""
    from data.load import load_documents

    try:
        return load_documents(dataset, split, limit_docs=limit, columns=columns).digest
    except DistillError:
        return None


# --- report ----------------------------------------------------------------------------------------------------------


def _report(file: Path, at_hand: Holdings) -> Node:
    """A report: its files as they lie, then the runs and caches among them."""
    report, base = read_result(file), file.parent.parent
    if report.get("format") != "codedistill-report":
        raise ConfigError("not a report", where=file, expected="codedistill-report", got=report.get("format"))
    parts: list[Node] = []
    for name, entry in mapping(report.get("files")).items():
        path, recorded = base / name, mapping(entry).get("sha256")
        found = at_hand.sha256(path)
        state = WHOLE if found == recorded else MISSING if found is None else ALTERED
        notes = {WHOLE: [], MISSING: [f"there is no such file; recorded {recorded}"],
                 ALTERED: [f"SHA-256 {found}, recorded {recorded}"]}[state]  # fmt: skip
        made_from = []
        if state == WHOLE and path.name == "run.json":
            made_from = [_run(path.parent, read_result(path), at_hand)]
        elif state == WHOLE and path.name == MANIFEST:
            folder = next((cache for cache in at_hand.caches if cache.resolve() == path.parent.resolve()), None)
            made_from = [_cache(folder, at_hand)] if folder else []
        parts.append(_node("file", name, state, digest=found, notes=notes, made_from=made_from))
    headline = report.get("headline")
    notes = [str(headline[0])] if isinstance(headline, list) and headline else []
    notes += [] if parts else ["it names no files"]
    return _node("report", file.parent.name, WHOLE, at=file, digest=at_hand.sha256(file), notes=notes, made_from=parts)
