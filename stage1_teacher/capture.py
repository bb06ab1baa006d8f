"""The capture loop: batch → rows on the teacher's device → a shard's arrays, encoded while the next shard is computed.

A batch's rows leave a CUDA device as one buffer behind the batch's own kernels, into pinned memory. The writer's thread
waits for the event behind that copy and puts nothing on the teacher's stream: labelling and encoding overlap.

Shapes: N rows of a chunk, S rows of a shard, K entries, G grid temperatures, M samples per row.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from shared.checkpoints import ModelFiles, device_kinds, head_and_positions, load_frozen
from shared.errors import CacheFormatError, DistillError, require
from shared.logits import LogitSource, send
from shared.machine import versions
from shared.process import local_rank, log, rank, world_size
from shared.progress import progress
from stage1_teacher.config import TeacherConfig
from stage1_teacher.disk import least_bytes_per_token, require_space
from stage1_teacher.documents import Segment
from stage1_teacher.sampling import draw, to_samples, uniforms
from stage1_teacher.store import TokenStore
from stage1_teacher.topk import CapturedRows, HostRows, capture_rows

MAX_EXCESS_MASS = 1e-4
# On a CPU, oneDNN and torch's layer over it (ideep) each keep 1,024 compiled kernels by default, one for every shape of
# a bfloat16 product; batches of documents bring ever new shapes. The layers of one batch share a few.
KERNEL_CACHES, CACHED_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), 32

# Captured rows of a shard, each batch's beside the numbers that its rows have in the shard: i64 [N].
Captured = list[tuple[Array, HostRows]]


# --- the teacher -----------------------------------------------------------------------------------------------------


def load_teacher(config: TeacherConfig, files: ModelFiles) -> LogitSource:
    """Load the teacher on this process's devices; its logits come in chunks of the configured rows.

    The first product on a CPU reads how many compiled kernels to keep: few, unless the environment says otherwise.

    Raises:
        DistillError: its head has another width than its configuration says.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(CACHED_KERNELS))
    model = load_frozen(files.path, config.dtype, load_in=config.load_in, **device_placement(config))
    source = LogitSource(model, config.head_rows)
    processes = "" if world_size() == 1 else f" in each of {world_size()} processes"
    log(
        f"teacher {files.name}: {model.num_parameters() / 1e6:,.1f} M parameters, {config.dtype} on "
        f"{', '.join(device_kinds(model))}{processes}, {torch.get_num_threads()} CPU threads; license "
        f"{files.license or 'unknown'}"
    )
    if source.notice:
        log(f"the float32 head cannot be used: {source.notice}; taking the model's own {config.dtype} logits")
    width, _ = head_and_positions(files.path)
    what = "the head does not fit the configuration"
    require(source.head_width == width, what, error=DistillError, expected=width, got=source.head_width)
    return source


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
        What is kept of each row, on its way to the host.
    """
    lengths, ends, tokens = _layout(segments)
    uniform_SM = _uniforms(segments, config.samples) if config.samples else None
    captured: Captured = []
    for batch in plan_batches(lengths, config.batch_tokens):
        # A segment's last token predicts nothing: rows are the tokens before it, in the shard's order.
        rows_N = np.concatenate([np.arange(ends[i], ends[i + 1] - 1) for i in batch])
        real_BT = np.arange(lengths[batch[0]] - 1) < np.array([[lengths[i] - 1] for i in batch])
        ids_BT = np.zeros(real_BT.shape, np.int64)
        ids_BT[real_BT] = tokens[rows_N]
        chunks: list[CapturedRows] = []
        left_N = rows_N
        for logits_NV in source.chunks(torch.from_numpy(ids_BT), torch.from_numpy(real_BT)) if len(rows_N) else ():
            chunk_N, left_N = left_N[: len(logits_NV)], left_N[len(logits_NV) :]
            gold_N = send(torch.from_numpy(tokens[chunk_N + 1]), logits_NV.device)
            uniform_NM = None if uniform_SM is None else send(torch.from_numpy(uniform_SM[chunk_N]), logits_NV.device)
            chunks.append(_capture_chunk(logits_NV, gold_N, uniform_NM, config, tokenizer_size))
        if chunks:
            captured.append((rows_N, HostRows(chunks)))
        advance(sum(lengths[i] for i in batch))
    return captured


@torch.inference_mode()
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
    """Bring a shard's rows into the order of its segments, once they are on the host.

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
    for at, host_rows in captured:
        rows = host_rows.arrays()
        excess[at] = rows["excess_mass"]
        _require_usable(rows["top_logit"] + excess[at], at, ends, segments)
        ids_SK[at], margins_SK[at] = rows["ids"], rows["margins"]
        k[at], tail_log_SG[at], gold_in_topk[at] = rows["k"], rows["tail_log"], rows["gold_rank"] < K
        gold_logprob[at], entropy[at] = rows["gold_logprob"], rows["entropy_nats"]
        if M:
            drawn_SM[at], drawn_margins_SM[at] = rows["sample_ids"], rows["sample_margins"]

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
    samples = None
    if M:
        temperature, drawn_from = config.samples_temperature, config.samples_from
        samples = to_samples(drawn_SM, drawn_margins_SM, temperature=temperature, drawn_from=drawn_from)
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
        samples=samples,
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


def capture_shards(
    writer: CacheWriter,
    config: TeacherConfig,
    source: LogitSource,
    shards: Mapping[int, range],
    store: TokenStore,
    run: tracking.Run,
) -> None:
    """Capture this process's shards; each is encoded and written while the next one is captured.

    Args:
        writer: of the cache.
        config: options of the build.
        source: the teacher's logits.
        shards: for each shard's number the places of its segments.
        store: the segments of the whole build.
        run: where figures of each shard are logged.

    Raises:
        ConfigError: the disk cannot hold what is left, at the bytes per token of what is written.
        DistillError: anything else that labelling or writing a shard raises; earlier shards are kept.
    """
    tokenizer_size = writer.build["tokenizer_size"]
    num_tokens = sum(int(store.lengths[places.start : places.stop].sum()) for places in shards.values())
    how = {
        "fused_head": source.notice is None,
        "devices": device_kinds(source.model),
        "versions": versions("codedistill", "torch", "transformers", "tokenizers", "numpy", "h5py")
        | {"compressor": COMPRESSOR},
    }
    written_bytes = written_tokens = 0

    def write(shard: int, segments: Sequence[Segment], captured: Captured, token_budget: int) -> None:
        nonlocal written_bytes, written_tokens
        least = least_bytes_per_token(config, tokenizer_size)
        bytes_per_token = written_bytes / written_tokens if written_tokens else least
        require_space(writer.path, (num_tokens - written_tokens) * world_size(), bytes_per_token)
        arrays, excess_mass = to_arrays(captured, segments, config, tokenizer_size)
        # With the batches' token budget an audit runs the same batches.
        record = writer.write_shard(shard, arrays, how | {"token_budget": token_budget, "excess_mass": excess_mass})
        statistics = record.statistics
        written_bytes += record.bytes
        written_tokens += statistics["tokens"]
        figures = {key: statistics[key] for key in ("teacher_nll_nats", "entropy_nats", "gold_in_topk")}
        figures |= {"tokens_per_second": bar.rate(), "captured_mass": statistics["captured_mass"]["1"]["mean"]}
        run.log(figures, step=shard)

    share = "labelling" if world_size() == 1 else f"labelling, rank {rank()}'s share of {world_size()}"
    # The pool ends before this returns, also by an exception: what the teacher has computed is written in any case.
    with progress(share, num_tokens, "tokens") as bar, ThreadPoolExecutor(1, "shard-writer") as pool:
        writing = pool.submit(lambda: None)

        def advance(amount: int) -> None:
            if writing.done():
                writing.result()  # raises what went wrong
            bar.advance(amount)

        for shard, positions in shards.items():
            segments = store.segments(positions)
            captured, budget = _capture_within_memory(source, segments, config, tokenizer_size, advance)
            writing.result()  # so that at most one shard waits
            writing = pool.submit(write, shard, segments, captured, budget)
        writing.result()


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
