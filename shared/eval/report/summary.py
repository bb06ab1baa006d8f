"""The report's sentences: the facts that `templates/{headline,background,caveats}.j2` put into words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import ConfigError
from shared.eval.report.compare import FIDELITY, Row, benchmark_rows, fidelity_rows
from shared.eval.report.tables import (
    BASELINE,
    BENCHMARKS,
    FIGURES,
    Model,
    count,
    is_sampled,
    ratio_text,
    ratio_to_teacher,
    signed,
    solved,
)
from shared.eval.results import Proof, Variant

FULL_SIZES = {"humaneval": 164, "mbpp": 500}
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
        label = FIDELITY[FIGURES[key].path][0]
        return next((row for row in self.rows if row.figure == label), None)


def differences(models: Sequence[Model]) -> list[Differences]:
    """Every student against the baseline, on the same documents and problems."""
    _, baseline = roles(models)
    found = []
    for model in [m for m in models if baseline and m is not baseline and m.name != "teacher"]:
        assert baseline is not None
        rows: list[Row] = []
        reasons = []
        ours, theirs = model.fidelity, baseline.fidelity
        try:
            if ours and theirs and not (ours.seen_in_training or theirs.seen_in_training):
                rows += fidelity_rows(theirs, ours)
        except ConfigError as error:
            reasons.append(f"fidelity: {error}")
        for key in [key for key in BENCHMARKS if key in model.benchmarks and key in baseline.benchmarks]:
            sides = [(m.benchmarks[key], m.outcomes.get(key, {})) for m in (baseline, model)]
            try:
                judged = benchmark_rows(sides[0][0], sides[1][0], sides[0][1], sides[1][1])
            except ConfigError as error:
                reasons.append(f"{key}: {error}")
                continue
            for row in judged:
                row.figure = f"{BENCHMARKS[key]}: {row.figure}"
            rows += judged
        rows = [row for row in rows if row.verdict != "unknown"]
        if rows or reasons:
            found.append(Differences(student=model, baseline=baseline, rows=rows, reasons=reasons))
    return found


def facts(
    models: Sequence[Model], found: Sequence[Differences], caches: Sequence[Mapping[str, Any]], proof: Proof | None
) -> dict[str, Any]:
    """What the templates of the sentences are given."""
    student, baseline = roles(models)
    teacher = next(model for model in models if model.name == "teacher")
    return {
        "models": models,
        "teacher": teacher,
        "student": student,
        "baseline": baseline,
        "paired": next((each for each in found if each.student is student), None),
        "manifest": next((cache for cache in caches if "sources" in cache), None),
        "proof": proof,
        "best": _best(proof) if proof else None,
        "benchmarks": BENCHMARKS,
        "full_sizes": FULL_SIZES,
        "too_few_prompts": TOO_FEW_PROMPTS,
        "other_settings": _other_settings(student, baseline) if student and baseline else [],
        "machines": list(dict.fromkeys(_machine(m.latency.machine) for m in models if m.latency)),
        "count": count,
        "signed": signed,
        "solved": solved,
        "is_sampled": is_sampled,
        "ratio": lambda key: _ratio(key, student, teacher) if student else None,
    }


def _best(proof: Proof) -> Variant | None:
    """The proof's variant of most entries with the `ghost` loss."""
    ghosts = [variant for variant in proof.variants if variant.loss == "ghost" and variant.versus_ce]
    return max(ghosts, key=lambda variant: variant.k or 0, default=None)


def _ratio(key: str, student: Model, teacher: Model) -> str | None:
    ratio = ratio_to_teacher(key, student, teacher)
    return None if ratio is None else ratio_text(ratio, FIGURES[key].less, FIGURES[key].more)


def _other_settings(student: Model, baseline: Model) -> list[str]:
    """What else than the teacher's labels differs between two runs."""
    ours, theirs = student.config, baseline.config
    keys = [key for key in ours if theirs and key not in MAY_DIFFER and ours[key] != theirs.get(key)]
    return [f"{key} ({ours[key]}, the baseline's {theirs.get(key)})" for key in keys]


def _machine(machine: Mapping[str, Any]) -> str:
    accelerators = machine.get("accelerators") or ["no accelerator"]
    return ", ".join([str(machine.get("processor")), f"{machine.get('cores')} cores", *accelerators])
