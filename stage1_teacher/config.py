"""Stage 1's configuration: every default lives here; TOML profiles and options override."""

from dataclasses import dataclass
from typing import Literal

from shared.errors import ConfigError

MAX_TOP_K = 65_535  # `k` is stored in at most 16 bits
MAX_SAMPLES = 65_535  # `samples_counts` likewise
MAX_TEMPERATURE = 50.0  # the tail's lower clamp in topk.py is exactly 0 after exp() up to here


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """What `teacher build` does.

    Attributes:
        teacher: a model directory or a Hub id.
        revision: branch, tag or commit of a Hub id; the commit it stands for is recorded.
        dataset: `mbpp`, `stdlib`, a `.jsonl` or `.parquet` file, or a Hub id.
        split: the data set's split.
        dataset_revision: branch, tag or commit of a Hub data set; the commit it stands for is recorded.
        columns: the data set's own column names, such as `prompt=instruction,completion=output`.
        limit_docs: use only that many documents.
        top_k: entries kept of each row.
        top_p: keep only a row's shortest prefix that holds this much of its probability at T = 1, within top_k.
        temperatures: the grid at which the mass outside the row is stored; holds 1.
        codec: how the kept logits are encoded.
        filter: how the cache's arrays are compressed; zstd needs hdf5plugin here and where the cache is read.
        shard_tokens: tokens of a shard, about: documents are never cut for it.
        batch_tokens: most tokens of a batch, padding included.
        head_rows: rows that go through the LM head at once; their float32 logits are the largest buffer.
        max_length: longest document in tokens; None takes the teacher's own limit.
        on_long: what becomes of a longer document.
        dtype: the backbone's precision. The head always runs in float32.
        device_map: where the layers go, as transformers reads it.
        load_in: quantise the teacher's weights as it loads; needs bitsandbytes.
        samples: ids drawn of each row besides, with their counts; None for none.
        samples_from: draw from the whole distribution, or from what is outside the row.
        samples_temperature: the temperature of the grid that they are drawn at.
    """

    teacher: str = ""
    revision: str | None = None
    dataset: str = ""
    split: str = "train"
    dataset_revision: str | None = None
    columns: str | None = None
    limit_docs: int | None = None
    top_k: int = 64
    top_p: float | None = None
    temperatures: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    codec: Literal["f16", "q"] = "q"
    filter: Literal["gzip", "zstd"] = "gzip"
    shard_tokens: int = 32_768
    batch_tokens: int = 1_024
    head_rows: int = 192
    max_length: int | None = None
    on_long: Literal["split", "truncate", "drop"] = "split"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    device_map: str = "auto"
    gpus_per_teacher: int | None = None
    load_in: Literal["8bit", "4bit"] | None = None
    samples: int | None = None
    samples_from: Literal["full", "tail"] = "full"
    samples_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("limit_docs", "top_k", "shard_tokens", "batch_tokens", "head_rows", "gpus_per_teacher", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    "a value out of range", where=f"TeacherConfig.{name}", expected="at least 1", got=value
                )
        if self.top_k > MAX_TOP_K:
            raise ConfigError(
                "a value out of range", where="TeacherConfig.top_k", expected=f"at most {MAX_TOP_K:,}", got=self.top_k
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(
                "a value out of range", where="TeacherConfig.top_p", expected="above 0, at most 1", got=self.top_p
            )
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(
                "a value out of range", where="TeacherConfig.max_length", expected="at least 2", got=self.max_length
            )
        grid = self.temperatures
        if 1.0 not in grid or list(grid) != sorted(set(grid)) or not all(0 < t <= MAX_TEMPERATURE for t in grid):
            raise ConfigError(
                "a temperature grid that cannot be used",
                where="TeacherConfig.temperatures",
                expected=f"ascending values above 0, at most {MAX_TEMPERATURE:g}, 1 among them",
                got=list(grid),
            )
        self._check_samples()

    def _check_samples(self) -> None:
        if self.samples is not None and self.samples > MAX_SAMPLES:
            raise ConfigError(
                "a value out of range",
                where="TeacherConfig.samples",
                expected=f"at most {MAX_SAMPLES:,}",
                got=self.samples,
            )
        if self.samples_temperature not in self.temperatures:
            raise ConfigError(
                "samples off the temperature grid",
                where="TeacherConfig.samples_temperature",
                expected=list(self.temperatures),
                got=self.samples_temperature,
            )
        if self.samples is not None and self.samples_from == "tail" and self.top_p is not None:
            raise ConfigError(
                "samples of the tail with top_p",
                where="TeacherConfig.samples_from",
                expected="rows of a fixed top_k, whose tail is drawn from",
                got=f"top_p {self.top_p}",
                fix="leave top_p out, or draw from the full distribution",
            )
