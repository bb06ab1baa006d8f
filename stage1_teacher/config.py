"""Stage 1's configuration: every default and its help text live here; TOML profiles and options override."""

from dataclasses import dataclass, field
from typing import Any, Literal

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


def _option(default: Any, help: str, metavar: str | None = None) -> Any:
    """A field that is an option of the command line, too."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """What `teacher build` does.

    Most fields are options of the command line and say there what they are. These are not:

    Attributes:
        temperatures: the grid at which the mass outside the row is stored; holds 1.
        head_rows: rows that go through the LM head at once, by default 192 on a CPU and 2,048 on a GPU; their float32
            logits are the largest buffer.
    """

    teacher: str = _option("", "Any causal language model: a Hub id or a directory (safetensors).", "ID|DIR")
    revision: str | None = _option(None, "Branch, tag or commit of a Hub id; the commit is recorded.", "REV")
    dataset: str = _option(
        "",
        "mbpp, stdlib, a Hub id, or .jsonl[.gz|.zst] and .parquet: a file, folder, glob, or list with commas.",
        "NAME|FILE",
    )
    split: str = _option("train", "The data set's split.", "NAME")
    dataset_config: str | None = _option(
        None, "Which of a Hub data set's configurations; also owner/name:config.", "NAME"
    )
    dataset_revision: str | None = _option(
        None, "Branch, tag or commit of a Hub data set; the commit is recorded.", "REV"
    )
    columns: str | None = _option(
        None, "Names of your columns, such as text=content or prompt=question,completion=answer.", "OURS=THEIRS,…"
    )
    limit_docs: int | None = _option(None, "Use only the first N documents.", "N")
    top_k: int = _option(64, "Logits kept per token.", "K")
    top_p: float | None = _option(None, "Keep fewer than K once they cover this probability, such as 0.98.", "P")
    temperatures: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    codec: Literal["f16", "q"] = _option("q", "q: about 3 bits per logit; f16: half precision.")
    filter: Literal["gzip", "zstd"] = _option(
        "gzip", "Compression of the shards; zstd reads faster and needs hdf5plugin on both sides."
    )
    # A longer document, which is never cut for it, is a shard by itself.
    shard_tokens: int = _option(32_768, "Approximate tokens per shard.", "N")
    batch_tokens: int = _option(1_024, "Max tokens per batch, padding included.", "N")
    head_rows: int | None = None
    decontaminate: str = _option(
        "auto", "Leave out text of humaneval,mbpp:test,exercises; auto: of those at hand; none: nothing.", "NAMES"
    )
    max_length: int | None = _option(None, "Longest document in tokens; by default the teacher's positions.", "N")
    on_long: Literal["split", "truncate", "drop"] = _option("split", "What to do with longer documents.")
    max_lossy: float = _option(
        0.1, "Largest share of documents that may change in an encode-decode round trip.", "SHARE"
    )
    # Chats open and close as their template has them.
    open_with: str = _option("auto", "Token before each document: auto, none, bos, eos or a special token.", "TOKEN")
    close_with: str = _option("auto", "Token after each document; the same choices.", "TOKEN")
    dtype: Literal["bfloat16", "float16", "float32"] = _option(
        "bfloat16", "Precision of the teacher's backbone; the head runs in float32."
    )
    load_in: Literal["8bit", "4bit"] | None = _option(None, "Quantise the teacher's weights; needs bitsandbytes.")
    samples: int | None = _option(None, "Also store S sampled ids per token.", "S")
    samples_from: Literal["full", "tail"] = _option(
        "full", "Sample from all ids, or only from those outside the top k."
    )
    samples_temperature: float = _option(1.0, "Sampling temperature, one of the cache's grid (0.5, 1, 1.5, 2).", "T")
    device_map: str = _option("auto", "Where layers go: auto, cpu, cuda:0, …", "MAP")
    gpus_per_teacher: int | None = _option(None, "GPUs for the teacher of each process.", "G")

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
