"""The planner: what a build will take, measured on a pilot before the expensive run.

The pilot labels a sample of documents, evenly spaced in order of length, so that short and long ones are in it as often
as in the data. Seconds come from a fit over its batches, bytes from really encoding its rows.
"""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.batching import plan_batches
from shared.cache.encode import encode_shard
from shared.cache.format import Array, ShardArrays, indptr
from shared.cache.rows import truncate
from shared.checkpoints import device_kinds, head_and_positions, load_frozen
from shared.errors import ConfigError
from shared.files import to_json
from shared.machine import machine
from shared.process import world_size
from shared.progress import progress
from stage1_teacher.batching import plan_shards
from stage1_teacher.build import find_inputs, max_length
from stage1_teacher.config import TeacherConfig
from stage1_teacher.disk import free_bytes
from stage1_teacher.ranks import Ranks

if TYPE_CHECKING:
    from stage1_teacher.documents import Piece

TOP_KS = (8, 16, 32, 64, 128)
TOP_P = 0.98
RESAMPLES = 1_000
MANIFEST_BYTES = 8_192


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An expected value and the bounds that hold it nine times in ten."""

    expected: float
    low: float | None
    high: float | None


def plan_build(config: TeacherConfig, out: Path, *, pilot_docs: int) -> dict[str, Any]:
    """Measure what `teacher build` with this configuration would take; writes nothing.

    Args:
        config: teacher, data and options, as for a build.
        out: where the cache would go.
        pilot_docs: documents of the pilot; all where there are fewer.

    Returns:
        JSON values: `teacher`, `data`, `batches`, `pilot`, `bytes`, `hours`, `memory`, and `choices`: for several K and
        for a top-p the mean mass that a row captures, the KL that the codec adds over row and tail, and bytes. What is
        lost *inside* the tail has no KL, since a cache says nothing of it: the captured mass bounds it.

    Raises:
        ConfigError: options, teacher or documents that cannot be used.
    """
    if world_size() > 1:
        raise ConfigError("`teacher plan` runs in one process", expected=1, got=f"{world_size()} processes")
    from shared.tokenizer import load_tokenizer
    from stage1_teacher.documents import cut_documents

    files, documents = find_inputs(config)
    tokenizer = load_tokenizer(files.path)
    head_width, limit = head_and_positions(files.path)
    corpus = cut_documents(
        documents.documents,
        tokenizer,
        max_length=max_length(config.max_length, limit),
        on_long=config.on_long,
        head_width=head_width,
    )
    pieces = corpus.pieces
    lengths = [len(piece.ids) for piece in pieces]
    shards = plan_shards(lengths, config.shard_tokens)
    batches = [
        [shard[i] for i in batch]
        for shard in shards
        for batch in plan_batches([lengths[i] for i in shard], config.batch_tokens)
    ]
    cells = np.array([len(batch) * (lengths[batch[0]] - 1) for batch in batches])
    largest = [pieces[i] for i in batches[int(cells.argmax())]]
    chosen = [pieces[i] for i in spread_by_length(lengths, pilot_docs)]
    pilot = run_pilot(config, files.path, chosen, largest, len(tokenizer), head_width)

    num_tokens, shard_tokens = sum(lengths), np.array([sum(lengths[i] for i in shard) for shard in shards])
    other_bytes = len(tokenizer.backend_tokenizer.to_str(pretty=True).encode()) + MANIFEST_BYTES
    choices = weigh_choices(config, pilot, shard_tokens, len(tokenizer), head_width)
    own = next(choice for choice in choices if choice["chosen"])
    size = {key: round(value * num_tokens + other_bytes) for key, value in own["bytes_per_token"].items()}
    # Shards are encoded while the teacher labels the next one: what takes longer decides, and the last one's encoding.
    labelling = predict_seconds(pilot.cells, pilot.seconds, cells)
    encoding = own["encode_seconds_per_token"] * num_tokens
    fixed = pilot.load_seconds + encoding / len(shards)
    seconds = fixed + max(labelling.expected, encoding)
    low = None if labelling.low is None else fixed + max(labelling.low, encoding)
    high = None if labelling.high is None else fixed + max(labelling.high, encoding)
    free = free_bytes(out)
    return {
        "teacher": {"name": files.name, "licence": files.licence, **pilot.teacher},
        "data": {
            "name": documents.name,
            "split": documents.split,
            "documents": len(documents.documents),
            "tokens": num_tokens,
            "targets": sum(sum(piece.is_target) for piece in pieces),
            "long": {"documents": len(corpus.long), "become": config.on_long},
            "not_restored_by_the_tokenizer": len(corpus.lossy),
            "lengths": _histogram(lengths),
        },
        "batches": {
            "shards": len(shards),
            "batches": len(batches),
            "padding": 1 - float((num_tokens - len(lengths)) / max(cells.sum(), 1)),
        },
        "pilot": {
            "documents": len(chosen),
            "tokens": len(pilot.arrays.tokens),
            "batches": len(pilot.seconds),
            "seconds": float(pilot.seconds.sum()),
        },
        "bytes": {**size, "free": free, "fits": free >= size["high"]},
        "hours": {
            "expected": seconds / 3600,
            "low": None if low is None else low / 3600,
            "high": None if high is None else high / 3600,
            "tokens_per_second": num_tokens / seconds,
        },
        "memory": pilot.memory,
        "choices": choices,
    }


def spread_by_length(lengths: Sequence[int], count: int) -> list[int]:
    """Positions of `count` documents, evenly spaced in order of length, ascending; all where there are fewer."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    count = min(count, len(order))
    return sorted(order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pilot:
    """What the pilot measured: rows of its largest K, and for each batch its cells (padding included) and seconds."""

    arrays: ShardArrays
    cells: Array
    seconds: Array
    load_seconds: float
    teacher: dict[str, Any]
    memory: dict[str, Any]


def run_pilot(
    config: TeacherConfig,
    path: Path,
    pieces: Sequence["Piece"],
    largest: Sequence["Piece"],
    tokenizer_size: int,
    head_width: int,
) -> Pilot:
    """Label a pilot's documents and time each batch.

    The largest batch of the whole plan runs before: it warms up, and shows the most memory that a batch takes.
    """
    import torch

    from stage1_teacher.capture import label_shard
    from stage1_teacher.logits import LogitSource

    start = time.perf_counter()
    placement = Ranks().placement(config.device_map, config.gpus_per_teacher)
    teacher = load_frozen(path, dtype=config.dtype, load_in=config.load_in, **placement)
    source = LogitSource(teacher, config.head_rows)
    load_seconds = time.perf_counter() - start
    wide = replace(config, top_k=max(config.top_k, TOP_KS[-1]), top_p=None)
    cuda = [device for device in range(torch.cuda.device_count()) if torch.cuda.memory_allocated(device)]
    try:
        label_shard(source, largest, replace(wide, batch_tokens=1 << 60), tokenizer_size, lambda _: None)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "the device has too little memory for the largest batch",
            where=f"{len(largest)} documents, batch_tokens = {config.batch_tokens:,}",
            got=str(error).partition("\n")[0],
            fix="a smaller batch_tokens in the configuration file; `teacher build` would halve it by itself",
        ) from None
    lengths = [len(piece.ids) for piece in pieces]
    marks = [time.perf_counter()]
    with progress("pilot", sum(lengths), "tokens") as bar:

        def advance(tokens: int) -> None:
            for device in cuda:
                torch.cuda.synchronize(device)
            marks.append(time.perf_counter())
            bar.advance(tokens)

        arrays, _ = label_shard(source, pieces, wide, tokenizer_size, advance)
    batches = plan_batches(lengths, config.batch_tokens)
    parameters = list(teacher.parameters())
    return Pilot(
        arrays=arrays,
        cells=np.array([len(batch) * (lengths[batch[0]] - 1) for batch in batches]),
        seconds=np.diff(marks),
        load_seconds=load_seconds,
        teacher={
            "parameters": teacher.num_parameters(),
            "dtype": config.dtype,
            "head": "float32" if source.notice is None else config.dtype,
            "notice": source.notice,
            "devices": device_kinds(teacher),
            "threads": torch.get_num_threads(),
        },
        memory={
            "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
            "head_bytes": source.head_bytes,
            "peak_bytes_by_device": {f"cuda:{i}": torch.cuda.max_memory_allocated(i) for i in cuda},
            "peak_resident_bytes": _peak_resident_bytes(),
            "machine_bytes": machine()["memory_bytes"],
        },
    )


def predict_seconds(cells: Array, seconds: Array, planned_cells: Array) -> Interval:
    """Seconds of all planned batches from a·cells + b, fitted to the pilot's; the bounds by bootstrap over its batches.

    The fit has used up two of the pilot's n batches, so that deviations are widened by √(n/(n − 2)); up to n = 2 there
    are no bounds.

    Args:
        cells: tokens of each pilot batch, padding included; seconds: what it took.
        planned_cells: the same of each batch of the build.
    """
    n = len(cells)

    def total(picked: Array) -> float:
        a, b = _fit_line(cells[picked].astype(float), seconds[picked])
        return float(a * planned_cells.sum() + b * len(planned_cells))

    expected = total(np.arange(n))
    if n < 3:
        return Interval(expected=expected, low=None, high=None)
    rng = np.random.default_rng(0)
    deviations = np.array([total(rng.choice(n, n)) for _ in range(RESAMPLES)]) - expected
    low, high = np.quantile(deviations, (0.05, 0.95)) * (n / (n - 2)) ** 0.5
    return Interval(expected=expected, low=max(expected + float(min(low, 0)), 0.0), high=expected + float(max(high, 0)))


def _fit_line(x: Array, y: Array) -> tuple[float, float]:
    """Least squares of y = a x + b with a, b ≥ 0."""
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread) if spread else 0.0
    if slope <= 0:
        return 0.0, float(y.mean())
    intercept = float(y.mean() - slope * x.mean())
    return (slope, intercept) if intercept >= 0 else (float(x @ y / (x @ x)), 0.0)


def weigh_choices(
    config: TeacherConfig, pilot: Pilot, shard_tokens: Array, tokenizer_size: int, head_width: int
) -> list[dict[str, Any]]:
    """What rows of several K and of a top-p would hold and take, from the pilot's rows; the configured one is marked.

    Args:
        config: codec, grid and filter; its own top-k and top-p are among the choices.
        pilot: rows of the largest K.
        shard_tokens: tokens of each planned shard.
        tokenizer_size: as in the cache; head_width: as in the cache.
    """
    own = (config.top_k, config.top_p)

    def encode(rows: ShardArrays, top_k: int) -> tuple[bytes, dict[str, Any]]:
        return encode_shard(
            rows,
            codec=config.codec,
            temperatures=config.temperatures,
            top_k=top_k,
            tokenizer_size=tokenizer_size,
            head_width=head_width,
            compression=config.filter,
        )

    bare = replace(pilot.arrays, samples=None)

    def cut(top_k: int, top_p: float | None) -> ShardArrays:
        # Samples of the longest rows' tails are outside shorter rows, too, and take about as many bytes as theirs.
        return replace(truncate(bare, config.temperatures, top_k=top_k, top_p=top_p), samples=pilot.arrays.samples)

    rows = cut(config.top_k, config.top_p)
    parts = [[(len(encode(part, config.top_k)[0]), len(part.tokens)) for part in _parts(rows, n)] for n in (1, 2, 8)]
    fixed_bytes, error = shard_overhead(*parts)
    pairs = {(k, None) for k in TOP_KS if k <= tokenizer_size} | {own, (config.top_k, TOP_P)}
    choices = []
    for top_k, top_p in sorted(pairs, key=lambda pair: (pair[1] is not None, pair)):
        rows = cut(top_k, top_p)
        start = time.perf_counter()
        image, statistics = encode(rows, top_k)
        seconds = time.perf_counter() - start
        fixed = (fixed_bytes + len(to_json(statistics))) * len(shard_tokens) / shard_tokens.sum()
        growing = max(len(image) - fixed_bytes, 0) / len(rows.tokens)
        choices.append(
            {
                "top_k": top_k,
                "top_p": top_p,
                "chosen": (top_k, top_p) == own,
                "mean_k": statistics["entries"] / max(statistics["rows"], 1),
                "captured_mass": {T: figures["mean"] for T, figures in statistics["captured_mass"].items()},
                "codec_kl_nats": statistics["codec_kl_nats"],
                "next_token_in_row": statistics["gold_in_topk"],
                "bytes_per_token": {
                    "expected": float(fixed + growing),
                    "low": float(fixed + growing * (1 - error)),
                    "high": float(fixed + growing * (1 + error)),
                },
                "encode_seconds_per_token": seconds / len(rows.tokens),
            }
        )
    return choices


def shard_overhead(
    whole: Sequence[tuple[int, int]], halves: Sequence[tuple[int, int]], eighths: Sequence[tuple[int, int]]
) -> tuple[float, float]:
    """What of a shard's bytes does not grow with its tokens, and how far the rest per token may be off, relatively.

    The first is what two halves take more than the whole (tables of ids, HDF5's own). The second is twice the standard
    error over eighths and 1 % for the straight line itself: pilots of 64 documents foretold 102,091 tokens to 0.5 %.

    Args:
        whole: bytes and tokens of the pilot as one shard; halves, eighths: of its parts, each a shard of its own.
    """
    fixed = max(sum(size for size, _ in halves) - whole[0][0], 0) if len(halves) > 1 else 0
    rates = np.array([max(size - fixed, 0) / tokens for size, tokens in eighths])
    error = 2 * rates.std(ddof=1) / rates.mean() / len(rates) ** 0.5 if len(rates) > 1 and rates.any() else 1.0
    return float(fixed), float(min(error + 0.01, 1.0))


def _parts(rows: ShardArrays, count: int) -> list[ShardArrays]:
    """Documents dealt out in turn."""
    D = len(rows.doc_meta)
    return [take_documents(rows, range(i, D, count)) for i in range(min(count, D))]


def take_documents(rows: ShardArrays, documents: Sequence[int]) -> ShardArrays:
    """Some documents of a shard as a shard of their own."""
    kept = np.zeros(len(rows.tokens), bool)
    for document in documents:
        kept[rows.doc_indptr[document] : rows.doc_indptr[document + 1]] = True
    entries = np.repeat(kept, rows.k)
    per_row = ("tokens", "loss_mask", "k", "tail_log", "gold_logprob", "gold_in_topk", "entropy_nats")
    per_entry = ("topk_ids", "topk_margins")
    parts: dict[str, Any] = {name: getattr(rows, name)[kept] for name in per_row}
    parts |= {name: getattr(rows, name)[entries] for name in per_entry}
    if rows.samples is not None:
        s, drawn = rows.samples, np.repeat(kept, rows.samples.k)
        parts["samples"] = replace(s, k=s.k[kept], ids=s.ids[drawn], counts=s.counts[drawn], margins=s.margins[drawn])
    lengths = np.diff(rows.doc_indptr)[list(documents)]
    return replace(rows, doc_indptr=indptr(lengths), doc_meta=[rows.doc_meta[i] for i in documents], **parts)


def _histogram(lengths: Sequence[int]) -> list[dict[str, int]]:
    """Documents and tokens by length, in bins that end at powers of two."""
    bins = np.ceil(np.log2(lengths)).astype(int)
    return [
        {
            "up_to": 1 << int(b),
            "documents": int((bins == b).sum()),
            "tokens": int(np.asarray(lengths)[bins == b].sum()),
        }
        for b in range(bins.min(), bins.max() + 1)
    ]


def _peak_resident_bytes() -> int:
    """The most memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
