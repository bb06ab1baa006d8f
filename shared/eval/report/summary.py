"""The report's sentences: the facts that `templates/{headline,background,caveats}.j2` put into words."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shared.cache.manifest import Manifest, written_text
from shared.errors import ConfigError
from shared.eval.report.compare import Row, result_rows
from shared.eval.report.tables import BASELINE, FIGURES, NOT_HELD_OUT, Model, benchmarks, speed_key
from shared.eval.results import BENCHMARKS, Proof

MAY_DIFFER = {"alpha"}  # between a student and its baseline


def roles(models: Sequence[Model]) -> tuple[Model | None, Model | None]:
    """The student that the report is about, and its baseline, trained without soft labels; None where missing."""
    students = {model.name: model for model in models if model.name != "teacher"}
    no_labels = [model for model in students.values() if model.config.get("alpha") == 0]
    baseline = students.get(BASELINE) or next(iter(no_labels), None)
    others = [model for model in students.values() if model is not baseline]
    student = students.get("student_kd") or next(iter(others), baseline)
    return student, None if baseline is student else baseline


def differences(models: Sequence[Model]) -> list[dict[str, Any]]:
    """Every student against the baseline, on the same documents and problems.

    Returns:
        Of each pair the names `student` and `baseline`, the judged `rows`, and the `reasons` why a result has none.
    """
    _, baseline = roles(models)
    found = []
    for model in models if baseline else []:
        if baseline is None or model is baseline or model.name == "teacher":
            continue
        rows: list[Row] = []
        reasons = []
        for kind in ("fidelity", *BENCHMARKS):
            try:
                rows += _judged(baseline, model, kind)
            except ConfigError as error:
                reasons.append(f"{kind}: {error}")
        if rows or reasons:
            as_data = [dataclasses.asdict(row) for row in rows]
            found.append({"student": model.name, "baseline": baseline.name, "rows": as_data, "reasons": reasons})
    return found


def _judged(baseline: Model, model: Model, kind: str) -> list[Row]:
    """The judged rows of one kind of result that both have."""
    sides = (baseline, model)
    results = [side.results[kind] for side in sides if kind in side.results]
    nlls = [side.cell(FIGURES["heldout_nll_nats"]) for side in sides]
    not_held_out = kind == "fidelity" and NOT_HELD_OUT in [nll.reason for nll in nlls]
    if len(results) < 2 or not_held_out:
        return []
    rows = result_rows(results, [side.outcomes.get(kind, {}) for side in sides])
    title = f"{model.benchmarks[kind].benchmark}: " if kind in BENCHMARKS else ""
    return [dataclasses.replace(row, figure=title + row.figure) for row in rows if row.verdict != "unknown"]


def facts(
    models: Sequence[Model],
    pairs: Sequence[Mapping[str, Any]],
    manifests: Iterable[Manifest | None],
    proof: Proof | None,
) -> dict[str, Any]:
    """What the templates of the sentences are given."""
    student, baseline = roles(models)
    whole = [manifest for manifest in manifests if manifest]
    ghosts = [variant for variant in proof.variants if variant.loss == "ghost" and variant.versus_ce] if proof else []
    paired = [row for pair in pairs if student and pair["student"] == student.name for row in pair["rows"]]
    return {
        "models": models,
        "teacher": models[0],
        "student": student,
        "baseline": baseline,
        "speed_key": speed_key(models),
        "paired": {row["figure"]: row for row in paired},
        "manifest": next(iter(whole), None),
        "written": written_text([source for manifest in whole for source in manifest.sources]),
        "proof": proof,
        "best": max(ghosts, key=lambda variant: variant.k or 0, default=None),
        "benchmarks": benchmarks(models),
        "other_settings": _other_settings(student, baseline) if student and baseline else [],
        "machines": list(dict.fromkeys(_machine(m.latency.machine) for m in models if m.latency)),
    }


def _other_settings(student: Model, baseline: Model) -> list[str]:
    """What else than the teacher's labels differs between two runs."""
    ours, theirs = student.config, baseline.config
    keys = [key for key in ours if theirs and key not in MAY_DIFFER and ours[key] != theirs.get(key)]
    return [f"{key} ({ours[key]}, the baseline's {theirs.get(key)})" for key in keys]


def _machine(machine: Mapping[str, Any]) -> str:
    accelerators = machine.get("accelerators") or ["no accelerator"]
    return ", ".join([str(machine.get("processor")), f"{machine.get('cores')} cores", *accelerators])
