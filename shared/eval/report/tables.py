"""The report's tables and the text forms of its figures."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LABELS = {"teacher": "Teacher", "student_kd": "Distilled student", "student_ce": "Cross-entropy twin"}
BENCHMARKS = {"humaneval": "HumanEval", "mbpp": "MBPP"}
SHARES = {
    "share_parses": "programs that parse",
    "share_runs": "programs that run",
    "share_some_assert": "programs that pass an assert",
}

Models = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of the comparison: where a figure is found and how it is shown.

    Args:
        file: the result that holds it: `sizes` (latency.json, else fidelity.json), `fidelity`, `latency` or `draft`.
        path: the keys that lead to it, joined by dots.
        label: of the row.
        form: a format specification.
        scale: factor before it is shown.
        less: what a ratio to the teacher below 1 means; no ratio where empty.
        more: what one above 1 means.
        always: whether the row stands even where no model has the figure.
    """

    file: str
    path: str
    label: str
    form: str = ".3f"
    scale: float = 1
    less: str = ""
    more: str = ""
    always: bool = False


_SIZE: dict[str, Any] = {"less": "smaller", "more": "larger"}
_MB: dict[str, Any] = _SIZE | {"form": ",.1f", "scale": 1e-6}
_MS: dict[str, Any] = {"form": ",.1f", "less": "faster", "more": "slower"}
_RATE: dict[str, Any] = {"form": ",.1f", "less": "slower", "more": "faster"}
_SHARE: dict[str, Any] = {"form": ".1%"}
FIGURES = {  # the report's key → the row
    "parameters": Figure("sizes", "parameters", "Parameters", always=True, **_SIZE),
    "embedding_share": Figure("sizes", "embedding_share", "Parameters in embeddings and output head", **_SHARE),
    "bytes": Figure("sizes", "bytes", "Weights on disk, MB", always=True, **_MB),
    "memory_bytes": Figure("latency", "memory_bytes", "Weights in memory, MB", **_MB),
    "peak_bytes": Figure("latency", "peak_bytes", "Peak memory, MB ↓", **_MB),
    "heldout_nll_nats": Figure("fidelity", "nll_nats", "Held-out NLL, nats per token ↓", always=True),
    "heldout_bits_per_byte": Figure("fidelity", "bits_per_byte", "Held-out bits per byte ↓", always=True),
    "kl_to_teacher_nats": Figure("fidelity", "kl_to_teacher_nats", "KL to the teacher, nats per token ↓", always=True),
    "reverse_kl_nats": Figure("fidelity", "reverse_kl_nats", "Reverse KL, nats per token ↓"),
    "top1_agreement": Figure("fidelity", "top1_agreement", "Top-1 agreement with the teacher ↑", always=True, **_SHARE),
    "top5_agreement": Figure("fidelity", "top5_agreement", "Top-5 agreement with the teacher ↑", **_SHARE),
    "ece": Figure("fidelity", "ece", "Expected calibration error ↓"),
    "prefill_ms": Figure("latency", "prefill_ms", "Prefill, ms ↓", always=True, **_MS),
    "decode_tokens_per_second": Figure(
        "latency", "decode_tokens_per_second", "Decode, tokens per second ↑", always=True, **_RATE
    ),
    "decode_ms_p50_batch_1": Figure("latency", "batches.1.decode_ms_p50", "Decode step, batch 1, median, ms ↓", **_MS),
    "decode_ms_p95_batch_1": Figure("latency", "batches.1.decode_ms_p95", "Decode step, batch 1, p95, ms ↓", **_MS),
    "decode_ms_p50_batch_8": Figure("latency", "batches.8.decode_ms_p50", "Decode step, batch 8, median, ms ↓", **_MS),
    "decode_ms_p95_batch_8": Figure("latency", "batches.8.decode_ms_p95", "Decode step, batch 8, p95, ms ↓", **_MS),
    "tokens_per_second_per_watt": Figure(
        "latency", "tokens_per_second_per_watt", "Decode, tokens per second per watt ↑", **_RATE
    ),
    "acceptance_rate": Figure("draft", "acceptance_rate", "Drafted tokens kept ↑", **_SHARE),
    "mean_accepted_length": Figure(
        "draft", "mean_accepted_length", "Drafted tokens kept per pass of the teacher ↑", ".2f"
    ),
    "draft_speedup": Figure("draft", "speedup", "Speed-up of the teacher ↑", ".2f"),
}


def group(figure: Figure) -> str:
    """The heading that a row stands under."""
    if figure.more == "larger" or figure.file == "sizes":
        return "Size"
    return {"fidelity": "Held-out text", "latency": "Speed", "draft": "As the teacher's draft"}[figure.file]


def comparison(models: Models) -> list[dict[str, Any]]:
    """The comparison's rows: group, label and one {value, notes, reason} per model.

    Notes are the 95 % interval, then what the figure is against the teacher's.
    """
    teacher = models["teacher"]
    rows = []
    for key, figure in FIGURES.items():
        if not figure.always and all(model.get(key) is None for model in models.values()):
            continue
        cells = []
        for model in models.values():
            value, ratio = model[key], model["ratios_to_teacher"].get(key)
            notes = []
            if interval := model["ci95"].get(key):
                notes.append("–".join(format(bound * figure.scale, figure.form) for bound in interval))
            if model is not teacher and ratio is not None:
                notes.append(compare(ratio, figure.less, figure.more))
            elif model is not teacher and key == "heldout_nll_nats" and None not in (value, teacher[key]):
                notes.append(signed(value - teacher[key]))
            text = (
                None
                if value is None
                else count(value)
                if key == "parameters"
                else f"{value * figure.scale:{figure.form}}"
            )
            cells.append({"value": text, "notes": notes, "reason": model["reasons"].get(key, "")})
        rows.append({"group": group(figure), "label": figure.label, "cells": cells})
    if any(mapping(model["settings"].get("draft")) for model in models.values()):
        rows.append(_equality_row(models))
    return rows + [row for name in BENCHMARKS for row in _benchmark_rows(models, name)]


def _equality_row(models: Models) -> dict[str, Any]:
    """Whether decoding with the model's drafts gave the teacher's own tokens."""
    cells = []
    for model in models.values():
        draft = mapping(model["settings"].get("draft"))
        equal = draft.get("equal_to_greedy")
        text = {True: "yes", False: "no"}[equal] if isinstance(equal, bool) else None
        if equal is False and mapping(draft.get("equality")):
            found = {dtype: mapping(part) for dtype, part in mapping(draft.get("equality")).items()}
            text = ", ".join(
                f"{dtype} {part.get('num_equal')}/{part.get('num_prompts')}" for dtype, part in found.items()
            )
        cells.append({"value": text, "notes": [], "reason": model["reasons"].get("acceptance_rate", "not said")})
    return {"group": "As the teacher's draft", "label": "Output equal to plain greedy decoding", "cells": cells}


def _benchmark_rows(models: Models, name: str) -> list[dict[str, Any]]:
    """Solved problems, further pass@k, and how far programs that fail got."""
    scores = {key: model.get(name) for key, model in models.items()}
    if name != "humaneval" and not any(solved(score) for score in scores.values()):
        return []
    drawn = any(score and score["sampled"] for score in scores.values())

    def row(label: str, cell: Any, reason_key: str) -> dict[str, Any]:
        cells = []
        for key, score in scores.items():
            value, notes = (None, []) if score is None else cell(score)
            cells.append({"value": value, "notes": notes, "reason": models[key]["reasons"].get(reason_key, "")})
        return {"group": "Programs written", "label": label, "cells": cells}

    def interval(bounds: Any) -> list[str]:
        return [f"{bounds[0]:.1%}–{bounds[1]:.1%}"] if bounds else []

    benchmark = BENCHMARKS[name]
    label = f"{benchmark} {'pass@1' if drawn else 'solved (greedy pass@1)'} ↑"
    rows = [row(label, lambda s: (solved(s), interval(s["ci95"]) if solved(s) else []), f"{name}.pass_at_1")]
    ks = sorted({int(k) for score in scores.values() if score for k in score["pass_at_k"]} - {1})
    for k in map(str, ks):

        def at_k(score: Mapping[str, Any], k: str = k) -> tuple[str | None, list[str]]:
            value = score["pass_at_k"].get(k)
            return (None, []) if value is None else (f"{value:.1%}", interval(score["pass_at_k_ci95"].get(k)))

        rows.append(row(f"{benchmark} pass@{k} ↑", at_k, f"{name}.pass_at_k"))
    for share, words in SHARES.items():
        if any(score and score[share] is not None for score in scores.values()):
            rows.append(
                row(
                    f"{benchmark}: {words} ↑",
                    lambda s, share=share: (None if s[share] is None else f"{s[share]:.1%}", []),
                    f"{name}.{share}",
                )
            )
    return rows


def proof_rows(proof: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The proof's arms as text; what an arm does not say is –."""
    rows = []
    for arm in arms(proof):
        against = arm["versus_ce"]
        settings = (("loss", "loss"), ("k", "K"), ("learning_rate", "lr"), ("epochs", "epochs"))
        rows.append(
            {
                "name": arm["name"],
                "settings": ", ".join(f"{label} {arm[key]}" for key, label in settings if arm.get(key) is not None),
                "nll": _mean_sd(arm["test_nll"]),
                "kl": _mean_sd(arm["test_kl"]),
                "nll_difference": _difference(against),
                "kl_difference": _difference(against["kl"]),
                "p": "–" if against["p_holm"] is None else f"{against['p_holm']:.2g}",
                "significant": {True: "yes", False: "no"}.get(against["significant"], "–"),
            }
        )
    return rows


def arms(proof: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A proof's arms with only figures that are numbers, in its order."""
    found = []
    for arm in proof.get("variants") or []:
        against = mapping(arm.get("versus_ce"))
        parts = {part: _numbers(arm.get(part)) for part in ("test_nll", "test_kl", "versus_ce")}
        parts["versus_ce"]["kl"] = _numbers(against.get("kl"))
        found.append({**arm, "name": str(arm.get("name", "unnamed")), **parts})
    return found


def _numbers(value: object) -> dict[str, Any]:
    figures = mapping(value)
    numbers: dict[str, Any] = {key: number(figures.get(key)) for key in ("mean", "sd", "difference", "p_holm")}
    significant = figures.get("significant")
    return numbers | {
        "ci95": bounds(figures.get("ci95")),
        "significant": significant if isinstance(significant, bool) else None,
    }


def _difference(figures: Mapping[str, Any]) -> str:
    if figures["difference"] is None:
        return "–"
    interval = figures["ci95"]
    return signed(figures["difference"]) + (f" ({signed(interval[0])} to {signed(interval[1])})" if interval else "")


def _mean_sd(figures: Mapping[str, Any]) -> str:
    if figures["mean"] is None:
        return "–"
    return f"{figures['mean']:.3f}" + ("" if figures["sd"] is None else f" ± {figures['sd']:.3f}")


# --- text forms ------------------------------------------------------------------------------------------------------


def signed(value: float, form: str = "+.3f") -> str:
    """A difference with its sign; minus is a minus, not a hyphen."""
    return format(value, form).replace("-", "−")


def number(value: object) -> float | int | None:
    """A value if it is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def mapping(value: object) -> Mapping[str, Any]:
    """A value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def bounds(value: object) -> list[float] | None:
    """A value if it is two numbers."""
    known = isinstance(value, list) and len(value) == 2 and all(number(bound) is not None for bound in value)
    return value if known and isinstance(value, list) else None


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


def solved(score: Mapping[str, Any] | None) -> str | None:
    """Problems solved of problems run, such as "0/164", or pass@1 where samples were drawn; None where not measured."""
    if not score or score["pass_at_1"] is None or not score["num_problems"]:
        return None
    if score["sampled"]:
        return f"{score['pass_at_1']:.1%}"
    return f"{round(score['pass_at_1'] * score['num_problems'])}/{score['num_problems']}"
