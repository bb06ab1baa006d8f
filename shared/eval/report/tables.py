"""The report's figures, tables, and the text forms of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shared.eval.report.compare import Outcomes
from shared.eval.results import (
    BenchmarkResult,
    Draft,
    Fidelity,
    Interval,
    Latency,
    PairedDifference,
    Proof,
    Result,
    Spread,
    Timing,
)

BASELINE = "student_ce"
LABELS = {"teacher": "Teacher", "student_kd": "Distilled student", BASELINE: "Cross-entropy baseline"}
BENCHMARKS = {"humaneval": "HumanEval", "mbpp": "MBPP"}  # a result's folder → the benchmark if no result names another
SHARES = {
    "share_parses": "programs that parse",
    "share_runs": "programs that run",
    "share_some_assert": "programs that pass an assert",
}
NOT_HELD_OUT = "not held out: the model was scored on documents that it was trained on"


class Benchmark(NamedTuple):
    """A benchmark by the folder of its results and the name that they give it."""

    key: str
    title: str


@dataclass(frozen=True, slots=True)
class Measured:
    """A model's figure with its 95 % interval where known; None, with the reason, where it is not known."""

    value: float | None = None
    ci95: Interval | None = None
    reason: str | None = None


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
    draft: Draft | None = None
    benchmarks: Mapping[str, BenchmarkResult] = field(default_factory=dict)
    outcomes: Mapping[str, Outcomes] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    run_digest: str | None = None
    cached_nll: float | None = None

    @property
    def timing(self) -> Timing | None:
        """The model's own part of `latency`."""
        return self.latency.models.get(self.name) if self.latency else None

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration that a student was trained with."""
        config: Mapping[str, Any] = self.run.get("config") or {}
        return config

    @property
    def in_text(self) -> str:
        """The label inside a sentence."""
        return self.label.lower() if self.label in LABELS.values() else self.label

    @property
    def the(self) -> str:
        """The label at the beginning of a sentence."""
        return f"The {self.label.lower()}" if self.label in LABELS.values() else self.label

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
        figure = FIGURES[key]
        part = self._part(figure.part)
        if part is None:
            if key == "heldout_nll_nats" and self.cached_nll is not None:
                return Measured(self.cached_nll)
            return Measured(reason=f"not measured: there is no {PARTS[figure.part][0]} for this model")
        if part is self.fidelity and self.fidelity.seen_in_training:
            return Measured(reason=NOT_HELD_OUT)
        value: float | None = getattr(part, figure.name)
        if value is None:
            return Measured(reason=getattr(part, "reasons", {}).get(figure.name, "unknown"))
        return Measured(value, getattr(part, "ci95", {}).get(figure.name))

    def title(self, key: str) -> str:
        """The name of the benchmark in a folder."""
        return self.benchmarks[key].benchmark if key in self.benchmarks else BENCHMARKS[key]

    def result_of(self, benchmark: Benchmark) -> BenchmarkResult | None:
        """The model's result of this benchmark."""
        result = self.benchmarks.get(benchmark.key)
        return result if result and result.benchmark == benchmark.title else None

    def score(self, benchmark: Benchmark, name: str = "pass_at_1", k: str = "") -> Measured:
        """A benchmark's figure by its name in the result; pass@k for a given k."""
        result = self.result_of(benchmark)
        if result is None:
            other = self.benchmarks.get(benchmark.key)
            why = f"{benchmark.key}/result.json is of {other.benchmark}" if other else ""
            return Measured(reason=f"not measured: {why or f'there is no {benchmark.key}/result.json for this model'}")
        value, ci95 = getattr(result, name), result.ci95 if name == "pass_at_1" else None
        if k:
            value, ci95 = (result.pass_at_k or {}).get(k), (result.pass_at_k_ci95 or {}).get(k)
        unknown = f"fewer than {k} samples of each problem" if k else "unknown"
        return Measured(value, ci95, None if value is not None else result.reasons.get(name, unknown))

    def _part(self, part: str) -> Any:
        """The part of the results that holds a figure."""
        timing = self.timing
        if part.startswith("batch "):
            return timing and timing.batches.get(part.removeprefix("batch "))
        sizes = timing or (self.fidelity and self.fidelity.model)
        return {"sizes": sizes, "timing": timing, "fidelity": self.fidelity, "draft": self.draft}[part]


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
CARDS = {  # what the page opens with: key of a figure → title, unit; the first benchmark's card stands third
    "parameters": ("Size", "parameters"),
    "decode_tokens_per_second": ("Speed", "tokens per second ↑"),
    "heldout_nll_nats": ("Held-out NLL", "nats per token ↓"),
    "kl_to_teacher_nats": ("KL to the teacher", "nats per token ↓"),
    "top1_agreement": ("Top-1 agreement", "with the teacher ↑"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One model's figure: its text, None where not measured, with the reason; `notes` stand under it."""

    value: str | None
    notes: Sequence[str] = ()
    reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """A row of the comparison, a cell per model."""

    group: str
    label: str
    cells: Sequence[Cell]


def ratio_to_teacher(key: str, model: Model, teacher: Model) -> float | None:
    """A figure over the teacher's; None where one is missing, or times come from different machines."""
    figure, value, teachers = FIGURES[key], model.value(key), teacher.value(key)
    if not figure.less or not value or not teachers:
        return None
    machines = [m.latency.machine if m.latency else None for m in (model, teacher)]
    return None if figure.less in ("faster", "slower") and machines[0] != machines[1] else value / teachers


def cards(models: Sequence[Model], teacher: Model) -> list[tuple[str, str, list[tuple[str, Cell]]]]:
    """The six figures that the page opens with: title, unit, and each model's label and cell."""
    made = [
        (title, unit, [(model.label, _cell(key, model, teacher)) for model in models])
        for key, (title, unit) in CARDS.items()
    ]
    first = benchmarks_of(models)[0]
    solved = [(model.label, _score_cell(model, first)) for model in models]
    return [*made[:2], (first.title, "pass@1 ↑", solved), *made[2:]]


def comparison_rows(models: Sequence[Model], teacher: Model) -> list[TableRow]:
    """The comparison of all models."""
    rows = [
        TableRow(group=figure.group, label=figure.label, cells=[_cell(key, model, teacher) for model in models])
        for key, figure in FIGURES.items()
        if figure.always or any(model.value(key) is not None for model in models)
    ]
    if any(model.draft for model in models):
        rows.append(TableRow(group="As the teacher's draft", label="Output equal to plain greedy decoding",
                             cells=[_equality_cell(model) for model in models]))  # fmt: skip
    return rows + [row for benchmark in benchmarks_of(models) for row in _benchmark_rows(models, benchmark)]


def _cell(key: str, model: Model, teacher: Model) -> Cell:
    """A model's figure with its 95 % interval and what it is against the teacher's."""
    figure, measured, notes = FIGURES[key], model.measured(key), []
    if measured.value is None:
        return Cell(value=None, reason=measured.reason)
    if measured.ci95:
        notes.append("–".join(format(bound * figure.scale, figure.form) for bound in measured.ci95))
    ratio, teachers = ratio_to_teacher(key, model, teacher), teacher.value(key)
    if model is not teacher and ratio is not None:
        notes.append(ratio_text(ratio, figure.less, figure.more))
    elif model is not teacher and key == "heldout_nll_nats" and teachers is not None:
        notes.append(signed(measured.value - teachers))
    return Cell(value=figure.text(measured.value), notes=notes)


def _equality_cell(model: Model) -> Cell:
    """Whether decoding with the model's drafts gave the teacher's own tokens."""
    if model.draft is None:
        return Cell(value=None, reason=model.measured("acceptance_rate").reason)
    parts = [f"{dtype} {part.num_equal}/{part.num_prompts}" for dtype, part in model.draft.equality.items()]
    return Cell(value="yes" if model.draft.equal_to_greedy else ", ".join(parts))


# --- benchmarks ------------------------------------------------------------------------------------------------------


def benchmarks_of(models: Sequence[Model]) -> list[Benchmark]:
    """The benchmarks that models were given; HumanEval where none was in its folder."""
    found = [
        Benchmark(key, model.benchmarks[key].benchmark)
        for key in BENCHMARKS for model in models if key in model.benchmarks
    ]  # fmt: skip
    absent = [] if found and found[0].key == "humaneval" else [Benchmark("humaneval", BENCHMARKS["humaneval"])]
    return list(dict.fromkeys(absent + found))


def solved(model: Model, benchmark: Benchmark) -> str | None:
    """Problems solved of problems run, such as "0/164", or pass@1 where samples were drawn; None where not measured."""
    result, pass_at_1 = model.result_of(benchmark), model.score(benchmark).value
    if result is None or pass_at_1 is None:
        return None
    return (
        f"{pass_at_1:.1%}" if is_sampled(result) else f"{round(pass_at_1 * result.num_problems)}/{result.num_problems}"
    )


def is_sampled(result: BenchmarkResult) -> bool:
    """Whether its completions were drawn, and not greedy."""
    return result.settings.get("decoding") != "greedy"


def _score_cell(model: Model, benchmark: Benchmark, name: str = "pass_at_1", k: str = "") -> Cell:
    score = model.score(benchmark, name, k)
    if score.value is None:
        return Cell(value=None, reason=score.reason)
    text = solved(model, benchmark) if name == "pass_at_1" else f"{score.value:.1%}"
    return Cell(value=text, notes=[f"{score.ci95[0]:.1%}–{score.ci95[1]:.1%}"] if score.ci95 else [])


def _benchmark_rows(models: Sequence[Model], benchmark: Benchmark) -> list[TableRow]:
    """Solved problems, further pass@k, and how far programs that fail got."""
    results = [result for model in models if (result := model.result_of(benchmark))]
    first = " pass@1" if any(map(is_sampled, results)) else " solved (greedy pass@1)"
    ks = sorted({int(k) for result in results for k in result.pass_at_k or {}} - {1})
    rows = [(first, "pass_at_1", ""), *((f" pass@{k}", "pass_at_k", str(k)) for k in ks)]
    rows += [(f": {label}", name, "") for name, label in SHARES.items()
             if any(getattr(result, name) is not None for result in results)]  # fmt: skip
    return [
        TableRow(group="Programs written", label=f"{benchmark.title}{label} ↑",
                 cells=[_score_cell(model, benchmark, name, k) for model in models])
        for label, name, k in rows
    ]  # fmt: skip


# --- text forms ------------------------------------------------------------------------------------------------------


def proof_rows(proof: Proof) -> list[dict[str, str]]:
    """The proof's variants as text."""
    return [
        {
            "name": variant.name,
            "settings": ", ".join(
                f"{label} {value}"
                for label, value in (("loss", variant.loss), ("K", variant.k), ("lr", variant.learning_rate),
                                     ("epochs", f"{variant.epochs:g}"))
                if value is not None
            ),
            "nll": _spread(variant.test_nll),
            "kl": _spread(variant.test_kl),
            "nll_difference": _difference(variant.versus_ce),
            "kl_difference": _difference(variant.versus_ce and variant.versus_ce.kl),
            "p": f"{variant.versus_ce.p_holm:.2g}" if variant.versus_ce else "–",
            "significant": ("yes" if variant.versus_ce.significant else "no") if variant.versus_ce else "–",
        }
        for variant in proof.variants
    ]  # fmt: skip


def _spread(spread: Spread) -> str:
    return f"{spread.mean:.3f}" + ("" if spread.sd is None else f" ± {spread.sd:.3f}")


def _difference(paired: PairedDifference | None) -> str:
    return f"{signed(paired.difference)} ({' to '.join(map(signed, paired.ci95))})" if paired else "–"


def signed(value: float, form: str = "+.3f") -> str:
    """A difference with its sign; minus is a minus, not a hyphen."""
    return format(value, form).replace("-", "−")


def ratio_text(ratio: float, less: str, more: str) -> str:
    """A ratio in words: 0.04 → "25× smaller"; within half a percent of 1, "no" more or less."""
    if abs(ratio - 1) < 0.005:
        return f"no {more}"
    factor = max(ratio, 1 / ratio)
    return f"{factor:{',.0f' if factor >= 10 else '.2g'}}× {less if ratio < 1 else more}"


def count(value: float) -> str:
    """A large number in thousands, millions or billions."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:,.1f}{unit}"
    return f"{value:,.0f}"
