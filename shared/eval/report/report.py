"""The report: all results side by side, in JSON, Markdown and one self-contained HTML page."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.cache.format import FORMAT, MANIFEST, VERSION
from shared.cache.manifest import Manifest, read_manifest
from shared.checkpoints import WEIGHTS, model_digest
from shared.errors import ConfigError, DistillError, require
from shared.eval.report import tables
from shared.eval.report.compare import read_outcomes
from shared.eval.report.provenance import REPORT_FORMAT, Files
from shared.eval.report.summary import differences, facts, roles
from shared.eval.report.tables import FIGURES, LABELS, SHARES, Model
from shared.eval.results import BENCHMARKS, BenchmarkResult, Draft, Fidelity, Latency, Proof
from shared.eval.templates import environment
from shared.files import read_json, replace_files, sha256_file, to_json
from shared.machine import machine, versions
from shared.process import log
from shared.records import to_dict

PACKAGES = ("codedistill", "torch", "transformers", "numpy", "h5py", "matplotlib", "jinja2")
RESULT_FILES = ("fidelity.json", "latency.json", "draft.json", *(f"{key}/result.json" for key in BENCHMARKS))
BULKY = ("per_document", "per_prompt", "ece_bins", "outcomes", "definitions")  # in report.json, not on the page
PAGES = ("report.md", "report.html")
DOCUMENTS_PAGE = "documents.html"
NUM_DOCUMENTS = 3
UNSHOWN = ("files", "build", "documents_per_shard")  # of a manifest
NUM_PROMPTS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """All that a report is made from."""

    models: Sequence[Model]  # teacher first
    caches: Mapping[str, Manifest | None]  # by name; None for an unfinished one
    shown_cache: tuple[Path, str] | None  # folder and name of the last finished one, whose documents are shown
    proof: Proof | None
    prompts: Sequence[dict[str, Any]]  # the first ones, and what the models write after them
    files: Mapping[str, dict[str, Any]]  # see `Files`

    @property
    def inputs(self) -> dict[str, Any]:
        """What a report follows from."""
        return {
            "codedistill": versions("codedistill")["codedistill"],
            "models": [model.name for model in self.models],
            "runs": {model.name: model.run_digest for model in self.models if model.run_digest},
            "files": {name: file["sha256"] for name, file in self.files.items()},
        }

    def is_up_to_date(self, out: Path) -> bool:
        """Whether a whole report of the same inputs is there; says so where it is."""
        try:
            report = read_json(out / "report.json")
            pages = {name: sha256_file(out / name) for name in report["pages"]}
            same = (report["inputs"], report["pages"]) == (self.inputs, pages)
        except (ConfigError, OSError, KeyError, TypeError):
            return False
        if same:
            log(f"{out / 'report.html'} is up to date")
        return bool(same)


# --- reading ---------------------------------------------------------------------------------------------------------


def collect(
    eval_dir: Path, runs: Mapping[str, Path], caches: Sequence[Path], proof_file: Path | None, out_dir: Path
) -> Collected:
    """Read everything that a report shows; files are named relative to the parent of `out_dir`.

    Args:
        eval_dir: holds `<name>/{fidelity,latency,draft}.json` and `<name>/{humaneval,mbpp}/result.json` per model, and
            a `latency.json` of several models, which wins: times of one run can be compared.
        runs: run folders by student, in the table's order.
        caches: where `eval_dir` has no teacher, `teacher_eval/` of the first that has one is read.

    Raises:
        ConfigError: there are no results; a file cannot be read as what it should be; or a student's name is not its
            results'.
        CacheFormatError, CacheCorruptError: a manifest is of another version, or damaged.
    """
    files = Files(out_dir.parent)
    manifests = {files.name(path): _manifest(path, files) for path in caches}
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
    return Collected(
        models=models,
        caches=manifests,
        shown_cache=next(((path, files.name(path)) for path in reversed(caches) if manifests[files.name(path)]), None),
        proof=files.result(proof_file, Proof, "variants over several seeds") if proof_file else None,
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
    return any((folder / name).is_file() for name in RESULT_FILES)


def _model(name: str, folder: Path, run_dir: Path | None, together: Latency | None, files: Files) -> Model:
    """One model's results."""
    own = files.result(folder / "latency.json", Latency, "size, speed, memory")
    results, outcomes = {}, {}
    for key in BENCHMARKS:
        file = folder / key / "result.json"
        if not file.is_file():
            continue
        result = results[key] = BenchmarkResult.read(file)
        files.remember(file, result.benchmark, result.command)
        if found := read_outcomes(file, result):
            outcomes[key] = found
            files.remember(file.with_name("verdicts.jsonl"), f"{result.benchmark}, problem by problem", result.command)
    run, log = {}, []
    if run_dir:
        run = files.record(run_dir / "run.json", "how the student was trained")
        log = files.lines(run_dir / "training_log.jsonl", "training curves", run.get("command", ""))
    return Model(
        name=name,
        label=LABELS.get(name, f"{name} (folder)" if name in LABELS.values() else name),
        fidelity=files.result(folder / "fidelity.json", Fidelity, "NLL, KL, agreement, calibration"),
        latency=together if together and name in together.models else own,
        draft=files.result(folder / "draft.json", Draft, "speculative decoding"),
        benchmarks=results,
        outcomes=outcomes,
        run=run,
        log=log,
        run_digest=model_digest(run_dir) if run_dir and (run_dir / WEIGHTS).is_file() else None,
    )


def _prompts(models: Sequence[Model], folders: Mapping[str, Path], files: Files) -> list[dict[str, Any]]:
    """The first prompts of the first benchmark, and the first sample of teacher, student and baseline after each."""
    key, shown = "humaneval", [model for model in (models[0], *roles(models)) if model]
    written: dict[str, dict[str, dict[str, Any]]] = {}  # by label and problem
    for model in shown:
        if result := model.benchmarks.get(key):
            file = folders[model.name] / key / "completions.jsonl"
            lines = files.lines(file, f"{result.benchmark}, what the models write", result.command)
            written[model.label] = {line["task_id"]: line for line in lines if line["sample"] == 0}
    first: dict[str, Any] = next(iter(written.values()), {})
    return [
        {
            "benchmark": next(model.benchmarks[key].benchmark for model in shown if key in model.benchmarks),
            "task_id": task,
            "prompt": first[task]["prompt"],
            "answers": [
                {
                    "label": model.label,
                    "text": written[model.label][task]["completion"],
                    "passed": model.outcomes.get(key, {}).get(task, {}).get("passed"),
                }
                for model in shown if model.label in written
            ],
        }
        for task in [task for task in first if all(task in tasks for tasks in written.values())][:NUM_PROMPTS]
    ]  # fmt: skip


def _manifest(path: Path, files: Files) -> Manifest | None:
    if not (path / MANIFEST).is_file():
        return None
    manifest = read_manifest(path)
    made = [each for each in (manifest.derived_from, manifest.build) if each and "command" in each]
    command = made[0]["command"] if made else "teacher build"
    files.remember(path / MANIFEST, "captured mass, teacher, documents", f"codedistill {command}")
    return manifest


# --- writing ---------------------------------------------------------------------------------------------------------


def write_report(collected: Collected, out_dir: Path) -> dict[str, Any]:
    """Write `report.md`, `report.html`, a page of documents and, last, `report.json`, and return the last as data."""
    from shared.eval.report.plots import report_plots

    documents, documents_page = _documents(collected.shown_cache)
    models, proof, pairs = collected.models, collected.proof, differences(collected.models)
    render, given = _renderer(), facts(models, pairs, collected.caches.values(), proof)

    def sentences(name: str) -> list[str]:
        """A template's paragraphs, each on one line."""
        return [" ".join(text.split()) for text in render(f"{name}.j2", **given).split("\n\n") if text.strip()]

    report = {
        "format": REPORT_FORMAT,
        "version": 1,
        "headline": sentences("headline") or ["Nothing has been measured yet."],
        "background": sentences("background"),
        "models": {model.name: _model_json(model, models[0]) for model in models},
        "differences": pairs,
        "proof": proof and proof.to_dict(),
        "prompts": collected.prompts,
        "documents": documents,
        "caveats": sentences("caveats"),
        "caches": [_cache_json(*cache) for cache in collected.caches.items()],
        "files": collected.files,
        "inputs": collected.inputs,
        "machine": machine(),
        "versions": versions(*PACKAGES),
    }
    shown = {"report": report, "rows": tables.comparison(models), "benchmark": next(iter(tables.benchmarks(models))),
             "speed_key": given["speed_key"], "proof": proof,
             "plots": report_plots(models, collected.caches, proof)}  # fmt: skip
    pages = {name: render(f"{name}.j2", **shown).encode(errors="backslashreplace") for name in PAGES}
    pages |= {DOCUMENTS_PAGE: documents_page} if documents_page else {}
    report["pages"] = {name: hashlib.sha256(page).hexdigest() for name, page in pages.items()}
    out_dir.mkdir(parents=True, exist_ok=True)
    replace_files(out_dir, {DOCUMENTS_PAGE: None} | pages | {"report.json": to_json(report).encode()})
    return report


def _documents(cache: tuple[Path, str] | None) -> tuple[dict[str, Any] | None, bytes | None]:
    """The page of a cache's first documents, and what the report says of it; only a reason where there is none."""
    from shared.eval.show.page import look_into, render_page

    if cache is None:
        return None, None
    path, name = cache
    try:
        look = look_into(path, limit=NUM_DOCUMENTS)
    except DistillError as error:
        return {"cache": name, "reasons": {"documents": str(error)}}, None
    return {"cache": name, "ids": [look.name(document) for document in look.documents]}, render_page(look)


def _model_json(model: Model, teacher: Model) -> dict[str, Any]:
    """A model's figures, each None with a reason where it is missing, and the results that they come from."""
    cells = {key: model.cell(figure) for key, figure in FIGURES.items()}
    reasons = {key: cell.reason for key, cell in cells.items()}
    for key in BENCHMARKS:
        reasons[key] = f"not measured: there is no {key}/result.json for this model"
        if result := model.benchmarks.get(key):
            reasons[key] = None if result.solved else result.reasons.get("pass_at_1", "unknown")
    return {
        "label": model.label,
        "digests": model.digests,
        **{key: cell.value for key, cell in cells.items()},
        "ci95": {key: cell.ci95 for key, cell in cells.items() if cell.ci95},
        **{key: _score_json(model.benchmarks[key]) if key in model.benchmarks else {} for key in BENCHMARKS},
        "reasons": {key: reason for key, reason in reasons.items() if reason},
        "ratios_to_teacher": {key: tables.ratio_to_teacher(figure, model, teacher)
                              for key, figure in FIGURES.items() if figure.less},
        "results": {kind: result.to_dict() for kind, result in model.results.items()} | {"run": dict(model.run)},
        "outcomes": model.outcomes,
    }  # fmt: skip


def _cache_json(name: str, manifest: Manifest | None) -> dict[str, Any]:
    """What a manifest says but for its files; only a reason where there is none."""
    if manifest is None:
        return {"name": name, "reasons": {"manifest": "the cache has no manifest.json: it is unfinished"}}
    fields = to_dict(dataclasses.replace(manifest, files={})).items()
    shown = {key: value for key, value in fields if key not in UNSHOWN and value is not None}
    return {"name": name, "format": FORMAT, "version": VERSION, **shown}


def _score_json(result: BenchmarkResult) -> dict[str, Any]:
    keys = ("benchmark", "pass_at_1", "ci95", "num_problems", "pass_at_k", "pass_at_k_ci95", *SHARES)
    return {key: getattr(result, key) for key in keys} | {"sampled": result.is_sampled}


def _renderer() -> Callable[..., str]:
    templates = environment("shared.eval.report")
    texts = (tables.count, tables.signed, tables.ratio_words, tables.difference_cells, tables.variant_cells)
    templates.globals |= {"zip": zip} | {text.__name__: text for text in texts}
    templates.filters |= {
        "pretty": lambda value: to_json(value).rstrip(),
        "slim": lambda results: {kind: {key: value for key, value in result.items() if key not in BULKY}
                                 for kind, result in results.items()},
        "cell": lambda text: " ".join(str(text).split()).replace("|", "\\|"),
    }  # fmt: skip
    return lambda name, **given: templates.get_template(name).render(**given)
