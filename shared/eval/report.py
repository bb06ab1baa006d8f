"""The report: whatever results exist, side by side, in JSON, Markdown and one self-contained HTML page."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.errors import ConfigError
from shared.eval.findings import LABELS, caveats, count, headline, table
from shared.eval.plots import Plot, fidelity_plot, mass_plot, tradeoff_plot, training_plot
from shared.runtime import machine, read_json, sha256_file, to_json, versions, write_bytes, write_json

FIDELITY = {  # the report's key → the key in fidelity.json
    "heldout_nll_nats": "nll_nats",
    "heldout_bits_per_byte": "bits_per_byte",
    "kl_to_teacher_nats": "kl_to_teacher_nats",
    "top1_agreement": "top1_agreement",
}
LATENCY = ("prefill_ms", "decode_tokens_per_second")
RATIOS = ("parameters", "bytes", *LATENCY)
PACKAGES = ("codedistill", "torch", "transformers", "numpy", "h5py", "matplotlib", "jinja2")


def build_report(eval_dir: Path, runs: Mapping[str, Path], caches: Sequence[Path], out_dir: Path) -> dict[str, Any]:
    """Write `report.json`, `report.md` and `report.html`, each atomically, and return the first as data.

    Args:
        eval_dir: holds `<name>/{fidelity,latency}.json` and `<name>/humaneval/result.json` per model, and a
            `latency.json` of several models, which wins: times of one run can be compared.
        runs: run folders by student, in the table's order; `run.json` and `training_log.jsonl` are read.
        caches: cache folders; `manifest.json` is read, and `teacher_eval/` where `eval_dir` has no teacher.
        out_dir: where the report goes; made if absent.

    Raises:
        ConfigError: a file that exists but cannot be read as what it should be, or a student's name that is not its
        results'.
    """
    source = _Files(out_dir.parent)
    shared_latency = source.read(eval_dir / "latency.json") or {}
    found = sorted(p.name for p in eval_dir.iterdir() if p.is_dir()) if eval_dir.is_dir() else []
    names = list(dict.fromkeys(["teacher", *runs, *shared_latency.get("models", {}), *found]))
    folders = {name: eval_dir / name for name in names}
    unnamed = [name for name in names if name not in runs and name != "teacher"]
    for name in runs:
        if unnamed and name not in found and name not in shared_latency.get("models", {}):
            raise ConfigError(
                "a student has no results, and there are results that no student is named for",
                where=eval_dir,
                expected=" or ".join(unnamed),
                got=name,
                fix="name the student as its results are, or measure it with `codedistill eval`",
            )
    if "teacher" not in found:  # measured where the cache was made
        attached = [cache / "teacher_eval" for cache in caches if (cache / "teacher_eval").is_dir()]
        folders["teacher"] = next(iter(attached), folders["teacher"])
    models = {name: _model(name, folders[name], runs.get(name), shared_latency, source) for name in names}
    _fill_teacher(models)
    for model in models.values():
        model["ratios_to_teacher"] = _ratios(model, models["teacher"])
    logs = {models[name]["label"]: source.read_lines(run / "training_log.jsonl") for name, run in runs.items()}
    cache_entries = [_cache(path, source) for path in caches]
    report = {
        "format": "codedistill-report",
        "version": 1,
        "headline": headline(models),
        "models": models,
        "caveats": caveats(models),
        "caches": cache_entries,
        "files": source.files,
        "machine": machine(),
        "versions": versions(*PACKAGES),
    }
    plots = _plots(models, logs, cache_entries)
    out_dir.mkdir(parents=True, exist_ok=True)
    for suffix in ("md", "html"):
        text = _render(f"report.{suffix}.j2", report=report, plots=plots)
        write_bytes(out_dir / f"report.{suffix}", text.encode())
    write_json(out_dir / "report.json", report)
    return report


# --- reading ---------------------------------------------------------------------------------------------------------


class _Files:
    """Reads result files and remembers each one's size and digest, named relative to the report's parent folder."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.files: dict[str, dict[str, Any]] = {}

    def read(self, path: Path) -> dict[str, Any] | None:
        """The JSON object in a file; None where there is no file."""
        if not path.is_file():
            return None
        value = read_json(path)
        if not isinstance(value, dict):
            raise ConfigError(
                "a result file of another form", where=path, expected="a JSON object", got=type(value).__name__
            )
        self._remember(path)
        return value

    def read_lines(self, path: Path) -> list[dict[str, Any]]:
        """The objects of a JSONL file, without a last line cut short by a kill; empty where there is no file."""
        if not path.is_file():
            return []
        self._remember(path)
        records = []
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ConfigError("a log line is not valid JSON", where=f"{path}, line {number}", got=error) from error
        return records

    def name(self, path: Path) -> str:
        return Path(os.path.relpath(path, self.base)).as_posix()

    def _remember(self, path: Path) -> None:
        self.files[self.name(path)] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _model(
    name: str, folder: Path, run_dir: Path | None, shared_latency: Mapping[str, Any], source: _Files
) -> dict[str, Any]:
    """One model's figures; each that is missing is None, with a reason."""
    fidelity = source.read(folder / "fidelity.json")
    latency = source.read(folder / "latency.json")
    if latency is not None and "models" in latency:
        latency = latency | latency["models"].get(name, {})
    if name in shared_latency.get("models", {}):
        latency = {**shared_latency, **shared_latency["models"][name]}
    humaneval = source.read(folder / "humaneval" / "result.json")
    run = source.read(run_dir / "run.json") if run_dir else None
    reasons: dict[str, str] = {}

    def figure(key: str, result: Mapping[str, Any] | None, result_key: str, file: str) -> Any:
        if result is None:
            reasons[key] = f"not measured: there is no {file} for this model"
            return None
        if key in FIDELITY and result.get("seen_in_training"):
            reasons[key] = "not held out: the model was scored on documents that it was trained on"
            return None
        value = result.get(result_key)
        if isinstance(value, dict):  # a timing with its spread
            value = value.get("median")
        if value is None:
            reasons[key] = (result.get("reasons") or {}).get(result_key) or f"{file} has no {result_key}"
        return value

    sizes = latency if latency is not None else (fidelity or {}).get("model")
    model: dict[str, Any] = {"label": LABELS.get(name, name)}
    model |= {key: figure(key, sizes, key, "latency.json or fidelity.json") for key in ("parameters", "bytes")}
    model |= {key: figure(key, fidelity, result_key, "fidelity.json") for key, result_key in FIDELITY.items()}
    model |= {key: figure(key, latency, key, "latency.json") for key in LATENCY}
    keys = ("pass_at_1", "num_problems", "ci95")
    model["humaneval"] = {k: figure(f"humaneval.{k}", humaneval, k, "humaneval/result.json") for k in keys}
    model["reasons"] = reasons
    results = {"fidelity": fidelity, "latency": latency, "humaneval": humaneval, "run": run}
    model["settings"] = {
        key: {k: v for k, v in result.items() if k not in ("models", "machine", "versions", "reasons", "per_document")}
        for key, result in results.items()
        if result is not None
    }
    model["machines"] = {key: result.get("machine") for key, result in results.items() if result is not None}
    model["versions"] = {key: result.get("versions") for key, result in results.items() if result is not None}
    return model


def _fill_teacher(models: Mapping[str, dict[str, Any]]) -> None:
    """Where the teacher itself was not scored, take its NLL as a student's score recorded it from the cache."""
    teacher = models["teacher"]
    if teacher["heldout_nll_nats"] is None:
        for model in models.values():
            value = model["settings"].get("fidelity", {}).get("teacher_nll_nats")
            if value is not None:
                teacher["heldout_nll_nats"] = value
                teacher["reasons"].pop("heldout_nll_nats")
                return


def _ratios(model: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, float | None]:
    """Each figure over the teacher's; None where one is missing, or times come from different machines."""
    ratios: dict[str, float | None] = {}
    for key in RATIOS:
        comparable = key not in LATENCY or model["machines"].get("latency") == teacher["machines"].get("latency")
        ratios[key] = model[key] / teacher[key] if comparable and model[key] is not None and teacher[key] else None
    return ratios


def _cache(path: Path, source: _Files) -> dict[str, Any]:
    manifest = source.read(path / "manifest.json")
    if manifest is None:
        return {"name": source.name(path), "reasons": {"manifest": "the cache has no manifest.json: it is unfinished"}}
    return {"name": source.name(path), **{key: value for key, value in manifest.items() if key != "files"}}


# --- writing ----------------------------------------------------------------------------------------------------------


def _plots(
    models: Mapping[str, Mapping[str, Any]],
    logs: Mapping[str, list[dict[str, Any]]],
    caches: Sequence[Mapping[str, Any]],
) -> list[Plot]:
    """The plots for which there is data. A speed is drawn only if it comes from the teacher's machine."""
    measured = {m["label"]: m for m in models.values()}
    tradeoff = {
        label: (m["decode_tokens_per_second"], m["heldout_nll_nats"], m["parameters"])
        for label, m in measured.items()
        if m["machines"].get("latency") == models["teacher"]["machines"].get("latency")
        and None not in (m["decode_tokens_per_second"], m["heldout_nll_nats"], m["parameters"])
    }
    masses = {c["name"]: c["statistics"]["captured_mass"] for c in caches if "captured_mass" in c.get("statistics", {})}
    plots = [
        fidelity_plot({label: (m["heldout_nll_nats"], m["kl_to_teacher_nats"]) for label, m in measured.items()}),
        tradeoff_plot(tradeoff),
        training_plot(
            logs, "ce", "Training: cross-entropy to the text",
            "The twin is trained on this loss alone, the distilled student on a mix with the teacher's distribution.",
        ),
        training_plot(
            logs, "kd", "Training: divergence from the teacher",
            "The distance to the cached distribution; the twin is not trained on it.",
        ),
        mass_plot(masses),
    ]  # fmt: skip
    return [plot for plot in plots if plot is not None]


def _render(template: str, *, report: Mapping[str, Any], plots: Sequence[Plot]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("shared.eval"),
        autoescape=jinja2.select_autoescape(("html.j2",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "pretty": lambda value: to_json(value).rstrip()}
    return environment.get_template(template).render(report=report, rows=table(report["models"]), plots=plots)
