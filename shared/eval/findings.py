"""What the report says: the headline, the comparison's rows and the caveats, from measured figures alone."""

from collections.abc import Mapping
from typing import Any

LABELS = {"teacher": "Teacher", "student_kd": "Distilled student", "student_ce": "Cross-entropy twin"}
HUMANEVAL_PROBLEMS = 164


def headline(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences made of measured figures alone; the first one is the title."""
    students = [name for name in models if name != "teacher"]
    if not students:
        return ["No student has been measured yet."]
    name = "student_kd" if "student_kd" in models else students[0]
    student, twin = models[name], models.get("student_ce")
    label = f"The {student['label'].lower()}" if name in LABELS else student["label"]
    ratios, sentences, clauses = student["ratios_to_teacher"], [], []
    if ratios["parameters"]:
        clauses.append(f"is {compare(ratios['parameters'], 'smaller', 'larger')} than its teacher")
    if ratios["decode_tokens_per_second"]:
        clauses.append(f"decodes {compare(ratios['decode_tokens_per_second'], 'slower', 'faster')}")
    if clauses:
        sentences.append(f"{label} {' and '.join(clauses)}.")
    for key, name in (("kl_to_teacher_nats", "KL to the teacher"), ("heldout_nll_nats", "held-out NLL")):
        if student[key] is None:
            continue
        owner = "Its" if sentences else f"{label}'s"
        sentence = f"{owner} {name} is {student[key]:.3f} nats per token"
        if key == "heldout_nll_nats" and models["teacher"][key] is not None:
            sentence += f", its teacher's {models['teacher'][key]:.3f}"
        if twin is not None and twin is not student and twin[key] is not None:
            sentence += f", its cross-entropy twin's {twin[key]:.3f}"
        sentences.append(f"{sentence}.")
    scores = [f"{m['label'].lower()} {humaneval(m)}" for m in models.values() if humaneval(m)]
    if scores:
        sentences.append(f"HumanEval problems solved, greedy: {', '.join(scores)}.")
    return sentences or [f"Nothing has been measured yet for {', '.join(students)}."]


def caveats(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the figures do not show, in plain sentences."""
    teacher, student, twin = (models.get(name) for name in LABELS)
    assert teacher is not None
    sentences = [
        "Each student was trained once, with one seed. One seed proves nothing: a difference between two students "
        "may be chance. A claim needs several paired seeds and an interval that excludes zero."
    ]
    if student and twin and None not in (student["heldout_nll_nats"], twin["heldout_nll_nats"]):
        ours, theirs = student["heldout_nll_nats"], twin["heldout_nll_nats"]
        word = "worse than" if ours > theirs else "better than" if ours < theirs else "equal to"
        sentences.append(
            f"Closeness to the teacher and likelihood of the text are different things. The distilled student's NLL is "
            f"{ours:.3f} nats per token, {word} its twin's {theirs:.3f}."
        )
    scored = [m for m in models.values() if humaneval(m)]
    if scored:
        texts = []
        for m in scored:
            low, high = m["humaneval"]["ci95"] or (None, None)
            interval = "" if low is None else f" (95% interval {low:.1%} to {high:.1%})"
            texts.append(f"{m['label'].lower()} {humaneval(m)}{interval}")
        text = (
            f"HumanEval is printed as it came out: {'; '.join(texts)}. The intervals cover the choice of problems only."
        )
        if any(m["humaneval"]["num_problems"] < HUMANEVAL_PROBLEMS for m in scored):
            text += f" Where fewer than {HUMANEVAL_PROBLEMS} problems were run, the score is not HumanEval's."
        if any(m["humaneval"]["pass_at_1"] == 0 for m in scored):
            text += " A score of 0 cannot rank two students."
        sentences.append(text)
    kinds = {m["settings"]["fidelity"].get("kind") for m in models.values() if "fidelity" in m["settings"]}
    for kind in sorted(filter(None, kinds)):
        sentences.append(
            f"KL is measured on what the cache holds ({kind}): the cached ids and one cell for all others. It is a "
            "lower bound of the KL over the whole vocabulary."
        )
    tested_on = {
        m["settings"]["fidelity"].get("cache", {}).get("manifest_sha256")
        for m in models.values()
        if "fidelity" in m["settings"]
    }
    if len(tested_on) > 1:
        sentences.append(
            "The models were scored on different held-out caches: NLL, KL and agreement cannot be compared."
        )
    if teacher["parameters"] and teacher["parameters"] < 1e9:
        sentences.append(
            f"The teacher is small ({count(teacher['parameters'])} parameters). The run shows that the pipeline works, "
            "not what a strong teacher would give."
        )
    if any(m["settings"].get("fidelity", {}).get("seen_in_training") is False for m in models.values()):
        sentences.append(
            "The held-out text was kept from the students. Whether the teacher saw it in its own training is not "
            "known; if it did, its figures are flattered."
        )
    machines = [m["machines"]["latency"] for m in models.values() if m["machines"].get("latency")]
    places = dict.fromkeys(
        ", ".join([m["processor"], f"{m['cores']} cores", *(m["accelerators"] or ["no accelerator"])]) for m in machines
    )
    if places:
        sentences.append(
            f"Times hold for the machine they were taken on ({'; '.join(places)}). Between models timed on different "
            "machines no ratio is given."
        )
    return sentences


# --- text forms ------------------------------------------------------------------------------------------------------


def compare(ratio: float, less: str, more: str) -> str:
    """A ratio in words: 0.04 → "25× smaller"; within half a percent of 1, "no" more or less."""
    if abs(ratio - 1) < 0.005:
        return f"no {more}"
    factor = max(ratio, 1 / ratio)
    return (
        f"{factor:,.0f}× {less if ratio < 1 else more}"
        if factor >= 10
        else f"{factor:.2g}× {less if ratio < 1 else more}"
    )


def count(value: float) -> str:
    """A large number in thousands, millions or billions."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:,.1f}{unit}"
    return f"{value:,.0f}"


def humaneval(model: Mapping[str, Any]) -> str | None:
    """Problems solved of problems run, such as "0/164"; None where not measured."""
    score = model["humaneval"]
    if score["pass_at_1"] is None or not score["num_problems"]:
        return None
    return f"{round(score['pass_at_1'] * score['num_problems'])}/{score['num_problems']}"


def table(models: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The comparison's rows: a label, a unit and one {value, note, reason} per model."""
    teacher = models["teacher"]

    def row(key: str, label: str, form: str, *, scale: float = 1, less: str = "", more: str = "") -> dict[str, Any]:
        cells = []
        for model in models.values():
            value, ratio, note = model[key], model["ratios_to_teacher"].get(key), ""
            if model is not teacher and ratio is not None:
                note = compare(ratio, less, more)
            elif model is not teacher and key == "heldout_nll_nats" and None not in (value, teacher[key]):
                note = f"{value - teacher[key]:+.3f}"
            text = None if value is None else count(value) if key == "parameters" else format(value * scale, form)
            cells.append({"value": text, "note": note, "reason": model["reasons"].get(key, "")})
        return {"label": label, "cells": cells}

    rows = [
        row("parameters", "Parameters", "", less="smaller", more="larger"),
        row("bytes", "Weights on disk, MB", ",.1f", scale=1e-6, less="smaller", more="larger"),
        row("heldout_nll_nats", "Held-out NLL, nats per token ↓", ".3f"),
        row("heldout_bits_per_byte", "Held-out bits per byte ↓", ".3f"),
        row("kl_to_teacher_nats", "KL to the teacher, nats per token ↓", ".3f"),
        row("top1_agreement", "Top-1 agreement with the teacher ↑", ".1%"),
        row("prefill_ms", "Prefill, ms ↓", ",.1f", less="faster", more="slower"),
        row("decode_tokens_per_second", "Decode, tokens per second ↑", ",.1f", less="slower", more="faster"),
    ]
    cells = []
    for model in models.values():
        interval = model["humaneval"]["ci95"]
        note = f"95% CI {interval[0]:.1%}–{interval[1]:.1%}" if humaneval(model) and interval else ""
        cells.append(
            {"value": humaneval(model), "note": note, "reason": model["reasons"].get("humaneval.pass_at_1", "")}
        )
    return [*rows, {"label": "HumanEval solved (greedy pass@1) ↑", "cells": cells}]
