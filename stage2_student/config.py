"""Stage 2's configuration: every default lives here; TOML profiles and `--set` override."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from shared.cache.reader import Cache
from shared.config import load_config, unknown_key
from shared.errors import CacheMismatchError, ConfigError, require, require_range
from shared.model.gpt import PRESETS, GPTConfig
from shared.records import convert

# Arguments that codedistill sets itself, or that would undo what it promises, and what to use instead.
FIXED: dict[str, str | None] = dict.fromkeys((
    "output_dir", "data_seed", "label_names", "remove_unused_columns", "resume_from_checkpoint", "report_to",
    "prediction_loss_only", "average_tokens_across_devices", "ignore_data_skip", "train_sampling_strategy",
    "save_only_model",
)) | {
    "vocab_size": "the student's vocabulary is the cache's",
    "label_smoothing_factor": "`label_smoothing`",
    "push_to_hub": "push a finished student: `codedistill student export RUN --out DIR --push-to-hub OWNER/NAME`",
    "auto_find_batch_size": "`--batch-tokens auto`, which keeps the blocks per optimizer step",
}  # fmt: skip
# Types with their range, as `require_range` takes it.
Count = Annotated[int, {"at_least": 1}]
Natural = Annotated[int, {"at_least": 0}]
Positive = Annotated[float, {"above": 0}]
NotNegative = Annotated[float, {"at_least": 0}]
Share = Annotated[float, {"at_least": 0, "at_most": 1}]
ShareBelowOne = Annotated[float, {"at_least": 0, "below": 1}]
Mixture = Annotated[float, {"above": 0, "below": 1}]

SIZES = tuple(field.name for field in dataclasses.fields(GPTConfig) if field.name != "vocab_size")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """What `student train` does. Names that `TrainingArguments` has mean what they mean there.

    Attributes:
        preset: the student's sizes, by name (`shared.model.gpt.PRESETS`).
        alpha: weight of the distillation term; the rest is cross-entropy. 0 reads no soft labels.
        temperature: T of the distillation term, one of the cache's grid.
        loss: `ghost` keeps the teacher's tail as one bucket beside the K ids; `truncated` drops it (biased); `sampled`
            uses only the cache's samples of the full distribution, `hybrid` the K ids and samples of the tail;
            `dense` uses the teacher's full distribution at T = 1, which `student proof` writes to a file.
        divergence: of teacher p and student q: `forward` KL(p‖q), `reverse` KL(q‖p), `jsd`, or against their mixture m
            `skewed-forward` KL(p‖m) and `skewed-reverse` KL(q‖m). `sampled` and `hybrid` have only the forward one.
        beta: the teacher's share of the mixture in `jsd`, which is beta·KL(p‖m) + (1 − beta)·KL(q‖m).
        skew: the teacher's share of the mixture in the skewed divergences.
        k: use the best k entries of each row, the others' mass joins the tail; 0 uses all that the cache holds.
        label_smoothing: share of cross-entropy's target that is spread evenly over the vocabulary, where alpha is 0;
            the losses that are logged leave it out.
        targets: `completion` trains where the cache's loss mask says so, `all` on every token that has a next one.
        block_size: tokens of a packed block.
        num_train_epochs: passes over the cache's documents, each packed anew; the last may be a part of one.
        validation_fraction: without a validation cache, the share of the documents of each cache that is held out.
        max_steps: optimizer steps; above 0 it wins over `num_train_epochs`.
        eval_steps, save_steps: 0 evaluates, or saves, only at the end.
        save_minutes: also save at the first step that ends so long after the last checkpoint; 0 never does.
        save_total_limit: complete checkpoints kept.
        bf16: mixed precision; weights and optimizer stay in float32.
        torch_compile: compile the layers, and on CUDA the loss; `auto` does where CUDA and a C compiler are.
        seed: initial weights, data order and held-out documents.
        early_stopping_patience: evaluations without a better `eval_loss` after which training stops; 0 never stops it.
        early_stopping_threshold: by how much a loss must be lower to be better, in nats.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
            max_position_embeddings, rope_theta, norm_epsilon, initializer_range: sizes (`shared.model.gpt.GPTConfig`);
            None is the preset's. The vocabulary is the cache's.
        init_embedding: a model with the cache's tokenizer, by directory or Hub id, from whose embedding the student's
            starts, in its leading directions (`project_embedding`); empty draws it from the seed.
        training: further `TrainingArguments`, passed on as they are.
    """

    preset: str = "gpt-125m"
    alpha: Share = 0.7
    temperature: Positive = 1.0
    loss: Literal["ghost", "truncated", "sampled", "hybrid", "dense"] = "ghost"
    divergence: Literal["forward", "reverse", "jsd", "skewed-forward", "skewed-reverse"] = "forward"
    beta: Mixture = 0.5
    skew: Mixture = 0.1
    k: Natural = 0
    label_smoothing: ShareBelowOne = 0.0
    targets: Literal["completion", "all"] = "completion"
    block_size: Count = 512
    per_device_train_batch_size: Count = 8
    per_device_eval_batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    num_train_epochs: Positive = 4
    validation_fraction: ShareBelowOne = 0.0
    max_steps: int = -1
    learning_rate: Positive = 1e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: NotNegative = 0.05
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    logging_steps: Count = 10
    eval_steps: Natural = 0
    save_steps: Natural = 200
    save_minutes: NotNegative = 0.0
    save_total_limit: Count = 2
    bf16: bool = True
    torch_compile: bool | Literal["auto"] = "auto"
    dataloader_num_workers: Natural = 0
    seed: Natural = 0
    early_stopping_patience: Natural = 0
    early_stopping_threshold: NotNegative = 0.0
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    max_position_embeddings: int | None = None
    rope_theta: float | None = None
    norm_epsilon: float | None = None
    initializer_range: float | None = None
    init_embedding: str = ""
    training: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.preset in PRESETS, "unknown preset", where="preset", expected=" | ".join(PRESETS), got=self.preset)
        for name, hint in typing.get_type_hints(StudentConfig, include_extras=True).items():
            for bounds in getattr(hint, "__metadata__", ()):
                require_range(getattr(self, name), name, **bounds)
        require(
            not (self.label_smoothing and self.alpha),
            "distillation has the teacher's labels in place of smoothed ones",
            where="label_smoothing, alpha",
            expected="label_smoothing=0, or alpha=0",
            got=f"label_smoothing={self.label_smoothing:g}, alpha={self.alpha:g}",
        )
        require(
            not self.uses_samples or self.divergence == "forward",
            "samples estimate only the forward divergence",
            where="loss, divergence",
            expected="divergence=forward, or loss=ghost or truncated",
            got=f"loss={self.loss}, divergence={self.divergence}",
        )
        require(
            not (self.uses_samples and self.k),
            "samples were drawn beside all entries of a row, or in place of them",
            where="loss, k",
            expected="k=0, or loss=ghost or truncated",
            got=f"loss={self.loss}, k={self.k}",
        )
        dense = {"divergence": "forward", "k": 0, "temperature": 1.0, "targets": "completion"}
        require(
            self.loss != "dense" or all(getattr(self, name) == value for name, value in dense.items()),
            "the full distribution is stored at T = 1, for the loss mask's targets, and has the forward divergence",
            where="loss=dense",
            expected=", ".join(f"{name}={value}" for name, value in dense.items()),
        )
        positions = self.student_sizes().max_position_embeddings
        require(
            self.block_size <= positions,
            "blocks are longer than the student's positions",
            where="block_size",
            expected=f"at most max_position_embeddings = {positions}",
            got=self.block_size,
        )

    def student_sizes(self, **changes: Any) -> GPTConfig:
        """The sizes to build, and `changes` to them, such as the cache's `vocab_size`.

        Raises:
            ConfigError: sizes that do not go together.
        """
        given = {name: value for name in SIZES if (value := getattr(self, name)) is not None}
        return dataclasses.replace(PRESETS[self.preset], **given | changes)

    @property
    def uses_samples(self) -> bool:
        """Whether the loss needs the cache's sampled targets."""
        return self.loss in ("sampled", "hybrid")


def require_labels(config: StudentConfig, cache: Cache) -> None:
    """Check that a cache holds what the loss needs.

    Raises:
        ConfigError: fewer entries per row than `k`, no samples, samples from elsewhere, or at a temperature below T.
    """
    require(config.k <= cache.width, "the cache holds fewer entries per row",
            where=cache.path, expected=f"k at most {cache.width}", got=config.k)  # fmt: skip
    if not config.uses_samples:
        return
    wanted = {"sampled": "full", "hybrid": "tail"}[config.loss]
    try:
        samples = cache.sampling
    except CacheMismatchError as error:
        raise ConfigError(
            f"loss={config.loss} needs sampled targets, and the cache holds none",
            where=cache.path,
            fix=f"build the cache with samples of the {wanted} distribution, or loss=ghost",
        ) from error
    require(samples.drawn_from == wanted, f"loss={config.loss} needs other samples than the cache holds",
            where=cache.path, expected=f"samples_from={wanted}", got=f"samples_from={samples.drawn_from}")  # fmt: skip
    require(
        config.temperature <= samples.temperature,
        "samples cannot stand for a flatter distribution: a few of them would carry all the weight",
        where=cache.path,
        expected=f"temperature at most samples_temperature={samples.temperature:g}",
        got=f"temperature={config.temperature:g}",
    )


def student_config(*layers: Mapping[str, Any]) -> StudentConfig:
    """Resolve a config from layers of overrides; a later layer wins.

    Keys that only `TrainingArguments` has are checked against its types and go to `training`.

    Raises:
        ConfigError: an unknown key, a key that cannot be set, or a value of another type.
    """
    from transformers import TrainingArguments  # takes seconds, and `--help` needs none of it

    ours = {field.name for field in dataclasses.fields(StudentConfig)} - {"training"}
    hints = typing.get_type_hints(TrainingArguments)
    theirs = {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments) if field.init}
    own: dict[str, Any] = {}
    training: dict[str, Any] = {}
    for key, value in {key: value for layer in layers for key, value in layer.items()}.items():
        if key in FIXED or key.startswith("hub_"):
            fix = FIXED["push_to_hub" if key.startswith("hub_") else key]
            raise ConfigError("this key cannot be set", where=key, got=repr(value), fix=fix)
        if key in ours:
            own[key] = value
        elif key in theirs:
            hint = bool if key == "fsdp" and isinstance(value, bool) else theirs[key]
            training[key] = convert(value, hint, where=f"TrainingArguments.{key}")
        else:
            raise unknown_key(key, ours | theirs.keys() - FIXED.keys(), "StudentConfig")
    return load_config(StudentConfig, own, {"training": training})
