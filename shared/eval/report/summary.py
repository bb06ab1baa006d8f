"""The report's sentences: the facts that `templates/{headline,background,caveats}.j2` put into words."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import ConfigError
from shared.eval.report.compare import FIDELITY, Row, result_rows
from shared.eval.report.tables import (
    BASELINE,
    BENCHMARKS,
    FIGURES,
    NOT_HELD_OUT,
    Model,
    benchmarks_of,
    count,
    is_sampled,
    ratio_text,
    ratio_to_teacher,
    signed,
    solved,
)
from shared.eval.results import Proof

FULL_SIZES = {"HumanEval": 164, "MBPP": 500}
TOO_FEW_PROMPTS = 10
MAY_DIFFER = {"alpha"}  # between a student and its baseline


def roles(models: Sequence[Model]) -> tuple[Model | None, Model | None]:
    """The student that the report is about, and its baseline, trained without soft labels; None where missing."""
    students = {model.name: model for model in models if model.name != "teacher"}
    no_labels = [model for model in students.values() if model.config.get("alpha") == 0]
    baseline = students.get(BASELINE) or next(iter(no_labels), None)
    others = [model for model in students.values() if model is not baseline]
    student = students.get("student_kd") or next(iter(others), baseline)
    return student, None if baseline is student else baseline


@dataclass(frozen=True, kw_only=True, slots=True)
class Differences:
    """A student against its baseline: the judged rows, and why a result has none."""

    student: Model
    baseline: Model
    rows: Sequence[Row]
    reasons: Sequence[str]

    def of(self, key: str) -> Row | None:
        """The row of a fidelity figure, by its name in `FIGURES`."""
        label = FIDELITY[FIGURES[key].name][0]
        return next((row for row in self.rows if row.figure == label), None)


def differences(models: Sequence[Model]) -> list[Differences]:
    """Every student against the baseline, on the same documents and problems."""
    _, baseline = roles(models)
    found = []
    for model in [m for m in models if baseline and m is not baseline and m.name != "teacher"]:
        assert baseline is not None
        rows: list[Row] = []
        reasons = []
        for kind in ("fidelity", *BENCHMARKS):
            try:
                rows += _judged(baseline, model, kind)
            except ConfigError as error:
                reasons.append(f"{kind}: {error}")
        if rows or reasons:
            found.append(Differences(student=model, baseline=baseline, rows=rows, reasons=reasons))
    return found


def _judged(baseline: Model, model: Model, kind: str) -> list[Row]:
    """The judged rows of one kind of result that both have."""
    sides = (baseline, model)
    results = [side.results[kind] for side in sides if kind in side.results]
    not_held_out = kind == "fidelity" and NOT_HELD_OUT in [side.measured("heldout_nll_nats").reason for side in sides]
    if len(results) < 2 or not_held_out:
        return []
    rows = result_rows(results, [side.outcomes.get(kind, {}) for side in sides])
    title = f"{model.benchmarks[kind].benchmark}: " if kind in BENCHMARKS else ""
    return [dataclasses.replace(row, figure=title + row.figure) for row in rows if row.verdict != "unknown"]


def facts(
    models: Sequence[Model], found: Sequence[Differences], caches: Sequence[Mapping[str, Any]], proof: Proof | None
) -> dict[str, Any]:
    """What the templates of the sentences are given."""
    student, baseline = roles(models)
    teacher = next(model for model in models if model.name == "teacher")
    best = [variant for variant in proof.variants if variant.loss == "ghost" and variant.versus_ce] if proof else []

    def ratio(key: str) -> str | None:
        value = ratio_to_teacher(key, student, teacher) if student else None
        return None if value is None else ratio_text(value, FIGURES[key].less, FIGURES[key].more)

    return {
        "models": models,
        "teacher": teacher,
        "student": student,
        "baseline": baseline,
        "paired": next((each for each in found if each.student is student), None),
        "manifest": next((cache for cache in caches if "sources" in cache), None),
        "proof": proof,
        "best": max(best, key=lambda variant: variant.k or 0, default=None),
        "benchmarks": benchmarks_of(models),
        "full_sizes": FULL_SIZES,
        "too_few_prompts": TOO_FEW_PROMPTS,
        "other_settings": _other_settings(student, baseline) if student and baseline else [],
        "machines": list(dict.fromkeys(_machine(m.latency.machine) for m in models if m.latency)),
        "ratio": ratio,
        "results_of": lambda benchmark: [result for model in models if (result := model.result_of(benchmark))],
        "count": count,
        "signed": signed,
        "solved": solved,
        "is_sampled": is_sampled,
    }


def _other_settings(student: Model, baseline: Model) -> list[str]:
    """What else than the teacher's labels differs between two runs."""
    ours, theirs = student.config, baseline.config
    keys = [key for key in ours if theirs and key not in MAY_DIFFER and ours[key] != theirs.get(key)]
    return [f"{key} ({ours[key]}, the baseline's {theirs.get(key)})" for key in keys]


def _machine(machine: Mapping[str, Any]) -> str:
    accelerators = machine.get("accelerators") or ["no accelerator"]
    return ", ".join([str(machine.get("processor")), f"{machine.get('cores')} cores", *accelerators])
