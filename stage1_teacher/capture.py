"""The capture loop: batch → rows on the teacher's device → a shard's arrays, encoded while the next shard is computed.

Shapes: N rows of a chunk, S rows of a shard, K entries, G grid temperatures, M samples per row.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from shared import tracking
from shared.batching import plan_batches
from shared.cache.deflate import COMPRESSOR
from shared.cache.format import Array, ShardArrays
from shared.cache.rows import truncate
from shared.cache.writer import CacheWriter
from shared.checkpoints import ModelFiles, device_kinds, load_frozen
from shared.errors import CacheFormatError, DistillError, require
from shared.logits import LogitSource
from shared.machine import versions
from shared.process import local_rank, log, rank, world_size
from shared.progress import Progress, progress
from stage1_teacher.config import TeacherConfig
from stage1_teacher.disk import least_bytes_per_token, require_space
from stage1_teacher.documents import Segment
from stage1_teacher.sampling import draw, to_samples, uniforms
from stage1_teacher.store import TokenStore
from stage1_teacher.topk import CapturedRows, capture_rows

MAX_EXCESS_MASS = 1e-4

# Captured rows of a shard, each chunk beside the numbers that its rows have in the shard: i64 [N].
Captured = list[tuple[Array, CapturedRows]]


# --- the teacher -----------------------------------------------------------------------------------------------------


def load_teacher(config: TeacherConfig, files: ModelFiles) -> tuple[Any, LogitSource]:
    """Load the teacher on this process's devices; its logits come in chunks of the configured rows."""
    model = load_frozen(files.path, config.dtype, load_in=config.load_in, **device_placement(config))
    return model, LogitSource(model, config.head_rows)


def device_placement(config: TeacherConfig) -> dict[str, Any]:
    """Where this process's teacher goes, as arguments of `from_pretrained`.

    One process follows `device_map`. Several, or one with `gpus_per_teacher` G, take G devices each (1 by default):
    those from G · local rank on. Without CUDA all run on the CPU.

    Raises:
        ConfigError: fewer devices than the processes of this machine need.
    """
    if world_size() == 1 and config.gpus_per_teacher is None:
        return {"device_map": config.device_map}
    if not torch.cuda.is_available():
        require(config.gpus_per_teacher is None, "--gpus-per-teacher needs CUDA", got="no CUDA device")
        return {"device_map": "cpu"}
    per_teacher = config.gpus_per_teacher or 1
    devices = range(local_rank() * per_teacher, (local_rank() + 1) * per_teacher)
    require(
        devices.stop <= torch.cuda.device_count(),
        "too few CUDA devices on this machine",
        where=f"local rank {local_rank()}",
        expected=f"devices {devices.start} to {devices.stop - 1}",
        got=torch.cuda.device_count(),
        fix="fewer --nproc-per-node, or a smaller --gpus-per-teacher",
    )
    if per_teacher == 1:
        return {"device_map": {"": devices.start}}
    return {"device_map": "auto", "max_memory": {device: torch.cuda.mem_get_info(device)[0] for device in devices}}


# --- one shard -------------------------------------------------------------------------------------------------------


def capture_shard(
    source: LogitSource,
    segments: Sequence[Segment],
    config: TeacherConfig,
    tokenizer_size: int,
    advance: Callable[[int], None],
) -> Captured:
    """Run one shard's segments through the teacher, batch by batch.

    Args:
        source: the teacher's logits.
        segments: the shard's, in order.
        config: batches, top-k, grid and samples.
        tokenizer_size: ids from here on are masked.
        advance: called with the number of tokens after each batch.

    Returns:
        What is kept of each row, on the teacher's device.
    """
    lengths, ends, tokens = _layout(segments)
    uniform_SM = _uniforms(segments, config.samples) if config.samples else None
    captured: Captured = []
    for batch in plan_batches(lengths, config.batch_tokens):
        # A segment's last token predicts nothing: rows are the tokens before it, in the shard's order.
        rows_N = np.concatenate([np.arange(ends[i], ends[i + 1] - 1) for i in batch])
        real_BT = torch.arange(lengths[batch[0]] - 1) < torch.tensor([[lengths[i] - 1] for i in batch])
        ids_BT = torch.zeros(real_BT.shape, dtype=torch.int64)
        ids_BT[real_BT] = torch.from_numpy(tokens[rows_N])
        for logits_NV in source.chunks(ids_BT, real_BT) if len(rows_N) else ():
            chunk_N, rows_N = rows_N[: len(logits_NV)], rows_N[len(logits_NV) :]
            gold_N = torch.from_numpy(tokens[chunk_N + 1]).to(logits_NV.device)
            uniform_NM = None if uniform_SM is None else torch.from_numpy(uniform_SM[chunk_N]).to(logits_NV.device)
            captured.append((chunk_N, _capture_chunk(logits_NV, gold_N, uniform_NM, config, tokenizer_size)))
        advance(sum(lengths[i] for i in batch))
    return captured


def _capture_chunk(
    logits_NV: torch.Tensor,
    gold_N: torch.Tensor,
    uniform_NM: torch.Tensor | None,
    config: TeacherConfig,
    tokenizer_size: int,
) -> CapturedRows:
    """Rows of a chunk, with samples where there are uniform numbers to draw them by; the logits are overwritten."""
    drawn = None
    if uniform_NM is not None and config.samples_from == "full":  # before the logits are overwritten
        drawn = draw(logits_NV[:, :tokenizer_size], uniform_NM, config.samples_temperature)
    rows = capture_rows(
        logits_NV, gold_N, top_k=config.top_k, temperatures=config.temperatures, tokenizer_size=tokenizer_size
    )
    if uniform_NM is not None and config.samples_from == "tail":
        tail_NV = logits_NV[:, :tokenizer_size].scatter_(1, rows.ids, -torch.inf)
        drawn = draw(tail_NV, uniform_NM, config.samples_temperature)
    if drawn is None:
        return rows
    ids_NM, logits_NM = drawn
    return replace(rows, sample_ids=ids_NM, sample_margins=rows.top_logit[:, None] - logits_NM)


def to_arrays(
    captured: Captured, segments: Sequence[Segment], config: TeacherConfig, tokenizer_size: int
) -> tuple[ShardArrays, float]:
    """Bring a shard's rows from the device into the order of its segments.

    Returns:
        The shard's exact arrays, and the mean probability that the teacher gave to ids beyond the tokenizer.

    Raises:
        CacheFormatError: logits that cannot be used (document and position named), or too much mass on such ids.
    """
    _, ends, tokens = _layout(segments)
    S, K = len(tokens), min(config.top_k, tokenizer_size)
    k, gold_in_topk = np.zeros(S, np.int64), np.zeros(S, bool)
    ids_SK, margins_SK = np.zeros((S, K), np.int32), np.zeros((S, K), np.float32)
    tail_log_SG = np.full((S, len(config.temperatures)), -np.inf)
    gold_logprob, entropy, excess = np.full(S, np.nan, np.float32), np.zeros(S, np.float32), np.zeros(S, np.float32)
    M = config.samples or 0
    drawn_SM, drawn_margins_SM = np.full((S, M), -1, np.int64), np.zeros((S, M), np.float32)
    for at, rows in captured:
        excess[at] = rows.excess_mass.cpu()
        _require_usable(rows.top_logit.cpu().numpy() + excess[at], at, ends, segments)
        ids_SK[at], margins_SK[at] = rows.ids.cpu(), rows.margins.cpu()
        k[at], tail_log_SG[at], gold_in_topk[at] = rows.k.cpu(), rows.tail_log.cpu(), rows.gold_rank.cpu() < K
        gold_logprob[at], entropy[at] = rows.gold_logprob.cpu(), rows.entropy_nats.cpu()
        if rows.sample_ids is not None and rows.sample_margins is not None:
            drawn_SM[at], drawn_margins_SM[at] = rows.sample_ids.cpu(), rows.sample_margins.cpu()

    excess_mass = float(excess.sum(dtype=np.float64)) / max(S - len(segments), 1)
    require(
        excess_mass <= MAX_EXCESS_MASS,
        "the teacher predicts ids that its tokenizer does not have",
        error=CacheFormatError,
        expected=f"a mean probability of at most {MAX_EXCESS_MASS:g} on ids from {tokenizer_size}",
        got=f"{excess_mass:.2e}",
        fix="use the tokenizer that the teacher was trained with",
    )
    kept_SK = np.arange(K) < k[:, None]
    arrays = ShardArrays(
        tokens=tokens,
        loss_mask=np.concatenate([np.append(segment.is_target[1:], False) for segment in segments]).astype(np.uint8),
        doc_indptr=ends,
        doc_meta=[segment.meta for segment in segments],
        k=k,
        topk_ids=ids_SK[kept_SK].astype(np.int64),
        topk_margins=margins_SK[kept_SK],
        tail_log=tail_log_SG,
        gold_logprob=gold_logprob,
        gold_in_topk=gold_in_topk,
        entropy_nats=entropy,
        samples=to_samples(
            drawn_SM, drawn_margins_SM, temperature=config.samples_temperature, drawn_from=config.samples_from
        )
        if M
        else None,
    )
    if config.top_p is not None:
        arrays = truncate(arrays, config.temperatures, top_p=config.top_p)
    return arrays, excess_mass


def _require_usable(top_logit_N: Array, rows_N: Array, ends: Array, segments: Sequence[Segment]) -> None:
    for bad in np.flatnonzero(~np.isfinite(top_logit_N)):
        segment = int(np.searchsorted(ends, rows_N[bad], side="right")) - 1
        raise CacheFormatError(
            "the teacher's logits cannot be used",
            where=f"document {segments[segment].meta['id']!r}, position {rows_N[bad] - ends[segment]}",
            expected="finite logits, or −inf beside them",
            got=f"a largest logit of {top_logit_N[bad]}",
            fix="another --dtype, such as float32, may help",
        )


def _uniforms(segments: Sequence[Segment], num: int) -> Array:
    """Random numbers for each row's samples `[S, num]`; zeros for a segment's last row, which draws nothing."""
    return np.concatenate([np.pad(uniforms(s.meta, len(s.ids) - 1, num), ((0, 1), (0, 0))) for s in segments])


def _layout(segments: Sequence[Segment]) -> tuple[list[int], Array, Array]:
    """Lengths of a shard's segments, their borders `[D + 1]`, and all their tokens `[S]`."""
    lengths = [len(segment.ids) for segment in segments]
    tokens = np.concatenate([segment.ids for segment in segments]).astype(np.int64)
    return lengths, np.cumsum([0, *lengths]), tokens


# --- all shards ------------------------------------------------------------------------------------------------------


class Background:
    """Runs one task at a time beside the caller, so that at most one shard waits; the caller gets its exception."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "shard-writer")
        self._task: Future[None] | None = None

    def start(self, task: Callable[..., None], *arguments: Any) -> None:
        """Run a task once the one before it is done; raise what that one raised."""
        self.wait()
        self._task = self._pool.submit(task, *arguments)

    def check(self) -> None:
        """Raise what the task has raised, if it has ended."""
        if self._task is not None and self._task.done():
            self.wait()

    def wait(self) -> None:
        """Return once the task is done; raise what it raised."""
        if self._task is not None:
            task, self._task = self._task, None
            task.result()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()  # what the teacher has computed is written in any case


class ShardSink:
    """Encodes captured shards and writes them while the disk can hold what is left.

    Args:
        writer: of the cache.
        config: options of the build.
        extra: keys of every shard's JSON.
        bar: progress over all tokens of this process.
        run: where figures of each shard are logged.
    """

    def __init__(
        self, writer: CacheWriter, config: TeacherConfig, extra: Mapping[str, Any], bar: Progress, run: tracking.Run
    ) -> None:
        self._writer, self._config, self._extra, self._bar, self._run = writer, config, extra, bar, run
        self._tokenizer_size: int = writer.build["tokenizer_size"]
        assert bar.total is not None
        self._total = bar.total
        self._bytes = self._tokens = 0

    def write(self, shard: int, segments: Sequence[Segment], captured: Captured, token_budget: int) -> None:
        """Write one shard; its JSON records the batches' token budget, so that an audit runs the same batches."""
        least = least_bytes_per_token(self._config, self._tokenizer_size)
        bytes_per_token = self._bytes / self._tokens if self._tokens else least
        require_space(self._writer.path, (self._total - self._tokens) * world_size(), bytes_per_token)
        arrays, excess_mass = to_arrays(captured, segments, self._config, self._tokenizer_size)
        own = {"token_budget": token_budget, "excess_mass": excess_mass}
        record = self._writer.write_shard(shard, arrays, {**self._extra, **own})
        statistics = record.statistics
        self._bytes += record.bytes
        self._tokens += statistics["tokens"]
        self._run.log(
            {
                "tokens_per_second": self._bar.rate(),
                "captured_mass": statistics["captured_mass"]["1"]["mean"],
                **{key: statistics[key] for key in ("teacher_nll_nats", "entropy_nats", "gold_in_topk")},
            },
            step=shard,
        )


def capture_shards(
    writer: CacheWriter,
    config: TeacherConfig,
    files: ModelFiles,
    shards: Mapping[int, range],
    store: TokenStore,
    run: tracking.Run,
    loaded: Callable[[LogitSource], None] = lambda source: None,
) -> None:
    """Load the teacher, capture this process's shards and write them.

    Args:
        writer: of the cache.
        config: options of the build.
        files: the teacher's.
        shards: for each shard's number the places of its segments.
        store: the segments of the whole build.
        run: where figures of each shard are logged.
        loaded: called with the teacher's logits before anything is captured.

    Raises:
        ConfigError: the disk cannot hold what is left, at the bytes per token of what is written.
        DistillError: anything else that labelling or writing a shard raises; earlier shards are kept.
    """
    model, source = load_teacher(config, files)
    devices = device_kinds(model)
    processes = "" if world_size() == 1 else f" in each of {world_size()} processes"
    log(
        f"teacher {files.name}: {model.num_parameters() / 1e6:,.1f} M parameters, {config.dtype} on "
        f"{', '.join(devices)}{processes}, {torch.get_num_threads()} CPU threads; license {files.license or 'unknown'}"
    )
    if source.notice:
        log(f"the float32 head cannot be used: {source.notice}; taking the model's own {config.dtype} logits")
    require(
        source.head_width == writer.build["head_width"],
        "the head does not fit the configuration",
        error=DistillError,
        expected=writer.build["head_width"],
        got=source.head_width,
    )
    loaded(source)
    extra = {
        "fused_head": source.notice is None,
        "devices": devices,
        "versions": versions("codedistill", "torch", "transformers", "tokenizers", "numpy", "h5py")
        | {"compressor": COMPRESSOR},
    }
    num_tokens = sum(int(store.lengths[places.start : places.stop].sum()) for places in shards.values())
    tokenizer_size = writer.build["tokenizer_size"]
    share = "labelling" if world_size() == 1 else f"labelling, rank {rank()}'s share of {world_size()}"
    with progress(share, num_tokens, "tokens") as bar, Background() as background:
        sink = ShardSink(writer, config, extra, bar, run)

        def advance(amount: int) -> None:
            background.check()
            bar.advance(amount)

        for shard, positions in shards.items():
            segments = store.segments(positions)
            captured, budget = _capture_within_memory(source, segments, config, tokenizer_size, advance)
            background.start(sink.write, shard, segments, captured, budget)
        background.wait()


def _capture_within_memory(
    source: LogitSource,
    segments: Sequence[Segment],
    config: TeacherConfig,
    tokenizer_size: int,
    advance: Callable[[int], None],
) -> tuple[Captured, int]:
    """Capture a shard; restart it with half the token budget whenever the device runs out of memory.

    Returns:
        The rows and the token budget of their batches.

    Raises:
        DistillError: one segment is too much.
    """
    budget = config.batch_tokens
    while True:
        done = 0

        def count(amount: int) -> None:
            nonlocal done
            done += amount
            advance(amount)

        try:
            return capture_shard(source, segments, replace(config, batch_tokens=budget), tokenizer_size, count), budget
        except torch.OutOfMemoryError as error:
            advance(-done)
            longest = max(len(segment.ids) for segment in segments)
            if budget <= longest:  # the longest segment was a batch by itself already
                raise DistillError(
                    "the device has too little memory for one document",
                    where=f"a document of {longest:,} tokens, shard of {len(segments)} documents",
                    got=str(error).partition("\n")[0],
                    fix="a smaller --max-length, `head_rows` in the configuration file, or --gpus-per-teacher",
                ) from None
            budget //= 2
        torch.cuda.empty_cache()
        log(f"out of memory; this shard is done again with batches of {budget:,} tokens")
