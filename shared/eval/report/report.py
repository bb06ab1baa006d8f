"""The report: all results side by side, in JSON, Markdown and one self-contained HTML page."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import ConfigError, require
from shared.eval.report.compare import read_outcomes
from shared.eval.report.provenance import REPORT_FORMAT, Files
from shared.eval.report.summary import Differences, differences, facts, roles
from shared.eval.report.tables import (
    BENCHMARKS,
    FIGURES,
    LABELS,
    SHARES,
    Model,
    cards,
    comparison_rows,
    is_sampled,
    proof_rows,
    ratio_to_teacher,
    score_reason,
    signed,
)
from shared.eval.results import BenchmarkResult, Draft, Fidelity, Latency, Proof
from shared.files import read_json, replace_files, sha256_file, to_json
from shared.machine import machine, versions
from shared.process import log
from shared.records import from_dict

PACKAGES = ("codedistill", "torch", "transformers", "numpy", "h5py", "matplotlib", "jinja2")
RESULT_FILES = ("fidelity.json", "latency.json", "draft.json", *(f"{key}/result.json" for key in BENCHMARKS))
BULKY = ("per_document", "per_prompt", "ece_bins", "outcomes", "definitions")  # in report.json, not on the page
NUM_PROMPTS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """All that a report is made from.

    Args:
        models: teacher first.
        logs: training logs by label.
        caches: what their manifests say.
        proof: as typed and as recorded; None without one.
        prompts: the first prompts, and what the models write after them.
        files: see `Files`.
    """

    models: Sequence[Model]
    logs: Mapping[str, list[dict[str, Any]]]
    caches: Sequence[dict[str, Any]]
    proof: tuple[Proof, dict[str, Any]] | None
    prompts: Sequence[dict[str, Any]]
    files: Mapping[str, dict[str, Any]]

    @property
    def inputs(self) -> dict[str, Any]:
        """What a report follows from."""
        return {
            "codedistill": versions("codedistill")["codedistill"],
            "models": [model.name for model in self.models],
            "files": {name: file["sha256"] for name, file in self.files.items()},
        }

    def is_up_to_date(self, out: Path) -> bool:
        """Whether a whole report of the same inputs is there; says so where it is."""
        try:
            report = read_json(out / "report.json")
            pages = {name: sha256_file(out / name) for name in ("report.md", "report.html")}
            same = (report["inputs"], report["pages"]) == (self.inputs, pages)
        except (ConfigError, OSError, KeyError, TypeError):
            return False
        if same:
            log(f"{out / 'report.html'} is up to date")
        return bool(same)


def build_report(
    eval_dir: Path, runs: Mapping[str, Path], caches: Sequence[Path], out_dir: Path, proof_file: Path | None = None
) -> dict[str, Any]:
    """Write `report.json`, `report.md` and `report.html`, and return the first as data; see `collect`."""
    return write_report(collect(eval_dir, runs, caches, proof_file, out_dir), out_dir)


# --- reading ---------------------------------------------------------------------------------------------------------


def collect(
    eval_dir: Path, runs: Mapping[str, Path], caches: Sequence[Path], proof_file: Path | None, out_dir: Path
) -> Collected:
    """Read everything that a report shows.

    Args:
        eval_dir: holds `<name>/{fidelity,latency,draft}.json` and `<name>/{humaneval,mbpp}/result.json` per model, and
            a `latency.json` of several models, which wins: times of one run can be compared.
        runs: run folders by student, in the table's order; `run.json` and `training_log.jsonl` are read.
        caches: cache folders; `manifest.json` is read, and `teacher_eval/` where `eval_dir` has no teacher.
        proof_file: what `student proof` wrote.
        out_dir: where the report goes; files are named relative to its parent.

    Raises:
        ConfigError: there are no results; a file cannot be read as what it should be; or a student's name is not its
            results'.
    """
    files = Files(out_dir.parent)
    cache_entries = [_cache(path, files) for path in caches]
    together = files.result(eval_dir / "latency.json", Latency, "size, speed, memory")
    timed = list(together.models) if together else []
    folders = _model_folders(eval_dir, runs, caches, timed)
    require(
        timed or runs or caches or proof_file or any(map(_holds_results, folders.values())),
        "no results to report",
        where=eval_dir,
        expected=f"latency.json, or folders named for models with {' or '.join(RESULT_FILES)}",
        fix="measure a model with `codedistill eval`, its --out in a folder named for the model",
    )
    models = [_model(name, folder, runs.get(name), together, files) for name, folder in folders.items()]
    if models[0].fidelity is None:  # the teacher's NLL as a student's score recorded it from the cache
        recorded = (m.fidelity.teacher_nll_nats for m in models if m.fidelity)
        nll = next((nll for nll in recorded if nll is not None), None)
        models[0] = dataclasses.replace(models[0], cached_nll=nll)
    logs = {
        model.label: files.lines(runs[model.name] / "training_log.jsonl", "training curves",
                                 "codedistill student train, as for run.json")
        for model in models if model.name in runs
    }  # fmt: skip
    raw = files.record(proof_file, "variants over several seeds", "codedistill student proof") if proof_file else None
    return Collected(
        models=models,
        logs=logs,
        caches=cache_entries,
        proof=(from_dict(Proof, raw, where=str(proof_file), strict=False), raw) if raw else None,
        prompts=_prompts(models, folders, files),
        files=files.files,
    )


def _model_folders(
    eval_dir: Path, runs: Mapping[str, Path], caches: Sequence[Path], timed: Sequence[str]
) -> dict[str, Path]:
    """The folder of each model's results: the teacher, the named students, then others that are found."""
    found = sorted(p.name for p in eval_dir.iterdir() if _holds_results(p)) if eval_dir.is_dir() else []
    names = list(dict.fromkeys(["teacher", *runs, *timed, *found]))
    unnamed = [name for name in names if name not in runs and name != "teacher"]
    for name in runs:
        require(
            not unnamed or name in found or name in timed,
            "a student has no results, and there are results that no student is named for",
            where=eval_dir,
            expected=" or ".join(unnamed),
            got=name,
            fix="name the student as its results are, or measure it with `codedistill eval`",
        )
    folders = {name: eval_dir / name for name in names}
    if "teacher" not in found:  # measured where the cache was made
        attached = (cache / "teacher_eval" for cache in caches if (cache / "teacher_eval").is_dir())
        folders["teacher"] = next(attached, folders["teacher"])
    return folders


def _holds_results(folder: Path) -> bool:
    """Whether a folder holds a model's results."""
    return any((folder / name).is_file() for name in RESULT_FILES)


def _model(name: str, folder: Path, run_dir: Path | None, together: Latency | None, files: Files) -> Model:
    """One model's results."""
    own = files.result(folder / "latency.json", Latency, "size, speed, memory")
    results, outcomes = {}, {}
    for key, title in BENCHMARKS.items():
        file = folder / key / "result.json"
        if (result := files.result(file, BenchmarkResult, title)) is None:
            continue
        results[key] = result
        if found := read_outcomes(file, result):
            outcomes[key] = found
            files.remember(file.with_name("verdicts.jsonl"), f"{title}, problem by problem", result.command)
    label = LABELS.get(name, f"{name} (folder)" if name in LABELS.values() else name)
    return Model(
        name=name,
        label=label,
        fidelity=files.result(folder / "fidelity.json", Fidelity, "NLL, KL, agreement, calibration"),
        latency=together if together and name in together.models else own,
        draft=files.result(folder / "draft.json", Draft, "speculative decoding"),
        benchmarks=results,
        outcomes=outcomes,
        run=(files.record(run_dir / "run.json", "how the student was trained") if run_dir else None) or {},
    )


def _prompts(models: Sequence[Model], folders: Mapping[str, Path], files: Files) -> list[dict[str, Any]]:
    """HumanEval's first prompts, and the first sample of teacher, student and baseline after each."""
    shown = [model for model in (models[0], *roles(models)) if model and "humaneval" in model.benchmarks]
    written: dict[str, dict[str, dict[str, Any]]] = {}
    for model in shown:
        file = folders[model.name] / "humaneval" / "completions.jsonl"
        command = model.benchmarks["humaneval"].command
        lines = files.lines(file, "HumanEval, what the models write", command)
        written[model.name] = {line["task_id"]: line for line in lines if line["sample"] == 0}
    common = (
        [task for task in written[shown[0].name] if all(task in found for found in written.values())] if shown else []
    )
    return [
        {
            "task_id": task,
            "prompt": written[shown[0].name][task]["prompt"],
            "answers": [
                {
                    "label": model.label,
                    "text": written[model.name][task]["completion"],
                    "passed": model.outcomes.get("humaneval", {}).get(task, {}).get("passed"),
                }
                for model in shown
            ],
        }
        for task in common[:NUM_PROMPTS]
    ]


def _cache(path: Path, files: Files) -> dict[str, Any]:
    """A cache's manifest without its list of files; only a reason where there is none."""
    name, file = files.name(path), path / "manifest.json"
    if not file.is_file():
        return {"name": name, "reasons": {"manifest": "the cache has no manifest.json: it is unfinished"}}
    manifest = read_json(file)
    require(isinstance(manifest, dict), "a manifest of another form", where=file, expected="a JSON object")
    command = (manifest.get("derived_from") or {}).get("command", "teacher build")
    files.remember(file, "captured mass, teacher, documents", f"codedistill {command}")
    return {"name": name} | {key: value for key, value in manifest.items() if key not in ("files", "name")}


# --- writing ---------------------------------------------------------------------------------------------------------


def write_report(collected: Collected, out_dir: Path) -> dict[str, Any]:
    """Write `report.md`, `report.html` and, last, `report.json`, and return the last as data.

    Args:
        collected: see `collect`.
        out_dir: made if absent.
    """
    models, found = collected.models, differences(collected.models)
    render = _renderer()
    typed_proof, raw_proof = collected.proof or (None, None)
    given = facts(models, found, collected.caches, typed_proof)

    def sentences(name: str) -> list[str]:
        """A template's paragraphs, each on one line."""
        return [" ".join(text.split()) for text in render(f"{name}.j2", **given).split("\n\n") if text.strip()]

    report = {
        "format": REPORT_FORMAT,
        "version": 1,
        "headline": sentences("headline") or ["Nothing has been measured yet."],
        "background": sentences("background"),
        "models": {model.name: _model_json(model, models[0]) for model in models},
        "differences": [_difference_json(each) for each in found],
        "proof": raw_proof,
        "prompts": collected.prompts,
        "caveats": sentences("caveats"),
        "caches": collected.caches,
        "files": collected.files,
        "inputs": collected.inputs,
        "machine": machine(),
        "versions": versions(*PACKAGES),
    }
    from shared.eval.report.plots import proof_plot

    pages = {
        f"report.{suffix}": render(
            f"report.{suffix}.j2",
            report=report,
            cards=cards(models, models[0]),
            rows=comparison_rows(models, models[0]),
            plots=_plots(collected) if suffix == "html" else [],
            proof_rows=proof_rows(typed_proof) if typed_proof else [],
            proof_plot=proof_plot(typed_proof) if typed_proof and suffix == "html" else None,
        ).encode(errors="backslashreplace")
        for suffix in ("md", "html")
    }
    report["pages"] = {name: hashlib.sha256(data).hexdigest() for name, data in pages.items()}
    out_dir.mkdir(parents=True, exist_ok=True)
    replace_files(out_dir, pages | {"report.json": to_json(report).encode()})
    return report


def _model_json(model: Model, teacher: Model) -> dict[str, Any]:
    """A model's figures, each None with a reason where it is missing, and the results that they come from."""
    reasons = {key: reason for key in FIGURES if (reason := model.reason(key))}
    for key in BENCHMARKS:
        result = model.benchmarks.get(key)
        if result is None or result.pass_at_1 is None:
            reasons[key] = score_reason(model, key, "pass_at_1")
    results = {"fidelity": model.fidelity, "latency": model.latency, "draft": model.draft, **model.benchmarks}
    return {
        "label": model.label,
        **{key: model.value(key) for key in FIGURES},
        "ci95": {key: interval for key in FIGURES if (interval := model.interval(key))},
        **{key: _score_json(model.benchmarks.get(key)) for key in BENCHMARKS},
        "reasons": reasons,
        "ratios_to_teacher": {key: ratio_to_teacher(key, model, teacher) for key, f in FIGURES.items() if f.less},
        "results": {key: result.to_dict() for key, result in results.items() if result} | {"run": dict(model.run)},
        "outcomes": model.outcomes,
    }


def _score_json(result: BenchmarkResult | None) -> dict[str, Any]:
    """A benchmark's figures; empty where it was not run."""
    if result is None:
        return {}
    keys = ("pass_at_1", "ci95", "num_problems", "pass_at_k", "pass_at_k_ci95", *SHARES)
    return {key: getattr(result, key) for key in keys} | {"sampled": is_sampled(result)}


def _difference_json(pair: Differences) -> dict[str, Any]:
    rows = [dataclasses.asdict(row) for row in pair.rows]
    return {"student": pair.student.name, "baseline": pair.baseline.name, "rows": rows, "reasons": list(pair.reasons)}


def _plots(collected: Collected) -> list[Any]:
    """The plots for which there is data."""
    from shared.eval.report.plots import calibration_plot, fidelity_plot, mass_plot, tradeoff_plot, training_plot

    masses = {
        cache["name"]: cache["statistics"]["captured_mass"]
        for cache in collected.caches
        if "captured_mass" in (cache.get("statistics") or {})
    }
    plots = [
        fidelity_plot(collected.models),
        tradeoff_plot(collected.models),
        training_plot(
            collected.logs, "ce", "Training: cross-entropy to the text",
            "The baseline is trained only on this loss, the distilled student also on the teacher's distribution.",
        ),
        training_plot(
            collected.logs, "kd", "Training: divergence from the teacher",
            "The distance to the cached distribution; the baseline is not trained on it.",
        ),
        calibration_plot(collected.models),
        mass_plot(masses),
    ]  # fmt: skip
    return [plot for plot in plots if plot is not None]


def _renderer() -> Callable[..., str]:
    """Renders a template by name."""
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
        "slim": lambda results: {key: {k: v for k, v in result.items() if k not in BULKY}
                                 for key, result in results.items()},
        "figure": lambda value, row: "–" if value is None else format(value, ".1%" if row["is_share"] else ".3f"),
        "signed": _signed,
        "judged": lambda row: "not told apart" if row["verdict"] == "noise" else row["verdict"],
        "cell": lambda text: " ".join(str(text).split()).replace("|", "\\|"),
    }  # fmt: skip
    environment.filters |= filters
    return lambda name, **given: environment.get_template(name).render(**given)


def _signed(value: float | None, row: Mapping[str, Any]) -> str:
    """A difference between two figures; that of shares in percentage points."""
    if value is None:
        return "–"
    return f"{signed(100 * value, '+.1f')} pp" if row["is_share"] else signed(value)
