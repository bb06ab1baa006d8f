"""A finished run as a transformers directory that can be shared: weights, config, tokenizer, model card."""

import os
import shutil
from pathlib import Path
from typing import Any

from shared.errors import ConfigError, ResumeError
from shared.files import fsync_directory, read_json, sha256_file, write_bytes, write_json
from shared.process import log
from stage2_student.checkpoint import RUN_FORMAT, RUN_VERSION
from stage2_student.config import SIZES

LINEAGE = "lineage.json"  # what `codedistill trace` goes on from
PRIVATE = {"run.json", "training_log.jsonl", "training_args.bin"}


def export(run: Path, out: Path) -> None:
    """Copy the student of a finished run, and write its card and its lineage.

    Raises:
        ConfigError: `run` is no finished run.
        ResumeError: `out` exists and is not empty.
    """
    record = read_json(run / "run.json") if (run / "run.json").exists() else {}
    if (record.get("format"), record.get("version"), record.get("state")) != (RUN_FORMAT, RUN_VERSION, "finished"):
        raise ConfigError("not a finished training run", where=run, fix="finish it with `codedistill student train`")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ResumeError("the folder to export to is not empty", where=out, fix="choose another --out")
    for license, what in _licenses(record):
        if license is None:
            log(f"warning: the license of {what} is unknown; find it out before you share the student")
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        for file in sorted(run.iterdir()):
            if file.is_file() and file.name not in PRIVATE and not file.name.startswith("."):
                shutil.copy(file, temporary / file.name)
        write_json(temporary / LINEAGE, _lineage(run, record, temporary))
        write_bytes(temporary / "README.md", _card(out.name, record).encode())
        if out.exists():
            out.rmdir()
        temporary.rename(out)
        fsync_directory(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _lineage(run: Path, record: dict[str, Any], exported: Path) -> dict[str, Any]:
    """Digests of the exported files, the run's record, and the caches that it was made from."""
    start = record["init_from"]
    return {
        "format": "codedistill-lineage",
        "version": 1,
        "run": {"name": run.resolve().name, "sha256": sha256_file(run / "run.json")},
        "files": {file.name: sha256_file(file) for file in sorted(exported.iterdir())},
        "caches": record["caches"],
        "validation": record["validation"],
        "init_from": start and {"weights_sha256": start["weights_sha256"]},
    }


def _licenses(record: dict[str, Any]) -> list[tuple[str | None, str]]:
    teacher = record["caches"][0]["teacher"]
    return [(teacher.get("license"), f"the teacher {teacher.get('name')}")] + [
        (source.get("license"), f"the data set {source['name']}") for source in _sources(record)
    ]


def _sources(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The data sets of all caches; `weighted` says the weight of the cache, where it has one."""
    return [
        source | {"weighted": "" if cache["weight"] is None else f", in a cache of weight {cache['weight']:g}"}
        for cache in record["caches"]
        for source in cache["sources"]
    ]


def _card(name: str, record: dict[str, Any]) -> str:
    """A model card that says what the student was made from; licenses of teacher and data pass on."""
    config, teacher = record["config"], record["caches"][0]["teacher"]
    sources = "\n".join(
        f"- {s['name']} ({s['split']}, {s['num_documents']} documents"
        f"{s['weighted']}), license: {s.get('license') or 'unknown'}, "
        f"revision: {s.get('revision') or 'none'}, digest: `{s['digest']}`\n"
        f"  Attribution: {s.get('attribution') or 'unknown'}"
        for s in _sources(record)
    )
    share = {"jsd": ", beta = {beta}", "skewed-forward": ", skew = {skew}", "skewed-reverse": ", skew = {skew}"}
    kept = f", k = {config['k']}" if config["k"] else ""
    objective = (
        f"{config['alpha']} x distillation (loss `{config['loss']}`, divergence `{config['divergence']}`"
        f"{share.get(config['divergence'], '').format(**config)}, T = {config['temperature']}{kept}) "
        f"+ {1 - config['alpha']:.3g} x cross-entropy"
        if config["alpha"] > 0
        else "cross-entropy (no soft labels)"
    )
    sizes = "".join(f", {name} = {config[name]}" for name in SIZES if config[name] is not None)
    metrics = "\n".join(f"- {key}: {value:.6g}" for key, value in record["metrics"].items())
    start = record["init_from"]
    started = f"from weights `{start['weights_sha256']}`, whose license passes on too," if start else "from scratch"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [distillation, code]
---
# {name}

A {record["parameters"]:,}-parameter decoder (architecture Starcoder2, preset `{config["preset"]}`{sizes}), trained {
        started
    }
with codedistill {record["versions"]["codedistill"]} {
        "on cached soft labels" if config["alpha"] > 0 else "as a twin, on the raw data"
    }.

- Teacher: {teacher.get("name")}, license: {teacher.get("license") or "unknown"}, commit: {
        teacher.get("commit") or "none"
    },
  weights: `{teacher["weights_digest"]}`.
  Attribution: {teacher.get("attribution") or "unknown"}. Restrictions of the teacher's license pass on to this model.
- Objective: {objective}
- Label identity: `{record["caches"][0]["label_identity"]}`

## Data

{sources}

## Figures of the run

{metrics}
"""
