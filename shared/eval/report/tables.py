"""The report's figures, tables, and the text forms of both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.eval.report.compare import Outcomes
from shared.eval.results import BatchTiming, BenchmarkResult, Draft, Fidelity, Latency, ModelFacts, Proof, Timing

BASELINE = "student_ce"
LABELS = {"teacher": "Teacher", "student_kd": "Distilled student", BASELINE: "Cross-entropy baseline"}
BENCHMARKS = {"humaneval": "HumanEval", "mbpp": "MBPP"}
SHARES = {
    "share_parses": "programs that parse",
    "share_runs": "programs that run",
    "share_some_assert": "programs that pass an assert",
}
NOT_HELD_OUT = "not held out: the model was scored on documents that it was trained on"


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model's results; None or absent where not measured.

    Args:
        name: of its folder of results.
        label: for the reader.
        fidelity, latency, draft: see `shared.eval.results`; the latency may hold other models too.
        benchmarks: by `humaneval` or `mbpp`; `outcomes` of each problem likewise.
        run: a student's run.json; empty where there is none.
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

    def value(self, key: str) -> float | None:
        """A figure by its key in `FIGURES`; None where `reason` says why."""
        figure, part = FIGURES[key], self._part(key)
        if key == "heldout_nll_nats" and self.cached_nll is not None and part is None:
            return self.cached_nll
        if part is None or (isinstance(part, Fidelity) and part.seen_in_training):
            return None
        value: float | None = getattr(part, figure.path)
        return value

    def reason(self, key: str) -> str | None:
        """Why a figure is None."""
        if self.value(key) is not None:
            return None
        part = self._part(key)
        if part is None:
            return f"not measured: there is no {FIGURES[key].file} for this model"
        if isinstance(part, Fidelity):
            return NOT_HELD_OUT if part.seen_in_training else part.reasons.get(FIGURES[key].path, "unknown")
        reasons: Mapping[str, str] = getattr(part, "reasons", {})
        return reasons.get(FIGURES[key].path, "unknown")

    def interval(self, key: str) -> list[float] | None:
        """A figure's 95 % interval."""
        intervals: Mapping[str, list[float] | None] = getattr(self._part(key), "ci95", {})
        return intervals.get(FIGURES[key].path) if self.value(key) is not None else None

    def _part(self, key: str) -> Fidelity | ModelFacts | BatchTiming | Draft | None:
        """The part of the results that holds a figure."""
        figure, timing = FIGURES[key], self.timing
        if figure.batch:
            return timing.batches.get(figure.batch) if timing else None
        sizes = timing or (self.fidelity.model if self.fidelity else None)
        parts = {"sizes": sizes, "timing": timing, "fidelity": self.fidelity, "draft": self.draft}
        return parts[figure.part]


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of the comparison: where a figure is found and how it is shown.

    Args:
        part: of the results: `sizes`, `timing`, `fidelity` or `draft`.
        path: the figure's name there.
        label: of the row.
        form: a format specification.
        scale: factor before it is shown.
        less: what a ratio to the teacher below 1 means; no ratio where empty.
        more: what one above 1 means.
        always: whether the row stands even where no model has the figure.
        batch: batch size of a time.
    """

    part: str
    path: str
    label: str
    form: str = ".3f"
    scale: float = 1
    less: str = ""
    more: str = ""
    always: bool = False
    batch: str = ""

    @property
    def file(self) -> str:
        """The result file."""
        files = {"sizes": "latency.json or fidelity.json", "timing": "latency.json"}
        return files.get(self.part, f"{self.part}.json")

    @property
    def group(self) -> str:
        """The heading that the row stands under."""
        if self.part == "sizes" or self.more == "larger":
            return "Size"
        return {"fidelity": "Held-out text", "timing": "Speed", "draft": "As the teacher's draft"}[self.part]

    @property
    def is_time(self) -> bool:
        """Whether it holds only for one machine."""
        return self.less in ("faster", "slower")

    def text(self, value: float) -> str:
        """A value as the reader sees it."""
        return count(value) if self.path == "parameters" else f"{value * self.scale:{self.form}}"


_SIZE: dict[str, Any] = {"less": "smaller", "more": "larger"}
_MB: dict[str, Any] = _SIZE | {"form": ",.1f", "scale": 1e-6}
_MS: dict[str, Any] = {"form": ",.1f", "less": "faster", "more": "slower"}
_RATE: dict[str, Any] = {"form": ",.1f", "less": "slower", "more": "faster", "batch": "1"}
_SHARE: dict[str, Any] = {"form": ".1%"}
FIGURES = {  # the report's key → the row
    "parameters": Figure("sizes", "parameters", "Parameters", always=True, **_SIZE),
    "embedding_share": Figure("sizes", "embedding_share", "Parameters in embeddings and output head", **_SHARE),
    "bytes": Figure("sizes", "bytes", "Weights on disk, MB", always=True, **_MB),
    "memory_bytes": Figure("timing", "memory_bytes", "Weights in memory, MB", **_MB),
    "peak_bytes": Figure("timing", "peak_bytes", "Peak memory, MB ↓", **_MB, batch="1"),
    "heldout_nll_nats": Figure("fidelity", "nll_nats", "Held-out NLL, nats per token ↓", always=True),
    "heldout_bits_per_byte": Figure("fidelity", "bits_per_byte", "Held-out bits per byte ↓", always=True),
    "kl_to_teacher_nats": Figure("fidelity", "kl_to_teacher_nats", "KL to the teacher, nats per token ↓", always=True),
    "reverse_kl_nats": Figure("fidelity", "reverse_kl_nats", "Reverse KL, nats per token ↓"),
    "top1_agreement": Figure("fidelity", "top1_agreement", "Top-1 agreement with the teacher ↑", always=True, **_SHARE),
    "top5_agreement": Figure("fidelity", "top5_agreement", "Top-5 agreement with the teacher ↑", **_SHARE),
    "ece": Figure("fidelity", "ece", "Expected calibration error ↓"),
    "prefill_ms": Figure("timing", "prefill_ms", "Prefill, ms ↓", always=True, **_MS, batch="1"),
    "decode_tokens_per_second": Figure(
        "timing", "decode_tokens_per_second", "Decode, tokens per second ↑", always=True, **_RATE
    ),
    **{
        f"decode_ms_{key}_batch_{batch}": Figure(
            "timing", f"decode_ms_{key}", f"Decode step, batch {batch}, {label}, ms ↓", **_MS, batch=batch
        )
        for batch in ("1", "8")
        for key, label in (("p50", "median"), ("p95", "p95"))
    },
    "tokens_per_second_per_watt": Figure(
        "timing", "tokens_per_second_per_watt", "Decode, tokens per second per watt ↑", **_RATE
    ),
    "acceptance_rate": Figure("draft", "acceptance_rate", "Drafted tokens kept ↑", **_SHARE),
    "mean_accepted_length": Figure(
        "draft", "mean_accepted_length", "Drafted tokens kept per pass of the teacher ↑", ".2f"
    ),
    "draft_speedup": Figure("draft", "speedup", "Speed-up of the teacher ↑", ".2f"),
}
CARDS = {  # what the page opens with: key of a figure, or a benchmark → title, unit
    "parameters": ("Size", "parameters"),
    "decode_tokens_per_second": ("Speed", "tokens per second ↑"),
    "humaneval": ("HumanEval", "pass@1 ↑"),
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
    value, teachers = model.value(key), teacher.value(key)
    if not FIGURES[key].less or not value or not teachers:
        return None
    machines = [m.latency.machine if m.latency else None for m in (model, teacher)]
    return None if FIGURES[key].is_time and machines[0] != machines[1] else value / teachers


def cell(key: str, model: Model, teacher: Model) -> Cell:
    """A model's figure with its 95 % interval and what it is against the teacher's."""
    figure, value, notes = FIGURES[key], model.value(key), []
    if value is None:
        return Cell(value=None, reason=model.reason(key))
    if interval := model.interval(key):
        notes.append("–".join(format(bound * figure.scale, figure.form) for bound in interval))
    ratio, teachers = ratio_to_teacher(key, model, teacher), teacher.value(key)
    if model is not teacher and ratio is not None:
        notes.append(ratio_text(ratio, figure.less, figure.more))
    elif model is not teacher and key == "heldout_nll_nats" and teachers is not None:
        notes.append(signed(value - teachers))
    return Cell(value=figure.text(value), notes=notes)


def cards(models: Sequence[Model], teacher: Model) -> list[tuple[str, str, list[tuple[str, Cell]]]]:
    """The six figures that the page opens with: title, unit, and each model's label and cell."""

    def of(key: str, model: Model) -> Cell:
        return _solved_cell(model, key) if key in BENCHMARKS else cell(key, model, teacher)

    return [(title, unit, [(m.label, of(key, m)) for m in models]) for key, (title, unit) in CARDS.items()]


def comparison_rows(models: Sequence[Model], teacher: Model) -> list[TableRow]:
    """The comparison of all models."""
    rows = [
        TableRow(group=figure.group, label=figure.label, cells=[cell(key, model, teacher) for model in models])
        for key, figure in FIGURES.items()
        if figure.always or any(model.value(key) is not None for model in models)
    ]
    if any(model.draft for model in models):
        rows.append(TableRow(group="As the teacher's draft", label="Output equal to plain greedy decoding",
                             cells=[_equality_cell(model) for model in models]))  # fmt: skip
    return rows + [row for key in BENCHMARKS for row in _benchmark_rows(models, key)]


def _equality_cell(model: Model) -> Cell:
    """Whether decoding with the model's drafts gave the teacher's own tokens."""
    if model.draft is None:
        return Cell(value=None, reason=model.reason("acceptance_rate"))
    parts = [f"{dtype} {part.num_equal}/{part.num_prompts}" for dtype, part in model.draft.equality.items()]
    return Cell(value="yes" if model.draft.equal_to_greedy else ", ".join(parts))


def solved(model: Model, benchmark: str) -> str | None:
    """Problems solved of problems run, such as "0/164", or pass@1 where samples were drawn; None where not measured."""
    result = model.benchmarks.get(benchmark)
    if result is None or result.pass_at_1 is None:
        return None
    if is_sampled(result):
        return f"{result.pass_at_1:.1%}"
    return f"{round(result.pass_at_1 * result.num_problems)}/{result.num_problems}"


def is_sampled(result: BenchmarkResult) -> bool:
    """Whether its completions were drawn, and not greedy."""
    return result.settings.get("decoding") != "greedy"


def score_reason(model: Model, benchmark: str, key: str) -> str:
    """Why a benchmark's figure is None."""
    result = model.benchmarks.get(benchmark)
    if result is None:
        return f"not measured: there is no {benchmark}/result.json for this model"
    return result.reasons.get(key, "unknown")


def _percents(interval: Sequence[float] | None) -> list[str]:
    return [f"{interval[0]:.1%}–{interval[1]:.1%}"] if interval else []


def _solved_cell(model: Model, benchmark: str) -> Cell:
    text, result = solved(model, benchmark), model.benchmarks.get(benchmark)
    if text is None or result is None:
        return Cell(value=None, reason=score_reason(model, benchmark, "pass_at_1"))
    return Cell(value=text, notes=_percents(result.ci95))


def _benchmark_rows(models: Sequence[Model], key: str) -> list[TableRow]:
    """Solved problems, further pass@k, and how far programs that fail got."""
    results = [model.benchmarks.get(key) for model in models]
    known = [result for result in results if result]
    if not known and key != "humaneval":
        return []

    def row(label: str, make: Callable[[BenchmarkResult], Cell], figure: str) -> TableRow:
        absent = [Cell(value=None, reason=score_reason(model, key, figure)) for model in models]
        cells = [make(result) if result else none for result, none in zip(results, absent, strict=True)]
        return TableRow(group="Programs written", label=f"{BENCHMARKS[key]}{label} ↑", cells=cells)

    def at_k(k: str) -> Callable[[BenchmarkResult], Cell]:
        def make(result: BenchmarkResult) -> Cell:
            value = (result.pass_at_k or {}).get(k)
            interval = (result.pass_at_k_ci95 or {}).get(k)
            return Cell(value=None) if value is None else Cell(value=f"{value:.1%}", notes=_percents(interval))

        return make

    def share(name: str) -> Callable[[BenchmarkResult], Cell]:
        def make(result: BenchmarkResult) -> Cell:
            value = getattr(result, name)
            return Cell(value=None if value is None else f"{value:.1%}", reason=result.reasons.get(name))

        return make

    title = "pass@1" if any(map(is_sampled, known)) else "solved (greedy pass@1)"
    rows = [TableRow(group="Programs written", label=f"{BENCHMARKS[key]} {title} ↑",
                     cells=[_solved_cell(model, key) for model in models])]  # fmt: skip
    ks = sorted({int(k) for result in known for k in result.pass_at_k or {}} - {1})
    rows += [row(f" pass@{k}", at_k(str(k)), "pass_at_k") for k in ks]
    shares = {name: label for name, label in SHARES.items() if any(getattr(r, name) is not None for r in known)}
    return rows + [row(f": {label}", share(name), name) for name, label in shares.items()]


def proof_rows(proof: Proof) -> list[dict[str, str]]:
    """The proof's variants as text."""
    rows = []
    for variant in proof.variants:
        versus, settings = variant.versus_ce, {"loss": variant.loss, "K": variant.k, "lr": variant.learning_rate}
        settings["epochs"] = f"{variant.epochs:g}"
        differences = (versus, versus.kl) if versus else ()
        texts = [f"{signed(d.difference)} ({signed(d.ci95[0])} to {signed(d.ci95[1])})" for d in differences]
        spreads = [f"{s.mean:.3f}" + ("" if s.sd is None else f" ± {s.sd:.3f}")
                   for s in (variant.test_nll, variant.test_kl)]  # fmt: skip
        rows.append({
            "name": variant.name,
            "settings": ", ".join(f"{label} {value}" for label, value in settings.items() if value is not None),
            "nll": spreads[0],
            "kl": spreads[1],
            "nll_difference": texts[0] if versus else "–",
            "kl_difference": texts[1] if versus else "–",
            "p": f"{versus.p_holm:.2g}" if versus else "–",
            "significant": ("yes" if versus.significant else "no") if versus else "–",
        })  # fmt: skip
    return rows


# --- text forms ------------------------------------------------------------------------------------------------------


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
