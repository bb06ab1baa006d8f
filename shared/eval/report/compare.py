"""What changed between two results of one kind, beyond noise.

All comparisons are paired: both results must come from the same documents, problems or machine. Each figure is judged
at 95 % on its own, so about one in twenty unchanged figures seems changed.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache.format import Array
from shared.errors import ConfigError, require
from shared.eval.bootstrap import percentile_interval, resample_sums
from shared.eval.report.provenance import REPORT_FORMAT
from shared.eval.results import BENCHMARKS, BatchTiming, BenchmarkResult, Fidelity, Interval, Latency, Result
from shared.files import read_json, read_json_lines

LEAST_UNITS = 10  # a bootstrap over fewer is too narrow to be believed
FIDELITY = {  # figure → its label, the sum per document it is made of, and whether higher is better
    "nll_nats": ("held-out NLL, nats per token", "nll_nats", False),
    "kl_to_teacher_nats": ("KL to the teacher, nats per token", "kl_nats", False),
    "reverse_kl_nats": ("reverse KL, nats per token", "reverse_kl_nats", False),
    "top1_agreement": ("top-1 agreement", "top1_agreed", True),
    "top5_agreement": ("top-5 agreement", "top5_overlap", True),
}
OUTCOMES = {  # what a sample can be → the share of them in a result, and its label
    "passed": ("pass_at_1", "pass@1"),
    "some_assert": ("share_some_assert", "share of programs that pass an assert"),
    "runs": ("share_runs", "share of programs that run"),
    "parses": ("share_parses", "share of programs that parse"),
}
TIMES = {"prefill_ms": ("prefill, ms", False), "decode_tokens_per_second": ("decode, tokens per second", True)}
SIZES = {"parameters": "parameters", "bytes": "weights on disk, bytes", "peak_bytes": "peak memory, bytes"}
MACHINE = ("host", "processor", "cores", "memory_bytes", "accelerators")
TIMING_SETTINGS = ("prompt_tokens", "new_tokens", "threads", "device")
PROBLEM_SETTINGS = ("decoding", "samples", "temperature", "top_p", "max_new_tokens", "limit", "completion_ends",
                    "timeout_seconds")  # fmt: skip
KINDS: dict[str, type[Result]] = {
    "fidelity": Fidelity, "latency": Latency, **dict.fromkeys(BENCHMARKS, BenchmarkResult)
}  # fmt: skip
ONLY_IN = {"kl_kind": "fidelity", "models": "latency", "pass_at_1": "benchmark"}  # a key that one kind alone has
VERDICTS = ("worse", "better", "changed", "unknown", "noise")

Outcomes = Mapping[str, Mapping[str, int]]  # problem → samples, and how many of them did what


@dataclass(kw_only=True)
class Row:
    """One figure of both results; None where unknown."""

    figure: str  # its label
    a: float | None
    b: float | None
    model: str | None = None  # where results hold several
    difference: float | None = None  # b − a
    ci95: Interval | None = None  # it was judged by this or by `p_value`
    p_value: float | None = None
    verdict: str = "unknown"  # or `better`, `worse`, `noise`, `changed` (a size, or newly known)
    how: str = ""  # the judgement in words; `method` leaves out its outcome
    method: str = ""
    is_share: bool = False  # of 1

    @property
    def is_open(self) -> bool:
        """Whether both values are known and nothing has judged them."""
        return self.verdict == "unknown" and self.difference is not None

    def judge(self, significant: bool, *, higher_is_better: bool) -> None:
        """Set the verdict of a difference that is known."""
        better = ((self.difference or 0) > 0) == higher_is_better
        self.verdict = "noise" if not significant else "better" if better else "worse"


def compare_files(a: Path, b: Path) -> dict[str, Any]:
    """Compare two result files, `b` being the new one.

    Returns:
        `kind`, `rows` (see `Row`) and `left_out`: which parts of two reports cannot be compared.

    Raises:
        ConfigError: files that are no results, of two kinds, or that cannot be compared; it says what differs.
    """
    values = [read_json(path) for path in (a, b)]
    kind, other = (_kind_of(value, path) for value, path in zip(values, (a, b), strict=True))
    require(kind == other, "results of two kinds", where=f"{a} and {b}", expected=kind, got=other)
    left_out: list[str] = []
    if kind == "report":
        try:
            rows, left_out = _report_rows(*values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError("a report of another form", where=f"{a} and {b}", got=repr(error)) from error
    else:
        cls = KINDS.get(kind, BenchmarkResult)
        results = [cls.from_dict(value, str(path)) for value, path in zip(values, (a, b), strict=True)]
        rows = result_rows(results, [read_outcomes(path, each) for path, each in zip((a, b), results, strict=True)])
    as_data = [dataclasses.asdict(row) for row in rows]
    return {"kind": kind, "a": str(a), "b": str(b), "rows": as_data, "left_out": left_out}


def _kind_of(value: Any, path: Path) -> str:
    kinds = [kind for key, kind in ONLY_IN.items() if key in value] if isinstance(value, dict) else []
    if isinstance(value, dict) and value.get("format") == REPORT_FORMAT:
        kinds = ["report"]
    expected = "fidelity.json, latency.json, a benchmark's result.json or report.json"
    require(kinds, "not a result that can be compared", where=path, expected=expected)
    return kinds[0]


def _report_rows(a: Any, b: Any) -> tuple[list[Row], list[str]]:
    """Compare what two reports have in common, model by model, and say what cannot be compared."""
    rows: list[Row] = []
    left_out = []
    for name in [name for name in a["models"] if name in b["models"]]:
        sides = [report["models"][name] for report in (a, b)]
        for kind, cls in KINDS.items():
            recorded = [side["results"].get(kind) for side in sides]
            if None in recorded:
                left_out += [] if recorded == [None, None] else [f"{name}: {kind} is in one report only"]
                continue
            if kind == "latency":
                recorded = [each | {"models": {name: each["models"][name]}} for each in recorded]
            results = [cls.from_dict(each, f"{name}, {kind}") for each in recorded]
            try:
                found = result_rows(results, [side["outcomes"].get(kind, {}) for side in sides])
            except ConfigError as error:
                left_out.append(f"{name}: {kind}: {error}")
                continue
            rows += [dataclasses.replace(row, model=name) for row in found]
    require(rows, "the reports have nothing that can be compared", got="; ".join(left_out) or "no common model")
    return rows, left_out


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """What `compare_files` gives, as text: what changed first."""
    rows = sorted(comparison["rows"], key=lambda row: VERDICTS.index(row["verdict"]))
    lines = [f"{comparison['b']} against {comparison['a']}: {comparison['kind']}, each figure judged at 95 %"]
    for row in rows:
        name = f"{row['model']}: {row['figure']}" if row["model"] else row["figure"]
        values = " → ".join(_number_text(row[side]) for side in ("a", "b"))
        change = "" if row["difference"] is None else f", {row['difference']:+,.6g}"
        change += f" [{row['ci95'][0]:+,.4g}, {row['ci95'][1]:+,.4g}]" if row["ci95"] else ""
        lines.append(f"  {row['verdict']:8}{name}  {values}{change}  ({row['how']})")
    counts = Counter(row["verdict"] for row in rows)
    lines += [f"  left out: {text}" for text in comparison["left_out"]]
    return "\n".join([*lines, ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])])


def _number_text(value: float | None) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


# --- judging ---------------------------------------------------------------------------------------------------------


def result_rows(results: Sequence[Result], outcomes: Sequence[Outcomes]) -> list[Row]:
    """Judge every figure of two results of one kind, the second being the new one, with the outcomes of each.

    Raises:
        ConfigError: they are not of the same documents, problems, settings or machine; it says what differs.
    """
    a, b = results
    if isinstance(a, Fidelity) and isinstance(b, Fidelity):
        rows = _fidelity_rows(a, b)
    elif isinstance(a, Latency) and isinstance(b, Latency):
        rows = _latency_rows(a, b)
    else:
        assert isinstance(a, BenchmarkResult) and isinstance(b, BenchmarkResult)
        rows = _benchmark_rows(a, b, *outcomes)
    return [row for row in rows if (row.a, row.b) != (None, None)]


def _fidelity_rows(a: Fidelity, b: Fidelity) -> list[Row]:
    """A paired bootstrap over documents."""
    what = ("cache.digest", "kl_kind", "seen_in_training", "num_targets")
    _require_same("what was scored", *(
        dict(zip(what, (r.cache.digest, r.kl_kind, r.seen_in_training, r.num_targets), strict=True)) for r in (a, b)
    ))  # fmt: skip
    ids = [[(document["id"], document["targets"]) for document in r.per_document] for r in (a, b)]
    require(ids[0] == ids[1], "the results cannot be compared: the documents differ",
            expected=f"{len(ids[0])} documents", got=f"{len(ids[1])}, or others", fix="measure both alike")  # fmt: skip
    rows = []
    for key, (label, column, higher_is_better) in FIDELITY.items():
        row = _row(label, (a, b), key, is_share=higher_is_better)
        if row.is_open:
            _judge_by_bootstrap(row, _column(b, column) - _column(a, column), _column(a, "targets"), higher_is_better,
                                "documents")  # fmt: skip
        rows.append(row)
    return rows


def _column(result: Fidelity, name: str) -> Array:
    """A sum of every document, f64 `[D]`; NaN where it was not finite."""
    return np.array([document[name] for document in result.per_document], np.float64)


def read_outcomes(result_file: Path, result: Result) -> Outcomes:
    """How many samples of each problem did what, from verdicts.jsonl beside a benchmark's result; empty without one.

    Raises:
        ConfigError: the file is malformed, or is not that of this result.
    """
    file = result_file.with_name("verdicts.jsonl")
    if not isinstance(result, BenchmarkResult) or not file.is_file():
        return {}
    outcomes: dict[str, Counter[str]] = {}
    verdicts: Counter[str] = Counter()
    for number, row in enumerate(read_json_lines(file), 1):
        try:
            task, verdict, parses, loaded, asserts = (
                row[key] for key in ("task_id", "verdict", "parses", "loaded", "asserts_passed")
            )
        except KeyError as error:
            raise ConfigError("not a verdict", where=f"{file}, line {number}", got=repr(error)) from error
        verdicts[verdict] += 1
        passed = verdict == "passed"
        outcomes.setdefault(task, Counter()).update(
            samples=1,
            passed=passed,
            parses=bool(parses),
            runs=passed or bool(loaded),
            some_assert=passed or bool(asserts),
        )
    require(dict(verdicts) == result.verdicts, "the verdicts beside a result are not its own", where=file,
            expected=result.verdicts, got=dict(verdicts), fix="run the evaluation again")  # fmt: skip
    return outcomes


def _benchmark_rows(a: BenchmarkResult, b: BenchmarkResult, outcomes_a: Outcomes, outcomes_b: Outcomes) -> list[Row]:
    """Problem by problem: McNemar's exact test for one sample each, else a paired bootstrap."""
    _require_same("the benchmark", *(
        {"benchmark": r.benchmark, "problems_sha256": r.problems_sha256, "num_problems": r.num_problems}
        | {f"settings.{key}": r.settings.get(key) for key in PROBLEM_SETTINGS}
        | {"run without a sandbox": r.unsafe}
        for r in (a, b)
    ))  # fmt: skip
    rows = []
    for key, (share, label) in OUTCOMES.items():
        row = _row(label, (a, b), share, is_share=True)
        rows.append(row)
        if not row.is_open:
            continue
        if outcomes_a.keys() != outcomes_b.keys() or len(outcomes_a) != a.num_problems:
            row.how = "no verdict of every problem is kept beside both results"
            continue
        pairs = [(outcomes_a[task], outcomes_b[task]) for task in outcomes_a]
        if all(problem["samples"] == 1 for pair in pairs for problem in pair):
            lost, gained = (sum(pair[i][key] > pair[1 - i][key] for pair in pairs) for i in (0, 1))
            row.p_value = mcnemar(lost, gained)
            row.method = f"McNemar's exact test over {len(pairs)} problems"
            row.how = f"McNemar's exact test: {gained} gained, {lost} lost, p = {row.p_value:.3g}"
            row.judge(row.p_value < 0.05, higher_is_better=True)
        else:
            mean_a, mean_b = np.array([[side[key] / side["samples"] for side in pair] for pair in pairs]).T
            _judge_by_bootstrap(row, mean_b - mean_a, np.ones(len(pairs)), True, "problems")
    return rows


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value that so uneven a split of the problems only one side solves is chance (McNemar 1947)."""
    discordant = only_a + only_b
    tail = sum(math.comb(discordant, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, float(2 * tail / 2**discordant))


def _latency_rows(a: Latency, b: Latency) -> list[Row]:
    """Times at batch 1: one has changed if all repeats of one side lie beyond all of the other.

    By chance that happens in 2 of C(n + m, n) orders of n and m repeats, which must be fewer than 5 %. Other load on
    the machine is not accounted for: compare on a quiet machine.
    """
    _require_same("how it was timed", *(
        {f"machine.{key}": r.machine.get(key) for key in MACHINE}
        | {f"settings.{key}": getattr(r.settings, key) for key in TIMING_SETTINGS}
        for r in (a, b)
    ))  # fmt: skip
    names = [name for name in a.models if name in b.models]
    require(names, "the results have no model in common", expected=", ".join(a.models), got=", ".join(b.models))
    repeats = (a.settings.repeats, b.settings.repeats)
    rows = []
    for name in names:
        models = [side.models[name] for side in (a, b)]
        batches = [model.batches["1"] for model in models]
        for way, words in (("batches", ""), ("served", ", as served")):
            timed = [getattr(model, way)["1"] for model in models if "1" in getattr(model, way)]
            if len(timed) == 2:
                rows += [_time_row(key, words, timed, repeats, name) for key in TIMES]
        for key, label in SIZES.items():
            row = _row(label, batches if key == "peak_bytes" else models, key, model=name)
            if row.is_open:
                row.verdict, row.how = "changed" if row.difference else "noise", "counted"
            rows.append(row)
    return rows


def _time_row(key: str, words: str, batches: Sequence[BatchTiming], repeats: tuple[int, int], model: str) -> Row:
    """The judged row of one figure of `TIMES`."""
    label, higher_is_better = TIMES[key]
    row = _row(label + words, batches, key, model=model)
    (low_a, high_a), (low_b, high_b) = (getattr(batch, f"{key}_range") for batch in batches)
    if 2 / math.comb(sum(repeats), repeats[0]) >= 0.05:
        row.how = f"{repeats[0]} and {repeats[1]} repeats are too few"
    else:
        apart = high_a < low_b or high_b < low_a
        spans = f"{low_a:,.4g} to {high_a:,.4g} and {low_b:,.4g} to {high_b:,.4g}"
        row.how = f"repeats {'apart' if apart else 'overlap'}: {spans}"
        row.judge(apart, higher_is_better=higher_is_better)
    return row


def _require_same(what: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    differing = [key for key in a if a[key] != b[key]]
    sides = ["; ".join(f"{key} {_short(side[key])}" for key in differing) for side in (a, b)]
    require(not differing, f"the results cannot be compared: {what} differs in {', '.join(differing)}",
            expected=sides[0], got=sides[1], fix="measure both alike")  # fmt: skip


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _row(figure: str, sides: Sequence[object], key: str, **options: Any) -> Row:
    """A row still to be judged, from one attribute of both sides; where only one has it, with its verdict."""
    a, b = sides
    row = Row(figure=figure, a=getattr(a, key), b=getattr(b, key), **options)
    if row.a is not None and row.b is not None:
        row.difference = row.b - row.a
    elif row.b is not None:
        row.verdict, row.how = "changed", "was not known"
    elif row.a is not None:
        reason = getattr(b, "reasons", {}).get(key, "none is recorded")
        row.verdict, row.how = "worse", f"the figure is lost: {reason}"
    return row


def _judge_by_bootstrap(row: Row, above: Array, below: Array, higher_is_better: bool, units: str) -> None:
    """Judge by the interval of Σ above / Σ below over units drawn with replacement; both f64 `[units]`."""
    row.how = row.method = f"paired bootstrap over {len(below)} {units}"
    if len(below) < LEAST_UNITS:
        row.how = f"{len(below)} {units} are too few for an interval"
        return
    sums_RF = resample_sums(np.column_stack([above, below]))
    with np.errstate(divide="ignore", invalid="ignore"):
        row.ci95 = percentile_interval(sums_RF[:, 0] / sums_RF[:, 1])
    if row.ci95 is not None:
        row.judge(row.ci95[0] > 0 or row.ci95[1] < 0, higher_is_better=higher_is_better)
