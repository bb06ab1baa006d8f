"""The report: whatever results exist, side by side, in JSON, Markdown and one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.errors import ConfigError
from shared.eval.report import provenance as sources
from shared.eval.report.compare import benchmark_rows, fidelity_rows, read_outcomes
from shared.eval.report.plots import (
    Plot,
    calibration_plot,
    fidelity_plot,
    mass_plot,
    proof_plot,
    tradeoff_plot,
    training_plot,
)
from shared.eval.report.provenance import Files
from shared.eval.report.summary import background, caveats, headline, roles
from shared.eval.report.tables import (
    BENCHMARKS,
    FIGURES,
    LABELS,
    SHARES,
    arms,
    bounds,
    comparison,
    mapping,
    number,
    proof_rows,
    signed,
)
from shared.files import replace_files, to_json
from shared.machine import machine, versions

TIMES = tuple(
    key for key, figure in FIGURES.items() if figure.file == "latency" and figure.less in ("faster", "slower")
)
RATIOS = tuple(key for key, figure in FIGURES.items() if figure.less)
PACKAGES = ("codedistill", "torch", "transformers", "numpy", "h5py", "matplotlib", "jinja2")
_RESULTS = ("fidelity.json", "latency.json", "draft.json", *(f"{name}/result.json" for name in BENCHMARKS))
BULKY = ("per_document", "per_prompt", "ece_bins", "outcomes", "definitions")  # in report.json, not on the page


def build_report(
    eval_dir: Path, runs: Mapping[str, Path], caches: Sequence[Path], out_dir: Path, proof_file: Path | None = None
) -> dict[str, Any]:
    """Write `report.md`, `report.html` and `report.json` together, and return the last as data.

    Args:
        eval_dir: holds `<name>/{fidelity,latency,draft}.json` and `<name>/{humaneval,mbpp}/result.json` per model, and
            a `latency.json` of several models, which wins: times of one run can be compared.
        runs: run folders by student, in the table's order; `run.json` and `training_log.jsonl` are read.
        caches: cache folders; `manifest.json` is read, and `teacher_eval/` where `eval_dir` has no teacher.
        out_dir: where the report goes; made if absent.
        proof_file: what `student proof` wrote: arms over several seeds.

    Raises:
        ConfigError: there are no results; a file cannot be read as what it should be; or a student's name is not its
            results'.
    """
    files = Files(out_dir.parent)
    cache_entries = [_cache(path, files) for path in caches]
    shared_latency = files.read(eval_dir / "latency.json") or {}
    files.say(eval_dir / "latency.json", "size, speed, memory", sources.latency_command(shared_latency))
    timed = shared_latency.get("models") or {}
    found = sorted(p.name for p in eval_dir.iterdir() if _has_results(p)) if eval_dir.is_dir() else []
    names = list(dict.fromkeys(["teacher", *runs, *timed, *found]))
    folders = {name: eval_dir / name for name in names}
    unnamed = [name for name in names if name not in runs and name != "teacher"]
    for name in runs:
        if unnamed and name not in found and name not in timed:
            raise ConfigError(
                "a student has no results, and there are results that no student is named for",
                where=eval_dir,
                expected=" or ".join(unnamed),
                got=name,
                fix="name the student as its results are, or measure it with `codedistill eval`",
            )
    if not (found or timed or runs or caches or proof_file):
        raise ConfigError(
            "no results to report",
            where=eval_dir,
            expected=f"latency.json, or folders named for models with {' or '.join(_RESULTS)}",
            fix="measure a model with `codedistill eval`, its --out in a folder named for the model",
        )
    if "teacher" not in found:  # measured where the cache was made
        attached = [cache / "teacher_eval" for cache in caches if (cache / "teacher_eval").is_dir()]
        folders["teacher"] = next(iter(attached), folders["teacher"])
    models = {name: _model(name, folders[name], runs.get(name), shared_latency, files, cache_entries) for name in names}
    _fill_teacher(models)
    for model in models.values():
        model["ratios_to_teacher"] = _ratios(model, models["teacher"])
    logs = {models[name]["label"]: _log(run, files) for name, run in runs.items()}
    proof = files.read(proof_file) if proof_file else None
    if proof_file:
        files.say(proof_file, "arms over several seeds", "codedistill student proof (make proof)")
    differences = _differences(models)
    report = {
        "format": "codedistill-report",
        "version": 1,
        "headline": headline(models, differences, proof),
        "background": background(models, cache_entries),
        "models": models,
        "differences": differences,
        "proof": proof,
        "caveats": caveats(models, proof),
        "caches": cache_entries,
        "files": files.files,
        "machine": machine(),
        "versions": versions(*PACKAGES),
    }
    plots = _plots(models, logs, cache_entries)
    pages = {
        f"report.{suffix}": _render(f"report.{suffix}.j2", report=report, plots=plots).encode(errors="backslashreplace")
        for suffix in ("md", "html")
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    replace_files(out_dir, pages | {"report.json": to_json(report).encode()})
    return report


# --- reading ---------------------------------------------------------------------------------------------------------


def _model(
    name: str,
    folder: Path,
    run_dir: Path | None,
    shared_latency: Mapping[str, Any],
    files: Files,
    caches: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """One model's figures; each that is missing is None, with a reason."""
    results: dict[str, Any] = {key: files.read(folder / f"{key}.json") for key in ("fidelity", "latency", "draft")}
    fidelity, latency = results["fidelity"], results["latency"]
    files.say(folder / "fidelity.json", "NLL, KL, agreement, calibration",
              sources.fidelity_command(fidelity or {}, caches))  # fmt: skip
    files.say(folder / "latency.json", "size, speed, memory", sources.latency_command(latency or {}))
    files.say(folder / "draft.json", "speculative decoding", sources.draft_command(results["draft"] or {}))
    if name in (shared_latency.get("models") or {}):
        latency = shared_latency
    if latency is not None and "models" in latency:
        latency = latency | (latency["models"].get(name) or {})
    results["latency"] = latency
    for benchmark in BENCHMARKS:
        results[benchmark] = _benchmark(folder / benchmark / "result.json", BENCHMARKS[benchmark], files)
    results["run"] = files.read(run_dir / "run.json") if run_dir else None
    if run_dir:
        command = sources.train_command(results["run"] or {}, files.name(run_dir), caches)
        files.say(run_dir / "run.json", "how the student was trained", command)

    reasons: dict[str, str] = {}
    sizes = latency if latency is not None else mapping((fidelity or {}).get("model")) or None
    holders = results | {"sizes": sizes}
    titles = {"sizes": "latency.json or fidelity.json"}
    model: dict[str, Any] = {"label": _label(name)}
    for key, figure in FIGURES.items():
        file = titles.get(figure.file, f"{figure.file}.json")
        model[key], reason = _find(holders[figure.file], figure.path, file)
        if figure.file == "fidelity" and (fidelity or {}).get("seen_in_training"):
            model[key], reason = None, "not held out: the model was scored on documents that it was trained on"
        if reason:
            reasons[key] = reason
    intervals = {key: mapping((results[key] or {}).get("ci95")) for key in ("fidelity", "draft", "latency")}
    model["ci95"] = {
        key: interval
        for key, figure in FIGURES.items()
        if model[key] is not None and (interval := bounds(intervals.get(figure.file, {}).get(figure.path)))
    }
    for benchmark in BENCHMARKS:
        model[benchmark] = _score(results[benchmark], benchmark, reasons)
    model["reasons"] = reasons
    model["settings"] = {
        key: {k: v for k, v in result.items() if k not in ("models", "machine", "versions")}
        for key, result in results.items()
        if result is not None
    }
    model["machines"] = {key: result.get("machine") for key, result in results.items() if result is not None}
    model["versions"] = {key: result.get("versions") for key, result in results.items() if result is not None}
    return model


def _has_results(folder: Path) -> bool:
    """Whether a folder is that of a measured model."""
    return any((folder / name).is_file() for name in _RESULTS)


def _label(name: str) -> str:
    """A model's name for the reader; a name that spells the label of another model stays recognisable."""
    return LABELS.get(name, f"{name} (folder)" if name in LABELS.values() else name)


def _find(result: Mapping[str, Any] | None, path: str, file: str) -> tuple[Any, str | None]:
    """A figure of a result, or why there is none."""
    if result is None:
        return None, f"not measured: there is no {file} for this model"
    value: Any = result
    for key in path.split("."):
        value = mapping(value).get(key)
    if isinstance(value, dict):  # a timing with its spread
        value = value.get("median")
    if value is None:
        return None, mapping(result.get("reasons")).get(path) or f"{file} has no {path}"
    if number(value) is None:
        return None, f"{path} of {file} is no number"
    return value, None


def _benchmark(file: Path, name: str, files: Files) -> dict[str, Any] | None:
    """A benchmark's result with the outcome of each problem, where verdicts lie beside it."""
    result = files.read(file)
    if result is None:
        return None
    command = sources.benchmark_command(result)
    files.say(file, name, command)
    outcomes = read_outcomes(file, result)
    if outcomes is None:
        return result
    verdicts = file.with_name("verdicts.jsonl")
    files.remember(verdicts)
    files.say(verdicts, f"{name}, problem by problem", command)
    return result | {"outcomes": outcomes}


def _score(result: Mapping[str, Any] | None, benchmark: str, reasons: dict[str, str]) -> dict[str, Any]:
    """A benchmark's figures; each that is missing is None, with a reason."""
    file = f"{benchmark}/result.json"
    score: dict[str, Any] = {}
    for key in ("pass_at_1", "num_problems", *SHARES):
        score[key], reason = _find(result, key, file)
        if reason:
            reasons[f"{benchmark}.{key}"] = reason
    result = result or {}
    score["ci95"] = bounds(result.get("ci95"))
    score["pass_at_k"] = {
        k: v for k, v in mapping(result.get("pass_at_k")).items() if k.isdecimal() and number(v) is not None
    }
    score["pass_at_k_ci95"] = {k: bounds(v) for k, v in mapping(result.get("pass_at_k_ci95")).items()}
    score["sampled"] = mapping(result.get("settings")).get("decoding", "greedy") != "greedy"
    return score


def _fill_teacher(models: Mapping[str, dict[str, Any]]) -> None:
    """Where the teacher itself was not scored, take its NLL as a student's score recorded it from the cache."""
    teacher = models["teacher"]
    if teacher["heldout_nll_nats"] is None:
        for model in models.values():
            value = number(model["settings"].get("fidelity", {}).get("teacher_nll_nats"))
            if value is not None:
                teacher["heldout_nll_nats"] = value
                teacher["reasons"].pop("heldout_nll_nats")
                return


def _ratios(model: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, float | None]:
    """Each figure over the teacher's; None where one is missing, or times come from different machines."""
    ratios: dict[str, float | None] = {}
    for key in RATIOS:
        comparable = key not in TIMES or model["machines"].get("latency") == teacher["machines"].get("latency")
        ratios[key] = model[key] / teacher[key] if comparable and model[key] and teacher[key] else None
    return ratios


def _differences(models: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every student against the twin: the rows of `compare`, or why there are none."""
    _, twin = roles(models)
    differences = []
    for name in [n for n in models if twin and n not in ("teacher", twin)]:
        entry: dict[str, Any] = {"student": name, "twin": twin, "rows": [], "reasons": []}
        for key, judge in (("fidelity", fidelity_rows), *((benchmark, benchmark_rows) for benchmark in BENCHMARKS)):
            sides = [models[side or ""]["settings"].get(key) for side in (twin, name)]
            if sides[0] is None or sides[1] is None:
                continue
            if key == "fidelity" and any(side.get("seen_in_training") for side in sides):
                continue
            try:
                title = "" if key == "fidelity" else f"{BENCHMARKS[key]}: "
                entry["rows"] += [row | {"figure": title + row["figure"]} for row in judge(*sides)
                                  if row["verdict"] != "unknown"]  # fmt: skip
            except ConfigError as error:
                entry["reasons"].append(f"{key}: {error}")
        if entry["rows"] or entry["reasons"]:
            differences.append(entry)
    return differences


def _cache(path: Path, files: Files) -> dict[str, Any]:
    manifest = files.read(path / "manifest.json")
    name = files.name(path)
    if manifest is None:
        return {"name": name, "reasons": {"manifest": "the cache has no manifest.json: it is unfinished"}}
    files.say(path / "manifest.json", "captured mass, teacher, documents", sources.build_command(manifest))
    listed = manifest.get("files") or {}
    return {
        "name": name,
        "manifest_sha256": files.files[files.name(path / "manifest.json")]["sha256"],
        "shards": {file: entry.get("sha256") for file, entry in listed.items() if file.endswith(".h5")},
        **{key: value for key, value in manifest.items() if key not in ("files", "name", "shards")},
    }


def _log(run: Path, files: Files) -> list[dict[str, Any]]:
    file = run / "training_log.jsonl"
    records = files.read_lines(file)
    files.say(file, "training curves", "codedistill student train, as for run.json")
    return records


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
    masses = {
        c["name"]: c["statistics"]["captured_mass"] for c in caches if "captured_mass" in (c.get("statistics") or {})
    }
    fidelity = {
        label: [(m[key], m["ci95"].get(key)) for key in ("heldout_nll_nats", "kl_to_teacher_nats")]
        for label, m in measured.items()
    }
    bins = {
        label: m["settings"]["fidelity"]["ece_bins"]
        for label, m in measured.items()
        if m["ece"] is not None and m["settings"]["fidelity"].get("ece_bins")
    }
    plots = [
        fidelity_plot(fidelity),
        tradeoff_plot(tradeoff),
        training_plot(
            logs, "ce", "Training: cross-entropy to the text",
            "The twin is trained on this loss alone, the distilled student on a mix with the teacher's distribution.",
        ),
        training_plot(
            logs, "kd", "Training: divergence from the teacher",
            "The distance to the cached distribution; the twin is not trained on it.",
        ),
        calibration_plot(bins, list(measured)),
        mass_plot(masses),
    ]  # fmt: skip
    return [plot for plot in plots if plot is not None]


def _render(template: str, *, report: Mapping[str, Any], plots: Sequence[Plot]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("shared.eval.report"),
        autoescape=jinja2.select_autoescape(("html.j2",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "pretty": lambda value: to_json(value).rstrip(),
        "slim": _slim,
        "figure": lambda value, row: "–" if value is None else format(value, ".1%" if row["is_share"] else ".3f"),
        "signed": _signed,
        "cell": lambda text: " ".join(str(text).split()).replace("|", "\\|"),
    }
    environment.filters |= filters
    proof = report["proof"]
    return environment.get_template(template).render(
        report=report,
        rows=comparison(report["models"]),
        plots=plots,
        proof_rows=proof_rows(proof) if proof else [],
        proof_plot=proof_plot(arms(proof)) if proof else None,
    )


def _slim(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {key: {k: v for k, v in result.items() if k not in BULKY} for key, result in settings.items()}


def _signed(value: float | None, row: Mapping[str, Any]) -> str:
    """A difference between two figures; that of shares in percentage points."""
    if value is None:
        return "–"
    return f"{signed(100 * value, '+.1f')} pp" if row["is_share"] else signed(value)
