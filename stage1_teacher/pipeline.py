"""The labelling loop: while one shard's rows are encoded and written, the teacher computes the next."""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shared import tracking
from shared.cache.writer import CacheWriter
from shared.checkpoints import ModelFiles, device_kinds, load_frozen
from shared.config import to_dict
from shared.errors import DistillError
from shared.files import read_json, sha256_json, write_json
from shared.machine import versions
from shared.process import log
from shared.progress import progress
from stage1_teacher.capture import Rows, capture, to_arrays
from stage1_teacher.config import TeacherConfig
from stage1_teacher.disk import least_bytes_per_token, require_room
from stage1_teacher.logits import LogitSource
from stage1_teacher.ranks import Ranks

if TYPE_CHECKING:
    from stage1_teacher.documents import Piece

MIN_BATCH_TOKENS = 64


class Background:
    """One task at a time beside the caller, so that at most one shard waits; its exception reaches the caller."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "shard-writer")
        self._task: Future[None] | None = None

    def start(self, task: Callable[..., None], *arguments: Any) -> None:
        """Run a task once the one before it is done, and raise what that one raised."""
        self.wait()
        self._task = self._pool.submit(task, *arguments)

    def check(self) -> None:
        """Raise what the task has raised, if it has ended."""
        if self._task is not None and self._task.done():
            self.wait()

    def wait(self) -> None:
        """Return once the task is done, and raise what it raised."""
        if self._task is not None:
            task, self._task = self._task, None
            task.result()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()  # what the teacher has computed is written in any case


def label_shards(
    writer: CacheWriter,
    config: TeacherConfig,
    files: ModelFiles,
    shards: Mapping[int, range],
    all_pieces: Sequence["Piece"],
    ranks: Ranks,
    run: tracking.Run,
) -> None:
    """Load the teacher, label shards and write them, each by the positions of its pieces.

    Raises:
        ConfigError: the disk cannot hold what is left, at the bytes per token of what is written.
        DistillError: what else labelling or writing a shard raises; shards before it are kept.
    """
    placement = ranks.placement(config.device_map, config.gpus_per_teacher)
    teacher = load_frozen(files.path, dtype=config.dtype, load_in=config.load_in, **placement)
    processes = "" if ranks.world_size == 1 else f" in each of {ranks.world_size} processes"
    devices = device_kinds(teacher)
    log(
        f"teacher {files.name}: {teacher.num_parameters() / 1e6:,.1f} M parameters, {config.dtype} on "
        f"{', '.join(devices)}{processes}, {torch.get_num_threads()} CPU threads; "
        f"licence {files.licence or 'unknown'}"
    )
    source = LogitSource(teacher, config.head_rows)
    if source.notice:
        log(f"the float32 head cannot be used: {source.notice}; taking the model's own {config.dtype} logits")
    if source.head_width != writer.build["head_width"]:
        raise DistillError(
            "the head does not fit the configuration", expected=writer.build["head_width"], got=source.head_width
        )
    extra = {
        "fused_head": source.notice is None,
        "devices": devices,
        "versions": versions("codedistill", "torch", "transformers", "tokenizers", "numpy", "h5py")
        | {"zlib": zlib.ZLIB_RUNTIME_VERSION},  # it decides the bytes of gzip
    }
    tokenizer_size = writer.build["tokenizer_size"]
    tokens = sum(len(all_pieces[i].ids) for positions in shards.values() for i in positions)

    least = least_bytes_per_token(config, tokenizer_size)
    written_bytes = written_tokens = 0

    def write(shard: int, positions: range, pieces: Sequence["Piece"], rows: Rows, token_budget: int) -> None:
        nonlocal written_bytes, written_tokens
        bytes_per_token = written_bytes / written_tokens if written_tokens else least
        require_room(writer.path, (tokens - written_tokens) * ranks.world_size, bytes_per_token)
        arrays, excess_mass = to_arrays(rows, pieces, config, tokenizer_size)
        own = {
            "token_budget": token_budget,
            "excess_mass": excess_mass,
            "first_document": writer.num_documents_before + positions.start,
        }
        record = writer.write_shard(shard, arrays, extra | own)
        statistics = record["statistics"]
        written_bytes += record["bytes"]
        written_tokens += statistics["tokens"]
        run.log(
            {
                "tokens_per_second": bar.rate(),
                "captured_mass": statistics["captured_mass"]["1"]["mean"],
                **{key: statistics[key] for key in ("teacher_nll_nats", "entropy_nats", "gold_in_topk")},
            },
            step=shard,
        )

    def advance(amount: int) -> None:
        background.check()
        bar.advance(amount)

    share = "labelling" if ranks.world_size == 1 else f"labelling, rank 0's share of {ranks.world_size}"
    with progress(share, tokens, "tokens") as bar, Background() as background:
        for shard, positions in shards.items():
            pieces = [all_pieces[i] for i in positions]
            rows, token_budget = _capture_within_memory(source, pieces, config, tokenizer_size, advance)
            background.start(write, shard, positions, pieces, rows, token_budget)
        background.wait()


def _capture_within_memory(
    source: LogitSource,
    pieces: Sequence["Piece"],
    config: TeacherConfig,
    tokenizer_size: int,
    advance: Callable[[int], None],
) -> tuple[Rows, int]:
    """Capture a shard, again from its start with half the token budget wherever the device runs out of memory.

    Raises:
        DistillError: one document alone is too much.
    """
    token_budget = config.batch_tokens
    while True:
        done = 0

        def count(amount: int) -> None:
            nonlocal done
            done += amount
            advance(amount)

        try:
            return capture(source, pieces, config, tokenizer_size, token_budget, count), token_budget
        except torch.OutOfMemoryError as error:
            advance(-done)
            longest = max(len(piece.ids) for piece in pieces)
            if token_budget <= longest:  # the longest document was a batch alone already
                raise DistillError(
                    "the device has too little memory for one document alone",
                    where=f"a document of {longest:,} tokens, shard of {len(pieces)} documents",
                    got=str(error).partition("\n")[0],
                    fix="a smaller --max-length, `head_rows` in the configuration file, or --gpus-per-teacher",
                ) from None
            token_budget //= 2
        torch.cuda.empty_cache()
        log(f"out of memory; this shard is done again with batches of {token_budget:,} tokens")


def run_file(out: Path) -> Path:
    """Holds the id of an unfinished build's W&B run: beside wandb's own files, for it is no part of the cache."""
    return out.parent / "wandb" / f"{out.name}.json"


@contextlib.contextmanager
def tracked(writer: CacheWriter, config: TeacherConfig) -> Iterator[tracking.Run]:
    """The build's W&B run: the one it had before it was stopped, if any."""
    file, build = run_file(writer.path), sha256_json(writer.build)
    earlier = read_json(file) if file.is_file() else {"build": None}
    with tracking.start(
        "teacher-build",
        name=writer.path.name,
        config=to_dict(config),
        directory=writer.path.parent,
        run_id=earlier["id"] if earlier["build"] == build else None,
    ) as run:
        if run.id:
            with contextlib.suppress(OSError):  # tracking is an aid: where it cannot be noted, a resume is a new run
                write_json(file, {"id": run.id, "build": build})
        yield run
