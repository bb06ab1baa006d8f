"""A finished run as a transformers directory that can be shared: weights, config, tokenizer, model card."""

import shutil
from pathlib import Path
from typing import Any

from shared.cache.manifest import written_text
from shared.checkpoints import WEIGHTS, tokenizer_files, weight_files
from shared.errors import ResumeError, require
from shared.files import output_path, publish_folder, read_json, sha256_file, write_bytes, write_json
from shared.process import log
from stage2_student.checkpoint import RUN_FORMAT, RUN_VERSION
from stage2_student.config import SIZES

LINEAGE = "lineage.json"  # what `codedistill trace` goes on from
CONFIGS = ("config.json", "generation_config.json")


def export(run: Path, out: Path) -> None:
    """Copy the student of a finished run, and write its card and its lineage. Run again, it reports a whole export.

    Raises:
        ConfigError: `run` is no finished run, or its weights are not those that training ended with.
        ResumeError: `out` holds something else than a whole export of this run.
    """
    out = output_path(out)
    require(run.is_dir(), "there is no such folder", where=run, expected="the folder of a finished training run")
    record = read_json(run / "run.json") if (run / "run.json").exists() else {}
    is_finished = [record.get(key) for key in ("format", "version", "state")] == [RUN_FORMAT, RUN_VERSION, "finished"]
    fix = "finish it with `codedistill student train`"
    require(is_finished, "not a finished training run", where=run, fix=fix)
    weights = run / WEIGHTS
    require(
        weight_files(run) == [weights] and sha256_file(weights) == record["weights_sha256"],
        "the run's weights are not those that training ended with",
        where=weights,
        expected=f"SHA-256 {record['weights_sha256']}",
        fix="run `codedistill student train` with the run's options again",
    )
    if _is_exported(run, out):
        log(f"{out} is up to date")
        return
    is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    require(is_free, "the export's folder is not empty", error=ResumeError, where=out, fix="choose another --out")
    for license, what in _licenses(record):
        if license is None:
            log(f"warning: the license of {what} is unknown; look it up before you share the student")
    with publish_folder(out) as folder:
        for file in (weights, *(run / name for name in CONFIGS), *tokenizer_files(run)):
            shutil.copyfile(file, folder / file.name)
        write_json(folder / LINEAGE, _lineage(run, record, folder))
        write_bytes(folder / "README.md", _card(out.name, record).encode())


def _is_exported(run: Path, out: Path) -> bool:
    """Whether `out` is an export of this run, its files unchanged."""
    lineage = read_json(out / LINEAGE) if (out / LINEAGE).is_file() else {}
    files = {out / name: digest for name, digest in lineage.get("files", {}).items()}
    is_of_run = bool(files) and lineage["run"]["sha256"] == sha256_file(run / "run.json")
    return is_of_run and all(file.is_file() and sha256_file(file) == digest for file, digest in files.items())


def _lineage(run: Path, record: dict[str, Any], exported: Path) -> dict[str, Any]:
    """Digests of the exported files and of the run's record, and the caches that it was made from."""
    starts = {key: record.get(key) for key in ("init_from", "init_embedding")}
    return {
        "format": "codedistill-lineage",
        "version": 1,
        "run": {"name": run.resolve().name, "sha256": sha256_file(run / "run.json")},
        "files": {file.name: sha256_file(file) for file in sorted(exported.iterdir())},
        "caches": record["caches"],
        "validation": record["validation"],
    } | {key: start and {"weights_sha256": start["weights_sha256"]} for key, start in starts.items()}


def _licenses(record: dict[str, Any]) -> list[tuple[str | None, str]]:
    teacher = record["caches"][0]["teacher"]
    sources = [source for cache in record["caches"] for source in cache["sources"]]
    return [(teacher.get("license"), f"the teacher {teacher.get('name')}")] + [
        (source.get("license"), f"the data set {source['name']}") for source in sources
    ]


def _card(name: str, record: dict[str, Any]) -> str:
    """A model card that says what the student was made from; licenses of teacher and data pass on."""
    config, teacher = record["config"], record["caches"][0]["teacher"]
    sizes = "".join(f", {name} = {config[name]}" for name in SIZES if config[name] is not None)
    started = "from scratch"
    for key, what in (("init_from", "weights"), ("init_embedding", "the embedding in weights")):
        if start := record.get(key):
            started = f"from {what} `{start['weights_sha256']}`, whose license passes on too,"
    labels = "on cached soft labels" if config["alpha"] > 0 else "with cross-entropy only, as a baseline"
    return "\n".join([
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [distillation, code]\n---",
        f"# {name}\n",
        f"A {record['parameters']:,}-parameter decoder (architecture Starcoder2, preset `{config['preset']}`{sizes}), "
        f"trained {started}\nwith codedistill {record['versions']['codedistill']} {labels}.\n",
        f"- Teacher: {teacher.get('name')}, license: {teacher.get('license') or 'unknown'}, "
        f"commit: {teacher.get('commit') or 'none'},",
        f"  weights: `{teacher['weights_digest']}`.",
        f"  Attribution: {teacher.get('attribution') or 'unknown'}. "
        "Restrictions of the teacher's license pass on to this model.",
        f"- Objective: {_objective(config)}",
        f"- Label identity: `{record['caches'][0]['label_identity']}`",
        "\n## Data\n",
        *(_describe_source(source, cache["weight"]) for cache in record["caches"] for source in cache["sources"]),
        "\n## Figures of the run\n",
        *(f"- {key}: {value:.6g}" for key, value in record["metrics"].items()),
        "",
    ])  # fmt: skip


def _objective(config: dict[str, Any]) -> str:
    """The loss, with the options that it has."""
    if config["alpha"] == 0:
        return "cross-entropy (no soft labels)"
    names = {"jsd": "beta", "skewed-forward": "skew", "skewed-reverse": "skew"}
    share = names.get(config["divergence"])
    options = [f"loss `{config['loss']}`", f"divergence `{config['divergence']}`"]
    options += [f"{share} = {config[share]}"] if share else []
    options += [f"T = {config['temperature']}"] + ([f"k = {config['k']}"] if config["k"] else [])
    return f"{config['alpha']} x distillation ({', '.join(options)}) + {1 - config['alpha']:.3g} x cross-entropy"


def _describe_source(source: dict[str, Any], weight: float | None) -> str:
    """A data set, with the weight of its cache where it has one."""
    weighted = "" if weight is None else f", in a cache of weight {weight:g}"
    return (
        f"- {source['name']} ({source['split']}, {source['num_documents']} documents{weighted}), "
        f"license: {source.get('license') or 'unknown'}, revision: {source.get('revision') or 'none'}, "
        f"digest: `{source['digest']}`\n  Attribution: {source.get('attribution') or 'unknown'}"
        + "".join(f"\n  {text}." for text in written_text([source]))
    )
