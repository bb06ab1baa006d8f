"""What changed between two results of one kind, beyond noise: the gate for a continuous integration.

Everything is paired: both results must come from the same documents, problems or machine. Each figure is judged at
95 % by itself, so that of twenty unchanged figures one may seem changed.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import ConfigError
from shared.eval.bootstrap import percentile_interval, resample_sums
from shared.eval.report.provenance import read_result

Row = dict[str, Any]
Result = Mapping[str, Any]

LEAST_DOCUMENTS = 10  # a bootstrap over fewer is too narrow to be believed
FIDELITY = {  # figure → its label, the sums whose ratio it is, and whether higher is better
    "nll_nats": ("held-out NLL, nats per token", ("nll_nats",), ("targets",), False),
    "kl_to_teacher_nats": ("KL to the teacher, nats per token", ("kl_nats",), ("labelled", "targets"), False),
    "reverse_kl_nats": ("reverse KL, nats per token", ("reverse_kl_nats",), ("labelled", "targets"), False),
    "top1_agreement": ("top-1 agreement", ("top1_agreed",), ("labelled", "targets"), True),
    "top5_agreement": ("top-5 agreement", ("top5_overlap",), ("labelled", "targets"), True),
}
OUTCOMES = {  # what a sample can be → its label
    "passed": "pass@1",
    "some_assert": "share of programs that pass an assert",
    "runs": "share of programs that run",
    "parses": "share of programs that parse",
}
TIMES = {"prefill_ms": ("prefill, ms", False), "decode_tokens_per_second": ("decode, tokens per second", True)}
SIZES = {"parameters": "parameters", "bytes": "weights on disk, bytes", "peak_bytes": "peak memory, bytes"}
MACHINE = ("host", "processor", "cores", "memory_bytes", "accelerators")
TIMING_SETTINGS = ("batch_size", "prompt_tokens", "new_tokens", "threads", "device")
PROBLEM_SETTINGS = ("decoding", "samples", "temperature", "top_p", "max_new_tokens", "limit", "completion_ends",
                    "timeout_seconds")  # fmt: skip


def compare_files(a: Path, b: Path) -> dict[str, Any]:
    """Compare two result files, `b` being the new one.

    Returns:
        `kind`, `rows` and `left_out`. A row has `model`, `figure`, `a`, `b`, `difference`, `ci95` or `p_value`, `how`
        it was judged, and the `verdict`: `better`, `worse`, `noise`, `changed` (a size) or `unknown`. `left_out` says
        which parts of two reports cannot be compared.

    Raises:
        ConfigError: files that are no results, of two kinds, or that cannot be compared; it says what differs.
    """
    results = [read_result(path) for path in (a, b)]
    kinds = [kind_of(result) for result in results]
    for path, kind in zip((a, b), kinds, strict=True):
        if kind is None:
            expected = "fidelity.json, latency.json, humaneval's result.json or report.json"
            raise ConfigError("not a result that can be compared", where=path, expected=expected)
    if kinds[0] != kinds[1]:
        raise ConfigError("results of two kinds", where=f"{a} and {b}", expected=kinds[0], got=kinds[1])
    kind = kinds[0]
    left_out: list[str] = []
    if kind == "fidelity":
        rows = fidelity_rows(*results)
    elif kind == "latency":
        rows = latency_rows(*results)
    elif kind == "benchmark":
        for path, result in zip((a, b), results, strict=True):
            result["outcomes"] = read_outcomes(path, result)
        rows = benchmark_rows(*results)
    else:
        rows, left_out = _report_rows(*results)
    return {"kind": kind, "a": str(a), "b": str(b), "rows": rows, "left_out": left_out}


def kind_of(result: Result) -> str | None:
    """`fidelity`, `latency`, `benchmark` or `report`; None for anything else."""
    if result.get("format") == "codedistill-report":
        return "report"
    if isinstance(result.get("models"), dict):
        return "latency"
    return "benchmark" if "pass_at_1" in result else "fidelity" if "nll_nats" in result else None


def describe(comparison: Mapping[str, Any]) -> str:
    """The comparison as text: what changed first, what did not after it."""
    order = ["worse", "better", "changed", "unknown", "noise"]
    rows = sorted(comparison["rows"], key=lambda row: order.index(row["verdict"]))
    lines = [f"{comparison['b']} against {comparison['a']}: {comparison['kind']}, each figure judged at 95 %"]
    for row in rows:
        name = f"{row['model']}: {row['figure']}" if row["model"] else row["figure"]
        values = " → ".join(_figure(row[side]) for side in ("a", "b"))
        change = "" if row["difference"] is None else f", {row['difference']:+,.6g}"
        change += f" [{row['ci95'][0]:+,.4g}, {row['ci95'][1]:+,.4g}]" if row.get("ci95") else ""
        lines.append(f"  {row['verdict']:8}{name}  {values}{change}  ({row['how']})")
    counts = Counter(row["verdict"] for row in rows)
    lines += [f"  left out: {text}" for text in comparison["left_out"]]
    return "\n".join([*lines, ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict])])


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


# --- fidelity --------------------------------------------------------------------------------------------------------


def fidelity_rows(a: Result, b: Result) -> list[Row]:
    """Judge the figures of two fidelity.json by a paired bootstrap over documents.

    Raises:
        ConfigError: they were measured on different documents or against different teachers.
    """
    _require_same(
        "what was scored",
        *(
            {
                "cache.manifest_sha256": (r.get("cache") or {}).get("manifest_sha256"),
                "kl_kind": r.get("kl_kind", r.get("kind")),
                "seen_in_training": bool(r.get("seen_in_training")),
                "num_targets": r.get("num_targets"),
            }
            for r in (a, b)
        ),
    )
    documents = [r.get("per_document") or [] for r in (a, b)]
    ids = [[(row.get("id"), row.get("targets")) for row in rows] for rows in documents]
    if all(ids) and ids[0] != ids[1]:
        raise ConfigError("the results cannot be compared: the documents differ", expected=f"{len(ids[0])} documents",
                          got=f"{len(ids[1])}, or others", fix="measure both alike")  # fmt: skip
    rows = []
    for key, (label, above, below, higher_is_better) in FIDELITY.items():
        if a.get(key) is None and b.get(key) is None:
            continue
        row = _row(None, label, a, b, key) | {"is_share": higher_is_better}
        (above_a, above_b), (below_a, below_b) = ([_column(d, names) for d in documents] for names in (above, below))
        if row["verdict"] != "unknown":
            pass
        elif above_a is None or above_b is None or below_a is None or below_b is None:
            row["how"] = "the results hold no sums per document"
        elif (below_a != below_b).any():
            row["how"] = "the teacher's rows differ"
        else:
            _bootstrap(row, above_b - above_a, below_a, higher_is_better, "documents")
        rows.append(row)
    return rows


def _column(documents: Sequence[Result], names: Iterable[str]) -> Any:
    """The first of the named sums that every document has, f64 `[D]`; None without one."""
    for name in names:
        values = [document.get(name) for document in documents]
        if values and all(_is_number(value) for value in values):
            return np.array(values, np.float64)
    return None


# --- benchmarks ------------------------------------------------------------------------------------------------------


def read_outcomes(result_file: Path, result: Result) -> dict[str, dict[str, int]] | None:
    """How many samples of each problem did what, from verdicts.jsonl beside a result; None where there is none.

    Raises:
        ConfigError: the file is malformed, or is not that of this result.
    """
    file = result_file.with_name("verdicts.jsonl")
    if not file.is_file():
        return None
    outcomes: dict[str, dict[str, int]] = {}
    verdicts: Counter[str] = Counter()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            verdicts[row["verdict"]] += 1
            of_problem = outcomes.setdefault(row["task_id"], {"samples": 0, "passed": 0})
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError("not a verdict", where=f"{file}, line {number}", got=repr(error)) from error
        of_problem["samples"] += 1
        of_problem["passed"] += row["verdict"] == "passed"
        told = {"parses": row.get("parses"), "runs": row.get("loaded"), "some_assert": row.get("asserts_passed")}
        if row["verdict"] == "passed":
            told |= {"runs": True, "some_assert": True}
        for key, value in told.items():
            if value is not None:
                of_problem[key] = of_problem.get(key, 0) + bool(value)
    if dict(verdicts) != (result.get("verdicts") or {}):
        raise ConfigError("the verdicts beside a result are not its own", where=file, expected=result.get("verdicts"),
                          got=dict(verdicts), fix="run the evaluation again")  # fmt: skip
    return outcomes


def _ran_unwalled(result: Result) -> bool:
    sandbox = (result.get("settings") or {}).get("sandbox") or {}
    return bool(sandbox.get("unsafe_no_sandbox"))


def benchmark_rows(a: Result, b: Result) -> list[Row]:
    """Judge two results of one benchmark, problem by problem: McNemar's exact test for one sample each, else bootstrap.

    Args:
        a: a result with the `outcomes` that `read_outcomes` gives.
        b: the new one.

    Raises:
        ConfigError: other problems, or completions made or judged otherwise.
    """
    _require_same(
        "the benchmark",
        *(
            {key: r.get(key) for key in ("benchmark", "problems_sha256", "num_problems")}
            | {f"settings.{key}": (r.get("settings") or {}).get(key) for key in PROBLEM_SETTINGS}
            | {"run without a sandbox": _ran_unwalled(r)}
            for r in (a, b)
        ),
    )
    sides = [r.get("outcomes") or {} for r in (a, b)]
    shares = {"passed": "pass_at_1", "runs": "share_runs", "parses": "share_parses", "some_assert": "share_some_assert"}
    rows = []
    for key, label in OUTCOMES.items():
        if all(r.get(shares[key]) is None and shares[key] not in (r.get("bounds") or {}) for r in (a, b)):
            continue
        row = _row(None, label, a, b, shares[key]) | {"is_share": True}
        rows.append(row)
        if row["verdict"] != "unknown" or row["how"]:
            continue
        counts = [{task: (found[key], found["samples"]) for task, found in o.items() if key in found} for o in sides]
        if not counts[0] or counts[0].keys() != counts[1].keys() or len(counts[0]) != a.get("num_problems"):
            row["how"] = "no verdict of every problem is kept beside both results"
        elif {samples for side in counts for _, samples in side.values()} == {1}:
            only_a = sum(counts[0][task][0] > counts[1][task][0] for task in counts[0])
            only_b = sum(counts[0][task][0] < counts[1][task][0] for task in counts[0])
            row["p_value"] = mcnemar(only_a, only_b)
            row["method"] = f"McNemar's exact test over {len(counts[0])} problems"
            row["how"] = f"McNemar's exact test: {only_b} gained, {only_a} lost, p = {row['p_value']:.3g}"
            _judge(row, row["p_value"] < 0.05, higher_is_better=True)
        else:
            means = [np.array([side[task][0] / side[task][1] for task in counts[0]]) for side in counts]
            _bootstrap(row, means[1] - means[0], np.ones(len(means[0])), True, "problems")
    return rows


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value that so uneven a split of the problems only one side solves is chance (McNemar 1947)."""
    discordant = only_a + only_b
    tail = sum(math.comb(discordant, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, float(2 * tail / 2**discordant))


# --- latency ---------------------------------------------------------------------------------------------------------


def latency_rows(a: Result, b: Result) -> list[Row]:
    """Judge two latency.json: a time has changed where all repeats of one side lie beyond all of the other.

    Under chance that happens in 2 of C(n + m, n) orders of n and m repeats, which must be fewer than 5 %. What else the
    machine did at either time is not in that: compare on a quiet machine.

    Raises:
        ConfigError: other machines or settings, or no model in common.
    """
    _require_same(
        "how it was timed",
        *(
            {f"machine.{key}": (r.get("machine") or {}).get(key) for key in MACHINE}
            | {f"settings.{key}": (r.get("settings") or {}).get(key) for key in TIMING_SETTINGS}
            for r in (a, b)
        ),
    )
    models = [r["models"] for r in (a, b)]
    names = [name for name in models[0] if name in models[1]]
    if not names:
        sides = [", ".join(side) for side in models]
        raise ConfigError("the results have no model in common", expected=sides[0], got=sides[1])
    repeats: list[Any] = [(r.get("settings") or {}).get("repeats") for r in (a, b)]
    rows = []
    for name in names:
        before, after = models[0][name], models[1][name]
        for key, (label, higher_is_better) in TIMES.items():
            row = _row(name, label, before, after, key)
            rows.append(row)
            ranges = [side.get(f"{key}_range") for side in (before, after)]
            if row["verdict"] != "unknown":
                continue
            if not all(isinstance(n, int) and n > 0 for n in repeats) or None in ranges:
                row["how"] = "the spread of the repeats is not recorded"
            elif 2 / math.comb(sum(repeats), repeats[0]) >= 0.05:
                row["how"] = f"{repeats[0]} and {repeats[1]} repeats are too few"
            else:
                apart = ranges[0][1] < ranges[1][0] or ranges[1][1] < ranges[0][0]
                row["how"] = f"repeats {'apart' if apart else 'overlap'}: {_span(ranges[0])} and {_span(ranges[1])}"
                _judge(row, apart, higher_is_better=higher_is_better)
        for key, label in SIZES.items():
            if before.get(key) is not None or after.get(key) is not None:
                row = _row(name, label, before, after, key)
                if row["verdict"] == "unknown":
                    row |= {"verdict": "changed" if row["difference"] else "noise", "how": "counted"}
                rows.append(row)
    return rows


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:,.4g} to {values[1]:,.4g}"


# --- reports ---------------------------------------------------------------------------------------------------------


def _report_rows(a: Result, b: Result) -> tuple[list[Row], list[str]]:
    """Compare what two reports have in common, model by model, and say what cannot be compared."""
    rows: list[Row] = []
    left_out = []
    for name in [name for name in a.get("models", {}) if name in b.get("models", {})]:
        for kind, judge in (("fidelity", fidelity_rows), ("latency", latency_rows), ("humaneval", benchmark_rows),
                            ("mbpp", benchmark_rows)):  # fmt: skip
            sides = [_recorded(report["models"][name], kind, name) for report in (a, b)]
            if sides[0] is None or sides[1] is None:
                if sides != [None, None]:
                    left_out.append(f"{name}: {kind} is in one report only")
                continue
            try:
                rows += [row | {"model": name} for row in judge(sides[0], sides[1])]
            except ConfigError as error:
                left_out.append(f"{name}: {kind}: {error}")
    if not rows:
        raise ConfigError("the reports have nothing that can be compared", got="; ".join(left_out) or "no common model")
    return rows, left_out


def _recorded(model: Result, kind: str, name: str) -> dict[str, Any] | None:
    """A result as a report has recorded it."""
    result = (model.get("settings") or {}).get(kind)
    if not isinstance(result, dict):
        return None
    result = result | {"machine": (model.get("machines") or {}).get(kind)}
    return result | {"models": {name: result}} if kind == "latency" else result


# --- judging ---------------------------------------------------------------------------------------------------------


def _require_same(what: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    differing = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    if differing:
        sides = ["; ".join(f"{key} {_short(side.get(key))}" for key in differing) for side in (a, b)]
        raise ConfigError(
            f"the results cannot be compared: {what} differs in {', '.join(differing)}",
            expected=sides[0],
            got=sides[1],
            fix="measure both alike",
        )


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _row(model: str | None, figure: str, a: Result, b: Result, key: str) -> Row:
    """A row still to be judged; where only one side has the figure, its verdict."""
    values = [side[key] if _is_number(side.get(key)) else None for side in (a, b)]
    row: Row = {"model": model, "figure": figure, "a": values[0], "b": values[1], "difference": None}
    row |= {"ci95": None, "p_value": None, "verdict": "unknown", "how": "", "method": "", "is_share": False}
    if bounded := [str((side.get("reasons") or {}).get(key)) for side in (a, b) if key in (side.get("bounds") or {})]:
        return row | {"how": f"not known: {'; '.join(bounded)}"}
    if values[0] is None:
        return row | {"verdict": "changed", "how": "was not known"} if values[1] is not None else row
    if values[1] is None:
        reason = (b.get("reasons") or {}).get(key, "none is recorded")
        return row | {"verdict": "worse", "how": f"the figure is lost: {reason}"}
    return row | {"difference": values[1] - values[0]}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bootstrap(row: Row, above: Any, below: Any, higher_is_better: bool, units: str) -> None:
    """Judge by the interval of Σ above / Σ below over units drawn with replacement."""
    row["how"] = row["method"] = f"paired bootstrap over {len(below)} {units}"
    if len(below) < LEAST_DOCUMENTS:
        row["how"] = f"{len(below)} {units} are too few for an interval"
        return
    sums = resample_sums(np.column_stack([above, below]))
    with np.errstate(divide="ignore", invalid="ignore"):
        row["ci95"] = percentile_interval(sums[:, 0] / sums[:, 1])
    if row["ci95"] is not None:
        low, high = row["ci95"]
        _judge(row, low > 0 or high < 0, higher_is_better=higher_is_better)


def _judge(row: Row, significant: bool, *, higher_is_better: bool) -> None:
    row["verdict"] = (
        "noise" if not significant else "better" if (row["difference"] > 0) == higher_is_better else "worse"
    )
