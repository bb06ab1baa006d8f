"""The planner: what a build will take and what each K would hold, measured on a pilot before the expensive run.

The pilot labels a sample of documents, evenly spaced in order of length, so that short and long ones occur in it as
often as in the data. Seconds come from a fit over its batches, bytes from encoding its rows.
"""

import functools
import math
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.batching import plan_batches
from shared.cache.encode import encode_shard
from shared.cache.format import Array, ShardArrays
from shared.cache.rows import select, truncate
from shared.checkpoints import device_kinds, head_and_positions
from shared.errors import ConfigError, require
from shared.files import output_path, to_json
from shared.machine import machine
from shared.process import world_size
from shared.progress import progress
from stage1_teacher.config import TeacherConfig
from stage1_teacher.disk import free_bytes
from stage1_teacher.documents import Segment, plan_shards
from stage1_teacher.request import Task, find_teacher
from stage1_teacher.store import TokenStore, find_store, make_store, store_folder

if TYPE_CHECKING:  # torch loads with the pilot
    from shared.logits import LogitSource

TOP_KS = (8, 16, 32, 64, 128)
TOP_P = 0.98
RESAMPLES = 1_000
MANIFEST_BYTES = 8_192


def plan_build(config: TeacherConfig, out: Path, *, pilot_docs: int) -> dict[str, Any]:
    """Measure what `teacher build` with this configuration would take; leaves nothing written.

    The tokens are those of a build that has begun at `out` with the same documents; else they go to a temporary folder.

    Args:
        config: teacher, data and options, as for a build.
        out: where the cache would go.
        pilot_docs: documents of the pilot; all where there are fewer.

    Returns:
        JSON values: `teacher`, `data`, `batches`, `pilot`, `bytes`, `hours`, `ends` (see `ends.weigh_ends`), `memory`,
        and `choices` (see `weigh_choices`).

    Raises:
        ConfigError: options, teacher or documents that cannot be used.
    """
    require(world_size() == 1, "`teacher plan` runs in one process", expected=1, got=f"{world_size()} processes")
    task = Task(config=config, out=output_path(out), files=find_teacher(config))
    with tempfile.TemporaryDirectory(prefix="codedistill-plan-") as folder:
        request = task.store_request()
        store = find_store(store_folder(task.out), request)
        store = store or make_store(Path(folder) / "tokens", request, task.data, task.tokenizer, task.limits)
        task.require_restored(store)
        return _measure(task, store, pilot_docs)


def _measure(task: Task, store: TokenStore, pilot_docs: int) -> dict[str, Any]:
    """The plan of documents that are tokenised."""
    config, lengths, facts = task.config, store.lengths, store.facts
    shards = plan_shards(lengths, config.shard_tokens)
    cells, widest = _batch_cells(lengths, shards, config.batch_tokens)
    chosen = [store.segments(range(i, i + 1))[0] for i in spread_by_length(lengths, pilot_docs)]
    largest = [store.segments(range(i, i + 1))[0] for i in widest]
    pilot = run_pilot(task, store, chosen, largest)

    shard_tokens = np.array([int(lengths[shard.start : shard.stop].sum()) for shard in shards])
    choices = weigh_choices(config, pilot, shard_tokens, len(task.tokenizer), task.limits.head_width)
    own = next(choice for choice in choices if choice["chosen"])
    other_bytes = len(task.tokenizer.backend_tokenizer.to_str(pretty=True).encode()) + MANIFEST_BYTES
    size = {key: round(value * facts.num_tokens + other_bytes) for key, value in own["bytes_per_token"].items()}
    free = free_bytes(task.out)
    return {
        "teacher": {"name": task.files.name, "license": task.files.license, **pilot.teacher},
        "data": {
            "name": store.data.name,
            "split": store.data.split,
            "documents": facts.num_documents,
            "tokens": facts.num_tokens,
            "targets": facts.num_targets,
            "long": {"documents": facts.long.count, "become": config.on_long},
            "not_restored_by_the_tokenizer": facts.lossy.count,
            "lengths": _histogram(lengths),
        },
        "batches": {
            "shards": len(shards),
            "batches": len(cells),
            "padding": 1 - (facts.num_tokens - len(lengths)) / max(int(cells.sum()), 1),
        },
        "pilot": {
            "documents": len(chosen),
            "tokens": len(pilot.arrays.tokens),
            "batches": len(pilot.seconds),
            "seconds": float(pilot.seconds.sum()),
        },
        "bytes": {**size, "free": free, "fits": free >= size["high"]},
        "hours": _hours_of(pilot, cells, shard_tokens, own["encode_seconds_per_token"]),
        "ends": pilot.ends,
        "memory": pilot.memory,
        "choices": choices,
    }


def _batch_cells(lengths: Array, shards: Sequence[range], batch_tokens: int) -> tuple[Array, list[int]]:
    """Tokens of each planned batch, padding included, and the segments of the batch that has most."""
    cells, widest, most = list[int](), list[int](), -1
    for shard in shards:
        own = lengths[shard.start : shard.stop].tolist()
        for batch in plan_batches(own, batch_tokens):
            cells.append(len(batch) * (own[batch[0]] - 1))
            if cells[-1] > most:
                most, widest = cells[-1], [shard[i] for i in batch]
    return np.array(cells), widest


def spread_by_length(lengths: Sequence[int] | Array, count: int) -> list[int]:
    """Positions of `count` documents, evenly spaced in order of length, ascending; all where there are fewer."""
    order = np.argsort(lengths, kind="stable")
    count = min(count, len(order))
    return sorted(int(order[(2 * i + 1) * len(order) // (2 * count)]) for i in range(count))


def _histogram(lengths: Array) -> list[dict[str, int]]:
    """Documents and tokens by length, in bins that end at powers of two."""
    bins = np.ceil(np.log2(lengths)).astype(int)
    parts = {1 << b: lengths[bins == b] for b in range(int(bins.min()), int(bins.max()) + 1)}
    return [{"up_to": end, "documents": len(part), "tokens": int(part.sum())} for end, part in parts.items()]


# --- the pilot -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Pilot:
    """What the pilot measured: rows of its largest K, and for each batch its cells (padding included) and seconds.

    `teacher`, `ends` and `memory` are those of the plan.
    """

    arrays: ShardArrays
    cells: Array
    seconds: Array
    load_seconds: float
    teacher: dict[str, Any]
    ends: dict[str, Any]
    memory: dict[str, Any]


def run_pilot(task: Task, store: TokenStore, segments: Sequence[Segment], largest: Sequence[Segment]) -> Pilot:
    """Label a pilot's segments and time each batch.

    The largest batch of the whole plan runs first: it warms up, and shows the most memory that a batch takes.
    """
    import torch

    from stage1_teacher.capture import capture_shard, load_teacher, to_arrays
    from stage1_teacher.ends import weigh_ends

    config, tokenizer_size = task.config, len(task.tokenizer)
    start = time.perf_counter()
    source = load_teacher(config, task.files)
    model = source.model
    load_seconds = time.perf_counter() - start
    wide = replace(config, top_k=max(config.top_k, TOP_KS[-1]), top_p=None)
    cuda = [device for device in range(torch.cuda.device_count()) if torch.cuda.memory_allocated(device)]
    _warm_up(source, largest, wide, tokenizer_size)
    lengths = [len(segment.ids) for segment in segments]
    marks = [time.perf_counter()]
    with progress("pilot", sum(lengths), "tokens") as bar:

        def advance(tokens: int) -> None:
            for device in cuda:
                torch.cuda.synchronize(device)
            marks.append(time.perf_counter())
            bar.advance(tokens)

        captured = capture_shard(source, segments, wide, tokenizer_size, advance)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Pilot(
        arrays=to_arrays(captured, segments, wide, tokenizer_size)[0],
        cells=np.array([len(b) * (lengths[b[0]] - 1) for b in plan_batches(lengths, config.batch_tokens)]),
        seconds=np.diff(marks),
        load_seconds=load_seconds,
        teacher={
            "parameters": model.num_parameters(),
            "dtype": config.dtype,
            "head": "float32" if source.notice is None else config.dtype,
            "notice": source.notice,
            "devices": device_kinds(model),
            "threads": torch.get_num_threads(),
        },
        ends=weigh_ends(source, task.tokenizer, store.facts.documents(), head_and_positions(task.files.path)[1]),
        memory={
            "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "head_bytes": source.head_bytes,
            "peak_bytes_by_device": {f"cuda:{i}": torch.cuda.max_memory_allocated(i) for i in cuda},
            "peak_resident_bytes": resident,
            "machine_bytes": machine()["memory_bytes"],
        },
    )


def _warm_up(source: "LogitSource", batch: Sequence[Segment], config: TeacherConfig, tokenizer_size: int) -> None:
    """Run one batch, whatever its size."""
    import torch

    from stage1_teacher.capture import capture_shard

    try:
        capture_shard(source, batch, replace(config, batch_tokens=1 << 60), tokenizer_size, lambda _: None)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "the device has too little memory for the largest batch",
            where=f"{len(batch)} documents, batch_tokens = {config.batch_tokens:,}",
            got=str(error).partition("\n")[0],
            fix="a smaller --batch-tokens; `teacher build` would halve it by itself",
        ) from None


# --- time ------------------------------------------------------------------------------------------------------------


def _hours_of(
    pilot: Pilot, cells: Array, shard_tokens: Array, encode_seconds_per_token: float
) -> dict[str, float | None]:
    """Hours of the build: shards are encoded while the teacher labels the next one, so the slower of both decides.

    So it is on a GPU, too: the thread that encodes puts nothing on the teacher's stream (`capture.py`).
    """
    num_tokens = int(shard_tokens.sum())
    encoding = encode_seconds_per_token * num_tokens
    fixed = pilot.load_seconds + encoding / len(shard_tokens)  # nothing is labelled beside the last shard's encoding
    labelling = dict(zip(("expected", "low", "high"), predict_seconds(pilot.cells, pilot.seconds, cells), strict=True))
    seconds = {key: None if s is None else fixed + max(s, encoding) for key, s in labelling.items()}
    rate = num_tokens / (seconds["expected"] or 1)
    # A live teacher labels the data anew in every epoch of every student.
    epochs = (seconds["expected"] or 0) / max(labelling["expected"] or 0, 1e-9)
    break_even = {"break_even_epochs": epochs, "break_even_students": math.ceil(epochs)}
    hours = {key: None if s is None else s / 3600 for key, s in seconds.items()}
    return hours | {"tokens_per_second": rate, **break_even}


def predict_seconds(cells: Array, seconds: Array, planned_cells: Array) -> tuple[float, float | None, float | None]:
    """Seconds of all planned batches from a·cells + b, fitted to the pilot's; bounds by bootstrap over its batches.

    The fit uses up two of the pilot's n batches, so deviations are widened by √(n/(n − 2)); up to n = 2 there are no
    bounds.

    Args:
        cells: tokens of each pilot batch, padding included; seconds: what it took.
        planned_cells: tokens of each batch of the build, padding included.

    Returns:
        The expected value, and the bounds that hold it nine times in ten.
    """
    n = len(cells)

    def total(picked: Array) -> float:
        a, b = _fit_line(cells[picked].astype(float), seconds[picked])
        return float(a * planned_cells.sum() + b * len(planned_cells))

    expected = total(np.arange(n))
    if n < 3:
        return expected, None, None
    rng = np.random.default_rng(0)
    deviations = np.array([total(rng.choice(n, n)) for _ in range(RESAMPLES)]) - expected
    low, high = np.quantile(deviations, (0.05, 0.95)) * (n / (n - 2)) ** 0.5
    return expected, max(expected + float(min(low, 0)), 0.0), expected + float(max(high, 0))


def _fit_line(x: Array, y: Array) -> tuple[float, float]:
    """Least squares of y = a x + b with a, b ≥ 0."""
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread) if spread else 0.0
    if slope <= 0:
        return 0.0, float(y.mean())
    intercept = float(y.mean() - slope * x.mean())
    return (slope, intercept) if intercept >= 0 else (float(x @ y / (x @ x)), 0.0)


# --- bytes, and what each K holds ------------------------------------------------------------------------------------


def weigh_choices(
    config: TeacherConfig, pilot: Pilot, shard_tokens: Array, tokenizer_size: int, head_width: int
) -> list[dict[str, Any]]:
    """What rows of several K and of a top-p would hold, lose and take, from the pilot's rows.

    Args:
        config: codec, grid and filter; its own top-k and top-p are among the choices, and marked.
        pilot: rows of the largest K.
        shard_tokens: tokens of each planned shard.
        tokenizer_size: as in the cache; head_width: as in the cache.

    Returns:
        For each choice the mean mass that a row captures at each temperature, the KL that the codec adds over row and
        tail, `gradient_error` (see `gradient_errors`), and bytes.
    """
    own = (config.top_k, config.top_p)
    encode = functools.partial(
        encode_shard,
        codec=config.codec,
        temperatures=config.temperatures,
        tokenizer_size=tokenizer_size,
        head_width=head_width,
        filter=config.filter,
    )
    bare = replace(pilot.arrays, samples=None)

    def cut(top_k: int, top_p: float | None) -> ShardArrays:
        # Samples of the longest rows' tails are outside shorter rows, too, and take about as many bytes as theirs.
        return replace(truncate(bare, config.temperatures, top_k=top_k, top_p=top_p), samples=pilot.arrays.samples)

    def sizes(num_parts: int) -> list[tuple[int, int]]:
        rows = cut(*own)
        number = np.arange(len(rows.doc_meta))  # documents are dealt out in turn, each part a shard of its own
        parts = [select(rows, number % num_parts == i) for i in range(min(num_parts, len(number)))]
        return [(len(encode(part, top_k=config.top_k)[0]), len(part.tokens)) for part in parts]

    shard_bytes, error = shard_overhead(sizes(1), sizes(2), sizes(8))
    pairs = {(k, None) for k in TOP_KS if k <= tokenizer_size} | {own, (config.top_k, TOP_P)}
    choices = []
    for top_k, top_p in sorted(pairs, key=lambda pair: (pair[1] is not None, pair)):
        rows = cut(top_k, top_p)
        start = time.perf_counter()
        image, statistics = encode(rows, top_k=top_k)
        seconds = time.perf_counter() - start
        errors = gradient_errors(rows, config.temperatures, tokenizer_size)
        fixed = float((shard_bytes + len(to_json(statistics))) * len(shard_tokens) / shard_tokens.sum())
        growing = max(len(image) - shard_bytes, 0) / len(rows.tokens)
        bounds = {"expected": 1.0, "low": 1 - error, "high": 1 + error}
        choices.append(
            {
                "top_k": top_k,
                "top_p": top_p,
                "chosen": (top_k, top_p) == own,
                "mean_k": statistics["entries"] / max(statistics["rows"], 1),
                "captured_mass": {T: figures["mean"] for T, figures in statistics["captured_mass"].items()},
                "codec_kl_nats": statistics["codec_kl_nats"],
                "gradient_error": None if errors is None or not len(errors) else float(errors.mean()),
                "next_token_in_row": statistics["gold_in_topk"],
                "bytes_per_token": {key: fixed + growing * factor for key, factor in bounds.items()},
                "encode_seconds_per_token": seconds / len(rows.tokens),
            }
        )
    return choices


def gradient_errors(rows: ShardArrays, temperatures: Sequence[float], tokenizer_size: int) -> Array | None:
    """How far a cut row bends the gradient of an untrained student (equal logits) at T = 1: |sparse − dense| / |dense|.

    Dense is q − p over all V ids. Sparse, as `ghost` training forms it, is q − p on the row's ids and spreads the tail
    p_τ evenly over the others, so both differ there by p_j − p_τ / (V − k). Σ p_j² over the tail is its mass at T = ½.

    Returns:
        f64 `[N]`, one for each row that has entries; None where the grid lacks 0.5.
    """
    if 0.5 not in temperatures:
        return None
    real = rows.k > 0
    k = rows.k[real]
    inside = np.arange(k.max(initial=0)) < k[:, None]
    weights_NK = np.zeros(inside.shape)  # exp(z_i − z_1) = p_i / p_1
    weights_NK[inside] = np.exp(-rows.topk_margins.astype(np.float64))
    one, half = (np.exp(rows.tail_log[real, list(temperatures).index(T)]) for T in (1.0, 0.5))
    total = weights_NK.sum(1) + one
    tail, tail_squares = one / total, half / total**2
    squares = (weights_NK**2).sum(1) / total**2 + tail_squares
    difference = tail_squares - tail**2 / np.maximum(tokenizer_size - k, 1)
    errors: Array = np.sqrt(np.maximum(difference, 0) / np.maximum(squares - 1 / tokenizer_size, 1e-300))
    return errors


def shard_overhead(
    whole: Sequence[tuple[int, int]], halves: Sequence[tuple[int, int]], eighths: Sequence[tuple[int, int]]
) -> tuple[float, float]:
    """What of a shard's bytes does not grow with its tokens, and how far the rest per token may be off, relatively.

    The first is what two halves take more than the whole (tables of ids, HDF5's own). The second is twice the standard
    error over eighths, and 1 % for the straight line itself: pilots of 64 documents predicted 102,091 tokens to 0.5 %.

    Args:
        whole: bytes and tokens of the pilot as one shard; halves, eighths: of its parts, each a shard of its own.
    """
    fixed = max(sum(size for size, _ in halves) - whole[0][0], 0) if len(halves) > 1 else 0
    rates = np.array([max(size - fixed, 0) / tokens for size, tokens in eighths])
    error = 2 * rates.std(ddof=1) / rates.mean() / len(rates) ** 0.5 if len(rates) > 1 and rates.any() else 1.0
    return float(fixed), float(min(error + 0.01, 1.0))
