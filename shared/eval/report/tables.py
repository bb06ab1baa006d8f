"""The report's models, figures and tables, and the text forms of all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shared.eval import results
from shared.eval.report.compare import Outcomes
from shared.eval.results import BenchmarkResult, Fidelity, Interval, Latency, Result

BASELINE = "student_ce"
LABELS = {"teacher": "Teacher", "student_kd": "Distilled student", BASELINE: "Cross-entropy baseline"}
BENCHMARKS = {"humaneval": "HumanEval", "mbpp": "MBPP"}  # a result's folder → the benchmark if no result names another
SHARES = {
    "share_parses": "programs that parse",
    "share_runs": "programs that run",
    "share_some_assert": "programs that pass an assert",
}
NOT_HELD_OUT = "not held out: the model was scored on documents that it was trained on"


class Measured(NamedTuple):
    """A model's figure with its 95 % interval where known; None, with the reason, where it is not known."""

    value: float | None = None
    ci95: Interval | None = None
    reason: str | None = None


class Benchmark(NamedTuple):
    """A benchmark by the folder of its results and the name that they give it."""

    key: str
    title: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model's results; None or absent where not measured.

    Args:
        name: of its folder of results.
        label: for the reader.
        fidelity, latency, draft: see `shared.eval.results`; the latency may hold other models too.
        benchmarks: by folder, see `BENCHMARKS`; `outcomes` of each problem likewise.
        run: a student's run.json; empty where there is none. `run_digest` is the digest of the model in its folder.
        cached_nll: the teacher's NLL as a cache recorded it, if the teacher itself was not scored.
    """

    name: str
    label: str
    fidelity: Fidelity | None = None
    latency: Latency | None = None
    draft: results.Draft | None = None
    benchmarks: Mapping[str, BenchmarkResult] = field(default_factory=dict)
    outcomes: Mapping[str, Outcomes] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    run_digest: str | None = None
    cached_nll: float | None = None

    @property
    def in_text(self) -> str:
        """The label inside a sentence."""
        return self.label.lower() if self.label in LABELS.values() else self.label

    @property
    def the(self) -> str:
        """The label at the beginning of a sentence."""
        return f"The {self.in_text}" if self.label in LABELS.values() else self.label

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration that a student was trained with."""
        config: Mapping[str, Any] = self.run.get("config") or {}
        return config

    @property
    def timing(self) -> results.Timing | None:
        """The model's own part of `latency`."""
        return self.latency.models.get(self.name) if self.latency else None

    @property
    def results(self) -> dict[str, Result]:
        """All results, by kind."""
        found = {"fidelity": self.fidelity, "latency": self.latency, "draft": self.draft, **self.benchmarks}
        return {kind: result for kind, result in found.items() if result}

    @property
    def digests(self) -> dict[str, str]:
        """The digest of the model by the kind of result that records it; `run` is that of the run's folder now."""
        found = {"run": self.run_digest}
        for kind, result in self.results.items():
            of = result.inputs
            found[kind] = of.get("models", {}).get(self.name) or of.get("student") or of.get("model")
        return {kind: digest for kind, digest in found.items() if digest}

    def value(self, key: str) -> float | None:
        """A figure by its key in `FIGURES`; None where it is not known."""
        return self.measured(key).value

    def measured(self, key: str) -> Measured:
        """A figure by its key in `FIGURES`."""
        figure, part = FIGURES[key], self._part(FIGURES[key].part)
        if part is None and key == "heldout_nll_nats" and self.cached_nll is not None:
            return Measured(self.cached_nll)
        if part is None:
            return Measured(reason=f"not measured: there is no {PARTS[figure.part][0]} for this model")
        if isinstance(part, Fidelity) and part.seen_in_training:
            return Measured(reason=NOT_HELD_OUT)
        value: float | None = getattr(part, figure.name)
        if value is None:
            return Measured(reason=getattr(part, "reasons", {}).get(figure.name, "unknown"))
        return Measured(value, getattr(part, "ci95", {}).get(figure.name))

    def _part(self, part: str) -> Any:
        """The part of the results that holds a figure."""
        timing = self.timing
        if part.startswith("batch "):
            return timing and timing.batches.get(part.removeprefix("batch "))
        sizes = timing or (self.fidelity and self.fidelity.model)
        return {"sizes": sizes, "timing": timing, "fidelity": self.fidelity, "draft": self.draft}[part]

    def benchmark(self, key: str) -> Benchmark:
        """The benchmark in a folder."""
        return Benchmark(key, self.benchmarks[key].benchmark if key in self.benchmarks else BENCHMARKS[key])

    def result_of(self, benchmark: Benchmark) -> BenchmarkResult | None:
        """The model's result of this benchmark."""
        return self.benchmarks.get(benchmark.key) if self.benchmark(benchmark.key) == benchmark else None

    def score(self, benchmark: Benchmark, name: str = "pass_at_1", k: str = "") -> Measured:
        """A benchmark's figure by its name in the result; pass@k for a given k."""
        result, other = self.result_of(benchmark), self.benchmark(benchmark.key)
        if result is None:
            why = f"there is no {benchmark.key}/result.json for this model"
            why = why if other == benchmark else f"{benchmark.key}/result.json is of {other.title}"
            return Measured(reason=f"not measured: {why}")
        value, ci95 = getattr(result, name), result.ci95 if name == "pass_at_1" else None
        if k:
            value, ci95 = (result.pass_at_k or {}).get(k), (result.pass_at_k_ci95 or {}).get(k)
        unknown = f"fewer than {k} samples of each problem" if k else "unknown"
        return Measured(value, ci95, None if value is not None else result.reasons.get(name, unknown))

    def solved(self, benchmark: Benchmark) -> str | None:
        """Problems solved of problems run, such as "0/164", or pass@1 of samples; None where not measured."""
        result, pass_at_1 = self.result_of(benchmark), self.score(benchmark).value
        if result is None or pass_at_1 is None:
            return None
        count = f"{round(pass_at_1 * result.num_problems)}/{result.num_problems}"
        return f"{pass_at_1:.1%}" if result.is_sampled else count


PARTS = {  # of the results → the file that holds it, and the heading of its figures
    "sizes": ("latency.json or fidelity.json", "Size"),
    "timing": ("latency.json", "Size"),
    "batch 1": ("latency.json", "Speed"),
    "batch 8": ("latency.json", "Speed"),
    "fidelity": ("fidelity.json", "Held-out text"),
    "draft": ("draft.json", "As the teacher's draft"),
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of the comparison: where a figure is found and how it is shown.

    Args:
        part: one of `PARTS`.
        name: the figure's name there.
        label: of the row.
        form: a format specification.
        scale: factor before it is shown.
        less, more: what a ratio to the teacher below 1 means, and one above 1; no ratio where empty.
        always: whether the row stands even where no model has the figure.
    """

    part: str
    name: str
    label: str
    form: str = ".3f"
    scale: float = 1
    less: str = ""
    more: str = ""
    always: bool = False

    @property
    def group(self) -> str:
        """The heading that the row stands under."""
        return "Size" if self.more == "larger" else PARTS[self.part][1]

    def text(self, value: float) -> str:
        """A value as the reader sees it."""
        return count(value) if self.name == "parameters" else f"{value * self.scale:{self.form}}"


_SIZE: dict[str, Any] = {"less": "smaller", "more": "larger"}
_MB: dict[str, Any] = _SIZE | {"form": ",.1f", "scale": 1e-6}
_MS: dict[str, Any] = {"form": ",.1f", "less": "faster", "more": "slower"}
_RATE: dict[str, Any] = {"form": ",.1f", "less": "slower", "more": "faster"}
_SHARE: dict[str, Any] = {"form": ".1%"}
FIGURES = {  # the report's key → the row
    "parameters": Figure("sizes", "parameters", "Parameters", always=True, **_SIZE),
    "embedding_share": Figure("sizes", "embedding_share", "Parameters in embeddings and output head", **_SHARE),
    "bytes": Figure("sizes", "bytes", "Weights on disk, MB", always=True, **_MB),
    "memory_bytes": Figure("timing", "memory_bytes", "Weights in memory, MB", **_MB),
    "peak_bytes": Figure("batch 1", "peak_bytes", "Peak memory, MB ↓", **_MB),
    "heldout_nll_nats": Figure("fidelity", "nll_nats", "Held-out NLL, nats per token ↓", always=True),
    "heldout_bits_per_byte": Figure("fidelity", "bits_per_byte", "Held-out bits per byte ↓", always=True),
    "kl_to_teacher_nats": Figure("fidelity", "kl_to_teacher_nats", "KL to the teacher, nats per token ↓", always=True),
    "reverse_kl_nats": Figure("fidelity", "reverse_kl_nats", "Reverse KL, nats per token ↓"),
    "top1_agreement": Figure("fidelity", "top1_agreement", "Top-1 agreement with the teacher ↑", always=True, **_SHARE),
    "top5_agreement": Figure("fidelity", "top5_agreement", "Top-5 agreement with the teacher ↑", **_SHARE),
    "ece": Figure("fidelity", "ece", "Expected calibration error ↓"),
    "prefill_ms": Figure("batch 1", "prefill_ms", "Prefill, ms ↓", always=True, **_MS),
    "decode_tokens_per_second": Figure("batch 1", "decode_tokens_per_second", "Decode, tokens per second ↑",
                                       always=True, **_RATE),
    **{
        f"decode_ms_{key}_batch_{batch}": Figure(f"batch {batch}", f"decode_ms_{key}",
                                                 f"Decode step, batch {batch}, {label}, ms ↓", **_MS)
        for batch in (1, 8) for key, label in (("p50", "median"), ("p95", "p95"))
    },
    "tokens_per_second_per_watt": Figure("batch 1", "tokens_per_second_per_watt",
                                         "Decode, tokens per second per watt ↑", **_RATE),
    "acceptance_rate": Figure("draft", "acceptance_rate", "Drafted tokens kept ↑", **_SHARE),
    "mean_accepted_length": Figure("draft", "mean_accepted_length", "Drafted tokens kept per pass of the teacher ↑",
                                   ".2f"),
    "draft_speedup": Figure("draft", "speedup", "Speed-up of the teacher ↑", ".2f"),
}  # fmt: skip
CARDS = {  # what the page opens with, beside the first benchmark: key of a figure → title, unit
    "parameters": ("Size", "parameters"),
    "decode_tokens_per_second": ("Speed", "tokens per second ↑"),
    "heldout_nll_nats": ("Held-out NLL", "nats per token ↓"),
    "kl_to_teacher_nats": ("KL to the teacher", "nats per token ↓"),
    "top1_agreement": ("Top-1 agreement", "with the teacher ↑"),
}


class Cell(NamedTuple):
    """One model's figure: its text, None where not measured, with the reason; `notes` stand under it."""

    value: str | None
    notes: Sequence[str] = ()
    reason: str | None = None


class TableRow(NamedTuple):
    """A row of the comparison, a cell per model."""

    group: str
    label: str
    cells: Sequence[Cell]


def cards(models: Sequence[Model]) -> list[TableRow]:
    """The six figures that the page opens with, as rows whose group is the unit."""
    rows = [TableRow(unit, title, [_cell(key, model, models[0]) for model in models])
            for key, (title, unit) in CARDS.items()]  # fmt: skip
    first = benchmarks_of(models)[0]
    rows.insert(2, TableRow("pass@1 ↑", first.title, [_score_cell(model, first) for model in models]))
    return rows


def comparison_rows(models: Sequence[Model]) -> list[TableRow]:
    """The comparison of all models, the teacher first."""
    rows = [
        TableRow(figure.group, figure.label, [_cell(key, model, models[0]) for model in models])
        for key, figure in FIGURES.items()
        if figure.always or any(model.value(key) is not None for model in models)
    ]
    if any(model.draft for model in models):
        cells = [_equality_cell(model) for model in models]
        rows.append(TableRow("As the teacher's draft", "Output equal to plain greedy decoding", cells))
    return rows + [row for benchmark in benchmarks_of(models) for row in _benchmark_rows(models, benchmark)]


def _cell(key: str, model: Model, teacher: Model) -> Cell:
    """A model's figure with its 95 % interval and what it is against the teacher's."""
    figure, (value, ci95, reason), teachers = FIGURES[key], model.measured(key), teacher.value(key)
    if value is None:
        return Cell(None, reason=reason)
    notes = ["–".join(format(bound * figure.scale, figure.form) for bound in ci95)] if ci95 else []
    if model is not teacher and (words := ratio_words(key, model, teacher)):
        notes.append(words)
    elif model is not teacher and key == "heldout_nll_nats" and teachers is not None:
        notes.append(signed(value - teachers))
    return Cell(figure.text(value), notes)


def _equality_cell(model: Model) -> Cell:
    """Whether decoding with the model's drafts gave the teacher's own tokens."""
    if model.draft is None:
        return Cell(None, reason=model.measured("acceptance_rate").reason)
    parts = [f"{dtype} {part.num_equal}/{part.num_prompts}" for dtype, part in model.draft.equality.items()]
    return Cell("yes" if model.draft.equal_to_greedy else ", ".join(parts))


def benchmarks_of(models: Sequence[Model]) -> list[Benchmark]:
    """The benchmarks that models were given; HumanEval where none was in its folder."""
    found = [model.benchmark(key) for key in BENCHMARKS for model in models if key in model.benchmarks]
    absent = [] if found and found[0].key == "humaneval" else [Benchmark("humaneval", BENCHMARKS["humaneval"])]
    return list(dict.fromkeys(absent + found))


def _benchmark_rows(models: Sequence[Model], benchmark: Benchmark) -> list[TableRow]:
    """Solved problems, further pass@k, and how far programs that fail got."""
    found = [result for model in models if (result := model.result_of(benchmark))]
    solved = " pass@1" if any(result.is_sampled for result in found) else " solved (greedy pass@1)"
    ks = sorted({int(k) for result in found for k in result.pass_at_k or {}} - {1})
    figures = [(solved, "pass_at_1", ""), *((f" pass@{k}", "pass_at_k", str(k)) for k in ks)]
    figures += [(f": {label}", name, "") for name, label in SHARES.items()
                if any(getattr(result, name) is not None for result in found)]  # fmt: skip
    return [
        TableRow("Programs written", f"{benchmark.title}{label} ↑",
                 [_score_cell(model, benchmark, name, k) for model in models])
        for label, name, k in figures
    ]  # fmt: skip


def _score_cell(model: Model, benchmark: Benchmark, name: str = "pass_at_1", k: str = "") -> Cell:
    value, ci95, reason = model.score(benchmark, name, k)
    if value is None:
        return Cell(None, reason=reason)
    text = model.solved(benchmark) if name == "pass_at_1" else f"{value:.1%}"
    return Cell(text, ["–".join(f"{bound:.1%}" for bound in ci95)] if ci95 else [])


# --- text forms ------------------------------------------------------------------------------------------------------


def ratio_to_teacher(key: str, model: Model, teacher: Model) -> float | None:
    """A figure over the teacher's; None where one is missing, or times come from different machines."""
    figure, value, teachers = FIGURES[key], model.value(key), teacher.value(key)
    if not figure.less or not value or not teachers:
        return None
    machines = [m.latency.machine if m.latency else None for m in (model, teacher)]
    return None if figure.less in ("faster", "slower") and machines[0] != machines[1] else value / teachers


def ratio_words(key: str, model: Model, teacher: Model) -> str | None:
    """The ratio to the teacher in words."""
    ratio = ratio_to_teacher(key, model, teacher)
    return None if ratio is None else ratio_text(ratio, FIGURES[key].less, FIGURES[key].more)


def ratio_text(ratio: float, less: str, more: str) -> str:
    """A ratio in words: 0.04 → "25× smaller"; within half a percent of 1, "no" more or less."""
    if abs(ratio - 1) < 0.005:
        return f"no {more}"
    factor = max(ratio, 1 / ratio)
    return f"{factor:{',.0f' if factor >= 10 else '.2g'}}× {less if ratio < 1 else more}"


def signed(value: float, form: str = "+.3f") -> str:
    """A difference with its sign; minus is a minus, not a hyphen."""
    return format(value, form).replace("-", "−")


def spread_text(spread: results.Spread) -> str:
    """Mean and standard deviation."""
    return f"{spread.mean:.3f}" + ("" if spread.sd is None else f" ± {spread.sd:.3f}")


def paired_text(paired: results.PairedDifference | None) -> str:
    """A paired difference with its interval."""
    return f"{signed(paired.difference)} ({' to '.join(map(signed, paired.ci95))})" if paired else "–"


def count(value: float) -> str:
    """A large number in thousands, millions or billions."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:,.1f}{unit}"
    return f"{value:,.0f}"
