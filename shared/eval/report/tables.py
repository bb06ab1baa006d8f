"""The report's models and figures: one description of each figure, from which both pages, JSON and ratios follow."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shared.eval import results
from shared.eval.report.compare import Outcomes
from shared.eval.results import BENCHMARKS, BenchmarkResult, Fidelity, Interval, Latency, Result

BASELINE = "student_ce"
LABELS = {"teacher": "Teacher", "student_kd": "Distilled student", BASELINE: "Cross-entropy baseline"}
SHARES = {
    "share_parses": "programs that parse",
    "share_runs": "programs that run",
    "share_some_assert": "programs that pass an assert",
}
NOT_HELD_OUT = "not held out: the model was scored on documents that it was trained on"


class Cell(NamedTuple):
    """A model's figure and its text, with its 95 % interval where known; None, with the reason, where it is not known.

    `notes` stand under it: the interval, and the figure against the teacher's.
    """

    value: float | None = None
    ci95: Interval | None = None
    reason: str | None = None
    text: str = "–"
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Figure:
    """Where a figure is found and how it is shown."""

    part: str  # of the results, see `PARTS`; or the title of a benchmark
    name: str  # there; of several in a dictionary, `key` is the one meant
    label: str
    form: str = ".3f"  # `show` says instead how the part is put
    scale: float = 1
    less: str = ""  # what a ratio to the teacher below 1 means, `more` one above 1; no ratio where empty
    more: str = ""
    always: bool = False  # whether the row stands even where no model has the figure
    key: str = ""
    interval: str = "ci95"  # the name of its interval, or of a dictionary of intervals
    show: Callable[[Any], str] | None = None

    @property
    def group(self) -> str:
        """The heading that the row stands under."""
        return "Size" if self.more == "larger" else PARTS.get(self.part, ("", "Programs written"))[1]

    def text(self, value: float) -> str:
        """A value as the reader sees it."""
        return f"{value * self.scale:{self.form}}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model's results; None or absent where not measured."""

    name: str  # of its folder of results
    label: str  # for the reader
    fidelity: Fidelity | None = None
    latency: Latency | None = None  # may hold other models too
    draft: results.Draft | None = None
    benchmarks: Mapping[str, BenchmarkResult] = field(default_factory=dict)  # by folder, see `BENCHMARKS`
    outcomes: Mapping[str, Outcomes] = field(default_factory=dict)  # likewise
    run: Mapping[str, Any] = field(default_factory=dict)  # a student's run.json
    log: Sequence[Mapping[str, Any]] = ()  # its training_log.jsonl
    run_digest: str | None = None  # of the model in the run's folder now
    cached_nll: float | None = None  # the teacher's as a cache recorded it, if the teacher itself was not scored

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
        return self.cell(FIGURES[key]).value

    def cell(self, figure: Figure) -> Cell:
        """A figure, without what it is against the teacher's."""
        part = self._part(figure.part)
        if part is None and figure is FIGURES["heldout_nll_nats"] and self.cached_nll is not None:
            return Cell(self.cached_nll, text=figure.text(self.cached_nll))
        if part is None:
            if self.timing and figure.part in self.timing.not_timed:
                return Cell(reason=self.timing.not_timed[figure.part])
            if self.timing and self.timing.not_served and figure.part.startswith("served "):
                return Cell(reason=self.timing.not_served)
            missing = PARTS.get(figure.part, (f"result of {figure.part}", ""))[0]
            return Cell(reason=f"not measured: there is no {missing} for this model")
        if isinstance(part, Fidelity) and part.seen_in_training:
            return Cell(reason=NOT_HELD_OUT)
        value, ci95 = (getattr(part, name, None) for name in (figure.name, figure.interval))
        if figure.key:
            value = (value or {}).get(figure.key)
        if value is None:
            unknown = f"fewer than {figure.key} samples of each problem" if figure.key else "unknown"
            return Cell(reason=getattr(part, "reasons", {}).get(figure.name, unknown))
        ci95 = ci95.get(figure.key or figure.name) if isinstance(ci95, dict) else ci95
        notes = ["–".join(map(figure.text, ci95))] if ci95 else []
        return Cell(value, ci95, None, figure.show(part) if figure.show else figure.text(value), notes)

    def _part(self, part: str) -> Any:
        """The part of the results that holds a figure."""
        timing = self.timing
        if part.startswith("batch "):
            return timing and timing.batches.get(part.removeprefix("batch "))
        if part.startswith("served "):
            return timing and timing.served.get(part.removeprefix("served "))
        parts = {"sizes": timing or (self.fidelity and self.fidelity.model), "timing": timing,
                 "fidelity": self.fidelity, "draft": self.draft}  # fmt: skip
        return parts[part] if part in parts else self.result_of(part)

    def result_of(self, benchmark: str) -> BenchmarkResult | None:
        """The model's result of the benchmark of this title."""
        return next((result for result in self.benchmarks.values() if result.benchmark == benchmark), None)


# --- figures ---------------------------------------------------------------------------------------------------------


def count(value: float) -> str:
    """A large number in thousands, millions or billions."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:,.1f}{unit}"
    return f"{value:,.0f}"


def _equality(draft: results.Draft) -> str:
    """Whether decoding with drafts gave the teacher's own tokens."""
    parts = [f"{dtype} {part.num_equal}/{part.num_prompts}" for dtype, part in draft.equality.items()]
    return "yes" if draft.equal_to_greedy else ", ".join(parts)


PARTS = {  # of the results → the file that holds it, and the heading of its figures
    "sizes": ("latency.json or fidelity.json", "Size"),
    "timing": ("latency.json", "Size"),
    "batch 1": ("latency.json", "Speed"),
    "batch 8": ("latency.json", "Speed"),
    "served 1": ("latency.json", "Speed"),
    "served 8": ("latency.json", "Speed"),
    "fidelity": ("fidelity.json", "Held-out text"),
    "draft": ("draft.json", "As the teacher's draft"),
}
_SIZE: dict[str, Any] = {"less": "smaller", "more": "larger"}
_MB: dict[str, Any] = _SIZE | {"form": ",.1f", "scale": 1e-6}
_MS: dict[str, Any] = {"form": ",.1f", "less": "faster", "more": "slower"}
_RATE: dict[str, Any] = {"form": ",.1f", "less": "slower", "more": "faster"}
_SHARE: dict[str, Any] = {"form": ".1%"}
FIGURES = {  # the report's key → the row
    "parameters": Figure("sizes", "parameters", "Parameters", always=True, show=lambda facts: count(facts.parameters),
                         **_SIZE),
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
    "decode_tokens_per_second": Figure("batch 1", "decode_tokens_per_second", "Decode, eager, tokens per second ↑",
                                       always=True, **_RATE),
    "served_decode_tokens_per_second": Figure("served 1", "decode_tokens_per_second",
                                              "Decode, as served, tokens per second ↑", **_RATE),
    **{
        f"decode_ms_{key}_batch_{batch}": Figure(f"batch {batch}", f"decode_ms_{key}",
                                                 f"Decode step, batch {batch}, {label}, ms ↓", **_MS)
        for batch in (1, 8) for key, label in (("p50", "median"), ("p95", "p95"))
    },
    **{
        f"served_decode_ms_p50_batch_{batch}": Figure(f"served {batch}", "decode_ms_p50",
                                                      f"Decode step, as served, batch {batch}, median, ms ↓", **_MS)
        for batch in (1, 8)
    },
    "tokens_per_second_per_watt": Figure("batch 1", "tokens_per_second_per_watt",
                                         "Decode, tokens per second per watt ↑", **_RATE),
    "acceptance_rate": Figure("draft", "acceptance_rate", "Drafted tokens kept ↑", **_SHARE),
    "mean_accepted_length": Figure("draft", "mean_accepted_length", "Drafted tokens kept per pass of the teacher ↑",
                                   ".2f"),
    "draft_speedup": Figure("draft", "speedup", "Speed-up of the teacher, eager ↑", ".2f"),
    "served_draft_speedup": Figure("draft", "served_speedup", "Speed-up of the teacher, as served ↑", ".2f"),
}  # fmt: skip
EQUALITY = Figure("draft", "equal_to_greedy", "Output equal to plain greedy decoding", show=_equality)


class Row(NamedTuple):
    """A figure of every model, the teacher first."""

    figure: Figure
    cells: Sequence[Cell]

    @property
    def is_shown(self) -> bool:
        """Whether it stands in the comparison."""
        return self.figure.always or any(cell.value is not None for cell in self.cells)


def comparison(models: Sequence[Model]) -> dict[str, Row]:
    """Every figure of all models by key; that of a benchmark is such as `HumanEval/pass_at_1`."""
    figures = FIGURES | {"equal_to_greedy": EQUALITY}
    for benchmark, found in benchmarks(models).items():
        for figure in _benchmark_figures(benchmark, [result for _, result in found]):
            figures[f"{benchmark}/{figure.name}{figure.key}"] = figure
    return {key: Row(figure, [_against_teacher(model, figure, models[0]) for model in models])
            for key, figure in figures.items()}  # fmt: skip


def _against_teacher(model: Model, figure: Figure, teacher: Model) -> Cell:
    """A model's figure, with what it is against the teacher's."""
    cell, teachers = model.cell(figure), teacher.cell(figure).value
    if model is teacher or cell.value is None or teachers is None:
        return cell
    ratio = ratio_to_teacher(figure, model, teacher)
    if figure is FIGURES["heldout_nll_nats"]:
        return cell._replace(notes=[*cell.notes, signed(cell.value - teachers)])
    return cell if ratio is None else cell._replace(notes=[*cell.notes, ratio_text(ratio, figure.less, figure.more)])


def benchmarks(models: Sequence[Model]) -> dict[str, list[tuple[Model, BenchmarkResult]]]:
    """Models and their results by benchmark; HumanEval, without any, where none is in its folder."""
    found: dict[str, list[tuple[Model, BenchmarkResult]]] = {}
    for folder in BENCHMARKS:
        for model in models:
            if result := model.benchmarks.get(folder):
                found.setdefault(result.benchmark, []).append((model, result))
        if not found:
            found[BENCHMARKS["humaneval"]] = []
    return found


def _benchmark_figures(title: str, found: Sequence[BenchmarkResult]) -> list[Figure]:
    """Solved problems, further pass@k, and how far programs that fail got."""
    solved = "pass@1" if any(result.is_sampled for result in found) else "solved (greedy pass@1)"
    ks = sorted({int(k) for result in found for k in result.pass_at_k or {}} - {1})
    return [
        Figure(title, "pass_at_1", f"{title} {solved} ↑", ".1%", always=True, show=lambda result: result.solved),
        *(Figure(title, "pass_at_k", f"{title} pass@{k} ↑", ".1%", key=str(k), interval="pass_at_k_ci95") for k in ks),
        *(Figure(title, name, f"{title}: {label} ↑", ".1%", interval="") for name, label in SHARES.items()),
    ]


def speed_key(models: Sequence[Model]) -> str:
    """The figure of decoding speed to show first: as served, where all models that were timed have it."""
    served = [model.value("served_decode_tokens_per_second") for model in models if model.timing]
    return "served_decode_tokens_per_second" if served and None not in served else "decode_tokens_per_second"


# --- text forms ------------------------------------------------------------------------------------------------------


def ratio_to_teacher(figure: Figure, model: Model, teacher: Model) -> float | None:
    """A figure over the teacher's; None where one is missing, or times come from different machines."""
    value, teachers = model.cell(figure).value, teacher.cell(figure).value
    if not figure.less or not value or not teachers:
        return None
    machines = [m.latency.machine if m.latency else None for m in (model, teacher)]
    return None if figure.less in ("faster", "slower") and machines[0] != machines[1] else value / teachers


def ratio_words(key: str, model: Model, teacher: Model) -> str | None:
    """The ratio to the teacher in words."""
    figure, ratio = FIGURES[key], ratio_to_teacher(FIGURES[key], model, teacher)
    return None if ratio is None else ratio_text(ratio, figure.less, figure.more)


def ratio_text(ratio: float, less: str, more: str) -> str:
    """A ratio in words: 0.04 → "25× smaller"; within half a percent of 1, "no" more or less."""
    if abs(ratio - 1) < 0.005:
        return f"no {more}"
    factor = max(ratio, 1 / ratio)
    return f"{factor:{',.0f' if factor >= 10 else '.2g'}}× {less if ratio < 1 else more}"


def signed(value: float, form: str = "+.3f") -> str:
    """A difference with its sign; minus is a minus, not a hyphen."""
    return format(value, form).replace("-", "−")


def difference_cells(row: Mapping[str, Any]) -> list[str]:
    """A judged row of two students in text: both figures, difference, interval or p-value, verdict."""

    def difference(value: float) -> str:
        return f"{signed(100 * value, '+.1f')} pp" if row["is_share"] else signed(value)

    form = ".1%" if row["is_share"] else ".3f"
    sides = ["–" if row[side] is None else format(row[side], form) for side in ("a", "b")]
    judged_by = "–" if row["p_value"] is None else f"p = {row['p_value']:.3g}"
    if row["ci95"]:
        judged_by = " to ".join(map(difference, row["ci95"]))
    change = "–" if row["difference"] is None else difference(row["difference"])
    return [*sides, change, judged_by, "not told apart" if row["verdict"] == "noise" else row["verdict"]]


def variant_cells(variant: results.ProofVariant) -> list[str]:
    """A variant of the proof in text: settings, NLL, its difference, p-value, significance, KL, its difference."""

    def spread(figure: results.Spread) -> str:
        return f"{figure.mean:.3f}" + ("" if figure.sd is None else f" ± {figure.sd:.3f}")

    def paired(figure: results.PairedDifference) -> str:
        return f"{signed(figure.difference)} ({' to '.join(map(signed, figure.ci95))})"

    k, versus = "" if variant.k is None else f", K {variant.k}", variant.versus_ce
    settings = f"loss {variant.loss}{k}, lr {variant.learning_rate}, epochs {variant.epochs:g}"
    if versus is None:
        return [settings, spread(variant.test_nll), "–", "–", "–", spread(variant.test_kl), "–"]
    found = [f"{versus.p_holm:.2g}", "yes" if versus.significant else "no"]
    return [settings, spread(variant.test_nll), paired(versus), *found, spread(variant.test_kl), paired(versus.kl)]
