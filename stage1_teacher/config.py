"""Stage 1's configuration: every default lives here; TOML profiles and options override."""

from dataclasses import dataclass
from typing import Literal

from shared.errors import require, require_range

MAX_STORED = 65_535  # `k` and `samples_counts` are stored in at most 16 bits
BOUNDS: dict[str, tuple[int, int | None]] = {
    "limit_docs": (1, None),
    "top_k": (1, MAX_STORED),
    "samples": (1, MAX_STORED),
    "shard_tokens": (1, None),
    "batch_tokens": (1, None),
    "head_rows": (1, None),
    "gpus_per_teacher": (1, None),
    "max_length": (2, None),
}
MAX_TEMPERATURE = 50.0  # the tail's lower clamp in topk.py is exactly 0 after exp() up to here


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """What `teacher build` does.

    Attributes:
        teacher: a model directory or a Hub id.
        revision: branch, tag or commit of a Hub id; the commit it stands for is recorded.
        dataset: `mbpp`, `stdlib`, data files (`data.tabular.find_data_files`), or a Hub id.
        split: the data set's split.
        dataset_config: which of a Hub data set's configurations; its name is recorded.
        dataset_revision: branch, tag or commit of a Hub data set; the commit it stands for is recorded.
        columns: the data set's names of our columns, such as `prompt=instruction,completion=output`.
        limit_docs: use only the first so many documents.
        top_k: entries kept of each row.
        top_p: of these, keep only the shortest prefix that holds this share of the row's probability at T = 1.
        temperatures: the grid at which the mass outside the row is stored; holds 1.
        codec: how the kept logits are encoded.
        filter: compression of the cache's arrays; zstd needs hdf5plugin here and where the cache is read.
        shard_tokens: most tokens of a shard; a longer document, which is never cut for it, is a shard by itself.
        batch_tokens: most tokens of a batch, padding included.
        head_rows: rows that go through the LM head at once; their float32 logits are the largest buffer.
        max_length: longest document in tokens; None takes the teacher's own limit.
        on_long: what becomes of a longer document.
        max_lossy: share of the documents that the tokenizer may fail to give back as they were; 1 takes any.
        open_with: what a document that is no chat opens with: `auto`, `none`, `bos`, `eos` or a special token
            (`shared.tokenizer.record_ends`); close_with: what it closes with.
        dtype: the backbone's precision. The head always runs in float32.
        device_map: where the layers go, as transformers reads it.
        gpus_per_teacher: GPUs that each process spreads its teacher over.
        load_in: quantise the teacher's weights as it loads; needs bitsandbytes.
        samples: ids to draw for each row as well, stored with their counts.
        samples_from: draw from all ids, or only from those outside the row.
        samples_temperature: the grid temperature to draw at.
    """

    teacher: str = ""
    revision: str | None = None
    dataset: str = ""
    split: str = "train"
    dataset_config: str | None = None
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
    max_lossy: float = 0.1
    open_with: str = "auto"
    close_with: str = "auto"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    device_map: str = "auto"
    gpus_per_teacher: int | None = None
    load_in: Literal["8bit", "4bit"] | None = None
    samples: int | None = None
    samples_from: Literal["full", "tail"] = "full"
    samples_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, (least, most) in BOUNDS.items():
            if (value := getattr(self, name)) is not None:
                require_range(value, f"TeacherConfig.{name}", at_least=least, at_most=most)
        if self.top_p is not None:
            require_range(self.top_p, "TeacherConfig.top_p", above=0, at_most=1)
        require_range(self.max_lossy, "TeacherConfig.max_lossy", at_least=0, at_most=1)
        grid = self.temperatures
        require(
            1.0 in grid and list(grid) == sorted(set(grid)) and all(0 < t <= MAX_TEMPERATURE for t in grid),
            "a temperature grid that cannot be used",
            where="TeacherConfig.temperatures",
            expected=f"ascending values above 0, at most {MAX_TEMPERATURE:g}, 1 among them",
            got=list(grid),
        )
        require(
            self.samples_temperature in grid,
            "samples off the temperature grid",
            where="TeacherConfig.samples_temperature",
            expected=list(grid),
            got=self.samples_temperature,
        )
        require(
            self.samples is None or self.samples_from == "full" or self.top_p is None,
            "samples of the tail with top_p",
            where="TeacherConfig.samples_from",
            expected="rows of a fixed top_k, whose tail is drawn from",
            got=f"top_p {self.top_p}",
            fix="leave top_p out, or draw from the full distribution",
        )
